"""Key rules of convolutional coders in the layout of taming-transformers (arXiv 2012.09841), which many tokenizers share:
`encoder.down.{level}.block.{i}`, `decoder.up.{level}.block.{i}`, where `up.0` is the highest resolution."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .containers import CheckpointShapeError
from .facts import count, shape
from .keymap import Rule, squeeze_convolution


def split_attention(tensor: torch.Tensor, context: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
    """Weight or bias of a 1x1 convolution that makes queries, keys and values, as those of three linear layers."""
    if tensor.shape[0] % 3:
        raise CheckpointShapeError(f"expected queries, keys and values of one width, got {tensor.shape[0]} rows")
    return squeeze_convolution(tensor, context).chunk(3)


def residual_rules(source: str, target: str) -> tuple[Rule, ...]:
    """A residual block."""
    names = {"nin_shortcut": "shortcut", **{part: part for part in ("norm1", "conv1", "norm2", "conv2")}}
    return tuple(Rule(f"{source}.{a}.{{leaf}}", f"{target}.{b}.{{leaf}}") for a, b in names.items())


def attention_rules(source: str, target: str) -> tuple[Rule, ...]:
    """An attention block, its projections apart (`q`, `k`, `v`) or fused (`qkv`)."""
    names = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out"}
    fused = tuple(f"{target}.{part}.{{leaf}}" for part in ("to_q", "to_k", "to_v"))
    return (
        Rule(f"{source}.norm.{{leaf}}", f"{target}.norm.{{leaf}}"),
        Rule(f"{source}.qkv.{{leaf}}", fused, split_attention),
        *(Rule(f"{source}.{a}.{{leaf}}", f"{target}.{b}.{{leaf}}", squeeze_convolution) for a, b in names.items()),
    )


def coder_rules(coder: str, levels: int) -> tuple[Rule, ...]:
    """All of `coder` ("encoder" or "decoder") with so many `levels`."""
    down = coder == "encoder"
    rules = [Rule(f"{coder}.{part}.{{leaf}}", f"{coder}.{part}.{{leaf}}") for part in ("conv_in", "norm_out", "conv_out")]
    for level in range(levels):
        source = f"{coder}.{'down' if down else 'up'}.{level}"
        target = f"{coder}.levels.{level if down else levels - 1 - level}"
        resample = "downsample" if down else "upsample"
        rules += residual_rules(f"{source}.block.{{j}}", f"{target}.blocks.{{j}}")
        rules += attention_rules(f"{source}.attn.{{j}}", f"{target}.attentions.{{j}}")
        rules.append(Rule(f"{source}.{resample}.conv.{{leaf}}", f"{target}.{resample}.conv.{{leaf}}"))
    rules += residual_rules(f"{coder}.mid.block_1", f"{coder}.mid_block1")
    rules += attention_rules(f"{coder}.mid.attn_1", f"{coder}.mid_attention")
    rules += residual_rules(f"{coder}.mid.block_2", f"{coder}.mid_block2")
    return tuple(rules)


def coder_sizes(state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """`in_channels`, `base_channels`, `channel_multipliers` and `num_res_blocks` of the encoder."""
    base, channels = shape(state, "encoder.conv_in.weight", 4)[:2]
    levels = count(state, r"encoder\.down\.(\d+)\.")
    widths = [shape(state, f"encoder.down.{level}.block.0.conv1.weight", 4)[0] for level in range(levels)]
    if any(width % base for width in widths):
        raise CheckpointShapeError(f"the widths {widths} of the encoder are no multiples of its base width {base}.")
    return {
        "in_channels": channels,
        "base_channels": base,
        "channel_multipliers": [width // base for width in widths],
        "num_res_blocks": count(state, r"encoder\.down\.0\.block\.(\d+)\."),
    }
