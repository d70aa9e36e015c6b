"""LaVIT (jy0205/LaVIT, commit 8cde9b4f; arXiv 2309.04669) -> our modules: the tokenizer and its decoders (see
`armm.convert.lavit_tokenizer`), and the language model, an ordinary folder of transformers whose vocabulary has a word for each code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights

from armm.multimodal_model import MultimodalModel
from pipelines.bpe import BPETokenizer
from tokenizers_visual.lavit import LaVITTokenizer
from tokenizers_visual.lavit_decoder import LaVITDecoder

from . import lavit_tokenizer, llama
from .containers import CheckpointKeysError, UnreadableCheckpointError, load_state_dict
from .facts import dtype_of, read_options
from .folders import load_folder, resolve_folder_or_file
from .keymap import apply_rules, load_strict
from .words import llama_options, load_words, published_options

TOKENIZER_FILE, VISION_FILE, READING_FILE = "tokenizer_encoder.bin", "eva_vitg_psz14.bin", "visual_weight.bin"


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
    loaded = [
        None if source is None else load_state_dict(resolve_folder_or_file(source)) for source in (vision, reading)
    ]
    return lavit_tokenizer.convert_tokenizer(state, vision=loaded[0], reading=loaded[1], config=config, dtype=dtype)


# ---------------------------------------------------------------------- pipelines


def load_single_file(
    path: Any,
    *,
    tokenizer: Any = None,
    text_tokenizer: Any = None,
    config: Any = None,
    dtype: torch.dtype | dict[str, torch.dtype] | None = None,
    generation_config: dict[str, Any] | None = None,
    **hub_options: Any,
) -> dict[str, Any]:
    """The components of a `LaVITPipeline`.

    Args:
        path: the authors' folder or its hub id, with `language_model/` and `visual_tokenizer/` in it.
        tokenizer: a `LaVITTokenizer`, in place of that in the folder.
        text_tokenizer: a `BPETokenizer`, or a file or folder of transformers; None looks into `language_model/`.
        config: a dict, or a JSON file, with what the files do not say: `language`, `tokenizer` and `decoder` with options of these
            parts (see `convert`), `begin_image`, and `resolution`, "high" or "low", for one of the two decoders; by default "high" where
            the folder has it.
        dtype: of the weights; a dict names components and "default".
        generation_config: settings that replace the authors' preset.
        hub_options: `revision`, `cache_dir`, `local_files_only`, `token` for files on the hub.
    """
    options = read_options(config, {}, {"language", "tokenizer", "decoder", "begin_image", "resolution"})
    root = resolve_folder_or_file(path, **hub_options)
    language, visual = root / "language_model", root / "visual_tokenizer"
    if not language.is_dir() or not visual.is_dir():
        raise UnreadableCheckpointError(f"{root} lacks language_model/ or visual_tokenizer/: it is no folder of LaVIT.")
    if not isinstance(tokenizer, LaVITTokenizer):
        reading = language / READING_FILE
        tokenizer = convert(
            visual,
            config=options.get("tokenizer"),
            reading=reading if reading.is_file() else None,
            dtype=dtype_of(dtype, "tokenizer"),
        )
    files = {"high": visual / "highres_tokenizer_decoder.bin", "low": visual / "tokenizer_decoder.bin"}
    resolution = options.get("resolution")
    if resolution is not None and resolution not in files:
        raise ValueError(f"`resolution` must be 'high' or 'low', got {resolution!r}.")
    wanted = files.values() if resolution is None else (files[resolution],)
    found = next((file for file in wanted if file.is_file()), None)
    if resolution is not None and found is None:
        raise UnreadableCheckpointError(f"there is no {files[resolution]}: take the other `resolution`.")
    if text_tokenizer is None or isinstance(text_tokenizer, BPETokenizer):
        words = text_tokenizer or load_words([language])
    else:
        words = load_words([resolve_folder_or_file(text_tokenizer, **hub_options)])
    settings = published_options(language / "config.json") | llama_options(options.get("language"))
    return {
        "tokenizer": tokenizer,
        "transformer": _language_model(load_folder(language), settings, dtype_of(dtype, "transformer")),
        "decoder": None
        if found is None
        else convert(found, config=options.get("decoder"), dtype=dtype_of(dtype, "decoder")),
        "text_tokenizer": words,
        "begin_image": options.get("begin_image"),
        "generation_config": dict(generation_config or {}),
    }


def _language_model(
    state: Mapping[str, torch.Tensor], options: Mapping[str, Any], dtype: torch.dtype | None
) -> MultimodalModel:
    arguments = llama.model_arguments(state, options)
    features = {"dim": arguments["transformer"]["dim"], "depth": 0}
    with init_empty_weights():
        model = MultimodalModel(**arguments, features=features)
    return load_strict(model, apply_rules(state, llama.RULES), llama.RULES, dtype=dtype)
