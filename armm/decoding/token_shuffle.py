"""Token-shuffle decoding: the tokens of one square window with one call of the trunk (arXiv 2504.17789)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from armm.decoding.base import Trunk, run_image
from armm.decoding.grouped import GroupedDecoding, States
from armm.decoding.orders import windows
from armm.nn.masks import causal_mask

if TYPE_CHECKING:
    from armm.condition import Condition
    from armm.model import AutoregressiveModel

__all__ = ["SchedulerMixin", "TokenShuffleDecoding"]


class TokenShuffleDecoding(GroupedDecoding):
    """Windows of `window` x `window` tokens in raster order, for models with a `TokenShuffle` of that window.

    N / window^2 calls. The tokens of a window are drawn independently of each other, but for a model with `causal_mlps`: then one
    after the other, by its small head. window=1 is next-token decoding.
    """

    @register_to_config
    def __init__(self, window: int = 2) -> None:
        if not isinstance(window, int) or window < 1:
            raise ValueError(f"window must be a positive integer, got {window!r}")
        self.window = window

    def groups(self, grid: Sequence[int]) -> list[Tensor]:
        return list(windows(grid, self.window))

    def check_model(self, model: AutoregressiveModel, grid: tuple[int, ...]) -> None:
        if self.window != model.window:
            raise ValueError(
                f"windows of {self.window}x{self.window} need a model that was trained with them, this one has window {model.window}"
            )

    def fed_index(self, model: AutoregressiveModel, grid: tuple[int, ...], groups: list[Tensor]) -> Tensor:
        return model.image_index(grid, "cpu")[: len(groups) - 1]

    def embeds(self, model: AutoregressiveModel, ids: Tensor, step: int) -> Tensor:
        return model.embed_windows(ids[:, None])

    def parts(self, model: AutoregressiveModel, count: int) -> list[int]:
        return [1] * count if model.shuffle is not None and model.shuffle.causal else [count]

    def logits(
        self, model: AutoregressiveModel, states: States, step: int, grid: tuple[int, ...], low: int, high: int, given: Tensor
    ) -> Tensor:
        logits = model.window_logits(states[-1], low=low, high=high, given=given[:, None]).flatten(1, 2)
        return logits[:, given.shape[1] :]

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
        embeds = model.embed_image(ids, grid)[:, :-1]
        total = condition.length + embeds.shape[1]
        index = model.image_index(grid, ids.device)[:-1]
        mask = causal_mask(total, total, ids.device)
        hidden = run_image(model, condition, embeds, index, mask, grid, trunk)[-1][:, condition.length - 1 :]
        order = windows(grid, self.window).to(ids.device)
        logits = model.window_logits(hidden, low=low, high=high, given=ids[:, order]).flatten(1, 2)
        order = order.flatten()
        return torch.empty_like(logits).index_copy(1, order, logits)
