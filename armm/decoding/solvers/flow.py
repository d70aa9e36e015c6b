"""Flow matching: from noise at t = 1 to data at t = 0 along a learned velocity (Lipman et al., arXiv 2210.02747; SiT, 2401.08740).

The path is x_t = (1 - t) data + t noise and the velocity its derivative, noise - data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["FLOW_GRIDS", "FLOW_METHODS", "FlowSolver", "time_index"]

# velocity(state, call, time) -> velocity; calls are counted from 0, `time` is that of the call
Velocity = Callable[[Tensor, int, float], Tensor]
FLOW_METHODS = ("euler", "euler_maruyama")
FLOW_GRIDS = ("uniform", "dense_end")
# Where a dense end begins: half of the steps lead down to the first time, half start at the second (FlowAR, 2412.15205).
DENSE_END = (0.3, 0.25)
UNIFORM_FROM = 50  # exactly at this number of steps FlowAR's grid is uniform


@dataclass(frozen=True)
class FlowSolver:
    """Euler steps along the velocity, or Euler-Maruyama steps along velocity and score with fresh noise at each.

    Args:
        method: "euler" (the ordinary differential equation) or "euler_maruyama" (the stochastic one, with the diffusion 2t of
            SiT; its last step, from `last_time`, adds no noise).
        grid: times of "euler": "uniform", or FlowAR's "dense_end", which spends half of the steps on the last quarter, but is
            uniform at exactly 50 steps.
        shift: of the "uniform" grid: above 1 more of the steps lie near the noise, f u / (1 + (f - 1) u) for u from 1 to 0 (Esser et
            al., arXiv 2403.03206).
        last_time: of "euler_maruyama", whose other times lie evenly between 1 and it.
    """

    method: str = "euler"
    grid: str = "uniform"
    last_time: float = 0.04
    shift: float = 1.0

    def __post_init__(self) -> None:
        if self.method not in FLOW_METHODS:
            raise ValueError(f"method must be one of {FLOW_METHODS}, got {self.method!r}")
        if self.grid not in FLOW_GRIDS:
            raise ValueError(f"grid must be one of {FLOW_GRIDS}, got {self.grid!r}")
        if not 0 < self.last_time < 1:
            raise ValueError(f"last_time must lie between 0 and 1, got {self.last_time!r}")
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shift must be a finite number above 0 (1 = evenly spaced), got {self.shift!r}")
        if self.shift != 1.0 and (self.method, self.grid) != ("euler", "uniform"):
            raise ValueError(
                f"shift={self.shift} needs method 'euler' and grid 'uniform', got {self.method!r}, {self.grid!r}"
            )

    @property
    def min_steps(self) -> int:
        """The smallest number of steps that makes sense."""
        return 1 if self.method == "euler" and self.grid == "uniform" else 2

    def times(self, num_steps: int) -> Tensor:
        """float64 [calls + 1], from 1 down to 0: the velocity is asked at all but the last.

        There are `num_steps` calls, or one less for an odd number with a dense end.
        """
        if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < self.min_steps:
            raise ValueError(f"num_steps must be an integer of at least {self.min_steps} for {self}, got {num_steps!r}")
        if self.method == "euler_maruyama":
            return torch.cat(
                [_linspace(1.0, self.last_time, num_steps), torch.zeros(1, dtype=torch.float64, device="cpu")]
            )
        if self.grid == "uniform" or num_steps == UNIFORM_FROM:
            times = _linspace(1.0, 0.0, num_steps + 1)
            return self.shift * times / (1.0 + (self.shift - 1.0) * times)
        half = num_steps // 2
        first, second = DENSE_END
        return torch.cat([_linspace(1.0, first, half), _linspace(second, 0.0, half + 1)])

    def num_calls(self, num_steps: int) -> int:
        """Calls of the velocity."""
        return len(self.times(num_steps)) - 1

    def num_noises(self, num_steps: int) -> int:
        """How many times `step_noise` is asked."""
        return self.num_calls(num_steps) - 1 if self.method == "euler_maruyama" else 0

    def __call__(
        self,
        velocity: Velocity,
        noise: Tensor,
        *,
        num_steps: int,
        step_noise: Callable[[int], Tensor] | None = None,
    ) -> Tensor:
        """From `noise` [...] to data of the same shape, in float32.

        The state is float64 (float32 on devices without it). velocity: see `Velocity`; it is given the state and may answer in
        any precision. step_noise: of "euler_maruyama", standard normal noise of the step with that number.
        """
        times = self.times(num_steps).tolist()
        dtype = torch.float32 if noise.device.type == "mps" else torch.float64
        x = noise.to(dtype)
        last = len(times) - 2
        for call, (time, following) in enumerate(zip(times, times[1:], strict=False)):
            step = following - time
            drift = velocity(x, call, time).to(dtype)
            if self.method == "euler":
                x = x + drift * step
                continue
            score = (-(1.0 - time) * drift - x) / (time * time + (1.0 - time) * time)
            x_next = x + (drift - time * score) * step
            if call < last:
                if step_noise is None:
                    raise ValueError("method 'euler_maruyama' needs step_noise")
                x_next = x_next + step_noise(call).to(dtype) * (math.sqrt(2.0 * time) * math.sqrt(abs(step)))
            x = x_next
        return x.float()


def _linspace(start: float, stop: float, count: int) -> Tensor:
    return torch.linspace(start, stop, count, dtype=torch.float64, device="cpu")


def time_index(times: Tensor, count: int = 1000) -> Tensor:
    """int64 indices of `times` in 0 .. 1 for a sinusoidal embedding: float32(t) * count, cut off."""
    return (times.to(torch.float32) * count).long()
