"""Adaptive modulation of a block: shift, scale and gate of its two branches, computed from a condition vector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAMES = ("shift1", "scale1", "gate1", "shift2", "scale2", "gate2")


WITHOUT_SHIFT = ("scale1", "gate1", "scale2", "gate2")


def modulate(x: Tensor, shift: Tensor | None, scale: Tensor) -> Tensor:
    x = x * (1 + scale)
    return x if shift is None else x + shift


class Modulation(nn.Module):
    """Linear(SiLU(c)) -> the parameters of one block (or, shared, of all blocks): [..., chunks * dim]."""

    def __init__(self, condition_dim: int, dim: int, chunks: int = 6) -> None:
        super().__init__()
        self.linear = nn.Linear(condition_dim, chunks * dim)

    def forward(self, condition: Tensor) -> Tensor:
        out = self.linear(F.silu(condition))
        return out.unsqueeze(1) if out.dim() == 2 else out


class BlockModulation(nn.Module):
    """The six modulation tensors of a block, by name.

    kind "block": the block owns a Linear of the condition [B, C] or [B, N, C]. kind "shared": the condition is already
    the shared [B, 1 or N, 6 * dim], to which the block adds its own learned rows. kind "branches": a Linear for each
    branch, the condition is a pair (attention's, feed-forward's). kind "tasks": the condition is a pair of the shared
    [B, 1, chunks * dim] and the task [B] of each row; the block multiplies it with a learned row of the task and adds another.
    Without "shift1" and "shift2" in the order nothing is shifted.
    """

    def __init__(self, kind: str, condition_dim: int, dim: int, order: Sequence[str] = NAMES, tasks: int = 0) -> None:
        super().__init__()
        if sorted(order) not in (sorted(NAMES), sorted(WITHOUT_SHIFT)):
            raise ValueError(
                f"modulation_order must be an order of {NAMES}, with or without the shifts, got {list(order)}"
            )
        if kind not in ("block", "shared", "branches", "tasks"):
            raise ValueError(f"modulation must be None, 'block', 'shared', 'branches' or 'tasks', got {kind!r}")
        if kind == "branches" and len(order) != len(NAMES):
            raise ValueError(f"modulation 'branches' needs all of {NAMES} in modulation_order, got {list(order)}")
        self.kind, self.chunks = kind, len(order)
        if kind == "branches":
            order = [name for branch in "12" for name in order if name.endswith(branch)]
        self.indices = [list(order).index(name) if name in order else None for name in NAMES]
        if kind == "block":
            self.projection = Modulation(condition_dim, dim, self.chunks)
        elif kind == "branches":
            self.projections = nn.ModuleList(Modulation(condition_dim, dim, chunks=3) for _ in range(2))
        elif kind == "tasks":
            self.task_scale = nn.Parameter(torch.zeros(tasks, self.chunks * dim))
            # no scaling and open gates to begin with
            self.task_shift = nn.Parameter(
                torch.tensor([float(name.startswith("gate")) for name in order]).repeat_interleave(dim).repeat(tasks, 1)
            )
        else:
            self.table = nn.Parameter(torch.zeros(self.chunks, dim))

    def forward(self, condition: Tensor | tuple[Tensor, Tensor], segments: Tensor | None = None) -> list[Tensor | None]:
        """-> [shift1, scale1, gate1, shift2, scale2, gate2], each [B, 1 or N, dim]; None for shifts that there are not.

        segments: [N], the condition is [B, S, C] and token n follows its row `segments[n]`.
        """
        if self.kind == "branches":
            pairs = zip(self.projections, condition, strict=True)
            chunks = [chunk for projection, part in pairs for chunk in projection(part).chunk(3, dim=-1)]
        else:
            if self.kind == "tasks":
                shared, task = condition
                values = shared * self.task_scale[task][:, None] + self.task_shift[task][:, None]
            else:
                values = self.projection(condition) if self.kind == "block" else condition + self.table.flatten()
            chunks = list(values.chunk(self.chunks, dim=-1))
        if segments is not None:
            chunks = [chunk.index_select(1, segments) for chunk in chunks]
        return [None if i is None else chunks[i] for i in self.indices]
