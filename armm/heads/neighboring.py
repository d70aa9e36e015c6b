"""One head for every axis of the grid, each predicting the neighbour one step along it (NAR, arXiv 2503.10696, section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from armm.heads.categorical import CategoricalHead


class NeighboringHead(nn.Module):
    """Heads of the axes in the order of the trunk's depth: along the width first, then the height, then the time.

    The head of the width reads the first tap of the trunk, the last head its final hidden state. A cell that is reached
    from several neighbours takes the mean of their logits.
    """

    def __init__(self, dim: int, vocab_size: int, axes: int = 2, bias: bool = False) -> None:
        super().__init__()
        if axes not in (2, 3):
            raise ValueError(f"axes must be 2 (images) or 3 (videos), got {axes}")
        self.vocab_size, self.num_axes = vocab_size, axes
        self.num_states = axes
        self.axes = nn.ModuleList(CategoricalHead(dim, vocab_size, bias) for _ in range(axes))

    def forward(self, states: Sequence[Tensor], low: int = 0, high: int | None = None) -> list[Tensor]:
        """Hidden states [..., D], one for every axis -> float32 logits [..., V] of every axis."""
        if len(states) != self.num_axes:
            raise ValueError(f"states must be {self.num_axes} hidden states, one for every axis, got {len(states)}")
        return [head(state, low, high) for head, state in zip(self.axes, states, strict=True)]

    def first(self, logits: Sequence[Tensor]) -> Tensor:
        """Logits of the first cell, from those of every axis at the last condition position."""
        return sum(logits[1:], logits[0]) / len(logits)

    def merge(self, logits: Sequence[Tensor], links: Sequence[tuple[Tensor, Tensor]], count: Tensor) -> Tensor:
        """Mean over the neighbours: logits [R, n, V] of every axis at n known cells -> [R, m, V] of m cells; see `neighbor_links`."""
        total = None
        for values, (source, weight) in zip(logits, links, strict=True):
            part = values.index_select(1, source) * weight[:, None]
            total = part if total is None else total + part
        return total / count[:, None]

    def fuse(self) -> bool:
        return all([head.fuse() for head in self.axes])

    def unfuse(self) -> None:
        for head in self.axes:
            head.unfuse()


def neighbor_links(
    known: Tensor, wanted: Tensor, grid: Sequence[int], device: torch.device | str | None = None
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Where the logits of `wanted` cells [m] come from among `known` cells [n] (raster indices).

    Cells are on the CPU.

    Returns:
        On `device`: for every axis, width first: index of the neighbour one step back in `known` [m] and 1.0 where there is one (else 0.0)
        [m]; and the number of neighbours of every wanted cell [m].
    """
    place = torch.full((math.prod(grid),), -1)
    place[known] = torch.arange(len(known))
    links, stride = [], 1
    for size in reversed(tuple(grid)):
        inside = (wanted // stride) % size > 0
        source = torch.where(inside, place[(wanted - stride).clamp(min=0)], -1)
        links.append((source.clamp(min=0), (source >= 0).float()))
        stride *= size
    count = sum((weight for _, weight in links), torch.zeros(len(wanted)))
    if len(wanted) and float(count.min()) == 0:
        raise ValueError("a wanted cell has no known neighbour: cells must be decoded near to far")

    def moved(tensor: Tensor) -> Tensor:  # without waiting for the device: this is asked at every step
        return tensor if device is None else tensor.to(device, non_blocking=True)

    return [(moved(source), moved(weight)) for source, weight in links], moved(count)
