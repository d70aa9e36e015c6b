"""Arguments that calls of many pipelines have: texts, sizes, ids to keep, recorded noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .settings import check_number


def text_list(texts: Any, name: str) -> list[str]:
    """A text or a list of them as a list; anything else is a TypeError."""
    listed = [texts] if isinstance(texts, str) else texts
    if not isinstance(listed, (list, tuple)) or not listed or not all(isinstance(text, str) for text in listed):
        raise TypeError(f"`{name}` must be a string or a non-empty list of strings, got {texts!r}.")
    return list(listed)


def grid_of_size(
    height: int | None, width: int | None, own: Sequence[int], step: int, unit: str = "token"
) -> tuple[int, int]:
    """The grid of an image of `height` x `width` pixels.

    Args:
        own: (height, width) of the checkpoint's grid, for sides that are None.
        step: pixels of a cell.
        unit: what a cell is.
    """
    sides = []
    for name, value, cells in zip(("height", "width"), (height, width), own, strict=True):
        value = cells * step if value is None else value
        check_number(name, value, low=step, integer=True)
        if value % step:
            raise ValueError(f"`{name}` must be a multiple of {step}, the pixels of a {unit}, got {value}.")
        sides.append(int(value) // step)
    return sides[0], sides[1]


def common_count(counts: Mapping[str, int]) -> int:
    """The number of images of a call of which so many of each argument are given; a ValueError unless one for all or one for each."""
    count = max(counts.values())
    for name, given in counts.items():
        if given not in (1, count):
            raise ValueError(f"`{name}` has {given} entries for {count} images: give one for all or one for each.")
    return count


def known_ids(
    latents: Any, batch: int, shape: Sequence[int], codes: int, device: torch.device
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The ids to keep and where, both [B, *shape]: `latents` (for one image or for all) with -1 at open places; None for None.

    Args:
        shape: of the ids of one image.
        codes: how many ids there are.
    """
    if latents is None:
        return None, None
    if not isinstance(latents, torch.Tensor) or latents.dtype != torch.int64:
        raise TypeError("`latents` must be an int64 tensor of ids, -1 where they are to be generated.")
    expected = [batch, *shape]
    if latents.dim() != len(expected) or latents.shape[0] not in (1, batch) or list(latents.shape[1:]) != expected[1:]:
        raise ValueError(f"`latents` must be {expected} for this call, got {list(latents.shape)}.")
    if int(latents.min()) < -1 or int(latents.max()) >= codes:
        raise ValueError(f"`latents` must lie between -1 (open) and {codes - 1}.")
    latents = latents.to(device).expand(expected)
    return latents.clamp(min=0), latents >= 0


def check_noise(noise: Any, expected: Sequence[int], axes: str) -> None:
    """Raises ValueError unless recorded `noise` is None or a tensor of the shape `expected`, whose axes are called `axes`."""
    if noise is not None and (not isinstance(noise, torch.Tensor) or list(noise.shape) != list(expected)):
        shape = list(noise.shape) if isinstance(noise, torch.Tensor) else type(noise).__name__
        raise ValueError(f"`noise` must be a tensor {list(expected)} [{axes}], got {shape}.")
