"""What writing a text costs, in floating point operations: a multiply and an add are two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass
class Cost:
    """Operations of the trunk for prompts and the texts after them, and how many of them image tokens are the reason for: those for
    their own states, and those for looking from or at them. `full_...`: had all image tokens stayed.

    Costs add up: `cost + other`.
    """

    flops: float = 0.0
    full_flops: float = 0.0
    visual_flops: float = 0.0
    full_visual_flops: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.full_flops + other.full_flops,
            self.visual_flops + other.visual_flops,
            self.full_visual_flops + other.full_visual_flops,
        )

    @property
    def saved(self) -> float:
        """Share of all operations that pruning saved."""
        return 1 - self.flops / self.full_flops if self.full_flops else 0.0

    @property
    def visual_saved(self) -> float:
        """Share of the operations for image tokens that pruning saved."""
        return 1 - self.visual_flops / self.full_visual_flops if self.full_visual_flops else 0.0


def text_cost(
    model: Any, tokens: Sequence[int], visual: Sequence[int], new_tokens: int, bidirectional: int = 0
) -> Cost:
    """The cost of a prompt and `new_tokens` fed after it.

    Args:
        model: whose trunk is run.
        tokens, visual: the prompt's tokens, and the image tokens among them, in each layer.
        bidirectional: how many tokens of the whole prompt see each other whole.
    """
    attention = model.trunk.blocks[0].attention
    wide = 4 * attention.heads * attention.head_dim
    linear = 2 * sum(layer.weight.numel() for layer in model.trunk.blocks[0].modules() if isinstance(layer, nn.Linear))

    def pairs(length: int, whole: int) -> int:
        whole = max(min(whole, length), 0)
        return whole * whole + (length * (length + 1) - whole * (whole + 1)) // 2

    def layer_cost(length: int, seen: int, removed: int) -> tuple[float, float]:
        whole = bidirectional - removed
        prompt = linear * length + wide * pairs(length, whole)
        without = linear * (length - seen) + wide * pairs(length - seen, whole - seen)
        written = sum(linear + wide * (length + step + 1) for step in range(new_tokens))
        return prompt + written, prompt - without + wide * seen * new_tokens

    own = [layer_cost(length, seen, tokens[0] - length) for length, seen in zip(tokens, visual, strict=True)]
    full, full_visual = layer_cost(tokens[0], visual[0], 0)
    layers = len(tokens)
    return Cost(sum(cost for cost, _ in own), full * layers, sum(seen for _, seen in own), full_visual * layers)
