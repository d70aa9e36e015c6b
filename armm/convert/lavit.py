"""LaVIT (jy0205/LaVIT, commit 8cde9b4f; arXiv 2309.04669) -> our modules: the tokenizer and its decoders (see
`armm.convert.lavit_tokenizer`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tokenizers_visual.lavit import LaVITTokenizer
from tokenizers_visual.lavit_decoder import LaVITDecoder

from . import lavit_tokenizer
from .containers import CheckpointKeysError, load_state_dict
from .folders import resolve_folder_or_file

TOKENIZER_FILE, VISION_FILE = "tokenizer_encoder.bin", "eva_vitg_psz14.bin"


def convert(
    path: Any,
    *,
    config: Any = None,
    vision: Any = None,
    reading: Any = None,
    dtype: torch.dtype | None = None,
    use_ema: bool = False,
) -> LaVITTokenizer | LaVITDecoder:
    """The tokenizer or the decoder in `path`.

    Args:
        path: `tokenizer_encoder.bin` or a folder that holds it, or `tokenizer_decoder.bin` or `highres_tokenizer_decoder.bin`.
        config: a dict, or a JSON file, with heads where widths are not the published ones: `vision_heads` and `num_heads` of a
            tokenizer, `num_heads` and `pool_heads` of a decoder.
        vision: `eva_vitg_psz14.bin` for the tokenizer; None looks beside it.
        reading: `visual_weight.bin`, with which the released language models read images; None reads with what the tokenizer's file
            holds.
        dtype: of the weights; None keeps the files'.
        use_ema: take the moving average stored beside the weights.
    """
    path = Path(path)
    if path.is_dir():
        path = path / TOKENIZER_FILE
    state = load_state_dict(path, use_ema=use_ema)
    if lavit_tokenizer.is_decoder(state):
        return lavit_tokenizer.convert_decoder(state, config=config, dtype=dtype)
    if "token_predictor.in_conv.0.weight" not in state:
        raise CheckpointKeysError(
            "this is no file of LaVIT's tokenizer: it holds neither token_predictor.* (the tokenizer) nor query_embed (a decoder).",
            missing=["token_predictor.*", "query_embed"],
        )
    return _tokenizer(path, state, config, vision, reading, dtype)


def _tokenizer(
    path: Path,
    state: Mapping[str, torch.Tensor],
    config: Any,
    vision: Any,
    reading: Any,
    dtype: torch.dtype | None,
) -> LaVITTokenizer:
    if vision is None and (path.parent / VISION_FILE).is_file():
        vision = path.parent / VISION_FILE
    loaded = [None if source is None else load_state_dict(resolve_folder_or_file(source)) for source in (vision, reading)]
    return lavit_tokenizer.convert_tokenizer(state, vision=loaded[0], reading=loaded[1], config=config, dtype=dtype)
