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

from armm.decoding.interleaved import InterleavedDecoding
from armm.decoding.vocabulary import ImageBlock
from armm.model import AutoregressiveModel
from pipelines.bpe import BPETokenizer
from tokenizers_visual.seed import SEEDTokenizer

from . import llama, seed_tokenizer
from .containers import CheckpointKeysError, load_state_dict
from .facts import dtype_of, read_options
from .folders import load_folder, resolve_folder_or_file
from .keymap import apply_rules, load_strict
from .words import llama_options, load_words, published_options

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
    state = load_folder(path, use_ema=use_ema)
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


def language_model(
    state: Mapping[str, torch.Tensor], options: Mapping[str, Any], dtype: torch.dtype | None
) -> AutoregressiveModel:
    """A model over one vocabulary of words and codes."""
    arguments = llama.model_arguments(state, options)
    vocab_size = arguments.pop("text_vocab_size")
    with init_empty_weights():
        model = AutoregressiveModel(vocab_size=vocab_size, **arguments)
    return load_strict(model, apply_rules(state, llama.RULES), llama.RULES, dtype=dtype)


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
    """The components of a `SEEDLLaMAPipeline`.

    Args:
        path: folder, file or hub id of the language model.
        tokenizer: `seed_quantizer.pt`, the folder or hub id that holds it, or a `SEEDTokenizer`.
        text_tokenizer: a `BPETokenizer`, or a file or folder of transformers; None looks beside the tokenizer and into `path`.
        config: a dict, or a JSON file, with what the files do not say: `language` and `tokenizer` with options of these parts (see
            `convert`), `vision` (the file of the vision transformer), `template` ("vicuna" for 8B, the default, or "llama2" for 14B).
        dtype: of the weights; a dict names components and "default".
        generation_config: settings that replace the authors' preset.
        hub_options: `revision`, `cache_dir`, `local_files_only`, `token` for files on the hub.
    """
    options = read_options(config, {}, {"language", "tokenizer", "vision", "template"})
    if tokenizer is None:
        raise ValueError(
            "SEED's tokenizer is a file of its own: pass `tokenizer=` (seed_quantizer.pt, or AILab-CVC/seed-tokenizer-2)."
        )
    local = resolve_folder_or_file(path, **hub_options)
    transformer = convert(local, config=options.get("language"), dtype=dtype_of(dtype, "transformer"))
    if not isinstance(transformer, AutoregressiveModel):
        raise ValueError(f"{path} holds a tokenizer, not a language model: pass it as `tokenizer=`.")
    places = [local if local.is_dir() else local.parent]
    if not isinstance(tokenizer, SEEDTokenizer):
        beside = resolve_folder_or_file(tokenizer, **hub_options)
        places.insert(0, beside if beside.is_dir() else beside.parent)
        tokenizer = convert(
            beside, config=options.get("tokenizer"), vision=options.get("vision"), dtype=dtype_of(dtype, "tokenizer")
        )
    if text_tokenizer is not None and not isinstance(text_tokenizer, BPETokenizer):
        places = [resolve_folder_or_file(text_tokenizer, **hub_options)]
    words = text_tokenizer if isinstance(text_tokenizer, BPETokenizer) else load_words(places)
    return {
        "tokenizer": tokenizer,
        "transformer": transformer,
        "decoding": InterleavedDecoding(),
        "text_tokenizer": words,
        "image_block": image_block(words, tokenizer, transformer.vocab_size).to_dict(),
        "template": options.get("template", "vicuna"),
        "generation_config": dict(generation_config or {}),
    }


def image_block(words: BPETokenizer | None, tokenizer: SEEDTokenizer, vocab_size: int) -> ImageBlock:
    """How images are written: by the names in the text tokenizer, or without one at the released ids."""
    size = tokenizer.codebook_size
    names = ("<img_00000>", "<img>", "</img>")
    found = [None if words is None else words.id_of(name) for name in names]
    first, begin, end = found
    if first is None or begin is None or end is None:
        if words is not None:
            raise ValueError(f"the text tokenizer lacks the tokens {', '.join(names)}: is it that of SEED-LLaMA?")
        first, begin, end = vocab_size - size - 2, vocab_size - 2, vocab_size - 1
    return ImageBlock(begin=begin, end=end, codes=((first, size),), grid=(1, tokenizer.config.num_tokens))
