"""Raster next-token decoding: one call of the trunk per token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from armm.condition import Condition, concatenate
from armm.decoding.base import (
    DecodingOutput,
    StepCallback,
    TokenStream,
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


class NextTokenDecoding(SchedulerMixin, ConfigMixin):
    """Tokens of an image in raster order, each from everything before it. A component of a pipeline, like a
    scheduler.
    """

    config_name = "scheduler_config.json"
    order = 1

    @register_to_config
    def __init__(self) -> None:
        pass

    def num_calls(self, grid: Sequence[int]) -> int:
        """Calls of the trunk for a grid of (height, width) tokens: the prefill yields the first token, the last is not
        fed.
        """
        return grid[0] * grid[1]

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
        """Generate the codes of one image per row of `condition`.

        null_condition: rows standing for "no condition", needed with active guidance. grid: (height, width) in tokens.
        noise: where Exp(1) noise comes from, see `NoiseSource`. known_ids, known_mask [B, N]: codes that are given
        where the mask is True (inpainting): they are fed in place of the drawn ones. vocabulary: (low, high), the ids
        that stand for codes; only these are computed, and codes are returned as id - low. callback(step, ids so far):
        may return their replacement. interrupt: asked before every token, True ends the loop. record_logits: keep
        what each draw was made from (after guidance, before the filters).
        """
        wake(model)
        sampler = sampler or Sampler()
        guided = check_guided(guidance, condition, null_condition)
        grid = model.grid if grid is None else model.check_grid(grid)
        low, high = vocabulary_range(model, vocabulary)
        batch, steps = condition.batch, grid[0] * grid[1]
        rows = concatenate([condition, null_condition]) if guided else condition  # type: ignore[list-item]
        device = rows.embeds.device
        check_known(known_ids, known_mask, batch, steps, high - low)
        if known_ids is not None:
            known_ids, known_mask = known_ids.to(device), known_mask.to(device)
        if sampler.do_sample and not isinstance(noise, NoiseSource):
            noise = NoiseSource(noise, batch, high - low, device)

        stream = _image_stream(model, rows, grid)
        ids = torch.zeros(batch, steps, dtype=torch.long, device=device)
        logits_kept = torch.empty(batch, steps, high - low, device=device) if record_logits else None
        done = 0
        token = ids[:, 0]
        for step in range(steps):
            if interrupt is not None and interrupt():
                break
            if guided and not guidance.covers(step):
                guided = False  # for good: the null rows are not needed any more
                stream.narrow(batch)
            hidden = stream.prefill() if step == 0 else stream.feed(_fed(token, low, guided), step - 1)
            logits = model.logits(hidden, low=low, high=high)
            if guided:
                logits = guidance.combine(logits, step, steps)
            if logits_kept is not None:
                logits_kept[:, step] = logits
            token = sampler(logits, noise.draw(step) if sampler.do_sample else None)
            if known_ids is not None:
                token = torch.where(known_mask[:, step], known_ids[:, step], token)
            ids.select(1, step).copy_(token)
            done = step + 1
            if callback is not None:
                replacement = callback(step, ids[:, :done])
                if replacement is not None:
                    ids[:, :done] = replacement
                    token = ids[:, step]
        return DecodingOutput(ids, logits_kept, stream.num_calls, done)


def _fed(token: Tensor, low: int, guided: bool) -> Tensor:
    if low:
        token = token + low
    return torch.cat([token, token]) if guided else token


def _image_stream(model: AutoregressiveModel, rows: Condition, grid: tuple[int, int]) -> TokenStream:
    fed = model.image_index(grid, rows.embeds.device)[:-1]  # the last token is never fed
    prefix = model.positions_for(prefix_index(model, rows), grid)
    return TokenStream(model, rows, prefix, model.positions_for(fed, grid))
