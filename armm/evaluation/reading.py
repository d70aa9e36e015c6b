"""Readings against the truth: which detected object is which real one, and what was read rightly.

Shapes: B scenes, K detections and real objects a scene (at most 3).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import permutations

import torch
from torch import Tensor

from armm.data.scenes import Scenes, centre_heights, project, unproject
from armm.data.scenes.graph import pair_relations

from .recogniser import OBJECT_ATTRIBUTES, Detections

ATTRIBUTES = (*OBJECT_ATTRIBUTES, "light", "count", "relation")
MATCH_DISTANCE = 0.12  # of the picture's width: a detection farther away is not this object


@dataclass
class Tally:
    """Counts of right readings and of all readings, attribute by attribute; `whole` counts scenes read without a fault."""

    right: dict[str, int] = field(default_factory=lambda: dict.fromkeys((*ATTRIBUTES, "whole"), 0))
    total: dict[str, int] = field(default_factory=lambda: dict.fromkeys((*ATTRIBUTES, "whole"), 0))

    def add(self, marks: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Adds what `compare` returned."""
        for name, (right, total) in marks.items():
            self.right[name] += int(right.sum())
            self.total[name] += int(total.sum())
        faultless = torch.stack([right == total for right, total in marks.values()]).all(0)
        self.right["whole"] += int(faultless.sum())
        self.total["whole"] += len(faultless)

    def accuracy(self) -> dict[str, float]:
        """Shares of right readings; attributes that never occurred are left out."""
        return {name: self.right[name] / total for name, total in self.total.items() if total}


def match(detections: Detections, scenes: Scenes) -> Tensor:
    """Assign detections to the real objects by the smallest summed distance on the screen: [B, K] int64, the detection of
    each real object, -1 where the object is absent or was missed."""
    present = scenes.present
    slots = present.shape[1]
    centres = project(scenes)
    seen = torch.arange(slots, device=present.device) < detections.count[:, None]  # [B, K]
    squared = (detections.xy[:, :, None] - centres[:, None]).square().sum(-1)  # [B, detection, object]
    cost = squared.masked_fill(~seen[:, :, None], 1e3) * present[:, None]
    orders = torch.tensor(list(permutations(range(slots))), device=present.device)  # [P, K]: detection of each object
    columns = torch.arange(slots, device=present.device)
    summed = cost[:, orders, columns].sum(-1)  # [B, P]
    assigned = orders[summed.argmin(-1)]
    distance = squared.gather(1, assigned[:, None])[:, 0]
    valid = present & seen.gather(1, assigned) & (distance < MATCH_DISTANCE**2)
    return assigned.masked_fill(~valid, -1)


def plane_positions(xy: Tensor, shape: Tensor, size: Tensor) -> Tensor:
    """Screen centres [..., 2] of objects read as `shape` and `size` (indices) -> where they stand, (x, z) [..., 2]."""
    return unproject(xy.float(), centre_heights(shape, size))


def compare(detections: Detections, scenes: Scenes) -> dict[str, tuple[Tensor, Tensor]]:
    """Attribute -> (right [B], total [B]): how many readings there were to make in each scene and how many were right.

    A missed object is wrong in every attribute; one that is not there is a wrong count. Relations are counted over pairs,
    from the plane positions that the read shapes and sizes imply.
    """
    present = scenes.present
    assigned = match(detections, scenes)
    matched, source = assigned >= 0, assigned.clamp(min=0)
    read = {name: detections.attributes[name].gather(1, source) for name in OBJECT_ATTRIBUTES}
    marks = {
        name: ((matched & (read[name] == getattr(scenes, name))).sum(1), present.sum(1)) for name in OBJECT_ATTRIBUTES
    }
    one = torch.ones_like(scenes.count)
    marks["light"] = ((detections.light == scenes.light).long(), one)
    marks["count"] = ((detections.count == scenes.count).long(), one)
    xy = detections.xy.gather(1, source[..., None].expand(-1, -1, 2))
    relations = pair_relations(plane_positions(xy, read["shape"], read["size"]))
    same = relations == pair_relations(scenes.position)
    pairs = (present[:, :, None] & present[:, None, :]).triu(1)
    found = (matched[:, :, None] & matched[:, None, :]).triu(1)
    marks["relation"] = ((same & found & pairs).sum((1, 2)), pairs.sum((1, 2)))
    return marks


def perfect_detections(scenes: Scenes) -> Detections:
    """The reading of an eye without error."""
    attributes = {name: getattr(scenes, name).clamp(min=0) for name in OBJECT_ATTRIBUTES}
    ones = torch.ones(scenes.present.shape, device=scenes.device)
    return Detections(
        count=scenes.count.clone(),
        light=scenes.light.clone(),
        xy=project(scenes).clone(),
        score=ones,
        attributes={name: value.clone() for name, value in attributes.items()},
        probabilities={name: ones for name in OBJECT_ATTRIBUTES} | {"light": ones[:, 0], "count": ones[:, 0]},
    )


def tally(recogniser: torch.nn.Module, batches: Iterable[tuple[Tensor, Scenes]]) -> Tally:
    """Read (pixels [B, 3, H, W] in [-1, 1], scenes) batches and count."""
    result = Tally()
    for pixels, scenes in batches:
        detections = recogniser.detect(pixels)
        result.add(compare(detections, scenes.to(detections.count.device)))
    return result
