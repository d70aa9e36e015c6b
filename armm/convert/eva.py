"""The vision transformer of EVA-CLIP (arXiv 2303.15389) as BLIP-2 and its successors store it: `attn.q_bias` and `attn.v_bias` beside
a fused `attn.qkv.weight`, no bias of keys."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from .containers import CheckpointKeysError, CheckpointShapeError
from .facts import count, shape
from .keymap import Rule

PARTS = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
# Width of a head of the published models: 1408 in 16 heads.
HEAD_DIM = 88


def rules(prefix: str, target: str = "vision.vit.") -> tuple[Rule, ...]:
    """Key rules of a vision transformer whose names start with `prefix`, for `joined_biases`."""
    return (
        Rule(prefix + "cls_token", target + "cls_token"),
        Rule(prefix + "pos_embed", target + "pos_embed"),
        Rule(prefix + "patch_embed.proj.{leaf}", target + "patch_embed.proj.{leaf}"),
        *(Rule(f"{prefix}blocks.{{i}}.{part}.{{leaf}}", f"{target}blocks.{{i}}.{part}.{{leaf}}") for part in PARTS),
        # behind the features that are used
        Rule(prefix + "norm.{leaf}", None),
        Rule(prefix + "head.{leaf}", None),
    )


def joined_biases(state: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """`state` with `attn.qkv.bias` in the place of `attn.q_bias` and `attn.v_bias` in the vision transformer at `prefix`."""
    joined = dict(state)
    pattern = re.compile(re.escape(prefix) + r"(blocks\.\d+\.attn\.)[qv]_bias")
    for stem in sorted({prefix + match[1] for name in state if (match := pattern.fullmatch(name))}):
        missing = [f"{stem}{part}_bias" for part in "qv" if f"{stem}{part}_bias" not in state]
        if missing:
            raise CheckpointKeysError(f"the checkpoint lacks {missing[0]}.", missing=missing)
        query, value = joined.pop(f"{stem}q_bias"), joined.pop(f"{stem}v_bias")
        joined[f"{stem}qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])
    return joined


def without_blocks(state: Mapping[str, torch.Tensor], prefix: str, layers: int) -> dict[str, torch.Tensor]:
    """`state` without the blocks from `layers` on, which are behind the features that are used."""
    pattern = re.compile(re.escape(prefix) + r"blocks\.(\d+)\.")
    return {name: value for name, value in state.items() if not ((m := pattern.match(name)) and int(m[1]) >= layers)}


def num_heads(dim: int, given: Any, name: str, width: int = HEAD_DIM) -> int:
    """The number of heads: as `given`, or heads of the published `width`. Raises where neither fits `dim`."""
    if given is None and dim % width:
        raise ValueError(f"a width of {dim} is none of the published ones: pass config={{{name!r}: ...}}.")
    heads = dim // width if given is None else given
    if not isinstance(heads, int) or isinstance(heads, bool) or heads < 1 or dim % heads:
        raise ValueError(f"`{name}` must divide the width {dim}, got {heads!r}.")
    return heads


def sizes(state: Mapping[str, torch.Tensor], prefix: str) -> dict[str, Any]:
    """`image_size`, `patch_size`, `dim`, `vision_layers` and `vision_mlp_hidden` of the vision transformer at `prefix`."""
    dim, _, patch, _ = shape(state, prefix + "patch_embed.proj.weight", 4)
    tokens = shape(state, prefix + "pos_embed", 3)[1] - 1
    side = round(max(tokens, 0) ** 0.5)
    if side * side != tokens or not tokens:
        raise CheckpointShapeError(
            f"{prefix}pos_embed has {tokens + 1} positions, which are no class token and a square image."
        )
    return {
        "image_size": side * patch,
        "patch_size": patch,
        "dim": dim,
        "vision_layers": count(state, re.escape(prefix) + r"blocks\.(\d+)\."),
        "vision_mlp_hidden": shape(state, prefix + "blocks.0.mlp.fc1.weight", 2)[0],
    }
