"""Pictures of scenes: analytic ray casting in torch, the same on every device and at any resolution.

One ray a pixel everywhere; pixels on an outline are shaded anew with ``supersample`` x ``supersample`` rays. Shadows
are signed distances to each solid's exact shadow on the ground, softer away from its foot: they cost no rays.
Shape legend: B scenes, P pixels of an image, M shaded rays.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import geometry
from .graph import COLORS, LIGHTS, RGB, Scenes
from .tracing import Hits, Objects, pixel_grid, trace, trace_pixels


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
    "dusk": Light((-0.75, 0.9, -0.25), (0.86, 0.66, 0.50), (0.30, 0.25, 0.28), (196, 152, 132), (1.0, 0.7, 0.5), 0.66),
    "night": Light((0.55, 1.0, -0.42), (0.42, 0.46, 0.56), (0.16, 0.17, 0.23), (40, 46, 84), (0.45, 0.55, 0.90), 0.75),
}

_CHUNK_PIXELS = 64 * 64 * 24  # rays in flight, chosen for the caches of a CPU
_GAMMA = 2.2


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
    check_size(size)
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
    check_size(size)
    solids, hits = trace_pixels(scenes, size)
    first = hits.first()
    shown = torch.full((len(scenes) * size * size,), -1, device=scenes.device)
    shown[hits.rays[first]] = solids.slot[hits.objects[first]] % 3
    return shown.view(len(scenes), size, size)


def project(scenes: Scenes) -> Tensor:
    """Where the middle of each object appears: image coordinates [B, 3, 2] in 0..1 (x right, y down; -1 where absent).

    ``unproject(points, centre_heights(shape, size))`` leads back to plane coordinates.
    """
    height = geometry.centre_heights(scenes.shape, scenes.size)
    points = geometry.project_points(torch.stack([scenes.position[..., 0], height, scenes.position[..., 1]], dim=-1))
    return torch.where(scenes.present[..., None], points, torch.full_like(points, -1.0))


def check_size(size: int) -> None:
    if not isinstance(size, int) or not 8 <= size <= 4096:
        raise ValueError(f"size must be an integer from 8 to 4096 (pixels), got {size!r}")


def _render_chunk(scenes: Scenes, size: int, supersample: int) -> Tensor:
    device, batch, pixels = scenes.device, len(scenes), size * size
    lights = _Lights.of(scenes)
    solids = Objects.of(scenes)
    grid = pixel_grid(size, device)
    # Pairs of an object and a pixel that may show it, or its shadow; half a pixel wider for the finer rays.
    near = solids.near(grid, 0.75 / size).nonzero()
    shaded = _may_shade(solids, grid, lights, 0.75 / size).nonzero()
    shown, darkened = ((part[:, 0], solids.scene[part[:, 0]] * pixels + part[:, 1]) for part in (near, shaded))
    color, surface = _shade(scenes, solids, lights, shown, darkened, grid.repeat(batch, 1), pixels)
    if supersample > 1:
        outline = _outline(surface.view(batch, size, size)).flatten().nonzero()[:, 0]
        offsets = (pixel_grid(supersample, device) - 0.5) / size
        points = (grid[outline % pixels, None] + offsets).view(-1, 2)
        rank = torch.full((batch * pixels,), -1, device=device)
        rank[outline] = torch.arange(len(outline), device=device)
        per_pixel = len(offsets)
        fine_shown = _refine(shown[0], rank[shown[1]], per_pixel)
        fine_darkened = _refine(darkened[0], rank[darkened[1]], per_pixel)
        fine, _ = _shade(scenes, solids, lights, fine_shown, fine_darkened, points, 0, outline // pixels)
        color[outline] = fine.view(len(outline), per_pixel, 3).mean(dim=1)
    color = color.clamp_(0, 1).pow_(1 / _GAMMA).mul_(255).round_()
    return color.to(torch.uint8).view(batch, size, size, 3).permute(0, 3, 1, 2)


def _refine(objects: Tensor, rank: Tensor, rays: int) -> tuple[Tensor, Tensor]:
    """The pairs on outlines (rank >= 0), once for each of a pixel's finer rays."""
    chosen = (rank >= 0).nonzero()[:, 0]
    fine = rank[chosen, None] * rays + torch.arange(rays, device=rank.device)
    return objects[chosen].repeat_interleave(rays), fine.flatten()


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


