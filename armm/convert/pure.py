"""PURE's files (arXiv 2503.11073, nonwhy/PURE, commit 4fb55531): Lumina-mGPT's transformer with a longer vocabulary, and LlamaGen's
tokenizer of eight pixels a code."""

from __future__ import annotations

from typing import Any

import torch

from . import llamagen
from .chameleon import convert, load_components
from .facts import dtype_of

__all__ = ["convert", "load_single_file"]


def load_single_file(
    path: Any,
    *,
    tokenizer: Any,
    tokenizer_config: Any = None,
    dtype: torch.dtype | dict[str, torch.dtype] | None = None,
    generation_config: dict[str, Any] | None = None,
    revision: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The components of a `PUREPipeline` from the authors' files.

    Args:
        path: folder or hub id of the model.
        tokenizer: LlamaGen's `vq_ds8_c2i.pt`, or a `VQTokenizer`.
        tokenizer_config: options for the tokenizer's file.
        dtype: of the weights; a dict names `"transformer"`, `"tokenizer"` and `"default"`.
        generation_config: settings that replace the family's preset.
        revision: of the model's repository on the hub.
        options: of `armm.convert.chameleon.load_components`.
    """
    hub = {
        name: options[name] for name in ("cache_dir", "local_files_only", "force_download", "token") if name in options
    }
    codes = llamagen.load_tokenizer(tokenizer, config=tokenizer_config, dtype=dtype_of(dtype, "tokenizer"), **hub)
    if revision is not None:
        options["revision"] = revision
    # One unit is 32 pixels for all models of the family.
    cells = 32 // codes.downsample if codes.downsample <= 32 else 1
    components = load_components(path, tokenizer=codes, dtype=dtype, layout={"cells": cells}, **options)
    return {**components, "generation_config": dict(generation_config or {})}
