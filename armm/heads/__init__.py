"""Heads: from a hidden state to a distribution or a value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from armm.heads.adaptive import AdaptiveHead
from armm.heads.categorical import CategoricalHead
from armm.heads.continuous import ContinuousHead
from armm.heads.flow import FlowHead
from armm.heads.mlp import MLPHead
from armm.heads.neighboring import NeighboringHead
from armm.heads.tied import TiedHead

__all__ = [
    "HEADS",
    "AdaptiveHead",
    "CategoricalHead",
    "ContinuousHead",
    "FlowHead",
    "MLPHead",
    "NeighboringHead",
    "TiedHead",
    "build_head",
]

# name in a model's config -> class; an `AdaptiveHead` also takes a condition, so its model makes it itself
HEADS: dict[str, Callable[..., nn.Module]] = {
    "categorical": CategoricalHead,
    "mlp": MLPHead,
    "neighboring": NeighboringHead,
    "tied": TiedHead,
}


def build_head(config: Mapping[str, Any] | None, dim: int, vocab_size: int, bias: bool = False) -> nn.Module:
    """The head that a config names, `{"type": ..., **arguments}`; None is a plain categorical head.

    Raises:
        ValueError: unknown type or arguments.
    """
    options = dict(config or {"type": "categorical"})
    kind = options.pop("type", None)
    if kind not in HEADS:
        raise ValueError(f"head type must be one of {sorted(HEADS)}, got {kind!r}")
    try:
        return HEADS[kind](dim, vocab_size, bias=bias, **options)
    except TypeError as error:
        raise ValueError(f"head of type {kind!r}: {error}") from error
