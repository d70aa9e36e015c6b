"""Scene graphs: what stands where, drawn at random but fully determined by (seed, index).

A scene holds one to three solids on a plane under one of three lights. Positions are drawn until the picture is
readable: everything inside the frame, nothing hidden by more than a third, and every pair of objects clearly side by
side or clearly one behind the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from . import geometry
from .tracing import visible_fraction

SHAPES = ("sphere", "cube", "cylinder", "cone")
COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "white")
SIZES = ("small", "large")
MATERIALS = ("matte", "shiny")
LIGHTS = ("day", "dusk", "night")
RELATIONS = ("left", "right", "front", "behind")
RGB = {  # sRGB, what the word means on a neutral object in daylight
    "red": (222, 38, 38),
    "green": (34, 160, 58),
    "blue": (38, 78, 226),
    "yellow": (250, 214, 30),
    "purple": (146, 54, 196),
    "orange": (255, 128, 16),
    "cyan": (28, 204, 214),
    "white": (248, 248, 248),
}
MAX_OBJECTS = 3
SPLITS = ("train", "heldout", "all")

_COUNT_EDGES = (0.35, 0.80)  # 35% one object, 45% two, 20% three
_HELDOUT_SHARE = 0.1
_EXTENT = (1.25, 1.9)  # positions are drawn within +-x, +-z
_MARGIN_RATIO, _MARGIN = 1.4, 0.4  # the dominant axis leads by this factor and this distance
_GAP = 0.12  # free ground between two objects
_FRAME = 0.02  # free border, in image widths
_VISIBLE = 0.66  # share of its own pixels that every object shows
_VISIBILITY_SIZE = 40
_CANDIDATES = 48  # layouts tried at once
_REDRAW = 6  # rounds before a scene's objects are drawn anew
_CHUNK = 2048


@dataclass
class Scenes:
    """A batch of B scene graphs; absent objects have -1 in every index (and zeros elsewhere)."""

    count: Tensor  # [B] int64
    shape: Tensor  # [B, 3] int64, into SHAPES
    color: Tensor  # [B, 3] int64, into COLORS
    size: Tensor  # [B, 3] int64, into SIZES
    material: Tensor  # [B, 3] int64, into MATERIALS
    position: Tensor  # [B, 3, 2] float32: x to the right, z away from the camera
    rotation: Tensor  # [B, 3] float32, radians about the vertical axis
    light: Tensor  # [B] int64, into LIGHTS
    seed: Tensor  # [B] int64, each scene's own seed (for its captions, say)

    def __len__(self) -> int:
        return self.count.shape[0]

    def __getitem__(self, index: int | slice | Tensor | list[int]) -> Scenes:
        """The scenes at an index (kept as a batch of one), a slice, a list, a mask or an index tensor."""
        if isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(f"scene {index} is out of range: there are {len(self)} scenes")
            index = slice(index, index + 1 or None)
        return Scenes(**{field.name: getattr(self, field.name)[index] for field in fields(self)})

    def to(self, device: torch.device | str) -> Scenes:
        """The same scenes on another device."""
        return Scenes(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def tensors(self) -> dict[str, Tensor]:
        """Field name -> tensor, for saving."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def device(self) -> torch.device:
        return self.count.device

    @property
    def present(self) -> Tensor:
        """[B, 3] bool: which object slots are filled."""
        return self.shape >= 0

    @property
    def scale(self) -> Tensor:
        """[B, 3] world scale of each object (1 where absent)."""
        scales = torch.tensor(geometry.SCALES, device=self.device)[self.size.clamp(min=0)]
        return torch.where(self.present, scales, torch.ones_like(scales))

    def objects(self, index: int) -> list[dict[str, str | float]]:
        """The objects of one scene in words: shape, color, size, material and plane coordinates x, z."""
        rows = (getattr(self, name)[index].tolist() for name in ("shape", "color", "size", "material", "position"))
        return [
            {
                "shape": SHAPES[shape],
                "color": COLORS[color],
                "size": SIZES[size],
                "material": MATERIALS[material],
                "x": position[0],
                "z": position[1],
            }
            for shape, color, size, material, position in zip(*rows, strict=True)
            if shape >= 0
        ]


def relation_index(dx: Tensor, dz: Tensor) -> Tensor:
    """Where an object stands that is (dx, dz) away from another: indices into RELATIONS, by the dominant axis."""
    side = torch.where(dx < 0, 0, 1)
    depth = torch.where(dz < 0, 2, 3)
    return torch.where(dx.abs() >= dz.abs(), side, depth)


def relation(dx: float, dz: float) -> str:
    """The same for two numbers, in words: "left", "right", "front" or "behind"."""
    if abs(dx) >= abs(dz):
        return "left" if dx < 0 else "right"
    return "front" if dz < 0 else "behind"


def pair_relations(position: Tensor) -> Tensor:
    """Positions [..., 3, 2] -> [..., 3, 3] int64: entry (i, j) says where i stands as seen from j."""
    offset = position[..., :, None, :] - position[..., None, :, :]
    return relation_index(offset[..., 0], offset[..., 1])


