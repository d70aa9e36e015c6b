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


def cells(grid: Sequence[int], size: int) -> list[Tensor]:
    """Neighbouring tokens together, in squares of `size` x `size` (xAR, arXiv 2502.20388, section 3.1).

    Raises:
        ValueError: the grid is no multiple of the cell.
    """
    height, width = grid
    if size < 1 or height % size or width % size:
        raise ValueError(
            f"a grid of {height}x{width} tokens cannot be cut into cells of {size}x{size}: both sides must be multiples of {size}"
        )
    return list(windows(grid, size))


def subsamples(grid: Sequence[int], stride: int) -> list[Tensor]:
    """Distant tokens together: those whose row and column leave the same remainders modulo `stride` (xAR, section 3.1).

    The groups are in raster order of their first token, the tokens of a group in raster order.

    Raises:
        ValueError: the grid is no multiple of the stride.
    """
    height, width = grid
    if stride < 1 or height % stride or width % stride:
        raise ValueError(
            f"a grid of {height}x{width} tokens has no equal subsamples of stride {stride}: both sides must be multiples of "
            f"{stride}"
        )
    grouped = torch.arange(height * width).view(height // stride, stride, width // stride, stride)
    return list(grouped.permute(1, 3, 0, 2).flatten(2).flatten(0, 1))


def whole(grid: Sequence[int]) -> list[Tensor]:
    """All tokens together."""
    return [torch.arange(math.prod(grid))]


def scale_factors(grid: Sequence[int], ratio: int = 2) -> list[int]:
    """How many tokens along each side one token of each scale stands for, coarsest first: powers of `ratio` down to 1.

    The coarsest is the largest power that divides every side.

    Raises:
        ValueError: there would be only one scale.
    """
    factors = [1]
    while ratio > 1 and not any(size % (factors[0] * ratio) for size in grid):
        factors.insert(0, factors[0] * ratio)
    if len(factors) == 1:
        sides = "x".join(map(str, grid))
        raise ValueError(f"a grid of {sides} tokens has no coarser scale with ratio {ratio}: its sides must be multiples of it")
    return factors
