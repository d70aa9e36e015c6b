"""Images as training sees them: uint8 <-> [-1, 1], and grids for the eye."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from PIL import Image


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """uint8 `[B, 3, H, W]` -> float32 in [-1, 1]."""
    return images.float().div_(127.5).sub_(1.0)


def to_uint8(pixels: torch.Tensor) -> torch.Tensor:
    """Float `[B, 3, H, W]` in [-1, 1] (clamped) -> uint8."""
    return pixels.float().clamp(-1, 1).add(1.0).mul(127.5).round().to(torch.uint8)


def save_grid(pixels: torch.Tensor, path: Path, columns: int = 8, scale: int = 2, gap: int = 2) -> None:
    """Writes pixels `[B, 3, H, W]` in [-1, 1] as one PNG of `columns` columns, enlarged `scale` times."""
    images = to_uint8(pixels).cpu()
    count, _, height, width = images.shape
    rows = -(-count // columns)
    canvas = torch.full((3, rows * (height + gap) + gap, columns * (width + gap) + gap), 255, dtype=torch.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        canvas[:, top : top + height, left : left + width] = image
    picture = Image.fromarray(canvas.permute(1, 2, 0).numpy())
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    temporary = path.with_name(f".{path.name}.tmp")
    picture.save(temporary, format="PNG")
    os.replace(temporary, path)
