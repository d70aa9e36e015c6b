"""Gives a restored picture the colors of its input: by wavelets (StableSR, arXiv 2305.07015) or by channel statistics."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 5
_KERNEL = (1.0, 2.0, 1.0)


def _blur(image: Tensor, radius: int) -> Tensor:
    """3x3 binomial blur of [B, C, H, W] with so many pixels between its taps; the border is repeated."""
    channels = image.shape[1]
    line = torch.tensor(_KERNEL, dtype=image.dtype, device=image.device)
    kernel = (line[:, None] * line / 16.0).expand(channels, 1, 3, 3)
    padded = F.pad(image, (radius,) * 4, mode="replicate")
    return F.conv2d(padded, kernel, groups=channels, dilation=radius)


def _split(image: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """The details and the rest of an image."""
    details = torch.zeros_like(image)
    for level in range(levels):
        low = _blur(image, 2**level)
        details = details + (image - low)
        image = low
    return details, image


def _check(target: Tensor, source: Tensor) -> None:
    if target.dim() != 4 or target.shape != source.shape:
        raise ValueError(
            f"target and source must be [B, C, H, W] of one shape, got {tuple(target.shape)} and {tuple(source.shape)}"
        )


def wavelet_color_fix(target: Tensor, source: Tensor, levels: int = LEVELS) -> Tensor:
    """The details of `target` [B, C, H, W] on the colors of `source`, both in [0, 1]; the result is not clamped."""
    _check(target, source)
    return _split(target, levels)[0] + _split(source, levels)[1]


def adain_color_fix(target: Tensor, source: Tensor) -> Tensor:
    """`target` [B, C, H, W] with the mean and the deviation of each channel of `source`, both in [0, 1]; not clamped."""
    _check(target, source)

    def statistics(image: Tensor) -> tuple[Tensor, Tensor]:
        flat = image.flatten(2)
        return flat.mean(2)[..., None, None], (flat.var(2) + 1e-5).sqrt()[..., None, None]

    mean, deviation = statistics(target)
    wanted_mean, wanted_deviation = statistics(source)
    return (target - mean) / deviation * wanted_deviation + wanted_mean


COLOR_FIXES = {"wavelet": wavelet_color_fix, "adain": adain_color_fix}
