"""Lumina-mGPT's files (arXiv 2408.02657, Alpha-VLLM/Lumina-mGPT, commit 104abe45): Chameleon's transformer in the layout of
transformers, without its tokenizer, which is Meta's `vqgan.ckpt`."""

from __future__ import annotations

from typing import Any

from .chameleon import convert, load_components

__all__ = ["convert", "load_single_file"]


def load_single_file(path: Any, *, generation_config: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """The components of a `LuminaMGPTPipeline` from the authors' files.

    Args:
        path: folder or hub id of the model.
        generation_config: settings that replace the family's preset.
        options: of `armm.convert.chameleon.load_components`; `tokenizer` is needed: Meta's `vqgan.ckpt`.
    """
    components = load_components(path, layout={"cells": 2}, **options)
    return {**components, "generation_config": dict(generation_config or {})}
