"""Which solid does a ray meet first: batched over the scenes of a batch and all their pixels.

A ray is tested only against solids whose bounding circle on screen it passes through, all rays and solids of one shape in one
call. Shape legend: B scenes, M rays.
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
class Frames:
    """Every object's local frame, flattened to [3B, ...] (object k of scene b is row 3b + k)."""

    shape: Tensor  # [3B]
    scale: Tensor  # [3B]
    position: Tensor  # [3B, 2]
    cosine: Tensor  # [3B]; only cubes are turned, the others look the same from every side
    sine: Tensor  # [3B]
    origin: Tensor  # [3, 3B]: the camera in local coordinates
    centre: Tensor  # [3B, 2]: bounding circle on screen
    reach: Tensor  # [3B]: its radius, -1 for absent objects

    @classmethod
    def of(cls, solids: Solids) -> Frames:
        shape, scale = solids.shape.flatten(), solids.scale.flatten()
        position, rotation = solids.position.flatten(0, 1), solids.rotation.flatten()
        turn = torch.where(shape == geometry.CUBE, rotation, torch.zeros_like(rotation))
        cosine, sine = turn.cos(), turn.sin()
        x, z = geometry.rotate(geometry.EYE[0] - position[:, 0], geometry.EYE[2] - position[:, 1], cosine, sine)
        origin = torch.stack([x, torch.full_like(x, geometry.EYE[1]), z]) / scale
        bounds = [math.hypot(h / 2, r) for h, r in zip(geometry.HEIGHTS, geometry.FOOTPRINTS, strict=True)]
        bounds[geometry.SPHERE] = 1.0
        kind = shape.clamp(min=0)
        middle = 0.5 * torch.tensor(geometry.HEIGHTS, device=shape.device)[kind] * scale
        world = torch.stack([position[:, 0], middle, position[:, 1]], dim=-1)
        depth = sum((world[:, axis] - geometry.EYE[axis]) * geometry.FORWARD[axis] for axis in range(3))
        reach = 1.06 * torch.tensor(bounds, device=shape.device)[kind] * scale / (2 * geometry.HALF_TANGENT * depth)
        reach = torch.where(shape < 0, torch.full_like(reach, -1.0), reach)
        return cls(shape, scale, position, cosine, sine, origin, geometry.project_points(world), reach)

    def local_directions(self, objects: Tensor, directions: Tensor) -> Tensor:
        """World directions [M, 3] of rays against ``objects`` [M] -> local directions [3, M]."""
        x, z = geometry.rotate(directions[:, 0], directions[:, 2], self.cosine[objects], self.sine[objects])
        return torch.stack([x, directions[:, 1], z]) / self.scale[objects]


def by_shape(frames: Frames, objects: Tensor) -> list[tuple[int, Tensor]]:
    """Groups of one shape: (shape, indices into ``objects``), empty groups left out."""
    kinds = frames.shape[objects]
    groups = [(shape, (kinds == shape).nonzero()[:, 0]) for shape in range(len(geometry.HEIGHTS))]
    return [(shape, rows) for shape, rows in groups if len(rows)]


def trace(frames: Frames, scene: Tensor, points: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Hits of M rays, given by scene [M], image point [M, 2] and direction [M, 3], with each of their scene's objects.

    Returns distances [M, 3] (``geometry.MISS`` where there is none) and faces [M, 3].
    """
    distance = torch.full((len(scene), 3), geometry.MISS, device=points.device)
    face = torch.zeros(len(scene), 3, dtype=torch.int64, device=points.device)
    centre, reach = frames.centre.view(-1, 3, 2), frames.reach.view(-1, 3)
    for slot in range(3):
        offset = points - centre[:, slot][scene]
        limit = reach[:, slot][scene]
        rays = ((offset[:, 0].square() + offset[:, 1].square() < limit * limit) & (limit > 0)).nonzero()[:, 0]
        objects = scene[rays] * 3 + slot
        for shape, rows in by_shape(frames, objects):
            chosen, ray = objects[rows], rays[rows]
            local = frames.local_directions(chosen, directions[ray])
            hit, side = geometry.intersect(shape, frames.origin[:, chosen], local)
            distance[ray, slot] = hit
            face[ray, slot] = side
    return distance, face


def pixel_grid(size: int, device: torch.device | str = "cpu") -> Tensor:
    """Centres of the pixels of a square image, in raster order: [size * size, 2], normalised."""
    line = (torch.arange(size, device=device) + 0.5) / size
    y, x = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([x, y], dim=-1).view(-1, 2)


def trace_pixels(solids: Solids, size: int) -> tuple[Tensor, Tensor]:
    """Every pixel's hits: distances and faces [B, size * size, 3]."""
    batch = solids.shape.shape[0]
    grid = pixel_grid(size, solids.shape.device)
    points = grid.repeat(batch, 1)
    scene = torch.arange(batch, device=grid.device).repeat_interleave(len(grid))
    distance, face = trace(Frames.of(solids), scene, points, geometry.ray_directions(points))
    return distance.view(batch, -1, 3), face.view(batch, -1, 3)


def visible_fraction(solids: Solids, size: int) -> Tensor:
    """[B, 3]: the share of its own pixels that each object shows (1 where absent), seen at ``size`` x ``size``."""
    distance, _ = trace_pixels(solids, size)
    own = distance < geometry.MISS
    shown = own & (distance == distance.amin(dim=-1, keepdim=True))
    share = shown.sum(dim=1) / own.sum(dim=1).clamp(min=1)
    return torch.where(solids.shape < 0, torch.ones_like(share), share)
