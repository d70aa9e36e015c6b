"""Step annealing: fewer steps of the continuous head the further the image is (DiSA, arXiv 2505.20297).

What is still to be drawn is the more constrained the more of the image is there, and its distribution needs fewer steps to be
sampled. Nothing is trained; a schedule says how many steps each call of the trunk gets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from armm.decoding.acceleration import Acceleration
from armm.decoding.solvers.diffusion import check_timestep

__all__ = ["ANNEALING_PRESETS", "ANNEALING_SCHEDULES", "StepAnnealing", "solver_steps"]


def _two_stage(step: int, steps: int) -> float:
    return 1.0 if step < (steps - 1) / 2 else 0.0


# (step, steps), of which there are at least two -> share of (upper - lower) on top of lower; arXiv 2505.20297, section 4
ANNEALING_SCHEDULES: dict[str, Callable[[int, int], float]] = {
    "linear": lambda step, steps: (steps - 1 - step) / (steps - 1),
    "cosine": lambda step, steps: (math.cos(math.pi * step / (steps - 1)) + 1) / 2,
    "two-stage": _two_stage,
    "constant": lambda step, steps: 0.0,
}

_MAR = {"upper": 50, "lower": 5}
# What the authors ran each model with (README of Qinyu-Allen-Zhao/DiSA): name of the model -> arguments of `StepAnnealing`.
ANNEALING_PRESETS: dict[str, dict[str, Any]] = {
    "mar-base": {**_MAR, "settings": {"num_inference_steps": 64, "guidance_scale": 2.9, "guidance_schedule": "linear"}},
    "mar-large": {
        **_MAR,
        "settings": {"num_inference_steps": 64, "guidance_scale": 3.0, "guidance_schedule": "linear"},
    },
    "mar-huge": {**_MAR, "settings": {"num_inference_steps": 64, "guidance_scale": 3.3, "guidance_schedule": "linear"}},
    "harmon-1.5b": {**_MAR, "settings": {"num_inference_steps": 64, "guidance_scale": 3.0}},
    "flowar-small": {"upper": 25, "lower": 15, "settings": {"guidance_scale": 4.2}},
    "flowar-large": {"upper": 25, "lower": 15, "settings": {"guidance_scale": 2.4}},
    "flowar-huge": {"upper": 50, "lower": 15, "settings": {"guidance_scale": 2.4}},
    "xar-base": {"upper": 50, "lower": 15, "settings": {"guidance_scale": 2.7}},
    "xar-large": {"upper": 50, "lower": 15, "settings": {"guidance_scale": 2.3}},
    "xar-huge": {"upper": 50, "lower": 15, "settings": {"guidance_scale": 2.2}},
}


@dataclass(frozen=True)
class StepAnnealing(Acceleration):
    """Steps of a continuous head as a function of the call of the trunk: from `upper` at the first to `lower` at the last.

    Args:
        upper, lower: steps at the first and at the last call.
        schedule: "linear", "cosine", "two-stage" (`upper` in the first half, then `lower`) or "constant" (`lower`).
        last_timestep: diffusion heads are not asked at noisier timesteps (of 1000) than this; steps that fall together there are
            run once, so that a few less than `steps(...)` may run. None leaves the grid as it is. Flow heads take no notice.
        settings: settings of a call that go with it.

    Raises:
        ValueError: steps below 1, `lower` above `upper`, or an unknown schedule.
    """

    name: ClassVar[str] = "step annealing"

    upper: int = 50
    lower: int = 5
    schedule: str = "linear"
    last_timestep: int | None = 950
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("upper", "lower"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")
        if self.lower > self.upper:
            raise ValueError(f"`lower` ({self.lower}) must not be above `upper` ({self.upper}): steps become fewer.")
        if self.schedule not in ANNEALING_SCHEDULES:
            raise ValueError(f"`schedule` must be one of {sorted(ANNEALING_SCHEDULES)}, got {self.schedule!r}.")
        check_timestep(self.last_timestep)

    @classmethod
    def preset(cls, model: str) -> StepAnnealing:
        """The schedule and settings its authors ran the published `model` with, by its name in the zoo ("mar-base-256" or "mar-base").

        Raises:
            ValueError: they ran no such model.
        """
        found = [name for name in ANNEALING_PRESETS if model == name or model.startswith(name + "-")]
        if not found:
            raise ValueError(f"there is no preset for {model!r}: choose from {', '.join(sorted(ANNEALING_PRESETS))}.")
        return cls(**ANNEALING_PRESETS[found[0]])

    def steps(self, step: int, num_calls: int) -> int:
        """Steps of the head at call `step` of `num_calls`; a single call gets `upper`."""
        if not 0 <= step < num_calls:
            raise ValueError(f"`step` must lie between 0 and {num_calls - 1}, got {step}.")
        if num_calls == 1:
            return self.lower if self.schedule == "constant" else self.upper
        return self.lower + int(ANNEALING_SCHEDULES[self.schedule](step, num_calls) * (self.upper - self.lower))

    def table(self, num_calls: int) -> list[int]:
        """`steps` of every call."""
        return [self.steps(step, num_calls) for step in range(num_calls)]


def solver_steps(num_calls: int, num_steps: int, annealing: StepAnnealing | None = None) -> list[int]:
    """Steps of a solver at each of `num_calls` calls: always `num_steps`, or as `annealing` says."""
    return [num_steps] * num_calls if annealing is None else annealing.table(num_calls)
