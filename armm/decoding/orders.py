"""Orders in which the cells of a grid are decoded: each is a list of groups, and a group is decoded by one call of the trunk.

Cells are raster indices into a grid of (height, width) or (time, height, width). Every order visits every cell once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def raster(grid: Sequence[int]) -> list[Tensor]:
    """One cell after the other, row by row."""
    return list(torch.arange(math.prod(grid)).split(1))


def near_to_far(grid: Sequence[int]) -> list[Tensor]:
    """Cells of equal Manhattan distance from the first one together, near ones first (NAR, arXiv 2503.10696, section 3.1).

    Inside a group cells are in raster order. `sum(grid) - len(grid) + 1` groups.
    """
    distance = manhattan_distance(grid)
    return [(distance == step).nonzero()[:, 0] for step in range(int(distance[-1]) + 1)]


def manhattan_distance(grid: Sequence[int]) -> Tensor:
    """int64 [N]: the distance of every cell from the first one."""
    return torch.cartesian_prod(*(torch.arange(size) for size in grid)).reshape(math.prod(grid), -1).sum(1)


def parallel_regions(grid: Sequence[int], regions: int) -> Tensor:
    """Raster cells [N] in the order of PAR (arXiv 2412.15119, section 3.2): cell k of every region, then cell k + 1 of every region.

    The image is cut into `regions` x `regions` regions; regions and the cells in them are taken row by row.

    Raises:
        ValueError: the grid cannot be cut like that.
    """
    height, width = grid
    if regions < 1 or height % regions or width % regions:
        raise ValueError(f"a grid of {height}x{width} tokens cannot be cut into {regions}x{regions} equal regions")
    cells = torch.arange(height * width).view(regions, height // regions, regions, width // regions)
    return cells.permute(1, 3, 0, 2).flatten()


def windows(grid: Sequence[int], size: int) -> Tensor:
    """Raster cells [M, size * size] of square windows: windows row by row, the cells in one row by row.

    Raises:
        ValueError: the grid is no multiple of the window.
    """
    height, width = grid
    if size < 1 or height % size or width % size:
        raise ValueError(
            f"a grid of {height}x{width} tokens cannot be cut into windows of {size}x{size}: both must be multiples of {size}"
        )
    cells = torch.arange(height * width).view(height // size, size, width // size, size)
    return cells.transpose(1, 2).reshape(-1, size * size)
