"""The recogniser: a small timm network that reads a picture of a scene back into its facts.

It is trained on real renders only (never on the generator's output) and then judges generated pictures, attribute by
attribute. Layout: a four-stage ResNet from timm, a top-down neck to a 16x16 grid, and per cell the chance that an object is
centred there, where exactly, and what it is; the light and the number of objects come from pooled features.

Shapes: B batch, G cells a side, F features. Screen coordinates run from 0 (left, top) to 1 (right, bottom).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

OBJECT_ATTRIBUTES = ("shape", "color", "size", "material")


@dataclass
class SceneReading:
    """What the recogniser saw in one picture. `objects`: dicts with shape, color, size, material (words), x, y (screen, 0
    to 1) and score; ordered by score. `scores`: the model's own probability of its reading, per attribute."""

    objects: list[dict[str, Any]]
    light: str
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return len(self.objects)


@dataclass
class RecogniserMaps:
    """Raw outputs. objectness [B, G, G] logits, offset [B, 2, G, G] (x, y in cells from the cell's centre to the object's),
    attributes {name: [B, classes, G, G]} logits, light [B, L] and count [B, max_objects] logits, features [B, F]."""

    objectness: Tensor
    offset: Tensor
    attributes: dict[str, Tensor]
    light: Tensor
    count: Tensor
    features: Tensor


@dataclass
class Detections:
    """Decoded readings as tensors: count [B], light [B], xy [B, K, 2] on the screen, score [B, K], attributes
    {name: [B, K]} and their probabilities; rows from `count` on are meaningless."""

    count: Tensor
    light: Tensor
    xy: Tensor
    score: Tensor
    attributes: dict[str, Tensor]
    probabilities: dict[str, Tensor]

    def to(self, device: torch.device | str) -> Detections:
        """The same detections on another device."""

        def moved(value: Any) -> Any:
            return (
                {name: item.to(device) for name, item in value.items()} if isinstance(value, dict) else value.to(device)
            )

        return Detections(**{name: moved(value) for name, value in vars(self).items()})


class _Neck(nn.Module):
    """Top-down merge of the stages' maps onto the finest one: lateral 1x1 convolutions, nearest upsampling, two 3x3."""

    def __init__(self, channels: Sequence[int], width: int):
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
                for _ in range(2)
            )
        )

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        merged = None
        for lateral, feature_map in zip(reversed(self.laterals), reversed(maps), strict=True):
            here = lateral(feature_map)
            merged = here if merged is None else here + F.interpolate(merged, size=here.shape[-2:], mode="nearest")
        return self.blocks(merged)


class SceneRecogniser(ModelMixin, ConfigMixin):
    """Reads shape, color, size and material of every object, the number of objects and the light from a picture.

    The word lists are part of the config (they default to those of `armm.data.scenes`), so a saved recogniser keeps its
    meaning.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        channels: tuple[int, ...] = (48, 96, 160, 192),
        layers: tuple[int, ...] = (1, 1, 1, 1),
        stem_width: int = 24,
        neck_width: int = 96,
        image_size: int = 64,
        max_objects: int = 3,
        shapes: tuple[str, ...] | None = None,
        colors: tuple[str, ...] | None = None,
        sizes: tuple[str, ...] | None = None,
        materials: tuple[str, ...] | None = None,
        lights: tuple[str, ...] | None = None,
    ):
        super().__init__()
        words = _scene_words()
        given = {"shape": shapes, "color": colors, "size": sizes, "material": materials, "light": lights}
        self.words = {name: tuple(given[name] or words[name]) for name in words}
        self.register_to_config(**{f"{name}s": list(values) for name, values in self.words.items()})
        self.backbone = ResNet(
            BasicBlock,
            list(layers),
            num_classes=0,
            channels=tuple(channels),
            stem_type="deep",
            stem_width=stem_width,
            zero_init_last=False,
        )
        self.neck = _Neck(channels, neck_width)
        self._splits = [1, 2, *(len(self.words[name]) for name in OBJECT_ATTRIBUTES)]
        self.cell_head = nn.Conv2d(neck_width, sum(self._splits), 1)
        nn.init.zeros_(self.cell_head.bias)
        with torch.no_grad():
            self.cell_head.bias[0] = -4.0  # most cells hold no object's centre
        self.feature_dim = channels[-1] + neck_width
        self.light_head = nn.Linear(self.feature_dim, len(self.words["light"]))
        self.count_head = nn.Sequential(
            nn.Linear(self.feature_dim, neck_width), nn.ReLU(), nn.Linear(neck_width, max_objects)
        )

    def forward(self, images: Tensor) -> RecogniserMaps:
        """images [B, 3, H, W] in [-1, 1], of any size: brought to the config's size first."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be [B, 3, H, W] in [-1, 1], got shape {tuple(images.shape)}.")
        images = fit(images, self.config.image_size).contiguous(memory_format=torch.channels_last)
        stages = self.backbone.forward_intermediates(images, intermediates_only=True)[1:]
        cells = self.neck(stages)
        features = torch.cat([stages[-1].mean((2, 3)), cells.mean((2, 3))], dim=1)
        objectness, offset, *attributes = self.cell_head(cells).float().split(self._splits, dim=1)
        return RecogniserMaps(
            objectness=objectness[:, 0],
            offset=offset,
            attributes=dict(zip(OBJECT_ATTRIBUTES, attributes, strict=True)),
            light=self.light_head(features).float(),
            count=self.count_head(features).float(),
            features=features.float(),
        )

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Pooled features [B, F] of the last stage and of the neck, for the Frechet distance."""
        return self.forward(self._ready(images)).features

    @torch.no_grad()
    def detect(self, images: Tensor, count: Tensor | None = None) -> Detections:
        """Decode pictures [B, 3, H, W]; `count` [B] overrides the model's own count (1 to max_objects)."""
        return decode(self.forward(self._ready(images)), self.config.max_objects, count)

    def recognise(self, images: Tensor) -> list[SceneReading]:
        """Read pictures [B, 3, H, W] in [-1, 1] into one `SceneReading` each."""
        seen = self.detect(images)
        readings = []
        for row in range(len(images)):
            objects = []
            for k in range(int(seen.count[row])):
                entry: dict[str, Any] = {
                    name: self.words[name][int(seen.attributes[name][row, k])] for name in OBJECT_ATTRIBUTES
                }
                entry["x"], entry["y"] = (float(v) for v in seen.xy[row, k])
                entry["score"] = float(seen.score[row, k])
                objects.append(entry)
            scores = {name: float(value[row]) for name, value in seen.probabilities.items() if value.ndim == 1}
            for name in OBJECT_ATTRIBUTES:
                scores[name] = float(seen.probabilities[name][row, : len(objects)].prod())
            readings.append(SceneReading(objects, self.words["light"][int(seen.light[row])], scores))
        return readings

    def _ready(self, images: Tensor) -> Tensor:
        if self.training:
            raise ValueError("The recogniser is in training mode; call .eval() before reading pictures with it.")
        return images.to(device=self.device, dtype=self.dtype)