def is_heldout(scenes: Scenes) -> Tensor:
    """[B] bool: which scenes belong to the held-out tenth of all combinations (never in the training split)."""
    names = ("shape", "color", "size", "material", "light", "position", "count")
    return _heldout(**{name: getattr(scenes, name) for name in names})


def sample_scenes(n: int, seed: int = 0, split: str = "train", *, start: int = 0) -> Scenes:
    """Draws scenes number ``start`` to ``start + n - 1`` of the endless sequence that ``seed`` and ``split`` name.

    Scene i of a sequence is always the same one, however many are drawn with it.

    Args:
        n: How many scenes.
        seed: Names the sequence; any integer.
        split: "train" (never shows a held-out combination), "heldout" (only those) or "all".
        start: Index of the first scene.
    """
    if not isinstance(n, int) or n < 0:
        raise ValueError(f"n must be a non-negative integer, got {n!r}")
    if not isinstance(start, int) or start < 0:
        raise ValueError(f"start must be a non-negative integer, got {start!r}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    base = _mix(torch.tensor(int(seed) & 0x7FFFFFFFFFFFFFFF) + SPLITS.index(split) * 7919)
    parts = []
    for first in range(0, max(n, 1), _CHUNK):
        index = torch.arange(start + first, start + min(first + _CHUNK, n))
        parts.append(_sample_chunk(_mix(base ^ _mix(index + 1)), split))
    names = [field.name for field in fields(Scenes)]
    return Scenes(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def _sample_chunk(keys: Tensor, split: str) -> Scenes:
    n = keys.shape[0]
    scenes = Scenes(
        count=torch.zeros(n, dtype=torch.int64),
        **{name: torch.full((n, MAX_OBJECTS), -1) for name in ("shape", "color", "size", "material")},
        position=torch.zeros(n, MAX_OBJECTS, 2),
        rotation=torch.zeros(n, MAX_OBJECTS),
        light=torch.zeros(n, dtype=torch.int64),
        seed=keys & 0x7FFFFFFF,
    )
    todo = torch.arange(n)
    attempt = 0
    while len(todo):
        drawn = _draw_objects(keys[todo], attempt // _REDRAW)
        good = _place(drawn, keys[todo], attempt, split)
        chosen = good.nonzero()[:, 0]
        chosen = chosen[_visible_enough(drawn[chosen])]
        for name, values in drawn.tensors().items():
            if name != "seed":
                getattr(scenes, name)[todo[chosen]] = values[chosen]
        keep = torch.ones(len(todo), dtype=torch.bool)
        keep[chosen] = False
        todo = todo[keep]
        attempt += 1
    return scenes


def _draw_objects(keys: Tensor, attempt: int) -> Scenes:
    u = _uniform(keys[:, None], 1000 + 100 * attempt + torch.arange(2 + 4 * MAX_OBJECTS))
    # The count is drawn once: scenes that are harder to place must not become rarer.
    first = _uniform(keys[:, None], torch.tensor([1]))[:, 0]
    count = 1 + (first > _COUNT_EDGES[0]).long() + (first > _COUNT_EDGES[1]).long()
    absent = torch.arange(MAX_OBJECTS) >= count[:, None]

    def pick(column: int, options: int) -> Tensor:
        chosen = (u[:, column : column + MAX_OBJECTS] * options).long().clamp(max=options - 1)
        return chosen.masked_fill(absent, -1)

    return Scenes(
        count=count,
        shape=pick(2, len(SHAPES)),
        color=pick(2 + MAX_OBJECTS, len(COLORS)),
        size=pick(2 + 2 * MAX_OBJECTS, len(SIZES)),
        material=pick(2 + 3 * MAX_OBJECTS, len(MATERIALS)),
        position=torch.zeros(len(keys), MAX_OBJECTS, 2),
        rotation=torch.zeros(len(keys), MAX_OBJECTS),
        light=(u[:, 0] * len(LIGHTS)).long().clamp(max=len(LIGHTS) - 1),
        seed=keys,
    )


def _place(scenes: Scenes, keys: Tensor, attempt: int, split: str) -> Tensor:
    """Writes the first admissible of many random layouts into ``scenes``; returns [B] bool: was there one?"""
    stream = 1_000_000 + attempt * _CANDIDATES * 10 + torch.arange(_CANDIDATES * 10)
    u = _uniform(keys[:, None], stream).view(len(keys), _CANDIDATES, 10)
    position = u[..., : 2 * MAX_OBJECTS].unflatten(-1, (MAX_OBJECTS, 2))
    position = (2 * position - 1) * torch.tensor(_EXTENT)
    position = position * scenes.present[:, None, :, None]
    good = _clear_layout(scenes, position)
    # The frame is deeper than wide: without a choice of the first pair's axis, side by side would be the rarer relation.
    aside = _uniform(keys[:, None], torch.tensor([2])) < 0.5
    span = (position[:, :, 0] - position[:, :, 1]).abs()
    good &= ((span[..., 0] > span[..., 1]) == aside) | (scenes.count < 2)[:, None]
    # The dearer tests see only the candidates that are left.
    row, candidate = good.nonzero().unbind(1)
    inside = _inside_frame(scenes, row, position[row, candidate])
    row, candidate = row[inside], candidate[inside]
    if split != "all":
        names = ("shape", "color", "size", "material", "light", "count")
        attributes = {name: getattr(scenes, name)[row] for name in names}
        wanted = _heldout(**attributes, position=position[row, candidate]) == (split == "heldout")
        row, candidate = row[wanted], candidate[wanted]
    good = torch.zeros_like(good)
    good[row, candidate] = True
    first = good.int().argmax(dim=1)
    rows = torch.arange(len(keys))
    scenes.position.copy_(position[rows, first])
    turn = math.pi / 12 + u[rows, first, 2 * MAX_OBJECTS : 3 * MAX_OBJECTS] * math.pi / 3  # 15 to 75 degrees
    scenes.rotation.copy_(turn * scenes.present)
    return good.any(dim=1)


def _inside_frame(scenes: Scenes, row: Tensor, position: Tensor) -> Tensor:
    """Layouts [N, 3, 2] of the scenes ``row`` [N] -> [N] bool: does every object lie in the frame with a free border?"""
    rings = torch.tensor(geometry.RINGS)[scenes.shape.clamp(min=0)] * scenes.scale[..., None, None]  # [B, 3, 3, 2]
    angles = torch.arange(8) * (math.pi / 4)
    circle = torch.stack([angles.cos(), angles.sin()], dim=-1)
    good = torch.ones(len(row), dtype=torch.bool)
    for slot in range(MAX_OBJECTS):
        used = scenes.present[row, slot].nonzero()[:, 0]
        ring = rings[row[used], slot][:, :, None]
        flat = position[used, slot][:, None, None] + ring[..., 1:] * circle  # [N, 3, 8, 2]
        points = torch.stack([flat[..., 0], ring[..., 0].expand(flat.shape[:-1]), flat[..., 1]], dim=-1)
        points = geometry.project_points(points)
        good[used] &= ((points > _FRAME) & (points < 1 - _FRAME)).flatten(1).all(dim=-1)
    return good


def _clear_layout(scenes: Scenes, position: Tensor) -> Tensor:
    """Positions [B, K, 3, 2] -> [B, K] bool: do objects stand apart, each pair along one clear axis?"""
    radius = torch.tensor(geometry.FOOTPRINTS)[scenes.shape.clamp(min=0)] * scenes.scale
    good = torch.ones(position.shape[:2], dtype=torch.bool)
    for i in range(MAX_OBJECTS):
        for j in range(i):
            offset = position[:, :, i] - position[:, :, j]
            span = offset.abs()
            lead, rest = span.amax(dim=-1), span.amin(dim=-1)
            apart = offset.square().sum(-1).sqrt() > (radius[:, i] + radius[:, j] + _GAP)[:, None]
            clear = (lead > _MARGIN_RATIO * rest) & (lead > rest + _MARGIN)
            good &= (apart & clear) | ~scenes.present[:, i, None]
    return good


def _visible_enough(scenes: Scenes) -> Tensor:
    if len(scenes) == 0:
        return torch.zeros(0, dtype=torch.bool)
    result = torch.ones(len(scenes), dtype=torch.bool)
    several = (scenes.count > 1).nonzero()[:, 0]
    for rows in several.split(128):
        fraction = visible_fraction(scenes[rows], _VISIBILITY_SIZE)
        result[rows] = (fraction >= _VISIBLE).all(dim=1)
    return result


def _heldout(
    shape: Tensor, color: Tensor, size: Tensor, material: Tensor, light: Tensor, position: Tensor, count: Tensor
) -> Tensor:
    """Tensors [..., 3] (light, count [...], position [..., 3, 2]) -> [...] bool, in whatever order the objects come."""
    kind = (shape * len(COLORS) + color) * len(SIZES) + size
    present = shape >= 0
    kinds = (_mix(kind + 11) * present).sum(-1)
    pair = _mix(_mix(kind + 101)[..., :, None] + 3 * _mix(kind + 211)[..., None, :] + pair_relations(position) * 65537)
    different = ~torch.eye(MAX_OBJECTS, dtype=torch.bool, device=shape.device)
    both = present[..., :, None] & present[..., None, :] & different
    several = _mix(kinds + (pair * both).flatten(-2).sum(-1))
    single = _mix(kinds + (material[..., 0] * len(LIGHTS) + light + 1) * 1_000_003)
    chosen = torch.where(count > 1, several, single)
    return _to_unit(chosen) < _HELDOUT_SHARE


def _mix(x: Tensor) -> Tensor:
    """The splitmix64 finaliser on int64 (multiplications wrap around): a counter-based random number generator."""
    x = x + -7046029254386353131
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def _to_unit(x: Tensor) -> Tensor:
    return ((x >> 40) & 0xFFFFFF).float() / 2**24


def _uniform(keys: Tensor, stream: Tensor) -> Tensor:
    """Keys [B, 1] and stream numbers [S] -> uniform float32 [B, S]."""
    return _to_unit(_mix(keys ^ _mix(stream)))