@dataclass
class _Lights:
    """The three lights as tables, and what each scene of a batch has of them."""

    towards: Tensor  # [B, 3] unit vectors
    step: Tensor  # [B, 2]: how far a shadow moves on the ground for one unit of height
    key: Tensor  # [B, 3]
    ambient: Tensor  # [B, 3]
    ground: Tensor  # [B, 3] linear
    sky: Tensor  # [B, 3]
    shadow: Tensor  # [B]

    @classmethod
    def of(cls, scenes: Scenes) -> _Lights:
        def table(name: str) -> Tensor:
            rows = [getattr(LIGHT_TABLE[light], name) for light in LIGHTS]
            return torch.tensor(rows, dtype=torch.float32, device=scenes.device)[scenes.light]

        towards = geometry.unit(table("direction").T).T
        return cls(
            towards=towards,
            step=-towards[:, [0, 2]] / towards[:, 1:2],
            key=table("key"),
            ambient=table("ambient"),
            ground=(table("ground") / 255) ** _GAMMA,
            sky=table("sky"),
            shadow=table("shadow"),
        )


def _may_shade(solids: Objects, grid: Tensor, lights: _Lights, margin: float) -> Tensor:
    """[O, P] bool: pixels whose ground an object may darken (a box along its shadow)."""
    ground = geometry.unproject(grid)
    step = lights.step[solids.scene]
    length = step.square().sum(-1, keepdim=True).sqrt()
    ax, az = (step / length).unbind(-1)
    dx = ground[:, 0] - solids.x[:, None]
    dz = ground[:, 1] - solids.z[:, None]
    along = dx * ax[:, None] + dz * az[:, None]
    across = (dz * ax[:, None] - dx * az[:, None]).abs_()
    foot = 1.45 * solids.scale[:, None] + 4 * margin
    end = length * geometry.CYLINDER_HEIGHT * solids.scale[:, None] + foot
    return (across < foot) & (along > -foot) & (along < end)


