"""Fixed sine-cosine position tables (Vaswani et al., arXiv 1706.03762, section 3.5), with one half of the width for the
sines and the other for the cosines, as vision transformers have them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sincos_table(coordinates: Tensor, dim: int, theta: float = 10000.0) -> Tensor:
    """[sin | cos] of `coordinates` [N] times theta ** (-k / (dim / 2)), k = 0 .. dim/2 - 1: float32 [N, dim].

    Computed in float64. `dim` must be even.
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"`dim` must be a positive even number, got {dim}")
    half = dim // 2
    frequencies = theta ** (-torch.arange(half, dtype=torch.float64, device=coordinates.device) / half)
    angles = coordinates.double()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1).float()


def video_sincos_table(grid: Sequence[int], dim: int) -> Tensor:
    """A row for each cell of `grid` (t, h, w) in raster order: float32 [t * h * w, dim], on the CPU.

    The table of the frame over the whole width, plus the tables of column (first half of the width) and row (second half).
    `dim` must be a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"`dim` must be a multiple of 4 for a table over frames, rows and columns, got {dim}")
    times, rows, columns = (torch.arange(n, dtype=torch.float64, device="cpu") for n in grid)
    time = sincos_table(times, dim)[:, None, None]
    row = sincos_table(rows, dim // 2)[:, None].expand(-1, len(columns), -1)
    column = sincos_table(columns, dim // 2)[None].expand(len(rows), -1, -1)
    return (time + torch.cat([column, row], dim=-1)).flatten(0, 2)
