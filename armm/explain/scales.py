"""One picture at several scales, for models whose eye has one size: crops of it, or it on a larger ground (after arXiv 2509.22415)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class View:
    """What is shown of a picture: a box (left, top, right, bottom) in units of its sides; it may be larger than the picture."""

    box: tuple[float, float, float, float]

    def of(self, picture: PIL.Image.Image) -> PIL.Image.Image:
        """The view at the picture's own size, on its mean color."""
        width, height = picture.size
        left, top, right, bottom = self.box
        mean = picture.resize((1, 1), PIL.Image.Resampling.BOX).getpixel((0, 0))
        # Enough ground around the picture for every view of it.
        ground = PIL.Image.new("RGB", (3 * width, 3 * height), mean)  # type: ignore[arg-type]
        ground.paste(picture, (width, height))
        box = ((1 + left) * width, (1 + top) * height, (1 + right) * width, (1 + bottom) * height)
        return ground.resize((width, height), PIL.Image.Resampling.BICUBIC, box=box)


def views(scale: float) -> list[View]:
    """The views of one scale: the whole picture made smaller, or four overlapping corners made larger."""
    if not 0.34 <= scale <= 4:
        raise ValueError(f"scale must lie between 0.34 and 4, got {scale}")
    side = 1 / scale
    if scale <= 1:
        margin = (side - 1) / 2
        return [View((-margin, -margin, 1 + margin, 1 + margin))]
    return [View((x, y, x + side, y + side)) for y in (0.0, 1 - side) for x in (0.0, 1 - side)]


def combine_views(maps: Sequence[Sequence[tuple[View, Tensor]]], size: tuple[int, int]) -> Tensor:
    """The maps [h, w] of the views of several scales as one map `size` (height, width) of the picture: averaged within a scale, scaled
    to 0 .. 1, and averaged over the scales."""
    height, width = size
    y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    total = torch.zeros(size, dtype=torch.float64)
    for scale in maps:
        placed, covered = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
        for view, values in scale:
            left, top, right, bottom = view.box
            inside_x, inside_y = (x - left) / (right - left), (y - top) / (bottom - top)
            where = torch.stack([2 * inside_x - 1, 2 * inside_y - 1], dim=-1)[None].to(torch.float64)
            sampled = F.grid_sample(values.double()[None, None], where, padding_mode="border", align_corners=False)
            inside = ((inside_x >= 0) & (inside_x <= 1) & (inside_y >= 0) & (inside_y <= 1)).double()
            placed += sampled[0, 0] * inside
            covered += inside
        placed = placed / covered.clamp(min=1)
        low, high = placed.aminmax()
        total += (placed - low) / (high - low) if high > low else torch.zeros_like(placed)
    return total / len(maps)
