"""The loop of strategies that decode several cells with one call of the trunk."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from armm.condition import Condition, concatenate
from armm.decoding.base import (
    DecodingOutput,
    StepCallback,
    TokenStream,
    Trunk,
    check_guided,
    check_known,
    prefix_index,
    vocabulary_range,
    wake,
)
from armm.decoding.guidance import Guidance
from armm.decoding.sampling import NoiseSource, Sampler

if TYPE_CHECKING:
    from armm.model import AutoregressiveModel

States = tuple[Tensor, ...]


class GroupedDecoding(SchedulerMixin, ConfigMixin):
    """Base: the cells of a grid in groups, each group drawn from one call of the trunk.

    A strategy says which groups there are, what is fed for a group that was drawn, and how logits come from hidden states.
    The call after the prefill feeds the first group, and so on; the last group is never fed.
    """

    config_name = "scheduler_config.json"
    order = 1

    # What a strategy defines.

    @abstractmethod
    def groups(self, grid: Sequence[int]) -> list[Tensor]:
        """Raster cells drawn by each call of the trunk; together all cells of the grid, each once."""

    def check_model(self, model: AutoregressiveModel, grid: tuple[int, ...]) -> None:  # noqa: B027
        """Raises ValueError if the model cannot be decoded like this."""

    def fed_index(self, model: AutoregressiveModel, grid: tuple[int, ...], groups: list[Tensor]) -> Tensor:
        """Flat position ids [F] of everything fed after the prefix, in the order of feeding."""
        return model.prefix_slots + torch.cat([groups[0][:0], *groups[:-1]])

    def embeds(self, model: AutoregressiveModel, ids: Tensor, step: int) -> Tensor:
        """Embeddings [R, f, D] fed before draw `step`, for the ids [R, n] of the group drawn last."""
        return model.embed(ids)

    def parts(self, model: AutoregressiveModel, count: int) -> list[int]:
        """How many of the `count` cells of a group are drawn at a time, one part after the other; by default all at once."""
        return [count]

    @abstractmethod
    def logits(
        self, model: AutoregressiveModel, states: States, step: int, grid: tuple[int, ...], low: int, high: int, given: Tensor
    ) -> Tensor:
        """Logits [R, n, high - low] of a part of group `step` from the states of the call before (see `TokenStream`).

        given: ids [R, k] of the parts before it, of the whole vocabulary; k is 0 for the first.
        """

    @abstractmethod
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
        """Teacher forcing: logits [B, N, high - low] of all cells in raster order, given all `ids` [B, N].

        ids: of the whole vocabulary. low, high: the rows of the vocabulary that are wanted. trunk: a compiled form of the
        model's.
        """

    def covers(self, guidance: Guidance, step: int, drawn: int) -> bool:
        """Whether draw `step`, before which `drawn` cells are known, is guided."""
        return guidance.covers(step)

    # What is the same for all.

    def num_calls(self, grid: Sequence[int]) -> int:
        """Calls of the trunk for a grid of tokens."""
        return len(self.groups(grid))

    @torch.no_grad()
    def __call__(
        self,
        model: AutoregressiveModel,
        condition: Condition,
        null_condition: Condition | None = None,
        grid: Sequence[int] | None = None,
        *,
        sampler: Sampler | None = None,
        guidance: Guidance | None = None,
        noise: NoiseSource | torch.Generator | Sequence[torch.Generator] | Tensor | None = None,
        known_ids: Tensor | None = None,
        known_mask: Tensor | None = None,
        vocabulary: tuple[int, int] | None = None,
        callback: StepCallback | None = None,
        interrupt: Callable[[], bool] | None = None,
        record_logits: bool = False,
    ) -> DecodingOutput:
        """Generate the codes of one image or video per row of `condition`, in raster order.

        Arguments as in `NextTokenDecoding`, but for two: recorded `noise` [B, N, V] is used in decode order, and
        `callback(step, ids)` sees all N ids, -1 where no code was drawn yet.
        """
        wake(model)
        sampler = sampler or Sampler()
        guided = check_guided(guidance, condition, null_condition)
        grid = model.grid if grid is None else model.check_grid(grid)
        self.check_model(model, grid)
        low, high = vocabulary_range(model, vocabulary)
        batch, total = condition.batch, math.prod(grid)
        rows = concatenate([condition, null_condition]) if guided else condition  # type: ignore[list-item]
        device = rows.embeds.device
        check_known(known_ids, known_mask, batch, total, high - low)
        if known_ids is not None and known_mask is not None:
            known_ids, known_mask = known_ids.to(device), known_mask.to(device)
        if sampler.do_sample and not isinstance(noise, NoiseSource):
            noise = NoiseSource(noise, batch, high - low, device)
        groups = self.groups(grid)
        stream = TokenStream(
            model,
            rows,
            model.positions_for(prefix_index(model, rows), grid),
            model.positions_for(self.fed_index(model, grid, groups).to(device), grid),
        )
        ids = torch.full((batch, total), -1, dtype=torch.long, device=device)
        logits_kept = torch.empty(batch, total, high - low, device=device) if record_logits else None
        drawn = done = 0
        token = ids[:, :0]
        places = torch.cat(groups).to(device).split([len(group) for group in groups])
        for step, cells in enumerate(places):
            if interrupt is not None and interrupt():
                break
            if guided and not self.covers(guidance, step, drawn):  # type: ignore[arg-type]
                guided = False  # for good: the null rows are not needed any more
                stream.narrow(batch)
            if step == 0:
                states = tuple(state[:, -1:] for state in stream.prefill_states())
            else:
                fed = token + low
                states = stream.feed_group(self.embeds(model, torch.cat([fed, fed]) if guided else fed, step))
            token, start = ids[:, :0], 0
            for size in self.parts(model, len(cells)):
                part = cells[start : start + size]
                given = token + low
                given = torch.cat([given, given]) if guided else given
                logits = self.logits(model, states, step, grid, low, high, given)
                if guided:
                    logits = guidance.combine(logits, step, len(groups))  # type: ignore[union-attr]
                if logits_kept is not None:
                    logits_kept[:, part] = logits
                draw = noise.draw_group(drawn + start, size) if sampler.do_sample else None  # type: ignore[union-attr]
                chosen = sampler(logits, draw)
                if known_ids is not None:
                    chosen = torch.where(known_mask[:, part], known_ids[:, part], chosen)  # type: ignore[index]
                token, start = torch.cat([token, chosen], dim=1), start + size
            ids[:, cells] = token
            drawn, done = drawn + len(cells), step + 1
            if callback is not None:
                replacement = callback(step, ids)
                if replacement is not None:
                    ids = replacement.to(device).clone()
                    token = ids[:, cells]
                wake(model)  # the callback may have decoded a preview, which swaps models under offloading
        return DecodingOutput(ids.clamp_(min=0), logits_kept, stream.num_calls, done)
