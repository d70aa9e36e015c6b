"""Ancestral sampling of a diffusion over any subset of its timesteps (DDPM, arXiv 2006.11239; improved, 2102.09672).

diffusers' `DDPMScheduler` walks the same path, but keeps its tables in float32, in which the noisiest entries (1 - 1e-9) lose all
their digits, takes a generator instead of noise, and knows no temperature; published samples are reproduced with float64 tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["DiffusionSolver", "DiffusionTables", "Steps", "check_timestep", "respaced_timesteps"]

# predict(state, call, timestep) -> (noise in the state, interpolation of the variance or None); calls are counted from 0
Predict = Callable[[Tensor, int, int], "tuple[Tensor, Tensor | None]"]
# A number, the numbers of equal sections from the cleanest to the noisiest ("10,5" or a list), or "ddim25" (a whole stride).
Steps = int | str | Sequence[int]


def respaced_timesteps(num_steps: Steps, total: int = 1000) -> list[int]:
    """The ascending timesteps, out of 0 .. total - 1, that so many steps visit (Nichol & Dhariwal, arXiv 2102.09672, section 4).

    Raises:
        ValueError: more steps than timesteps, less than 2, or no whole stride for "ddimN".
    """
    if isinstance(num_steps, str) and num_steps.startswith("ddim"):
        wanted = _number(num_steps.removeprefix("ddim"), num_steps)
        for whole in range(1, total):
            if len(range(0, total, whole)) == wanted:
                return list(range(0, total, whole))
        raise ValueError(f"num_steps {num_steps!r}: no whole stride gives exactly {wanted} of {total} timesteps")
    if isinstance(num_steps, str):
        sections = [_number(part, num_steps) for part in num_steps.split(",")]
    elif isinstance(num_steps, Sequence):
        sections = [_number(part, num_steps) for part in num_steps]
    else:
        sections = [_number(num_steps, num_steps)]
    if sum(sections) < 2:
        raise ValueError(f"num_steps must be at least 2, got {num_steps!r}")
    size, extra = divmod(total, len(sections))
    start, chosen = 0, []
    for section, steps in enumerate(sections):
        length = size + (section < extra)
        if steps > length:
            raise ValueError(f"num_steps {num_steps!r} asks for {steps} of the {length} timesteps of a section")
        stride = 1.0 if steps <= 1 else (length - 1) / (steps - 1)
        place = 0.0  # added up, not multiplied: the published grids depend on how it rounds
        for _ in range(steps):
            chosen.append(start + round(place))
            place += stride
        start += length
    return sorted(set(chosen))


def _number(value: object, given: object) -> int:
    try:
        number = int(value) if isinstance(value, str) else value
    except ValueError:
        number = None
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise ValueError(f"num_steps must be an integer, section counts such as '10,5', or 'ddim25', got {given!r}")
    return number


@dataclass(frozen=True)
class DiffusionTables:
    """The process that only visits `timesteps`: float64 [N] on the CPU, from the cleanest to the noisiest.

    timesteps: of the full process, what the head is told. betas, alphas_cumprod. posterior_mean_coef1, posterior_mean_coef2: of the
    clean value and of the state, in the mean of the step down. posterior_log_variance: lower bound of that step's log-variance, the
    first entry replaced by the second. log_betas: its upper bound. large_log_variance: the same with the first entry replaced by
    that of the lower bound.
    """

    timesteps: tuple[int, ...]
    betas: Tensor
    alphas_cumprod: Tensor
    posterior_mean_coef1: Tensor
    posterior_mean_coef2: Tensor
    posterior_log_variance: Tensor
    log_betas: Tensor
    large_log_variance: Tensor

    @classmethod
    def of(cls, timesteps: Sequence[int], total: int) -> DiffusionTables:
        full = _full_alphas_cumprod(total)
        kept = full[list(timesteps)]
        betas = 1.0 - kept / torch.cat([kept.new_ones(1), kept[:-1]])
        cumulative = (1.0 - betas).cumprod(0)
        previous = torch.cat([cumulative.new_ones(1), cumulative[:-1]])
        variance = betas * (1.0 - previous) / (1.0 - cumulative)
        clipped = torch.cat([variance[1:2] if len(variance) > 1 else betas[:1], variance[1:]])
        return cls(
            tuple(timesteps),
            betas,
            cumulative,
            betas * previous.sqrt() / (1.0 - cumulative),
            (1.0 - previous) * (1.0 - betas).sqrt() / (1.0 - cumulative),
            clipped.log(),
            betas.log(),
            torch.cat([clipped[:1], betas[1:]]).log(),
        )


@lru_cache(maxsize=4)
def _full_alphas_cumprod(total: int) -> Tensor:
    """Of the squared-cosine schedule (arXiv 2102.09672, equation 17), float64 [total]."""

    def level(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - level((i + 1) / total) / level(i / total), 0.999) for i in range(total)]
    return (1.0 - torch.tensor(betas, dtype=torch.float64, device="cpu")).cumprod(0)


@lru_cache(maxsize=1024)
def _tables(num_steps: Steps, last_timestep: int | None, total: int) -> DiffusionTables:
    timesteps = respaced_timesteps(num_steps, total)
    if last_timestep is not None:
        timesteps = sorted({min(timestep, last_timestep) for timestep in timesteps})
    return DiffusionTables.of(timesteps, total)


def check_timestep(last_timestep: int | None) -> None:
    """A ValueError unless it is None or a timestep."""
    if last_timestep is None:
        return
    if isinstance(last_timestep, bool) or not isinstance(last_timestep, int) or not 0 <= last_timestep < 1000:
        raise ValueError(f"`last_timestep` must be None or an integer between 0 and 999, got {last_timestep!r}.")


@dataclass(frozen=True)
class DiffusionSolver:
    """From noise to a value by ancestral steps; how many is said at each call, and tables are kept for each number.

    The state is float32, the tables are float64 and rounded to float32 where they meet it.

    Args:
        num_train_timesteps: of the process that the head was trained on, with the squared-cosine schedule.
    """

    num_train_timesteps: int = 1000

    def tables(self, num_steps: Steps, last_timestep: int | None = None) -> DiffusionTables:
        """The process for so many steps; timesteps above `last_timestep` are moved to it, and those that meet there are one."""
        key = tuple(num_steps) if isinstance(num_steps, list) else num_steps
        return _tables(key, last_timestep, self.num_train_timesteps)

    def num_calls(self, num_steps: Steps, last_timestep: int | None = None) -> int:
        """Calls of the head; less than the steps asked for where `last_timestep` makes some of them one."""
        return len(self.tables(num_steps, last_timestep).timesteps)

    def __call__(
        self,
        predict: Predict,
        noise: Tensor,
        *,
        num_steps: Steps,
        step_noise: Callable[[int], Tensor],
        temperature: float = 1.0,
        last_timestep: int | None = None,
        known: Tensor | None = None,
        known_mask: Tensor | None = None,
    ) -> Tensor:
        """From `noise` [...] to a value of the same shape, in float32.

        predict: see `Predict`; without an interpolation the variance is fixed to its upper bound. step_noise(call): standard normal
        noise of that step, asked at every call but the last. temperature: of that noise. known, known_mask: values that are given
        where the mask (bool, broadcast against `noise`) is True: at every step the state there is the value with the initial noise
        of that level.
        """
        tables = self.tables(num_steps, last_timestep)
        columns = zip(
            tables.alphas_cumprod.tolist(),
            tables.posterior_mean_coef1.tolist(),
            tables.posterior_mean_coef2.tolist(),
            tables.posterior_log_variance.tolist(),
            tables.log_betas.tolist(),
            tables.large_log_variance.tolist(),
            tables.timesteps,
            strict=True,
        )
        x = start = noise.float()
        last = len(tables.timesteps) - 1
        for call, row in enumerate(reversed(list(columns))):
            cumulative, from_value, from_state, low, high, large, timestep = row
            if known is not None and known_mask is not None:
                noisy = known.float() * math.sqrt(cumulative) + start * math.sqrt(1.0 - cumulative)
                x = torch.where(known_mask, noisy, x)
            predicted, interpolation = predict(x, call, timestep)
            value = x * math.sqrt(1.0 / cumulative) - predicted.float() * math.sqrt(1.0 / cumulative - 1.0)
            x = value * from_value + x * from_state
            if call == last:
                break
            if interpolation is None:
                deviation: Tensor | float = math.exp(0.5 * large)
            else:
                share = (interpolation.float() + 1.0) / 2.0
                deviation = torch.exp(0.5 * (share * high + (1.0 - share) * low))
            x = x + deviation * step_noise(call).float() * temperature
        return x
