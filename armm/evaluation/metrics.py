"""Metrics over pictures and feature vectors, in plain torch: PSNR, SSIM and the Frechet distance."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def psnr(images: Tensor, references: Tensor, data_range: float = 2.0) -> Tensor:
    """Peak signal-to-noise ratio of each picture in dB, [B]; images and references [B, C, H, W] of one scale."""
    _same_shape(images, references)
    error = (images.double() - references.double()).square().flatten(1).mean(1)
    return 10.0 * torch.log10(data_range**2 / error)


def ssim(images: Tensor, references: Tensor, data_range: float = 2.0, window: int = 11, sigma: float = 1.5) -> Tensor:
    """Structural similarity of each picture, [B]: Gaussian window, k1 = 0.01, k2 = 0.03, mean over the places where the
    window fits in the picture and over channels (Wang et al. 2004)."""
    _same_shape(images, references)
    if min(images.shape[-2:]) < window:
        raise ValueError(f"ssim needs pictures of at least {window}x{window}, got {tuple(images.shape[-2:])}.")
    x, y = images.double(), references.double()
    channels = x.shape[1]
    ramp = torch.arange(window, dtype=torch.float64, device=x.device) - (window - 1) / 2
    kernel = torch.exp(-(ramp**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(channels, 1, window)

    def blur(values: Tensor) -> Tensor:
        values = F.conv2d(values, kernel[..., None, :], groups=channels)
        return F.conv2d(values, kernel[..., :, None], groups=channels)

    mean_x, mean_y = blur(x), blur(y)
    variance_x = blur(x * x) - mean_x**2
    variance_y = blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).flatten(1).mean(1)


def gaussian_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [F] and unbiased covariance [F, F] of feature rows [N, F], in float64."""
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features must be [N, F] with N >= 2, got shape {tuple(features.shape)}.")
    features = features.double()
    mean = features.mean(0)
    centred = features - mean
    return mean, centred.T @ centred / (len(features) - 1)


def frechet_distance_of_gaussians(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2)). The trace of the root is the sum of the root eigenvalues of
    A^(1/2) B A^(1/2), which is symmetric: no general matrix root and no complex numbers are needed."""
    values, vectors = torch.linalg.eigh(cov_a.double())
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    inner = root @ cov_b.double() @ root
    cross = torch.linalg.eigvalsh((inner + inner.T) / 2).clamp_min(0).sqrt().sum()
    shift = (mean_a.double() - mean_b.double()).square().sum()
    return max(0.0, float(shift + cov_a.double().trace() + cov_b.double().trace() - 2 * cross))


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Frechet distance between Gaussians fitted to two sets of feature rows, [N, F] and [M, F]."""
    if features_a.shape[-1] != features_b.shape[-1]:
        raise ValueError(f"feature widths differ: {features_a.shape[-1]} and {features_b.shape[-1]}.")
    return frechet_distance_of_gaussians(*gaussian_statistics(features_a), *gaussian_statistics(features_b))


def share_with_error(right: int | float, total: int) -> tuple[float, float]:
    """A share and its binomial standard error; (nan, nan) of nothing."""
    if total == 0:
        return math.nan, math.nan
    share = right / total
    return share, math.sqrt(share * (1 - share) / total)


def _same_shape(images: Tensor, references: Tensor) -> None:
    if images.shape != references.shape or images.ndim != 4:
        raise ValueError(
            f"images and references must both be [B, C, H, W] of one shape, got {tuple(images.shape)} and "
            f"{tuple(references.shape)}."
        )
