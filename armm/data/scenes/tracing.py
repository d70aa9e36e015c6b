"""Which solid does a ray meet first: batched over the scenes of a batch and all their pixels.

Rays are tested only against solids whose bounding circle on screen they pass through. The tests ("pairs" of a solid and
a ray) lie sorted by shape, so that each formula runs once, over one contiguous stretch.
Shape legend: B scenes, O objects present in them, M rays, N pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from . import geometry


class Solids(Protocol):
    """What tracing needs to know of a batch of scenes (`Scenes` fulfils it)."""

    shape: Tensor  # [B, 3], -1 = absent
    position: Tensor  # [B, 3, 2]
    rotation: Tensor  # [B, 3]

    @property
    def scale(self) -> Tensor: ...  # [B, 3]


@dataclass
class Objects:
    """The objects present in a batch, sorted by shape, each with its local frame."""

    slot: Tensor  # [O]: 3 * scene + slot
    scene: Tensor  # [O]
    shape: Tensor  # [O], ascending
    bounds: list[int]  # where each shape's stretch begins, and the end
    scale: Tensor  # [O]
    x: Tensor  # [O] position
    z: Tensor
    cosine: Tensor  # [O]; only cubes are turned, the others look the same from every side
    sine: Tensor
    origin: Tensor  # [3, O]: the camera in local coordinates
    centre: Tensor  # [O, 2]: bounding circle on screen
    reach: Tensor  # [O]: its radius

    @classmethod
    def of(cls, solids: Solids) -> Objects:
        shape = solids.shape.flatten()
        slot = shape.sort(stable=True).indices[int((shape < 0).sum()) :]
        shape = shape[slot]
        shapes = torch.arange(len(geometry.HEIGHTS) + 1, device=shape.device)
        scale = solids.scale.flatten()[slot]
        x, z = solids.position.flatten(0, 1)[slot].unbind(-1)
        turn = torch.where(shape == geometry.CUBE, solids.rotation.flatten()[slot], 0.0)
        cosine, sine = turn.cos(), turn.sin()
        local_x, local_z = geometry.rotate(geometry.EYE[0] - x, geometry.EYE[2] - z, cosine, sine)
        origin = torch.stack([local_x, torch.full_like(x, geometry.EYE[1]), local_z]) / scale
        radii = [math.hypot(h / 2, r) for h, r in zip(geometry.HEIGHTS, geometry.FOOTPRINTS, strict=True)]
        radii[geometry.SPHERE] = 1.0
        middle = 0.5 * torch.tensor(geometry.HEIGHTS, device=shape.device)[shape] * scale
        world = torch.stack([x, middle, z], dim=-1)
        depth = sum((world[:, axis] - geometry.EYE[axis]) * geometry.FORWARD[axis] for axis in range(3))
        reach = 1.06 * torch.tensor(radii, device=shape.device)[shape] * scale / (2 * geometry.HALF_TANGENT * depth)
        return cls(
            slot=slot,
            scene=slot // 3,
            shape=shape,
            bounds=torch.searchsorted(shape, shapes).tolist(),
            scale=scale,
            x=x,
            z=z,
            cosine=cosine,
            sine=sine,
            origin=origin,
            centre=geometry.project_points(world),
            reach=reach,
        )

    def stretches(self, objects: Tensor) -> list[tuple[int, slice]]:
        """Ascending object numbers [N] -> (shape, the slice of the pairs that have it), empty ones left out."""
        edges = torch.searchsorted(objects, torch.tensor(self.bounds, device=objects.device)).tolist()
        return [(shape, slice(a, b)) for shape, (a, b) in enumerate(zip(edges, edges[1:], strict=False)) if b > a]

    def near(self, grid: Tensor, margin: float = 0.0) -> Tensor:
        """[O, P] bool: image points [P, 2] within each object's bounding circle, widened by ``margin``."""
        dx = grid[:, 0] - self.centre[:, :1]
        dy = grid[:, 1] - self.centre[:, 1:]
        return dx.square_().add_(dy.square_()) < (self.reach + margin).square()[:, None]


@dataclass
class Hits:
    """The outcome of N pairs and of M rays."""

    objects: Tensor  # [N] ascending object numbers
    rays: Tensor  # [N]
    direction: Tensor  # [3, N] local directions
    distance: Tensor  # [N]
    face: Tensor  # [N]
    nearest: Tensor  # [M] distance of the first hit of each ray, MISS where there is none

    def first(self) -> Tensor:
        """The pairs that are their ray's first hit: indices, still sorted by object."""
        hit = self.distance < geometry.MISS
        return (hit & (self.distance == self.nearest[self.rays])).nonzero()[:, 0]


def trace(solids: Objects, objects: Tensor, rays: Tensor, directions: Tensor) -> Hits:
    """Tests the pairs (objects [N] ascending, rays [N]); ``directions`` [3, M] are the rays' world directions."""
    scale = solids.scale[objects]
    x, z = geometry.rotate(
        directions[0].index_select(0, rays),
        directions[2].index_select(0, rays),
        solids.cosine[objects],
        solids.sine[objects],
    )
    local = torch.stack([x, directions[1].index_select(0, rays), z]).div_(scale)
    distance = torch.empty_like(scale)
    face = torch.empty_like(objects)
    for shape, part in solids.stretches(objects):
        origin = solids.origin.index_select(1, objects[part])
        distance[part], face[part] = geometry.intersect(shape, origin, local[:, part])
    nearest = torch.full((directions.shape[1],), geometry.MISS, device=scale.device)
    nearest.scatter_reduce_(0, rays, distance, "amin")
    return Hits(objects, rays, local, distance, face, nearest)


def pixel_grid(size: int, device: torch.device | str = "cpu") -> Tensor:
    """Centres of the pixels of a square image, in raster order: [size * size, 2], normalised."""
    line = (torch.arange(size, device=device) + 0.5) / size
    y, x = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([x, y], dim=-1).view(-1, 2)


def trace_pixels(scenes: Solids, size: int) -> tuple[Objects, Hits]:
    """Traces one ray through every pixel of every scene; ray r belongs to scene r // size^2."""
    solids = Objects.of(scenes)
    grid = pixel_grid(size, scenes.shape.device)
    objects, pixels = solids.near(grid).nonzero().unbind(1)
    directions = geometry.ray_directions(grid).T.repeat(1, scenes.shape.shape[0])
    return solids, trace(solids, objects, solids.scene[objects] * len(grid) + pixels, directions)


def visible_fraction(scenes: Solids, size: int) -> Tensor:
    """[B, 3]: the share of its own pixels that each object shows (1 where absent), seen at ``size`` x ``size``."""
    solids, hits = trace_pixels(scenes, size)
    number = len(solids.shape)
    own = torch.bincount(hits.objects[hits.distance < geometry.MISS], minlength=number)
    shown = torch.bincount(hits.objects[hits.first()], minlength=number)
    share = torch.ones(scenes.shape.numel(), device=scenes.shape.device)
    share[solids.slot] = shown / own.clamp(min=1)
    return share.view(-1, 3)
