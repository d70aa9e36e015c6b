"""Masked decoding of discrete tokens: every step guesses all open positions and keeps those it is surest of (MaskGIT)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from armm.condition import Condition, concatenate
from armm.decoding.base import DecodingOutput, StepCallback, check_guided, check_known, wake
from armm.decoding.guidance import Guidance
from armm.decoding.mask_schedule import MASK_SCHEDULES, check_schedule, check_steps, still_open
from armm.decoding.sampling import NoiseSource, Sampler

if TYPE_CHECKING:
    from armm.model import AutoregressiveModel


class MaskedTokenDecoding(SchedulerMixin, ConfigMixin):
    """All positions at once, a fixed number of times (Chang et al., arXiv 2202.04200; ELM, arXiv 2410.16257). A component of a
    pipeline, like a scheduler.

    Step k of K guesses every open position. Their confidence is log p(guess) + temperature * (1 - (k+1)/K) * Gumbel noise, averaged
    over sub-codes; the least confident max(1, min(open - 1, floor(open at first * schedule((k+1)/K)))) are opened again.

    Args:
        num_inference_steps: K.
        mask_schedule: "cos" or "linear".
        confidence_temperature: of the noise on the confidence; 0 takes the most confident.
        remask: in the first half of the steps a decided position that would now be guessed otherwise may be opened again.
    """

    config_name = "scheduler_config.json"
    order = 1

    @register_to_config
    def __init__(
        self,
        num_inference_steps: int = 10,
        mask_schedule: str = "cos",
        confidence_temperature: float = 1.0,
        remask: bool = False,
    ) -> None:
        check_steps(num_inference_steps)
        check_schedule(mask_schedule)
        _check_temperature(confidence_temperature)

    def num_calls(self, grid: Sequence[int], num_inference_steps: int | None = None) -> int:
        """Calls of the trunk; the same for every grid."""
        return self.config.num_inference_steps if num_inference_steps is None else num_inference_steps

    @torch.no_grad()
    def __call__(
        self,
        model: AutoregressiveModel,
        condition: Condition,
        null_condition: Condition | None = None,
        grid: Sequence[int] | None = None,
        *,
        num_inference_steps: int | None = None,
        confidence_temperature: float | None = None,
        sampler: Sampler | None = None,
        guidance: Guidance | None = None,
        noise: NoiseSource | torch.Generator | Sequence[torch.Generator] | Tensor | None = None,
        known_ids: Tensor | None = None,
        known_mask: Tensor | None = None,
        callback: StepCallback | None = None,
        interrupt: Callable[[], bool] | None = None,
        record_logits: bool = False,
    ) -> DecodingOutput:
        """Generate the codes of one image per row of `condition`.

        null_condition: rows standing for "no condition", needed with active guidance. grid: (height, width) in tokens.
        num_inference_steps, confidence_temperature: in place of the configured ones; do_sample=False of the sampler
        also switches the noise on the confidence off. noise: where Exp(1) noise comes from, see `NoiseSource`; recorded
        noise is [B, steps, N * D * (V + 1)], in each step N * D * V values for the guesses and N * D for the confidence
        (see `join_noise`). known_ids [B, N] or [B, N, D], known_mask [B, N]: codes that are given where the mask is
        True. callback(step, ids): the ids after a step, -1 where a position is open; it may return their replacement.
        interrupt: asked before every step, True ends the loop with the guesses so far. record_logits: keep the last
        step's logits.

        Returns:
            ids [B, N], or [B, N, D] where the model has D > 1 sub-codes.
        """
        wake(model)
        if model.mask_id is None:
            raise ValueError("masked decoding needs a model with a mask token (mask_token=True); use NextTokenDecoding")
        sampler = sampler or Sampler()
        steps = check_steps(self.num_calls((), num_inference_steps))
        heat = self.config.confidence_temperature if confidence_temperature is None else confidence_temperature
        heat = _check_temperature(heat) if sampler.do_sample else 0.0
        guided = check_guided(guidance, condition, null_condition)
        rows = concatenate([condition, null_condition]) if guided else condition  # type: ignore[list-item]
        grid = model.grid if grid is None else model.check_grid(grid)
        batch, tokens, parts, codes = condition.batch, math.prod(grid), model.sub_codes, model.vocab_size
        device = rows.embeds.device

        # [B, N, D] throughout; `open` [B, N]
        ids = torch.zeros(batch, tokens, parts, dtype=torch.long, device=device)
        is_open = torch.ones(batch, tokens, dtype=torch.bool, device=device)
        check_known(known_ids, known_mask, batch, tokens, codes, model.code_shape)
        if known_ids is not None:
            ids, is_open = known_ids.to(device).view(ids.shape), ~known_mask.to(device)
        given = ~is_open
        first_open = is_open.sum(1)
        if sampler.do_sample and not isinstance(noise, NoiseSource):
            noise = NoiseSource(noise, batch, tokens * parts * (codes + 1), device)

        logits, done = None, 0
        for step in range(steps):
            if interrupt is not None and interrupt():
                break
            ratio = (step + 1) / steps
            logits = _logits(model, rows, torch.where(is_open[..., None], model.mask_id, ids), guided, grid)
            if guided:
                logits = guidance.combine(logits, step, steps)
            draw = noise.draw(step) if sampler.do_sample else None
            sampled = sampler(logits, None if draw is None else draw[:, : -tokens * parts].view(logits.shape))
            confidence = logits.gather(-1, sampled[..., None]).squeeze(-1) - logits.logsumexp(-1)
            if heat and draw is not None:
                gumbel = -draw[:, -tokens * parts :].view(confidence.shape).log()
                confidence = confidence + heat * (1.0 - ratio) * gumbel
            confidence = confidence.mean(-1)
            kept = ~is_open
            if self.config.remask and 2 * (step + 1) <= steps:
                kept = kept & ((sampled == ids).all(-1) | given)
            ids = torch.where(is_open[..., None], sampled, ids)
            done = step + 1
            if done < steps:
                share = MASK_SCHEDULES[self.config.mask_schedule](ratio)
                is_open = _least_confident(confidence.masked_fill(kept, float("inf")), first_open, is_open, share)
            else:
                is_open = torch.zeros_like(is_open)
            if callback is not None:
                shown = ids.masked_fill(is_open[..., None], -1)
                replacement = callback(step, shown.squeeze(-1) if parts == 1 else shown)
                if replacement is not None:
                    replacement = replacement.view(batch, tokens, parts)
                    is_open = (replacement < 0).any(-1)
                    ids = torch.where(is_open[..., None], ids, replacement)
                wake(model)  # the callback may have decoded a preview, which swaps models under offloading
        kept_logits = logits if record_logits else None
        if parts == 1:
            ids = ids.squeeze(-1)
            kept_logits = None if kept_logits is None else kept_logits.squeeze(2)
        return DecodingOutput(ids, kept_logits, done, done)


def join_noise(guesses: Tensor, confidence: Tensor) -> Tensor:
    """Recorded Exp(1) noise [B, steps, N, D, V] of the guesses and [B, steps, N, D] of their confidence in one tensor."""
    return torch.cat([guesses.flatten(2), confidence.flatten(2)], dim=2)


def _logits(model: AutoregressiveModel, rows: Condition, ids: Tensor, guided: bool, grid: Sequence[int]) -> Tensor:
    """Logits [R, N, D, V] for every position of `ids` [B, N, D]."""
    if guided:
        ids = torch.cat([ids, ids])
    out = model.hidden(ids if model.sub_codes > 1 else ids.squeeze(-1), rows, grid=grid)
    hidden = out[0] if isinstance(out, tuple) else out
    logits = model.logits(hidden[:, -ids.shape[1] * ids.shape[2] :])
    return logits.view(*ids.shape, -1)


def _least_confident(confidence: Tensor, first_open: Tensor, is_open: Tensor, share: float) -> Tensor:
    """Which positions are open next: in each row all that are no more confident than its m-th least confident."""
    number = still_open(first_open, is_open.sum(1), share)
    threshold = confidence.sort(dim=1).values.gather(1, number[:, None] - 1)
    return (confidence <= threshold) & (confidence < float("inf"))


def _check_temperature(temperature: float) -> float:
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"confidence_temperature must be a finite number >= 0, got {temperature!r}")
    return temperature
