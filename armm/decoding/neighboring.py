"""Near-to-far decoding: all cells of one Manhattan distance with one call of the trunk (NAR, arXiv 2503.10696)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from armm.condition import Condition
from armm.decoding.base import Trunk, run_image
from armm.decoding.grouped import GroupedDecoding, States
from armm.decoding.guidance import Guidance
from armm.decoding.orders import manhattan_distance, near_to_far
from armm.heads.neighboring import NeighboringHead, neighbor_links

if TYPE_CHECKING:
    from armm.model import AutoregressiveModel

__all__ = ["NeighboringDecoding", "SchedulerMixin", "check_neighboring", "near_to_far_mask"]


class NeighboringDecoding(GroupedDecoding):
    """Cells near to far, for models with a `NeighboringHead`. An n x n image takes 2n - 1 calls."""

    @register_to_config
    def __init__(self) -> None:
        pass

    def groups(self, grid: Sequence[int]) -> list[Tensor]:
        return near_to_far(grid)

    def check_model(self, model: AutoregressiveModel, grid: tuple[int, ...]) -> None:
        check_neighboring(model)
        if len(grid) != model.head.num_axes:
            raise ValueError(f"grid must have the {model.head.num_axes} axes of the model's heads, got {list(grid)}")

    def covers(self, guidance: Guidance, step: int, drawn: int) -> bool:
        # The authors count tokens, not calls: guided while at most `interval` tokens are drawn.
        return guidance.interval < 0 or drawn <= guidance.interval

    def logits(
        self, model: AutoregressiveModel, states: States, step: int, grid: tuple[int, ...], low: int, high: int, given: Tensor
    ) -> Tensor:
        values = model.head(states, low, high)
        if step == 0:
            return model.head.first(values)
        groups = near_to_far(grid)
        links, count = neighbor_links(groups[step - 1], groups[step], grid, values[0].device)
        return model.head.merge(values, links, count)

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
        mask = near_to_far_mask(condition.length, grid, ids.device)
        states = run_image(model, condition, model.embed(ids), model.image_index(grid, ids.device), mask, grid, trunk)
        values = model.head([state[:, condition.length - 1 :] for state in states], low, high)
        first = model.head.first([value[:, :1] for value in values])
        cells = torch.arange(ids.shape[1])
        if len(cells) == 1:
            return first
        links, count = neighbor_links(cells, cells[1:], grid, ids.device)
        return torch.cat([first, model.head.merge([value[:, 1:] for value in values], links, count)], dim=1)


def check_neighboring(model: AutoregressiveModel) -> None:
    """Raises ValueError unless the model has heads for its neighbours."""
    if not isinstance(model.head, NeighboringHead):
        raise ValueError(
            f"neighboring decoding needs a model with a neighboring head, this one has a {type(model.head).__name__}"
        )


def near_to_far_mask(prefix: int, grid: Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """Bool [prefix + N, prefix + N]: causal in the prefix; a cell sees the prefix and every cell that is not farther than itself."""
    distance = torch.cat([torch.arange(prefix) - prefix, manhattan_distance(grid)]).to(device)
    return distance[:, None] >= distance[None, :]
