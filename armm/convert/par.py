"""PAR's files (arXiv 2412.15119, Epiphqny/PAR, commit d96acea) -> our modules: LlamaGen's transformer and transition tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate import init_empty_weights

from armm.decoding.parallel_groups import ParallelGroupsDecoding
from armm.hub import resolve_file
from armm.model import AutoregressiveModel

from . import llamagen
from .containers import CheckpointKeysError, CheckpointShapeError, load_state_dict
from .facts import compare, dtype_of, read_options, shape
from .keymap import Rule, apply_rules, load_strict

_TRANSITION = "spe_tok_embeddings.special_embeddings.weight"
_OPTION_NAMES = {**llamagen.OPTION_NAMES, "spe_token_num": "transition_tokens", "ar_token_num": "group_size"}
_OPTIONS = {*llamagen.TRANSFORMER_OPTIONS, "transition_tokens", "group_size"}
TRANSFORMER_RULES: tuple[Rule, ...] = (Rule(_TRANSITION, "transition_tokens.weight"), *llamagen.TRANSFORMER_RULES)


def convert(
    path: Any, *, config: Any = None, dtype: torch.dtype | None = None, use_ema: bool = False
) -> AutoregressiveModel:
    """The transformer in the file `path`.

    Args:
        path: a file of the authors, or one their trainer wrote.
        config: a dict, or a JSON file, with options by our names or the authors'; see `armm.convert.llamagen.convert`. The
            published models draw images of 384 pixels, `{"grid": [24, 24]}`, which is what is taken if nothing says otherwise.
        dtype: of the weights; None keeps the file's.
        use_ema: take the moving average stored beside the weights.
    """
    options = read_options(config, _OPTION_NAMES, _OPTIONS)
    state = load_state_dict(path, use_ema=use_ema)
    if _TRANSITION not in state:
        raise CheckpointKeysError(f"this is no PAR checkpoint: it lacks {_TRANSITION}.", missing=[_TRANSITION])
    tokens = shape(state, _TRANSITION, 2)[0]
    regions = math.isqrt(tokens + 1)
    if regions * regions != tokens + 1 or regions < 2:
        raise CheckpointShapeError(f"{_TRANSITION} has {tokens} rows; one less than a square number was expected.")
    compare(options, {"transition_tokens": tokens, "group_size": tokens + 1})
    shared = {name: value for name, value in options.items() if name in llamagen.TRANSFORMER_OPTIONS}
    arguments = llamagen.transformer_arguments(state, shared)
    with init_empty_weights():
        model = AutoregressiveModel(**arguments, grid=llamagen.given_grid(shared) or (24, 24), transition_tokens=tokens)
    context = {"qkv_rows": llamagen.qkv_rows(arguments["transformer"])}
    return load_strict(model, apply_rules(state, TRANSFORMER_RULES, context), TRANSFORMER_RULES, dtype=dtype)


def load_single_file(
    path: Any,
    *,
    tokenizer: Any,
    config: Any = None,
    tokenizer_config: Any = None,
    dtype: torch.dtype | dict[str, torch.dtype] | None = None,
    generation_config: dict[str, Any] | None = None,
    use_ema: bool = False,
    **hub_options: Any,
) -> dict[str, Any]:
    """The components of a `PARPipeline` from the authors' files; arguments as in `armm.convert.llamagen.load_single_file`."""
    transformer = convert(
        resolve_file(path, **hub_options), config=config, dtype=dtype_of(dtype, "transformer"), use_ema=use_ema
    )
    preset = {"guidance_scale": 1.5, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    return {
        "tokenizer": llamagen.load_tokenizer(
            tokenizer, config=tokenizer_config, dtype=dtype_of(dtype, "tokenizer"), **hub_options
        ),
        "transformer": transformer,
        "decoding": ParallelGroupsDecoding(math.isqrt(transformer.transition_tokens.num_embeddings + 1)),
        "generation_config": {**preset, **(generation_config or {})},
    }
