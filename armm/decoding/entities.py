"""Entities of next-X prediction: what is predicted at one step, and how a picture is made of them (xAR, arXiv 2502.20388)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from armm.decoding import orders
from armm.nn.positions import raster_coordinates

__all__ = ["ENTITIES", "EntityPlan"]

ENTITIES = ("patch", "cell", "subsample", "scale", "image")


@dataclass(frozen=True)
class EntityPlan:
    """The entities of one grid, one after the other.

    sizes: tokens of each entity. coordinates: [N, 2], row and column of every token in the full grid, float. index: [N], the row
    of every token in a learned position embedding: its raster cell, and for the tokens of coarser scales what follows. grid:
    (height, width). factors: for scales, see `orders.scale_factors`; else empty.
    """

    grid: tuple[int, int]
    sizes: tuple[int, ...]
    coordinates: Tensor
    index: Tensor
    factors: tuple[int, ...] = ()

    @classmethod
    def of(cls, entity: str, grid: Sequence[int], size: int = 1) -> EntityPlan:
        """The plan of one kind of entity.

        entity: "patch" (single tokens), "cell" (`size` x `size` neighbours), "subsample" (every `size`-th token along each
        side), "scale" (whole maps that grow by `size`) or "image" (everything at once); the order is raster, or coarse to fine.

        Raises:
            ValueError: another entity, or one that does not divide the grid.
        """
        if entity not in ENTITIES:
            raise ValueError(f"entity must be one of {ENTITIES}, got {entity!r}")
        if len(grid) != 2 or any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in grid):
            raise ValueError(f"grid must be two positive integers (height, width), got {list(grid)}")
        height, width = grid
        if entity == "scale":
            return cls._of_scales((height, width), size)
        groups = {
            "patch": lambda: orders.raster(grid),
            "cell": lambda: orders.cells(grid, size),
            "subsample": lambda: orders.subsamples(grid, size),
            "image": lambda: orders.whole(grid),
        }[entity]()
        index = torch.cat(groups)
        sizes = tuple(len(group) for group in groups)
        return cls((height, width), sizes, raster_coordinates(height, width)[index], index)

    @classmethod
    def _of_scales(cls, grid: tuple[int, int], ratio: int) -> EntityPlan:
        factors = tuple(orders.scale_factors(grid, ratio))
        shapes = [(grid[0] // factor, grid[1] // factor) for factor in factors]
        sizes = tuple(height * width for height, width in shapes)
        coordinates = [raster_coordinates(*shape) * factor for shape, factor in zip(shapes, factors, strict=True)]
        # the finest scale has the rows of the raster, so that they mean the same with every entity
        coarse, fine = sum(sizes[:-1]), sizes[-1]
        index = torch.cat([torch.arange(fine, fine + coarse), torch.arange(fine)])
        return cls(grid, sizes, torch.cat(coordinates), index, factors)

    @property
    def num_tokens(self) -> int:
        return sum(self.sizes)

    def segments(self, device: torch.device | str | None = None) -> Tensor:
        """int64 [N]: the entity of every token."""
        sizes = torch.tensor(self.sizes, device=device)
        return torch.arange(len(self.sizes), device=device).repeat_interleave(sizes, output_size=self.num_tokens)

    def split(self, latents: Tensor) -> Tensor:
        """A picture [B, H * W, C] in raster order -> the tokens of all entities, one after the other, [B, N, C]."""
        height, width = self.grid
        if latents.dim() != 3 or latents.shape[1] != height * width:
            raise ValueError(f"latents must be [batch, {height * width}, channels], got {tuple(latents.shape)}")
        if not self.factors:
            return latents[:, self.index.to(latents.device)]
        picture = latents.transpose(1, 2).unflatten(2, self.grid)
        maps = [F.avg_pool2d(picture, factor) if factor > 1 else picture for factor in self.factors]
        return torch.cat([level.flatten(2) for level in maps], dim=2).transpose(1, 2)

    def join(self, tokens: Tensor) -> Tensor:
        """The tokens of all entities [B, N, C] -> the picture [B, H * W, C] in raster order."""
        if tokens.dim() != 3 or tokens.shape[1] != self.num_tokens:
            raise ValueError(f"tokens must be [batch, {self.num_tokens}, channels], got {tuple(tokens.shape)}")
        if self.factors:
            return tokens[:, -math.prod(self.grid) :]
        picture = torch.empty_like(tokens)
        picture[:, self.index.to(tokens.device)] = tokens
        return picture
