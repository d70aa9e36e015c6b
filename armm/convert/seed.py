"""SEED and SEED-LLaMA (AILab-CVC/SEED, commit 93b3cf40; arXiv 2307.08041, 2310.01218) -> our modules.

The tokenizer is `seed_quantizer.pt`, see `armm.convert.seed_tokenizer`; the language models are ordinary folders of transformers whose
vocabulary has a word for each code.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights

from armm.model import AutoregressiveModel
from tokenizers_visual.seed import SEEDTokenizer

from . import llama, seed_tokenizer
from .containers import CheckpointKeysError, load_state_dict
from .facts import read_options
from .folders import load_folder, read_json, resolve_folder_or_file
from .keymap import apply_rules, load_strict

TOKENIZER_FILE = "seed_quantizer.pt"
VISION_FILE = "eva_vit_g.pth"


def convert(
    path: Any, *, config: Any = None, vision: Any = None, dtype: torch.dtype | None = None, use_ema: bool = False
) -> SEEDTokenizer | AutoregressiveModel:
    """The tokenizer or the language model in `path`.

    Args:
        path: `seed_quantizer.pt` or a folder that holds it; or the folder, or a file, of a language model in transformers' names.
        config: a dict, or a JSON file, with what the files do not say. Of the tokenizer: heads where widths are not the published
            ones (`vision_heads`, `num_heads`, `decoder_heads`, `reverse_heads`), `causal`, `vision_layers`. Of the language model: see
            `armm.convert.llama.model_arguments`.
        vision: BLIP-2's `eva_vit_g.pth` for a tokenizer file without vision transformer; None looks beside it.
        dtype: of the weights; None keeps the files'.
        use_ema: take the moving average stored beside the weights.
    """
    path = Path(path)
    if path.is_dir() and (path / TOKENIZER_FILE).is_file():
        path = path / TOKENIZER_FILE
    state = load_folder(path) if path.is_dir() else load_state_dict(path, use_ema=use_ema)
    if "quantize.embedding.weight" in state:
        return _tokenizer(path, state, config, vision, dtype)
    if "model.embed_tokens.weight" not in state:
        names = ["quantize.embedding.weight", "model.embed_tokens.weight"]
        raise CheckpointKeysError(
            f"this is no file of SEED: it holds neither {names[0]} (the tokenizer) nor {names[1]} (a language model).",
            missing=names,
        )
    beside = (path if path.is_dir() else path.parent) / "config.json"
    return language_model(state, published_options(beside) | llama_options(config), dtype)


def _tokenizer(
    path: Path, state: Mapping[str, torch.Tensor], config: Any, vision: Any, dtype: torch.dtype | None
) -> SEEDTokenizer:
    if vision is None and (path.parent / VISION_FILE).is_file():
        vision = path.parent / VISION_FILE
    weights = None if vision is None else load_state_dict(resolve_folder_or_file(vision))
    return seed_tokenizer.convert_state_dict(state, config=config, vision=weights, dtype=dtype)


def published_options(file: Path) -> dict[str, Any]:
    """What transformers' `config.json` says of a language model, where there is one."""
    values = read_json(file) if file.is_file() else {}
    if values.get("rope_scaling"):
        raise ValueError(f"{file} asks for scaled rotary positions ({values['rope_scaling']!r}), which are not supported.")
    return {name: value for name, value in values.items() if name in llama.OPTION_NAMES}


def llama_options(config: Any) -> dict[str, Any]:
    """Options under transformers' names or ours as a dict."""
    return read_options(config, llama.OPTION_NAMES, llama.OPTIONS)


def language_model(
    state: Mapping[str, torch.Tensor], options: Mapping[str, Any], dtype: torch.dtype | None
) -> AutoregressiveModel:
    """A model over one vocabulary of words and codes."""
    arguments = llama.model_arguments(state, options)
    vocab_size = arguments.pop("text_vocab_size")
    with init_empty_weights():
        model = AutoregressiveModel(vocab_size=vocab_size, **arguments)
    return load_strict(model, apply_rules(state, llama.RULES), llama.RULES, dtype=dtype)
