"""The geometry of a reading row (masks and positions of parallel segments), and grids of captioned pictures."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor


def reading_positions(prefix: int, segments: Sequence[int]) -> Tensor:
    """Flat position ids int64 [L]: the prefix counts from 0, and every segment continues where the prefix ended."""
    return torch.cat([torch.arange(prefix), *(prefix + torch.arange(length) for length in segments)])


def reading_mask(prefix: int, segments: Sequence[int], bidirectional: int = 0) -> Tensor:
    """Bool [L, L], True where a row's token may look: causal, and in no segment but its own.

    The first `bidirectional` tokens see each other whole.
    """
    owner = torch.cat([torch.zeros(prefix), *(torch.full((length,), i + 1.0) for i, length in enumerate(segments))])
    causal = torch.ones(len(owner), len(owner), dtype=torch.bool).tril()
    causal[:, :bidirectional] = True
    return causal & ((owner[None, :] == 0) | (owner[None, :] == owner[:, None]))


def save_captioned_grid(images: Sequence[Image.Image], captions: Sequence[str], path: Path, columns: int = 4) -> None:
    """Writes pictures with their captions below them as one PNG."""
    side, gap, text_height = 192, 8, 48
    rows = -(-len(images) // columns)
    canvas = Image.new("RGB", (columns * (side + gap) + gap, rows * (side + text_height + gap) + gap), "white")
    draw = ImageDraw.Draw(canvas)
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = gap + index % columns * (side + gap), gap + index // columns * (side + text_height + gap)
        canvas.paste(image.resize((side, side), Image.Resampling.NEAREST), (left, top))
        draw.multiline_text((left, top + side + 2), "\n".join(textwrap.wrap(caption, 32)[:4]), fill="black", spacing=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    canvas.save(temporary, format="PNG")
    os.replace(temporary, path)
