"""An explained answer: its words, a map of the picture for each, and pictures of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import PIL.Image
import PIL.ImageDraw
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Explanation:
    """What `pipe.explain` returns.

    Args:
        picture: as the model saw it.
        question, answer: texts.
        words: pieces of the answer.
        maps: for each piece, how much of it comes from where: float64 [h, w] in 0 .. 1.
        context: for each piece, scores of the question's pieces and the answer's before it, on the scale of its map.
        method: by which the maps were made.
    """

    picture: PIL.Image.Image
    question: str
    answer: str
    words: list[str]
    maps: list[Tensor]
    context: list[list[float]] = field(default_factory=list)
    method: str = "tam"

    def overlay(self, word: int | str = 0, size: int = 256) -> PIL.Image.Image:
        """The picture under the map of a word (its number, or the piece itself), warm where the word comes from."""
        number = self.words.index(word) if isinstance(word, str) else word
        values = F.interpolate(self.maps[number][None, None], size=(size, size), mode="bilinear", align_corners=False)
        heat = jet(values[0, 0].clamp(0, 1))
        ground = np.asarray(self.picture.resize((size, size), PIL.Image.Resampling.BICUBIC), dtype=np.float64)
        return PIL.Image.fromarray((0.5 * ground + 0.5 * heat).round().astype(np.uint8))

    def image(self, size: int = 192, columns: int = 5) -> PIL.Image.Image:
        """All words side by side: the picture, then an overlay for each, with captions."""
        panels = [(self.question or "", self.picture.resize((size, size), PIL.Image.Resampling.BICUBIC))]
        panels += [(word, self.overlay(number, size)) for number, word in enumerate(self.words)]
        columns = min(columns, len(panels))
        rows, line = math.ceil(len(panels) / columns), 18
        sheet = PIL.Image.new("RGB", (columns * (size + 8) + 8, rows * (size + line + 8) + 8), "white")
        draw = PIL.ImageDraw.Draw(sheet)
        for number, (caption, panel) in enumerate(panels):
            left, top = 8 + number % columns * (size + 8), 8 + number // columns * (size + line + 8)
            sheet.paste(panel, (left, top))
            # Pillow's own font knows Latin letters only.
            shown = caption.strip().encode("latin-1", "replace").decode("latin-1")[: size // 6]
            draw.text((left, top + size + 2), shown, fill="black")
        return sheet

    def mass_inside(self, mask: Tensor) -> list[float]:
        """For each word, the share of its map that lies inside `mask` bool [H, W]; nan for an empty map."""
        shares = []
        for values in self.maps:
            spread = F.interpolate(values[None, None], size=tuple(mask.shape), mode="nearest")[0, 0]
            total = float(spread.sum())
            shares.append(float(spread[mask].sum()) / total if total > 0 else math.nan)
        return shares


def jet(values: Tensor) -> np.ndarray:
    """Values [H, W] in 0 .. 1 as colors float64 [H, W, 3] in 0 .. 255, blue over green to red."""
    levels = torch.stack([1.5 - (4 * values - centre).abs() for centre in (3.0, 2.0, 1.0)], dim=-1)
    return (levels.clamp(0, 1) * 255).double().cpu().numpy()
