"""Classifier-free guidance: its rows, its formula, its schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# progress through the generation (0 .. 1) -> share of (scale - 1) that is applied
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda t: 1.0,
    "linear": lambda t: t,
    "half_linear": lambda t: min(1.0, 2.0 * t),
    "cosine": lambda t: (1.0 - math.cos(math.pi * t)) / 2.0,
    "sine": lambda t: math.sin(math.pi / 2 * t),
    "log": lambda t: math.log1p(t * (math.e - 1.0)),
}

# how token `step` of `steps` is placed in 0 .. 1: between the first and the last, counted with itself, or without
PROGRESS: dict[str, Callable[[int, int], float]] = {
    "span": lambda step, steps: step / (steps - 1) if steps > 1 else 1.0,
    "done": lambda step, steps: (step + 1) / steps,
    "begun": lambda step, steps: step / steps,
}


def _combine_logits(conditional: Tensor, null: Tensor, scale: float | Tensor) -> Tensor:
    if isinstance(scale, Tensor):
        return null + (conditional - null) * scale
    return torch.add(null, conditional - null, alpha=scale)


def _combine_log_softmax(conditional: Tensor, null: Tensor, scale: float | Tensor) -> Tensor:
    return _combine_logits(conditional.log_softmax(-1), null.log_softmax(-1), scale)


FORMULAS: dict[str, Callable[[Tensor, Tensor, float | Tensor], Tensor]] = {
    "logits": _combine_logits,
    "log_softmax": _combine_log_softmax,
}


@dataclass
class ContextGuidance:
    """Guidance of the images in sequences of text and images by rows that see less of what came before.

    null: what the row without condition sees: "image", the open image alone (numbered from 0 at its begin; Lumina-mGPT, arXiv
    2408.02657), or "start_image", the sequence's first token and the open image (Chameleon, arXiv 2405.09818). The result is null +
    scale * (full - null). image_scale: with it there is a third row, "images", that sees all images and no text, and the result
    is null + image_scale * (images - null) + scale * (full - images). Scales of 1 switch guidance off; `scale` may be changed
    between steps, and may lie below 1. shorten: results are scaled down to the length of the full row's where they are longer
    (arXiv 2510.06590's "channel" renormalisation; of velocities, not of logits).
    """

    scale: float = 1.0
    image_scale: float | None = None
    null: str = "image"
    shorten: bool = False

    def __post_init__(self) -> None:
        for name in ("scale", "image_scale"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value!r}")
        if self.null not in ("image", "start_image"):
            raise ValueError(f"null must be 'image' or 'start_image', got {self.null!r}")

    @property
    def active(self) -> bool:
        return self.scale != 1.0 or self.image_scale not in (None, 1.0)

    @property
    def views(self) -> tuple[str, ...]:
        """What the rows besides the full one see, in their order."""
        if not self.active:
            return ()
        return (self.null,) if self.image_scale is None else ("images", self.null)

    def combine(self, logits: Tensor) -> Tensor:
        """Logits [R * B, ...] of the rows [full; *views] -> [B, ...]."""
        rows = logits.chunk(2 if self.image_scale is None else 3)
        full, null = rows[0], rows[-1]
        if self.image_scale is None:
            combined = full if self.scale == 1.0 else _combine_logits(full, null, self.scale)
        else:
            combined = _combine_logits(rows[1], null, self.image_scale) + self.scale * (full - rows[1])
        if self.shorten:
            ratio = full.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True)
            combined = combined * (ratio + 1e-8).clamp(0.0, 1.0)
        return combined

    def combine_steps(self, logits: Tensor, numbers: Tensor, steps: int) -> Tensor:
        """`combine` for windows, as of `Guidance`: all tokens are guided alike."""
        return self.combine(logits)

    def covers(self, step: int) -> bool:
        """Whether the draw of token `step` is guided."""
        return True


@dataclass
class Guidance:
    """null + (conditional - null) * scale over the rows [conditional; null].

    scale <= 1 switches guidance off. schedule: how the scale grows from `start` to its value over the steps ("constant",
    "linear", "half_linear", "cosine", "sine", "log"), a function of progress ** power. progress: "span" is 0 at the first
    and 1 at the last step, "done" counts the step itself as done, "begun" does not. interval: decode steps 0 .. interval
    are guided, later ones are not (-1 = all are); the first token, which comes from the prefill, is not counted and is
    always guided. high: flow times above it are not guided. `scale` may be changed between steps. Where a schedule lies below 1,
    the step is not guided.
    """

    scale: float = 1.0
    schedule: str = "constant"
    interval: int = -1
    formula: str = "logits"
    progress: str = "span"
    power: float = 1.0
    high: float = 1.0
    start: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.start):
            raise ValueError(f"start must be a finite number, got {self.start!r}")
        if not math.isfinite(self.scale):
            raise ValueError(f"scale must be a finite number, got {self.scale!r}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {sorted(SCHEDULES)}, got {self.schedule!r}")
        if self.formula not in FORMULAS:
            raise ValueError(f"formula must be one of {sorted(FORMULAS)}, got {self.formula!r}")
        if self.progress not in PROGRESS:
            raise ValueError(f"progress must be one of {sorted(PROGRESS)}, got {self.progress!r}")
        if not 0 < self.power < math.inf:
            raise ValueError(f"power must be a finite number > 0, got {self.power!r}")
        if not 0 <= self.high <= 1:
            raise ValueError(f"high must be a flow time between 0 and 1 (1 = all are guided), got {self.high!r}")
        if not isinstance(self.interval, int) or self.interval < -1:
            raise ValueError(f"interval must be an integer >= -1 (-1 = every step), got {self.interval!r}")

    @property
    def active(self) -> bool:
        return self.scale > 1.0 or (self.start > 1.0 and self.schedule != "constant")

    def covers(self, step: int) -> bool:
        """Whether the draw of token `step` is guided (token 0 comes from the prefill, token 1 from decode step 0)."""
        return self.interval < 0 or step - 1 <= self.interval

    def scale_at(self, step: int, steps: int) -> float:
        progress = PROGRESS[self.progress](step, steps) ** self.power
        return max(1.0, self.start + (self.scale - self.start) * SCHEDULES[self.schedule](progress))

    def combine(self, logits: Tensor, step: int = 0, steps: int = 1) -> Tensor:
        """Logits [2B, ...] of the rows [conditional; null] -> [B, ...] for token `step` of `steps`."""
        conditional, null = logits.chunk(2)
        scale = self.scale if self.schedule == "constant" else self.scale_at(step, steps)
        return FORMULAS[self.formula](conditional, null, scale)

    def combine_steps(self, logits: Tensor, numbers: Tensor, steps: int) -> Tensor:
        """`combine` for windows: logits [2B, L, ...] of the tokens with these numbers [B, L] of `steps` -> [B, L, ...]."""
        if self.schedule == "constant" and self.interval < 0:
            return self.combine(logits)
        conditional, null = logits.chunk(2)
        flat = numbers.flatten().tolist()
        shape = (*numbers.shape, *(1 for _ in logits.shape[2:]))
        scales = [self.scale_at(min(number, steps - 1), steps) for number in flat]
        scale = torch.tensor(scales, device=logits.device).view(shape)
        covered = torch.tensor([self.covers(number) for number in flat], device=logits.device).view(shape)
        return torch.where(covered, FORMULAS[self.formula](conditional, null, scale), conditional)
