"""Raster next-token decoding: one call of the trunk per token."""

from __future__ import annotations

import math
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
    Trunk,
    check_guided,
    check_known,
    prefix_index,
    run_image,
    vocabulary_range,
    wake,
)
from armm.decoding.guidance import Guidance
from armm.decoding.orders import raster
from armm.decoding.sampling import NoiseSource, Sampler
from armm.nn.masks import causal_mask

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
        """Calls of the trunk for a grid of (height, width) or (time, height, width) tokens: the prefill yields the first token,
        the last is not fed.
        """
        return math.prod(grid)

    def groups(self, grid: Sequence[int]) -> list[Tensor]:
        """Raster cells drawn by each call of the trunk."""
        return raster(grid)

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
        total = condition.length + ids.shape[1] - 1
        index = model.image_index(grid, ids.device, behind=prefix_index(model, condition))[..., :-1]
        mask = causal_mask(total, total, ids.device)
        hidden = run_image(model, condition, model.embed(ids[:, :-1]), index, mask, grid, trunk)[-1]
        return model.logits(hidden[:, condition.length - 1 :], low=low, high=high)

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
        prefix: int = 0,
        vocabulary: tuple[int, int] | None = None,
        callback: StepCallback | None = None,
        interrupt: Callable[[], bool] | None = None,
        record_logits: bool = False,
    ) -> DecodingOutput:
        """Generate the codes of one image per row of `condition`.

        null_condition: rows standing for "no condition", needed with active guidance. grid: (height, width) or (time, height,
        width) in tokens. noise: where Exp(1) noise comes from, see `NoiseSource`; with K sub-codes recorded noise is [B, N, K, V].
        known_ids [B, N], or [B, N, K], and known_mask [B, N]: codes that are given where the mask is True (inpainting):
        they are fed in place of the drawn ones. prefix: the first so many are known and go in with the condition, in
        one call; steps of the guidance count from there. vocabulary: (low, high), the ids
        that stand for codes; only these are computed, and codes are returned as id - low. callback(step, ids so far):
        may return their replacement. interrupt: asked before every token, True ends the loop. record_logits: keep
        what each draw was made from (after guidance, before the filters).
        """
        wake(model)
        if not model.causal or model.tokens_per_position > 1:
            raise ValueError(
                "next-token decoding needs a causal model with one token a position; use MaskedTokenDecoding"
            )
        if model.window > 1 or model.head.num_states > 1:
            other = "TokenShuffleDecoding" if model.window > 1 else "NeighboringDecoding"
            raise ValueError(f"next-token decoding does not suit this model: it was made for {other}")
        sampler = sampler or Sampler()
        guided = check_guided(guidance, condition, null_condition)
        grid = model.grid if grid is None else model.check_grid(grid)
        low, high = vocabulary_range(model, vocabulary)
        batch, steps, parts = condition.batch, math.prod(grid), model.code_shape
        rows = concatenate([condition, null_condition]) if guided else condition  # type: ignore[list-item]
        device = rows.embeds.device
        check_known(known_ids, known_mask, batch, steps, high - low, parts)
        if known_ids is not None:
            known_ids, known_mask = known_ids.to(device), known_mask.to(device)
        _check_prefix(prefix, known_mask, steps)
        if sampler.do_sample and not isinstance(noise, NoiseSource):
            if parts and isinstance(noise, Tensor):
                noise = noise.flatten(2)
            noise = NoiseSource(noise, batch, math.prod(parts) * (high - low), device)

        stream = _image_stream(model, rows, grid, None if not prefix else _fed(known_ids[:, :prefix], low, guided))
        ids = torch.zeros(batch, steps, *parts, dtype=torch.long, device=device)
        logits_kept = torch.zeros(batch, steps, *parts, high - low, device=device) if record_logits else None
        if prefix:
            ids[:, :prefix] = known_ids[:, :prefix]
        done = prefix
        token = ids[:, 0]
        for step in range(prefix, steps):
            if interrupt is not None and interrupt():
                break
            if guided and not guidance.covers(step - prefix):
                guided = False  # for good: the null rows are not needed any more
                stream.narrow(batch)
            hidden = stream.prefill() if step == prefix else stream.feed(_fed(token, low, guided), step - prefix - 1)
            logits = model.logits(hidden, low=low, high=high)
            if guided:
                logits = guidance.combine(logits, step - prefix, steps - prefix)
            if logits_kept is not None:
                logits_kept[:, step] = logits
            token = sampler(logits, noise.draw(step).view(logits.shape) if sampler.do_sample else None)
            if known_ids is not None:
                known = known_mask[:, step].view(batch, *(1 for _ in parts))
                token = torch.where(known, known_ids[:, step], token)
            ids.select(1, step).copy_(token)
            done = step + 1
            if callback is not None:
                replacement = callback(step, ids[:, :done])
                if replacement is not None:
                    ids[:, :done] = replacement
                    token = ids[:, step]
                wake(model)  # the callback may have decoded a preview, which swaps models under offloading
        return DecodingOutput(ids, logits_kept, stream.num_calls, done)


def _fed(token: Tensor, low: int, guided: bool) -> Tensor:
    if low:
        token = token + low
    return torch.cat([token, token]) if guided else token


def _image_stream(
    model: AutoregressiveModel, rows: Condition, grid: Sequence[int], prefix: Tensor | None = None
) -> TokenStream:
    index = prefix_index(model, rows)
    fed = model.image_index(grid, rows.embeds.device, behind=index)[..., :-1]  # the last token is never fed
    if prefix is not None:
        given, fed = fed[..., : prefix.shape[1]], fed[..., prefix.shape[1] :]
        rows = rows.extend(model.embed(prefix), given)
        index = torch.cat([index, given.expand(*index.shape[:-1], -1)], dim=-1)
    return TokenStream(model, rows, model.positions_for(index, grid), model.positions_for(fed, grid))


def _check_prefix(prefix: int, known_mask: Tensor | None, steps: int) -> None:
    if not isinstance(prefix, int) or not 0 <= prefix < steps:
        raise ValueError(f"prefix must be an integer between 0 and {steps - 1}, got {prefix!r}")
    if prefix and (known_mask is None or not bool(known_mask[:, :prefix].all())):
        raise ValueError(f"prefix={prefix} tokens must all be given: known_ids, with known_mask True there")