def _shade(
    scenes: Scenes,
    solids: Objects,
    lights: _Lights,
    near: tuple[Tensor, Tensor],
    shaded: tuple[Tensor, Tensor],
    points: Tensor,
    pixels: int,
    owner: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Linear colors [M, 3] and surface numbers [M] (-1 ground, else slot and face) of rays through ``points`` [M, 2].

    ``near`` and ``shaded`` are pairs (objects, rays). Ray r belongs to scene r // pixels, or, for finer rays, pixel
    ``owner[r // rays per pixel]``.
    """
    directions = geometry.ray_directions(points).T.contiguous()
    rays = directions.shape[1]
    if owner is None:
        color = lights.ground.repeat_interleave(pixels, dim=0)
    else:
        color = lights.ground[owner].repeat_interleave(rays // max(len(owner), 1), dim=0)
    surface = torch.full((rays,), -1, device=points.device)
    hits = trace(solids, *near, directions)
    _shade_ground(solids, lights, *shaded, points, hits.nearest, color)
    _shade_objects(scenes, solids, lights, hits, directions, color, surface)
    return color, surface


def _shade_ground(
    solids: Objects, lights: _Lights, objects: Tensor, rays: Tensor, points: Tensor, nearest: Tensor, color: Tensor
) -> None:
    """Darkens the ground's colors [M, 3] in place where objects keep the light or the sky away."""
    keep = (nearest[rays] >= geometry.MISS).nonzero()[:, 0]
    objects, rays = objects[keep], rays[keep]
    x, z = geometry.unproject(points.index_select(0, rays)).unbind(-1)
    lit, contact = _shadow(solids, lights.step[solids.scene[objects]], objects, x, z)
    share = 1 - lights.shadow[solids.scene[objects]] * (1 - lit)
    factor = torch.ones_like(nearest).scatter_reduce_(0, rays, share * contact, "prod")
    color *= factor[:, None]


def _shadow(solids: Objects, step: Tensor, objects: Tensor, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Light (1 = all) and sky that object i leaves at ground point i: [N] each, objects ascending, step [N, 2]."""
    dx, dz, scale = x - solids.x[objects], z - solids.z[objects], solids.scale[objects]
    cosine, sine = solids.cosine[objects], solids.sine[objects]
    point = torch.stack(geometry.rotate(dx, dz, cosine, sine)).div_(scale)
    turned = torch.stack(geometry.rotate(step[:, 0], step[:, 1], cosine, sine))
    gap = torch.empty_like(dx)
    foot = torch.empty_like(dx)
    for shape, part in solids.stretches(objects):
        gap[part] = geometry.shadow_distance(shape, point[:, part], turned[:, part])
        foot[part] = geometry.FOOTPRINTS[shape] * (0.55 if shape == geometry.SPHERE else 0.9)
    away = (dx * step[:, 0] + dz * step[:, 1]) / step.square().sum(-1).sqrt()
    soft = (0.5 + gap * scale / (0.05 + 0.14 * away.clamp_(min=0))).clamp_(0, 1)
    bare = (point.square().sum(0).sqrt() - foot).clamp_(min=0)
    return soft * soft * (3 - 2 * soft), 1 - 0.32 * torch.exp(-5.0 * bare)


def _shade_objects(
    scenes: Scenes, solids: Objects, lights: _Lights, hits: Hits, directions: Tensor, color: Tensor, surface: Tensor
) -> None:
    """Writes the colors and surface numbers of the rays that meet an object, in place."""
    first = hits.first()
    objects, rays, face = hits.objects[first], hits.rays[first], hits.face[first]
    reach, slot, scene = hits.distance[first], solids.slot[objects], solids.scene[objects]
    direction = hits.direction.index_select(1, first)
    local = solids.origin.index_select(1, objects) + reach * direction
    true, rounded = torch.empty_like(local), torch.empty_like(local)
    for shape, part in solids.stretches(objects):
        true[:, part], rounded[:, part] = geometry.normals(shape, local[:, part], face[part], direction[:, part])
    cosine, sine = solids.cosine[objects], -solids.sine[objects]
    for normal in (true, rounded):
        normal[0], normal[2] = geometry.rotate(normal[0], normal[2], cosine, sine)
    world = directions.index_select(1, rays)
    view = -geometry.unit(world)
    world = world * reach + torch.tensor(geometry.EYE, device=world.device)[:, None]
    lit = _shadowed_objects(solids, lights, objects, scene, world)
    albedo = (torch.tensor([RGB[name] for name in COLORS], device=world.device) / 255) ** _GAMMA
    color[rays] = _surface_color(
        albedo[scenes.color.flatten()[slot]].T,
        scenes.material.flatten()[slot] == 1,
        true,
        rounded,
        view,
        lit,
        scene,
        lights,
    ).T
    surface[rays] = (slot % 3) * 4 + face


def _shadowed_objects(solids: Objects, lights: _Lights, own: Tensor, scene: Tensor, world: Tensor) -> Tensor:
    """Light [N] that reaches points [3, N] on the objects ``own`` past the other objects of their scene."""
    lit = torch.ones_like(world[0])
    number = torch.full((len(lights.step) * 3,), -1, device=own.device)
    number[solids.slot] = torch.arange(len(solids.slot), device=own.device)
    step = lights.step[scene]
    # Where the light through a point meets the ground: what shades that, and stands nearer the light, shades it too.
    x, z = world[0] + world[1] * step[:, 0], world[2] + world[1] * step[:, 1]
    for slot in range(3):
        other = number[scene * 3 + slot]
        dx, dz = x - solids.x[other], z - solids.z[other]
        nearer = (world[0] - solids.x[other]) * step[:, 0] + (world[2] - solids.z[other]) * step[:, 1] > 0
        close = dx * dx + dz * dz < (4.2 * solids.scale[other]).square()
        chosen = (nearer & close & (other >= 0) & (other != own)).nonzero()[:, 0]
        if len(chosen):
            chosen = chosen[other[chosen].sort().indices]
            lit[chosen] *= _shadow(solids, step[chosen], other[chosen], x[chosen], z[chosen])[0]
    return lit


def _surface_color(
    albedo: Tensor,
    shiny: Tensor,
    normal: Tensor,
    rounded: Tensor,
    view: Tensor,
    lit: Tensor,
    scene: Tensor,
    lights: _Lights,
) -> Tensor:
    """Linear colors [3, N]. Matte: plain Lambert. Shiny: a darker body, a bright highlight, a rim of sky."""
    towards, key, ambient, sky = (
        getattr(lights, name).T.index_select(1, scene) for name in ("towards", "key", "ambient", "sky")
    )
    facing = (normal * towards).sum(0).clamp_(min=0) * lit
    body = albedo * (ambient * (0.75 + 0.25 * normal[1]) + key * facing)
    aligned = (rounded * geometry.unit(towards + view)).sum(0).clamp_(min=0)
    highlight = (2.6 * aligned.pow(28) - 0.15).clamp_(0, 1) * (0.4 + 0.6 * lit)
    rim = (1 - (normal * view).sum(0).clamp_(0, 1)).pow(3)
    bright = (key + ambient).amax(dim=0).clamp_(min=0.9)
    polished = 0.56 * body * (1 - highlight) + bright * highlight + 0.22 * sky * rim
    return torch.where(shiny, polished, body)
