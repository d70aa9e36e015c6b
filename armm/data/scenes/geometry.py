"""The camera and the four solids: projection, ray intersection, normals, ground shadows.

World frame: x to the right, y up, z away from the camera, objects stand on the plane y = 0. Every solid is described
in a local unit frame (its base centre at the origin, lengths divided by the object's scale): one formula a shape.
Image coordinates are normalised: (0, 0) is the upper left corner, (1, 1) the lower right one.
Shape legend: M rays (or points), O objects.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Unit solids (multiplied by an object's scale): half widths and heights.
CUBE_HALF, CYLINDER_RADIUS, CONE_RADIUS = 0.82, 0.86, 1.08
CUBE_HEIGHT, CYLINDER_HEIGHT, CONE_HEIGHT = 2 * CUBE_HALF, 2.35, 2.35
SPHERE, CUBE, CYLINDER, CONE = range(4)
SCALES = (0.41, 0.63)  # small, large, in world units

HEIGHTS = (2.0, CUBE_HEIGHT, CYLINDER_HEIGHT, CONE_HEIGHT)
FOOTPRINTS = (1.0, CUBE_HALF * math.sqrt(2.0), CYLINDER_RADIUS, CONE_RADIUS)
# Three horizontal rings (height, radius) that bound each solid on screen.
RINGS = (
    ((0.35, 0.78), (1.0, 1.0), (1.65, 0.78)),
    ((0.0, FOOTPRINTS[CUBE]), (CUBE_HALF, FOOTPRINTS[CUBE]), (CUBE_HEIGHT, FOOTPRINTS[CUBE])),
    ((0.0, CYLINDER_RADIUS), (CYLINDER_HEIGHT / 2, CYLINDER_RADIUS), (CYLINDER_HEIGHT, CYLINDER_RADIUS)),
    ((0.0, CONE_RADIUS), (CONE_HEIGHT / 2, CONE_RADIUS / 2), (CONE_HEIGHT, 0.0)),
)

# Camera: a long lens looking down by PITCH at TARGET, so that sizes hardly change with depth.
PITCH = math.radians(42.0)
DISTANCE = 11.0
TARGET = (0.0, 0.45, 0.0)
HALF_TANGENT = 1.62 / DISTANCE
FORWARD = (0.0, -math.sin(PITCH), math.cos(PITCH))
UP = (0.0, math.cos(PITCH), math.sin(PITCH))
EYE = tuple(target - DISTANCE * axis for target, axis in zip(TARGET, FORWARD, strict=True))
MISS = 1e9


def centre_heights(shape: Tensor, size: Tensor) -> Tensor:
    """World height of the middle of objects of these shapes and sizes (indices of equal shape; 0 where absent)."""
    heights = torch.tensor(HEIGHTS, device=shape.device)[shape.clamp(min=0)]
    scales = torch.tensor(SCALES, device=size.device)[size.clamp(min=0)]
    return torch.where(shape < 0, torch.zeros_like(scales), 0.5 * heights * scales)


def project_points(points: Tensor) -> Tensor:
    """World points [..., 3] -> normalised image coordinates [..., 2]."""
    x, y, z = (points[..., axis] - EYE[axis] for axis in range(3))
    depth = y * FORWARD[1] + z * FORWARD[2]
    reach = 2 * HALF_TANGENT * depth
    return torch.stack([0.5 + x / reach, 0.5 - (y * UP[1] + z * UP[2]) / reach], dim=-1)


def ray_directions(points: Tensor) -> Tensor:
    """Normalised image coordinates [..., 2] -> ray directions [..., 3], of length one along the camera's axis."""
    u = (2 * points[..., 0] - 1) * HALF_TANGENT
    v = (1 - 2 * points[..., 1]) * HALF_TANGENT
    return torch.stack([u, FORWARD[1] + v * UP[1], FORWARD[2] + v * UP[2]], dim=-1)


