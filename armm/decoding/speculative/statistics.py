"""What a speculative call cost and where its drafts were taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import PIL.Image
import torch
from torch import Tensor

# from never taken to always taken: dark blue, teal, yellow
_COLORS = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]], dtype=float)


@dataclass
class SpeculativeStatistics:
    """Counts over one call.

    units: what there was to decode, for each row. calls: of the trunk, the prefill among them. windows: windows looked at, over all
    rows. committed: units that became certain in them. tested, taken: int64 [units], drafts that were judged at every unit and those
    that were taken, over all rows. cells: int64 [units, cells of a unit], where units stand in the image of `grid` tokens.
    """

    units: int
    grid: tuple[int, ...]
    cells: Tensor
    calls: int = 0
    windows: int = 0
    committed: int = 0
    tested: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    taken: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))

    def __post_init__(self) -> None:
        self.tested = torch.zeros(self.units, dtype=torch.long)
        self.taken = torch.zeros(self.units, dtype=torch.long)

    def record(self, done: Sequence[int], accepted: Sequence[int], drafts: Sequence[int], kept: Sequence[int]) -> None:
        """One call of the trunk: certain units before it, drafts taken and drafts there were, units that became certain."""
        self.windows += len(done)
        self.committed += sum(kept)
        for first, right, count in zip(done, accepted, drafts, strict=True):
            self.taken[first : first + right] += 1
            self.tested[first : first + min(right + 1, count)] += 1

    @property
    def mean_accepted_length(self) -> float:
        """Units that a window made certain, on average."""
        return self.committed / max(self.windows, 1)

    @property
    def acceptance_rate(self) -> float:
        """Drafts taken of those judged."""
        return float(self.taken.sum() / self.tested.sum().clamp(min=1))

    @property
    def reduction(self) -> float:
        """How many times fewer calls than one a unit."""
        return self.units / max(self.calls, 1)

    def acceptance_map(self) -> Tensor:
        """float [*grid]: share of judged drafts that were taken, NaN at cells where none was judged."""
        rate = self.taken.double() / self.tested
        values = torch.full((int(np.prod(self.grid)),), float("nan"), dtype=torch.float64)
        values[self.cells.flatten()] = rate.repeat_interleave(self.cells.shape[1])
        return values.view(*self.grid)

    def heat_map(self, cell: int = 16) -> PIL.Image.Image:
        """A picture of the image's grid, `cell` pixels a token: dark where drafts are rejected, yellow where they are taken, grey where
        none was judged. Frames of a video stand side by side."""
        if cell < 1:
            raise ValueError(f"cell must be at least 1 pixel, got {cell}")
        values = self.acceptance_map()
        if values.dim() == 3:
            values = torch.cat(list(values), dim=1)
        rate = values.numpy()
        place = np.nan_to_num(rate) * (len(_COLORS) - 1)
        low = np.minimum(place.astype(int), len(_COLORS) - 2)
        share = (place - low)[..., None]
        colors = _COLORS[low] * (1 - share) + _COLORS[low + 1] * share
        colors[np.isnan(rate)] = 128
        return PIL.Image.fromarray(colors.round().astype(np.uint8).repeat(cell, 0).repeat(cell, 1))

    def summary(self) -> dict[str, float]:
        return {
            "calls": self.calls,
            "reduction": self.reduction,
            "mean_accepted_length": self.mean_accepted_length,
            "acceptance_rate": self.acceptance_rate,
        }
