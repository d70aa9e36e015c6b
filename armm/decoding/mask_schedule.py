"""How many positions masked decoding leaves open after each step."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# share of the steps done (0 .. 1) -> share of the positions that are open afterwards
MASK_SCHEDULES: dict[str, Callable[[float], float]] = {
    "cos": lambda ratio: math.cos(math.pi / 2 * ratio),
    "linear": lambda ratio: 1.0 - ratio,
}


def still_open(first_open: Tensor, now_open: Tensor, share: float) -> Tensor:
    """How many stay open, int64: that share of those open at first, but less than now and at least one."""
    wanted = (first_open.double() * share).floor().long()
    return torch.minimum(now_open - 1, wanted).clamp(min=1)


def open_counts(first_open: int, steps: int, schedule: str) -> list[int]:
    """Open positions before each of `steps` steps and after the last: from `first_open` down to 0."""
    counts = [first_open]
    for step in range(1, steps):
        share = MASK_SCHEDULES[schedule](step / steps)
        counts.append(int(still_open(torch.tensor(first_open), torch.tensor(counts[-1]), share)))
    return [*counts, 0]


def check_schedule(schedule: str) -> None:
    """Raises ValueError unless there is a schedule of that name."""
    if schedule not in MASK_SCHEDULES:
        raise ValueError(f"mask_schedule must be one of {sorted(MASK_SCHEDULES)}, got {schedule!r}")


def check_steps(steps: int) -> int:
    """`steps`; a ValueError unless it is a positive integer."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"num_inference_steps must be a positive integer, got {steps!r}")
    return steps