def unproject(points: Tensor, height: Tensor | float = 0.0) -> Tensor:
    """Image points [..., 2] at a world ``height`` (a number or [...]) -> plane coordinates (x, z) [..., 2]."""
    if points.shape[-1:] != (2,):
        raise ValueError(f"points must have shape [..., 2] (x, y in the image), got {tuple(points.shape)}")
    directions = ray_directions(points)
    reach = (height - EYE[1]) / directions[..., 1]
    return torch.stack([EYE[0] + reach * directions[..., 0], EYE[2] + reach * directions[..., 2]], dim=-1)


def rotate(x: Tensor, z: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
    """World (x, z) -> the frame of an object turned by the angle of this cosine and sine."""
    return cosine * x + sine * z, cosine * z - sine * x


def intersect(shape: int, origin: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """First hits of rays with one unit solid: local ``origin`` and ``direction`` [3, M] -> distance [M] and face [M].

    Misses have distance ``MISS``. Faces number the parts of a solid between which its normal jumps.
    """
    return _INTERSECT[shape](origin, direction)


def _hit_sphere(origin: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    (ox, oy, oz), (dx, dy, dz) = origin, direction
    oy = oy - 1
    a = dx * dx + dy * dy + dz * dz
    b = ox * dx + oy * dy + oz * dz
    # The perpendicular form of the discriminant avoids the cancellation of b^2 - a*c for a far camera.
    k = b / a
    px, py, pz = ox - k * dx, oy - k * dy, oz - k * dz
    inside = (1 - px * px - py * py - pz * pz) / a
    distance = torch.where(inside > 0, -k - inside.clamp(min=0).sqrt(), MISS)
    return distance, torch.zeros_like(distance, dtype=torch.int64)


def _hit_cube(origin: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    centre = torch.tensor([[0.0], [CUBE_HALF], [0.0]], device=origin.device)
    safe = torch.where(direction.abs() < 1e-7, torch.full_like(direction, 1e-7), direction)
    inverse = 1 / safe
    middle = (centre - origin) * inverse
    half = CUBE_HALF * inverse.abs()
    near, face = (middle - half).max(dim=0)
    far = (middle + half).amin(dim=0)
    return torch.where(near < far, near, MISS), face


def _hit_cylinder(origin: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    (ox, oy, oz), (dx, dy, dz) = origin, direction
    a = (dx * dx + dz * dz).clamp(min=1e-9)
    k = (ox * dx + oz * dz) / a
    px, pz = ox - k * dx, oz - k * dz
    inside = (CYLINDER_RADIUS**2 - px * px - pz * pz) / a
    side = -k - inside.clamp(min=0).sqrt()
    y = oy + side * dy
    side = torch.where((inside > 0) & (y >= 0) & (y <= CYLINDER_HEIGHT), side, MISS)
    top = (CYLINDER_HEIGHT - oy) / dy
    tx, tz = ox + top * dx, oz + top * dz
    top = torch.where(tx * tx + tz * tz <= CYLINDER_RADIUS**2, top, MISS)
    return torch.minimum(side, top), (top < side).long()


def _hit_cone(origin: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    (ox, oy, oz), (dx, dy, dz) = origin, direction
    slope = CONE_RADIUS / CONE_HEIGHT
    # Start near the cone, so that the quadratic keeps its digits when the camera is far away.
    start = -(ox * dx + (oy - 1) * dy + oz * dz) / (dx * dx + dy * dy + dz * dz)
    ox, oy, oz = ox + start * dx, oy + start * dy, oz + start * dz
    apex = (CONE_HEIGHT - oy) * slope
    a = dx * dx + dz * dz - (slope * dy) ** 2
    b = ox * dx + oz * dz + apex * slope * dy
    c = ox * ox + oz * oz - apex * apex
    a = torch.where(a.abs() < 1e-7, torch.full_like(a, 1e-7), a)
    inside = b * b - a * c
    root = inside.clamp(min=0).sqrt()
    first, second = (-b - root) / a, (-b + root) / a
    best = torch.full_like(a, MISS)
    for candidate in (torch.maximum(first, second), torch.minimum(first, second)):
        y = oy + candidate * dy
        good = (inside >= 0) & (y >= 0) & (y <= CONE_HEIGHT)
        best = torch.where(good, candidate + start, best)
    return best, torch.zeros_like(best, dtype=torch.int64)


_INTERSECT = (_hit_sphere, _hit_cube, _hit_cylinder, _hit_cone)


def normals(shape: int, point: Tensor, face: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Local hit points [3, M] -> true unit normals and the rounded ones that highlights use, both [3, M].

    Highlights treat flat sides as if they bulged: every solid then has one, wherever the light is.
    """
    x, y, z = point
    if shape == SPHERE:
        true = torch.stack([x, y - 1, z])
        return true, true
    if shape == CUBE:
        chosen = torch.zeros_like(point).scatter_(0, face[None], 1.0)
        true = -chosen * torch.sign(direction)
        round_ = torch.stack([x, y - CUBE_HALF, z]) / CUBE_HALF
        return true, unit(round_)
    radial = unit(torch.stack([x, torch.zeros_like(x), z]))
    if shape == CYLINDER:
        top = (face == 1).float()
        true = torch.stack([radial[0] * (1 - top), top, radial[2] * (1 - top)])
        height = 2 * y / CYLINDER_HEIGHT - 1
        round_ = torch.stack([x / CYLINDER_RADIUS, 1.1 * height.clamp(min=-0.2) ** 3, z / CYLINDER_RADIUS])
        return true, unit(round_ + 0.1 * true)
    lift = CONE_RADIUS / CONE_HEIGHT
    true = unit(torch.stack([radial[0], torch.full_like(x, lift), radial[2]]))
    round_ = torch.stack([radial[0], 0.1 + 1.5 * y / CONE_HEIGHT, radial[2]])
    return true, unit(round_)


def shadow_distance(shape: int, point: Tensor, step: Tensor) -> Tensor:
    """Signed distance [M] from local ground points [2, M] to a unit solid's shadow, negative inside.

    ``step`` [2, M] is how far a shadow moves on the ground for one unit of height (the light's direction, flattened).
    """
    px, pz = point
    sx, sz = step
    length = (sx * sx + sz * sz).sqrt().clamp(min=1e-6)
    ax, az = sx / length, sz / length
    along, across = px * ax + pz * az, (pz * ax - px * az).abs()
    if shape == SPHERE:
        stretch = (1 + length * length).sqrt()
        scaled = ((along - length) / stretch).square() + across.square()
        return scaled.clamp(min=1e-9).sqrt() - 1
    if shape == CYLINDER:
        end = length * CYLINDER_HEIGHT
        beyond = along - torch.minimum(along.clamp(min=0), end)
        return (beyond.square() + across.square()).clamp(min=1e-9).sqrt() - CYLINDER_RADIUS
    if shape == CONE:
        end = length * CONE_HEIGHT
        base = (along.square() + across.square()).clamp(min=1e-9).sqrt() - CONE_RADIUS
        # The tangent from the apex's shadow to the base circle bounds the rest.
        sine = (CONE_RADIUS / end.clamp(min=CONE_RADIUS + 1e-3)).clamp(max=0.999)
        cosine = (1 - sine * sine).sqrt()
        edge = across * cosine - (end - along) * sine
        touch = along * cosine - across * sine
        reach = end * cosine
        tip = ((along - end).square() + across.square()).sqrt()
        wedge = torch.where(touch * 1.0 > reach + 1.0, tip, edge)
        wedge = torch.where(along > end, tip, wedge)
        return torch.where(along > CONE_RADIUS * sine, torch.minimum(base, wedge), base)
    sx, sz, end = sx * CUBE_HEIGHT, sz * CUBE_HEIGHT, length * CUBE_HEIGHT
    zero = torch.zeros_like(end)
    side_x = torch.maximum(px - sx.clamp(min=0), -px + sx.clamp(max=0)) - CUBE_HALF
    side_z = torch.maximum(pz - sz.clamp(min=0), -pz + sz.clamp(max=0)) - CUBE_HALF
    side = across - CUBE_HALF * (ax.abs() + az.abs())
    return torch.maximum(torch.maximum(side_x, side_z), torch.where(end > 0, side, zero))


def unit(vectors: Tensor) -> Tensor:
    """Vectors [3, M] scaled to length one."""
    return vectors * vectors.square().sum(0, keepdim=True).clamp(min=1e-12).rsqrt()
