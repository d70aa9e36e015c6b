"""A linear head for continuous tokens: hidden state -> a value."""

from __future__ import annotations

from torch import Tensor, nn


class ContinuousHead(nn.Module):
    """`projection`: hidden [..., D] -> float32 value [..., C]."""

    num_states = 1  # hidden states of the trunk that the head reads

    def __init__(self, dim: int, channels: int, bias: bool = True) -> None:
        super().__init__()
        self.projection = nn.Linear(dim, channels, bias=bias)
        nn.init.normal_(self.projection.weight, std=0.02)
        if bias:
            nn.init.zeros_(self.projection.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.projection(hidden).float()

    def fuse(self) -> bool:
        """Nothing to merge."""
        return False

    def unfuse(self) -> None:
        pass
