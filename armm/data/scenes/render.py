"""Pictures of scenes: analytic ray casting in torch, the same on every device and at any resolution.

One ray a pixel everywhere; pixels on an outline are shaded anew with ``supersample`` x ``supersample`` rays. Shadows on the
ground are signed distances to each solid's exact shadow, softened with the distance from its foot, so they cost no rays.
Shape legend: B scenes, P pixels of an image, M shaded rays.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import geometry
from .graph import COLORS, LIGHTS, RGB, Scenes
from .tracing import Frames, by_shape, pixel_grid, trace, trace_pixels


@dataclass(frozen=True)
class Light:
    """One kind of daylight; colors are linear RGB, the direction points towards the light."""

    direction: tuple[float, float, float]
    key: tuple[float, float, float]
    ambient: tuple[float, float, float]
    ground: tuple[float, float, float]  # as displayed (sRGB, 0 to 255)
    sky: tuple[float, float, float]  # what polished rims reflect
    shadow: float  # how much darker the ground is in full shadow


LIGHT_TABLE = {
    "day": Light((-0.55, 1.0, -0.42), (0.78, 0.77, 0.74), (0.32, 0.33, 0.35), (176, 190, 196), (0.85, 0.92, 1.0), 0.62),
    "dusk": Light((-0.75, 0.9, -0.25), (0.86, 0.66, 0.50), (0.30, 0.25, 0.28), (196, 152, 132), (1.0, 0.70, 0.50), 0.66),
    "night": Light((0.55, 1.0, -0.42), (0.36, 0.40, 0.50), (0.13, 0.14, 0.20), (40, 46, 84), (0.45, 0.55, 0.90), 0.75),
}

_CHUNK_PIXELS = 64 * 64 * 24  # rays in flight, chosen for the caches of a CPU
_GAMMA = 2.2


def _table(rows: list, device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32, device=device)


def render(scenes: Scenes, size: int = 64, supersample: int = 3, device: torch.device | str | None = None) -> Tensor:
    """Renders scenes to uint8 images [B, 3, size, size].

    Args:
        scenes: The scenes to draw.
        size: Width and height in pixels.
        supersample: Rays per side of a pixel on an outline; 1 turns antialiasing off.
        device: Where to compute and leave the images; the scenes' own device by default.
    """
    if not isinstance(scenes, Scenes):
        raise TypeError(f"scenes must be a Scenes batch (see sample_scenes), got {type(scenes).__name__}")
    _check_size(size)
    if not isinstance(supersample, int) or not 1 <= supersample <= 16:
        raise ValueError(f"supersample must be an integer from 1 to 16, got {supersample!r}")
    if device is not None:
        scenes = scenes.to(device)
    images = torch.empty(len(scenes), 3, size, size, dtype=torch.uint8, device=scenes.device)
    chunk = max(1, _CHUNK_PIXELS // (size * size))
    if scenes.device.type != "cpu":
        chunk *= 16
    with torch.inference_mode():
        for first in range(0, len(scenes), chunk):
            images[first : first + chunk] = _render_chunk(scenes[first : first + chunk], size, supersample)
    return images


def object_map(scenes: Scenes, size: int = 64) -> Tensor:
    """Which object each pixel shows: int64 [B, size, size], the object's slot or -1 for the ground."""
    _check_size(size)
    distance, _ = trace_pixels(scenes, size)
    nearest, slot = distance.min(dim=-1)
    return torch.where(nearest < geometry.MISS, slot, -1).view(len(scenes), size, size)


def project(scenes: Scenes) -> Tensor:
    """Where the middle of each object appears: normalised image coordinates [B, 3, 2] (x right, y down; -1 where absent).

    ``unproject(points, centre_heights(shape, size))`` leads back to plane coordinates.
    """
    height = geometry.centre_heights(scenes.shape, scenes.size)
    points = geometry.project_points(torch.stack([scenes.position[..., 0], height, scenes.position[..., 1]], dim=-1))
    return torch.where(scenes.present[..., None], points, torch.full_like(points, -1.0))


