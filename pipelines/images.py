"""Images that a person gives, in any of the usual forms, as what a model reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch

# Larger pictures are refused: decoding them would take gigabytes before they are made small.
MAX_PIXELS = 200_000_000


def pictures(image: Any, name: str = "image") -> list[PIL.Image.Image]:
    """RGB pictures of images.

    Args:
        image: a PIL image, or a list of them; a uint8 or float array [H, W, 3] or [B, H, W, 3], floats in [0, 1]; a uint8 or
            float tensor [3, H, W] or [B, 3, H, W], floats in [0, 1]; or a list of such arrays or tensors.
        name: of the argument, for error messages.

    Raises:
        TypeError: none of these. ValueError: an array of another shape or range, an empty list, a huge or a damaged picture.
    """
    if isinstance(image, (list, tuple)):
        if not image:
            raise ValueError(f"`{name}` is an empty list: give at least one image.")
        return [picture for item in image for picture in pictures(item, name)]
    if isinstance(image, PIL.Image.Image):
        return [loaded(image, name).convert("RGB")]
    if isinstance(image, (np.ndarray, torch.Tensor)):
        return [PIL.Image.fromarray(item) for item in _as_uint8(image, name)]
    raise TypeError(f"`{name}` must be a PIL image, an array, a tensor or a list of them, got {type(image).__name__}.")


def loaded(image: PIL.Image.Image, name: str = "image") -> PIL.Image.Image:
    """`image` with its pixels in memory; a ValueError where it is huge or damaged."""
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(
            f"`{name}` has {image.width} x {image.height} pixels, at most {MAX_PIXELS} are read: make it smaller first."
        )
    try:
        image.load()
    except (OSError, SyntaxError) as error:
        raise ValueError(f"`{name}` is a damaged picture ({error}).") from error
    return image


def images_to_pixels(image: Any, size: tuple[int, int], name: str = "image") -> torch.Tensor:
    """Images (see `pictures`) as float32 pixels [B, 3, H, W] in [-1, 1] of `size` (height, width); those of another size are
    cropped in the middle to the model's shape, then resized."""
    height, width = size
    rows = []
    for picture in pictures(image, name):
        if picture.size != (width, height):
            scale = min(picture.width / width, picture.height / height)
            crop_width, crop_height = max(1, round(width * scale)), max(1, round(height * scale))
            left, top = (picture.width - crop_width) // 2, (picture.height - crop_height) // 2
            box = (left, top, left + crop_width, top + crop_height)
            picture = picture.resize((width, height), PIL.Image.Resampling.BICUBIC, box=box, reducing_gap=None)
        rows.append(np.array(picture))
    return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def square_pixels(
    image: Any, size: int, mean: Sequence[float], std: Sequence[float], min_size: int = 1, name: str = "image"
) -> torch.Tensor:
    """Images (see `pictures`) as normalised pixels float32 [B, 3, size, size]: the longer side fills the square, the rest is the mean
    color. Sides are truncated, as Janus (arXiv 2410.13848) does it."""
    fill = tuple(int(value * 255) for value in mean)
    shift, scale = (torch.tensor(list(values), dtype=torch.float32)[:, None, None] for values in (mean, std))
    rows = []
    for picture in pictures(image, name):
        longest = max(picture.size)
        width, height = (max(int(side / longest * size), min_size) for side in picture.size)
        small = picture.resize((width, height), PIL.Image.Resampling.BICUBIC)
        square = PIL.Image.new("RGB", (size, size), fill)  # type: ignore[arg-type]
        square.paste(small, ((size - width) // 2, (size - height) // 2))
        rows.append(np.array(square))
    pixels = torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).float() * (1 / 255)
    return (pixels - shift) / scale


def _as_uint8(image: np.ndarray | torch.Tensor, name: str) -> np.ndarray:
    """An array [.., H, W, 3] or a tensor [.., 3, H, W] -> uint8 array [B, H, W, 3]."""
    expected = "[3, H, W] or [B, 3, H, W]" if isinstance(image, torch.Tensor) else "[H, W, 3] or [B, H, W, 3]"
    axis = -3 if isinstance(image, torch.Tensor) else -1
    if image.ndim not in (3, 4) or image.shape[axis] != 3 or 0 in image.shape:
        raise ValueError(f"`{name}` must have shape {expected}, got {tuple(image.shape)}.")
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu().movedim(-3, -1)
        image = (image.float() if image.is_floating_point() else image).numpy()
    if image.ndim == 3:
        image = image[None]
    if image.dtype == np.uint8:
        return np.ascontiguousarray(image)
    if not np.issubdtype(image.dtype, np.floating):
        raise TypeError(f"`{name}` must be uint8 in 0 .. 255 or floating point in 0 .. 1, got {image.dtype}.")
    if not np.isfinite(image).all() or image.min() < -1e-3 or image.max() > 1 + 1e-3:
        raise ValueError(
            f"`{name}` must lie in [0, 1] as floating point, got values from {image.min():.3g} to {image.max():.3g}: rescale it."
        )
    return np.ascontiguousarray((image.clip(0, 1) * 255).round().astype(np.uint8))