def fit(images: Tensor, size: int) -> Tensor:
    """Bring images [B, 3, H, W] to [B, 3, size, size], bilinearly with antialiasing; untouched when they fit."""
    if images.shape[-2:] == (size, size):
        return images
    resized = F.interpolate(images.float(), size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    return resized.to(images.dtype)


def cell_centres(maps: RecogniserMaps) -> Tensor:
    """Object centres that the cells point at, [B, 2, G, G] in cells (x, y)."""
    rows, columns = maps.objectness.shape[-2:]
    device = maps.objectness.device
    y, x = torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij")
    return torch.stack([x, y]).float() + 0.5 + maps.offset


def decode(maps: RecogniserMaps, max_objects: int, count: Tensor | None = None, radius: float = 1.25) -> Detections:
    """Take the `count` best centres of each picture. A centre taken silences every cell that points closer than `radius`
    cells to it: unlike a 3x3 window this keeps two objects whose centres lie in neighbouring cells apart."""
    batch, rows, columns = maps.objectness.shape
    chance = maps.objectness.sigmoid().flatten(1)
    centres = cell_centres(maps).flatten(2).transpose(1, 2)  # [B, G*G, 2]
    count_probability, own_count = maps.count.softmax(-1).max(-1)
    light_probability, light = maps.light.softmax(-1).max(-1)
    attributes = {name: value.flatten(2).softmax(1).max(1) for name, value in maps.attributes.items()}

    row = torch.arange(batch, device=chance.device)
    cells, scores = [], []
    for _ in range(max_objects):
        score, cell = chance.max(-1)
        taken = centres[row, cell]
        near = (centres - taken[:, None]).square().sum(-1) < radius * radius
        chance = chance.masked_fill(near, 0.0)
        chance[row, cell] = 0.0
        cells.append(cell)
        scores.append(score)
    cell, score = torch.stack(cells, 1), torch.stack(scores, 1)
    scale = torch.tensor([columns, rows], device=chance.device)
    return Detections(
        count=own_count + 1 if count is None else count.to(own_count),
        light=light,
        xy=centres.gather(1, cell[..., None].expand(-1, -1, 2)) / scale,
        score=score,
        attributes={name: index.gather(1, cell) for name, (_, index) in attributes.items()},
        probabilities={name: value.gather(1, cell) for name, (value, _) in attributes.items()}
        | {"count": count_probability, "light": light_probability},
    )


def _scene_words() -> dict[str, tuple[str, ...]]:
    from armm.data import scenes

    return {
        "shape": tuple(scenes.SHAPES),
        "color": tuple(scenes.COLORS),
        "size": tuple(scenes.SIZES),
        "material": tuple(scenes.MATERIALS),
        "light": tuple(scenes.LIGHTS),
    }
