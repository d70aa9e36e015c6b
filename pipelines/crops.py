"""Pictures made ready for tokenizers of images of flexible shape: alpha, Chameleon's square, Lumina-mGPT's crops."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import PIL.Image
import torch

_Resampling = PIL.Image.Resampling


def on_white(image: PIL.Image.Image) -> PIL.Image.Image:
    """An RGB picture; where `image` is transparent, white shines through."""
    if image.mode == "RGB":
        return image
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return image.convert("RGB")
    values = np.array(image.convert("RGBA"), dtype=np.float64)
    alpha = values[..., 3:] / 255
    return PIL.Image.fromarray(((1 - alpha) * 255 + alpha * values[..., :3]).astype(np.uint8))


def square(image: PIL.Image.Image, size: int) -> PIL.Image.Image:
    """The shorter side resized to `size` (Lanczos), then the middle `size` x `size` (Chameleon)."""
    scale = size / min(image.size)
    width, height = (round(scale * side) for side in image.size)
    image = image.resize((width, height), _Resampling.LANCZOS)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def crop_sizes(patches: int, unit: int, max_ratio: float = 4.0) -> list[tuple[int, int]]:
    """(width, height) in pixels of shapes of at most `patches` units of `unit` pixels, none longer than `max_ratio` times its other
    side, from the widest to the tallest (Lumina-mGPT)."""
    if patches < 1 or unit < 1:
        raise ValueError(f"patches and unit must be at least 1, got {patches} and {unit}")
    sizes, width, height = [], patches, 1
    while width > 0:
        if max(width, height) / min(width, height) <= max_ratio:
            sizes.append((width * unit, height * unit))
        if (height + 1) * width <= patches:
            height += 1
        else:
            width -= 1
    return sizes


def best_crop(size: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The (width, height) among `sizes` that loses least of a picture of `size`; of equals the larger tuple."""

    def kept(crop: tuple[int, int]) -> float:
        ratios = (crop[0] / size[0], crop[1] / size[1])
        return min(ratios) / max(ratios)

    return max((kept(crop), crop) for crop in sizes)[1]


def crop_to(image: PIL.Image.Image, size: tuple[int, int], generator: torch.Generator | None = None) -> PIL.Image.Image:
    """A picture of `size` (width, height) out of `image`: halved while it is twice as large, scaled to cover, cropped.

    generator: draws the place of the crop, as in training; None takes the middle.
    """
    width, height = size
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), _Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    image = image.resize((round(image.width * scale), round(image.height * scale)), _Resampling.BICUBIC)
    offsets = []
    for room in (image.width - width, image.height - height):
        drawn = room // 2 if generator is None else int(torch.randint(room + 1, (1,), generator=generator))
        offsets.append(drawn)
    left, top = offsets
    return image.crop((left, top, left + width, top + height))


def variable_crop(
    image: PIL.Image.Image, sizes: Sequence[tuple[int, int]], generator: torch.Generator | None = None
) -> PIL.Image.Image:
    """`image` in the best of the shapes `sizes`; see `crop_to`."""
    return crop_to(image, best_crop(image.size, sizes), generator)


def to_pixels(image: PIL.Image.Image) -> torch.Tensor:
    """An RGB picture as float32 pixels [1, 3, H, W] in [-1, 1]."""
    array = np.array(image, dtype=np.float64)
    return torch.from_numpy(array / 255.0 * 2.0 - 1.0).float().permute(2, 0, 1)[None]
