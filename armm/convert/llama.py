"""Language models in the layout of LLaMA (arXiv 2302.13971), which most models that read images are built around: LLaVA's
(arXiv 2310.03744) as a whole, Janus's inside a larger file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import init_empty_weights

from armm.multimodal_model import MultimodalModel

from .containers import CheckpointShapeError, load_state_dict
from .facts import compare, count, read_options, shape
from .keymap import Rule, apply_rules, load_strict

# transformers' names of the options -> ours.
OPTION_NAMES = {
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "num_hidden_layers": "num_layers",
    "hidden_size": "dim",
    "intermediate_size": "mlp_hidden",
    "rms_norm_eps": "norm_eps",
    "rope_theta": "rotary_theta",
    "max_position_embeddings": "max_positions",
}
OPTIONS = {
    "num_heads", "num_kv_heads", "num_layers", "dim", "mlp_hidden", "norm_eps", "rotary_theta", "max_positions", "vocab_size",
}  # fmt: skip
# What a file of transformers leaves out is LLaMA-7B's.
DEFAULT_HEAD_DIM = 128


def rules(prefix: str = "") -> tuple[Rule, ...]:
    """Key rules of a language model whose names start with `prefix`."""
    source, target = prefix + "model.layers.{i}.", "trunk.blocks.{i}."
    attention = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "o_proj": "to_out"}
    mlp = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
    return (
        Rule(prefix + "model.embed_tokens.weight", "token_embedding.weight"),
        *(Rule(f"{source}self_attn.{a}.weight", f"{target}attention.{b}.weight") for a, b in attention.items()),
        Rule(source + "self_attn.rotary_emb.inv_freq", None),  # the rotary table, recomputed
        *(Rule(f"{source}mlp.{a}.weight", f"{target}mlp.{b}.weight") for a, b in mlp.items()),
        Rule(source + "input_layernorm.weight", target + "attention_norm.weight"),
        Rule(source + "post_attention_layernorm.weight", target + "mlp_norm.weight"),
        Rule(prefix + "model.norm.weight", "trunk.norm.weight"),
        Rule(prefix + "lm_head.weight", "head.projection.weight"),
    )


RULES = (
    *rules(),
    Rule(
        "model.visual_gates_router.{i}.{part}.weight", None
    ),  # read by `armm.pruning.VisualTokenExit.from_single_file`
)


def model_arguments(state: Mapping[str, torch.Tensor], config: Any, prefix: str = "") -> dict[str, Any]:
    """Init arguments of `MultimodalModel` (`text_vocab_size`, `transformer`, `max_positions`) for the tensors of a language model.

    Args:
        config: a dict, or a JSON file, with options by transformers' names or ours. The heads come from it; where it is silent
            they are 128 wide.
    """
    options = read_options(config, OPTION_NAMES, OPTIONS)
    vocab_size, dim = shape(state, prefix + "model.embed_tokens.weight", 2)
    layer = prefix + "model.layers.0."
    num_heads = options.get("num_heads", max(dim // DEFAULT_HEAD_DIM, 1))
    if not isinstance(num_heads, int) or num_heads < 1 or dim % num_heads or (dim // num_heads) % 2:
        raise ValueError(f"`num_heads` must divide the width {dim} into heads of an even size, got {num_heads!r}.")
    head_dim = dim // num_heads
    key_rows = shape(state, layer + "self_attn.k_proj.weight", 2)[0]
    if key_rows % head_dim or num_heads % max(key_rows // head_dim, 1):
        raise CheckpointShapeError(
            f"{layer}self_attn.k_proj.weight has {key_rows} rows, which heads of {head_dim} cannot produce: is `num_heads` right?"
        )
    found = {
        "dim": dim,
        "num_layers": count(state, re.escape(prefix) + r"model\.layers\.(\d+)\."),
        "num_kv_heads": key_rows // head_dim,
        "mlp_hidden": shape(state, layer + "mlp.gate_proj.weight", 2)[0],
        "vocab_size": vocab_size,
    }
    compare(options, found)
    return {
        "text_vocab_size": vocab_size,
        "max_positions": options.get("max_positions", 2048),
        "transformer": {
            **{name: value for name, value in found.items() if name != "vocab_size"},
            "num_heads": num_heads,
            "mlp": "swiglu",
            "norm": "rms",
            "norm_eps": options.get("norm_eps", 1e-6),
            "rotary_axes": [head_dim],
            "rotary_theta": float(options.get("rotary_theta", 10000.0)),
            "rotary_layout": "half_split",
        },
    }


def convert(
    path: Any, *, config: Any = None, dtype: torch.dtype | None = None, use_ema: bool = False
) -> MultimodalModel:
    """The language model in the file `path`.

    Args:
        path: a file with transformers' names (`model.layers.{i}...`, `lm_head.weight`).
        config: see `model_arguments`.
        dtype: of the weights; None keeps the file's.
        use_ema: take the moving average stored beside the weights.
    """
    state = load_state_dict(path, use_ema=use_ema)
    with init_empty_weights():
        model = MultimodalModel(**model_arguments(state, config))
    return load_strict(model, apply_rules(state, RULES), RULES, dtype=dtype)