def _check_size(size: int) -> None:
    if not isinstance(size, int) or not 8 <= size <= 4096:
        raise ValueError(f"size must be an integer from 8 to 4096 (pixels), got {size!r}")


def _render_chunk(scenes: Scenes, size: int, supersample: int) -> Tensor:
    device, batch = scenes.device, len(scenes)
    frames = Frames.of(scenes)
    grid = pixel_grid(size, device)
    scene = torch.arange(batch, device=device).repeat_interleave(size * size)
    color, surface = _shade(scenes, frames, scene, grid.repeat(batch, 1))
    if supersample > 1:
        outline = _outline(surface.view(batch, size, size)).flatten().nonzero()[:, 0]
        offsets = (pixel_grid(supersample, device) - 0.5) / size
        points = (grid[outline % (size * size), None] + offsets).view(-1, 2)
        fine, _ = _shade(scenes, frames, scene[outline].repeat_interleave(len(offsets)), points)
        color[outline] = fine.view(len(outline), len(offsets), 3).mean(dim=1)
    color = color.clamp(0, 1).pow(1 / _GAMMA) * 255
    return color.round().to(torch.uint8).view(batch, size, size, 3).permute(0, 3, 1, 2)


def _outline(surface: Tensor) -> Tensor:
    """Surface numbers [B, H, W] -> bool: pixels with a neighbour (of eight) that shows another surface."""
    edge = torch.zeros_like(surface, dtype=torch.bool)
    for (a, b), (c, d) in (((0, 1), (0, 0)), ((0, 0), (0, 1)), ((0, 1), (0, 1)), ((1, 0), (0, 1))):
        height, width = surface.shape[1] - max(a, b), surface.shape[2] - max(c, d)
        first = (slice(None), slice(a, a + height), slice(c, c + width))
        second = (slice(None), slice(b, b + height), slice(d, d + width))
        different = surface[first] != surface[second]
        edge[first] |= different
        edge[second] |= different
    return edge


