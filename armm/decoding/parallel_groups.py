"""Parallel groups: token k of every region of the image with one call of the trunk (PAR, arXiv 2412.15119)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from armm.decoding.base import Trunk, run_image
from armm.decoding.grouped import GroupedDecoding, States
from armm.decoding.guidance import Guidance
from armm.decoding.orders import parallel_regions

if TYPE_CHECKING:
    from armm.condition import Condition
    from armm.model import AutoregressiveModel

__all__ = ["ParallelGroupsDecoding", "SchedulerMixin", "group_mask"]


class ParallelGroupsDecoding(GroupedDecoding):
    """The first token of each of `regions` x `regions` regions one by one, then one token of every region at a time.

    Between the two phases stand the model's transition tokens: with the last single token they form the group that
    predicts the first parallel one. n + (N - n) / n calls for N tokens and n regions.
    """

    @register_to_config
    def __init__(self, regions: int = 2) -> None:
        if not isinstance(regions, int) or regions < 2:
            raise ValueError(f"regions must be an integer of at least 2, got {regions!r}")
        self.regions = regions

    @property
    def group_size(self) -> int:
        return self.regions * self.regions

    def groups(self, grid: Sequence[int]) -> list[Tensor]:
        order = parallel_regions(grid, self.regions)
        size = self.group_size
        return [*order[:size].split(1), *(order[size:].split(size) if len(order) > size else ())]

    def check_model(self, model: AutoregressiveModel, grid: tuple[int, ...]) -> None:
        given = 0 if model.transition_tokens is None else model.transition_tokens.num_embeddings
        if given != self.group_size - 1:
            raise ValueError(
                f"{self.regions}x{self.regions} regions need a model with {self.group_size - 1} transition tokens, this one has {given}"
            )

    def fed_index(self, model: AutoregressiveModel, grid: tuple[int, ...], groups: list[Tensor]) -> Tensor:
        return self.sequence_index(model, grid)[model.prefix_slots : -len(groups[-1])]

    def sequence_index(self, model: AutoregressiveModel, grid: tuple[int, ...]) -> Tensor:
        """Flat position ids of everything in order: prefix, single tokens, transition tokens, parallel groups.

        A grid of one token per region has no parallel phase and no transition tokens.
        """
        prefix, size = model.prefix_slots, self.group_size
        cells = prefix + parallel_regions(grid, self.regions)
        transition = torch.full((size - 1 if len(cells) > size else 0,), model.transition_index(grid))
        return torch.cat([torch.arange(prefix), cells[:size], transition, cells[size:]])

    def embeds(self, model: AutoregressiveModel, ids: Tensor, step: int) -> Tensor:
        embeds = model.embed(ids)
        if step != self.group_size:
            return embeds
        return torch.cat([embeds, model.transition_tokens.weight.expand(len(ids), -1, -1)], dim=1)

    def logits(
        self, model: AutoregressiveModel, states: States, step: int, grid: tuple[int, ...], low: int, high: int, given: Tensor
    ) -> Tensor:
        return model.logits(states[-1], low=low, high=high)

    def covers(self, guidance: Guidance, step: int, drawn: int) -> bool:
        if step < self.group_size:
            return guidance.covers(step)
        # The authors count tokens from the start of the parallel phase.
        return guidance.interval < 0 or drawn - self.group_size <= guidance.interval

    def image_logits(
        self,
        model: AutoregressiveModel,
        ids: Tensor,
        condition: Condition,
        grid: Sequence[int] | None = None,
        *,
        low: int = 0,
        high: int | None = None,
        trunk: Trunk | None = None,
    ) -> Tensor:
        grid = model.grid if grid is None else model.check_grid(grid)
        self.check_model(model, grid)
        size, order = self.group_size, parallel_regions(grid, self.regions).to(ids.device)
        embeds = model.embed(ids[:, order])
        if ids.shape[1] > size:
            transition = model.transition_tokens.weight.expand(len(ids), -1, -1)
            embeds = torch.cat([embeds[:, :size], transition, embeds[:, size:]], dim=1)
        index = self.sequence_index(model, grid)[model.prefix_slots :].to(ids.device)
        mask = group_mask(condition.length, size, embeds.shape[1], ids.device)
        hidden = run_image(model, condition, embeds, index, mask, grid, trunk)[-1]
        start = condition.length - 1
        logits = model.logits(hidden[:, start : start + ids.shape[1]], low=low, high=high)
        return torch.empty_like(logits).index_copy(1, order, logits)


def group_mask(prefix: int, group_size: int, total: int, device: torch.device | str | None = None) -> Tensor:
    """Bool [prefix + total, prefix + total] over the prefix, the single tokens, the transition tokens and the parallel groups.

    Positions before the last single token are causal; from there on, groups of `group_size` see each other and all before.
    """
    place = torch.arange(prefix + total, device=device)
    start = prefix + group_size - 1
    group = torch.where(place < start, place, start + (place - start).div(group_size, rounding_mode="floor"))
    return group[:, None] >= group[None, :]
