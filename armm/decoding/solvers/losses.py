"""What a diffusion head is trained with (improved DDPM, Nichol & Dhariwal, arXiv 2102.09672)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from armm.decoding.solvers.diffusion import DiffusionSolver

__all__ = ["DiffusionLosses", "diffusion_losses"]

HALF_STEP = 1.0 / 255.0  # half of the distance between two of 256 values in [-1, 1]


@dataclass
class DiffusionLosses:
    """Of every token, [B, n]: mse of the predicted noise, and bound, the term of the variational bound in bits for each channel, which
    trains the variance only (0 where the variance is fixed)."""

    mse: Tensor
    bound: Tensor

    @property
    def total(self) -> Tensor:
        return self.mse + self.bound


def diffusion_losses(
    solver: DiffusionSolver,
    predict: Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]],
    target: Tensor,
    timesteps: Tensor,
    noise: Tensor,
) -> DiffusionLosses:
    """Losses of tokens `target` [B, n, C] that are noised to `timesteps` [B, n] with `noise` [B, n, C].

    predict(x, timesteps) -> the noise in x, and the interpolation of the variance or None; see `armm.heads.diffusion`.
    """
    tables = solver.tables(solver.num_train_timesteps)

    def at(table: Tensor) -> Tensor:
        return table.to(timesteps.device)[timesteps].float()[..., None]

    cumulative = tables.alphas_cumprod
    x = at(cumulative.sqrt()) * target + at((1 - cumulative).sqrt()) * noise
    predicted, interpolation = predict(x, timesteps)
    predicted = predicted.float()
    mse = (noise - predicted).square().mean(-1)
    if interpolation is None:
        return DiffusionLosses(mse, torch.zeros_like(mse))
    share = (interpolation.float() + 1) / 2
    low, high = at(tables.posterior_log_variance), at(tables.log_betas)
    log_variance = share * high + (1 - share) * low
    value = at((1 / cumulative).sqrt()) * x - at((1 / cumulative - 1).sqrt()) * predicted.detach()
    from_value, from_state = at(tables.posterior_mean_coef1), at(tables.posterior_mean_coef2)
    mean = from_value * value + from_state * x
    true_mean = from_value * target + from_state * x
    divergence = 0.5 * (
        log_variance - low - 1 + (low - log_variance).exp() + (true_mean - mean).square() * (-log_variance).exp()
    )
    likelihood = -_discretised_log_likelihood(target, mean, 0.5 * log_variance)
    bound = torch.where(timesteps[..., None] == 0, likelihood, divergence).mean(-1) / math.log(2.0)
    return DiffusionLosses(mse, bound)


def _discretised_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Of values in [-1, 1] with 256 levels under Gaussians whose tails belong to the outermost levels."""
    inverse, centred = (-log_scale).exp(), x - mean
    above, below = _normal_cdf(inverse * (centred + HALF_STEP)), _normal_cdf(inverse * (centred - HALF_STEP))
    inside = (above - below).clamp(min=1e-12).log()
    upper = torch.where(x > 0.999, (1 - below).clamp(min=1e-12).log(), inside)
    return torch.where(x < -0.999, above.clamp(min=1e-12).log(), upper)


def _normal_cdf(x: Tensor) -> Tensor:
    """The usual approximation with a hyperbolic tangent."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