def _shade(scenes: Scenes, frames: Frames, scene: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Linear colors [M, 3] and surface numbers [M] (-1 ground, else slot and face) of rays."""
    device = points.device
    directions = geometry.ray_directions(points)
    distance, face = trace(frames, scene, points, directions)
    nearest, slot = distance.min(dim=-1)
    hit = nearest < geometry.MISS
    reach = torch.where(hit, nearest, -geometry.EYE[1] / directions[:, 1])
    world = _table(list(geometry.EYE), device) + reach[:, None] * directions
    world[:, 1] = torch.where(hit, world[:, 1], 0.0)
    slot = torch.where(hit, slot, -1)

    lights = [LIGHT_TABLE[name] for name in LIGHTS]
    towards = geometry.unit(_table([light.direction for light in lights], device).T).T
    light = scenes.light[scene]
    lit, contact = _lit(frames, scene, slot, world, towards[light])

    ground = (_table([light.ground for light in lights], device) / 255) ** _GAMMA
    dark = _table([light.shadow for light in lights], device)
    color = ground[light] * (1 - dark[light] * (1 - lit))[:, None] * contact[:, None]
    rays = hit.nonzero()[:, 0]
    objects = scene[rays] * 3 + slot[rays]
    albedo = (_table([RGB[name] for name in COLORS], device) / 255) ** _GAMMA
    side = face[rays, slot[rays]]
    for shape, rows in by_shape(frames, objects):
        chosen, ray = objects[rows], rays[rows]
        local_direction = frames.local_directions(chosen, directions[ray])
        local = frames.origin[:, chosen] + reach[ray] * local_direction
        true, rounded = geometry.normals(shape, local, side[rows], local_direction)
        color[ray] = _surface_color(
            albedo[scenes.color.flatten()[chosen]],
            scenes.material.flatten()[chosen] == 1,
            _to_world(frames, chosen, true),
            _to_world(frames, chosen, rounded),
            -geometry.unit(directions[ray].T).T,
            lit[ray],
            contact[ray],
            light[ray],
            towards,
            lights,
        )
    surface = torch.where(hit, slot * 4 + face.gather(1, slot.clamp(min=0)[:, None])[:, 0], -1)
    return color, surface


def _to_world(frames: Frames, objects: Tensor, vectors: Tensor) -> Tensor:
    x, z = geometry.rotate(vectors[0], vectors[2], frames.cosine[objects], -frames.sine[objects])
    return torch.stack([x, vectors[1], z], dim=-1)


def _surface_color(
    albedo: Tensor,
    shiny: Tensor,
    normal: Tensor,
    rounded: Tensor,
    view: Tensor,
    lit: Tensor,
    contact: Tensor,
    light: Tensor,
    towards: Tensor,
    lights: list[Light],
) -> Tensor:
    """Matte: plain Lambert. Shiny: a darker body, a bright highlight, and a rim that mirrors the sky."""
    device = albedo.device
    direction = towards[light]
    key = _table([entry.key for entry in lights], device)[light]
    ambient = _table([entry.ambient for entry in lights], device)[light]
    sky = _table([entry.sky for entry in lights], device)[light]
    facing = (normal * direction).sum(-1).clamp(min=0) * lit
    upward = 0.75 + 0.25 * normal[:, 1]
    body = albedo * (ambient * (upward * contact)[:, None] + key * facing[:, None])
    half = geometry.unit((direction + view).T).T
    aligned = (rounded * half).sum(-1).clamp(min=0)
    highlight = (2.6 * aligned.pow(28) - 0.15).clamp(0, 1) * (0.4 + 0.6 * lit)
    rim = (1 - (rounded * view).sum(-1).clamp(0, 1)).pow(3)
    bright = (key + ambient).amax(dim=-1, keepdim=True).clamp(min=0.75)
    polished = 0.58 * body * (1 - highlight)[:, None] + bright * highlight[:, None] + 0.22 * sky * rim[:, None]
    return torch.where(shiny[:, None], polished, body)


def _lit(frames: Frames, scene: Tensor, own: Tensor, world: Tensor, towards: Tensor) -> tuple[Tensor, Tensor]:
    """How much of the light (1 = all) and of the sky (contact darkening) reaches points [M, 3]; ``own`` casts no shadow."""
    step = -towards[:, [0, 2]] / towards[:, 1:2]
    ground = world[:, [0, 2]] + world[:, 1:2] * step
    lit = torch.ones(len(scene), device=world.device)
    contact = torch.ones_like(lit)
    for slot in range(3):
        objects = scene * 3 + slot
        offset = ground - frames.position[objects]
        scale = frames.scale[objects]
        # On an object, only solids nearer to the light matter; the ground is darkened by all.
        behind = ((world[:, [0, 2]] - frames.position[objects]) * step).sum(-1) > 0
        near = offset.square().sum(-1) < (4.2 * scale).square()
        rays = (near & (frames.shape[objects] >= 0) & (own != slot) & ((own < 0) | behind)).nonzero()[:, 0]
        chosen = objects[rays]
        for shape, rows in by_shape(frames, chosen):
            index, ray = chosen[rows], rays[rows]
            size, flat = scale[ray], offset[ray]
            x, z = geometry.rotate(flat[:, 0], flat[:, 1], frames.cosine[index], frames.sine[index])
            sx, sz = geometry.rotate(step[ray, 0], step[ray, 1], frames.cosine[index], frames.sine[index])
            gap = geometry.shadow_distance(shape, torch.stack([x, z]) / size, torch.stack([sx, sz])) * size
            away = (flat * step[ray]).sum(-1) / step[ray].square().sum(-1).sqrt()
            width = 0.05 + 0.14 * away.clamp(min=0)
            soft = (0.5 + gap / width).clamp(0, 1)
            lit[ray] *= soft * soft * (3 - 2 * soft)
            foot = geometry.FOOTPRINTS[shape] * (0.55 if shape == geometry.SPHERE else 0.9)
            bare = (flat.square().sum(-1).sqrt() / size - foot).clamp(min=0)
            on_ground = (own[ray] < 0).float()
            contact[ray] *= 1 - 0.32 * on_ground * torch.exp(-5.0 * bare)
    return lit, contact
