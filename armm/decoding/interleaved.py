"""Sequences of text and images of one vocabulary: token after token, with a grammar that says what may come next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from armm.decoding.base import StepCallback, wake
from armm.decoding.contexts import ContextStream
from armm.decoding.guidance import ContextGuidance
from armm.decoding.sampling import NoiseSource, Sampler
from armm.decoding.vocabulary import Grammar, GrammarState

if TYPE_CHECKING:
    from armm.model import AutoregressiveModel


@dataclass
class SequenceOutput:
    """ids [B, M] behind the prompts, each row filled up behind its stop token; lengths [B], the stop token included; logits
    [B, M, V] the draws were made from (after guidance and grammar, before the filters), if recorded; num_calls of the trunk."""

    ids: Tensor
    lengths: Tensor
    logits: Tensor | None = None
    num_calls: int = 0

    def tokens(self) -> list[list[int]]:
        """The ids of each row up to and including its stop token."""
        return [row[:length] for row, length in zip(self.ids.tolist(), self.lengths.tolist(), strict=True)]


class InterleavedDecoding(SchedulerMixin, ConfigMixin):
    """Text and images of one vocabulary in one sequence. A component of a pipeline, like a scheduler."""

    config_name = "scheduler_config.json"
    order = 1

    @register_to_config
    def __init__(self) -> None:
        pass

    @torch.no_grad()
    def __call__(
        self,
        model: AutoregressiveModel,
        ids: Tensor,
        *,
        max_tokens: int,
        mask: Tensor | None = None,
        grammar: Grammar | None = None,
        stop_ids: Sequence[int] = (),
        fill_id: int | None = None,
        sampler: Sampler | None = None,
        image_sampler: Sampler | None = None,
        guidance: ContextGuidance | None = None,
        noise: NoiseSource | torch.Generator | Sequence[torch.Generator] | Tensor | None = None,
        forced_ids: Tensor | None = None,
        callback: StepCallback | None = None,
        interrupt: Callable[[], bool] | None = None,
        record_logits: bool = False,
        check_every: int = 16,
    ) -> SequenceOutput:
        """Continue the prompts `ids` [B, T].

        mask: bool [B, T], False on padding (on the left). grammar: what may come next; None allows every id everywhere. stop_ids:
        a row ends with the first of them; it is filled up with fill_id (default: the first stop id). sampler: of text;
        image_sampler: of what belongs to images, sizes included (default: the same). guidance: of images; it starts behind
        their sizes. noise: where Exp(1) noise comes from, see `NoiseSource`; one draw for each token of each row. forced_ids
        [B, F]: the first F tokens, whatever is drawn. callback(step, ids so far): may return their replacement. Whether all
        rows have ended is looked up every `check_every` tokens only.

        Raises:
            ValueError: prompts that are empty or do not fit, guidance without a grammar, and the like.
        """
        wake(model)
        self._check(model, ids, max_tokens, mask, forced_ids)
        sampler = sampler or Sampler()
        image_sampler = image_sampler or sampler
        views = guidance.views if guidance is not None else ()
        if views and grammar is None:
            raise ValueError("guidance of images needs a grammar that says where images are")
        batch, device = len(ids), ids.device
        stops = torch.tensor(list(stop_ids), dtype=torch.long, device=device)
        fill = int(stop_ids[0]) if fill_id is None and len(stop_ids) else fill_id or 0
        sampling = sampler.do_sample or image_sampler.do_sample
        if sampling and not isinstance(noise, NoiseSource):
            noise = NoiseSource(noise, batch, model.vocab_size, device)

        stream = ContextStream(model, ids, max_tokens - 1, mask, views, None if grammar is None else grammar.to(device))
        state = None if grammar is None else grammar.start(ids)
        seen = _seen(ids, model.vocab_size) if _penalised(sampler, image_sampler) else None
        out = torch.full((batch, max_tokens), fill, dtype=torch.long, device=device)
        kept = torch.zeros(batch, max_tokens, model.vocab_size, device=device) if record_logits else None
        finished = torch.zeros(batch, dtype=torch.bool, device=device)
        token, before = out[:, 0], state
        done = 0
        for step in range(max_tokens):
            if interrupt is not None and interrupt():
                break
            hidden = stream.prefill() if step == 0 else stream.feed(token, before, state)
            logits = model.logits(hidden)
            if views:
                guided = state.since >= grammar.block.header  # type: ignore[union-attr]
                logits = torch.where(guided[:, None], guidance.combine(logits), logits[:batch])  # type: ignore[union-attr]
            if grammar is not None and state is not None:
                logits = grammar.mask(logits, grammar.kinds(state, 1, max_tokens - step)[:, 0])
            if kept is not None:
                kept[:, step] = logits
            drawn = noise.draw(step) if sampling and isinstance(noise, NoiseSource) else None
            token = _draw(logits, state, sampler, image_sampler, drawn, seen)
            if forced_ids is not None and step < forced_ids.shape[1]:
                token = forced_ids[:, step].to(device)
            token = token.masked_fill(finished, fill)
            out[:, step] = token
            done = step + 1
            if callback is not None:
                replacement = callback(step, out[:, :done])
                if replacement is not None:
                    out[:, :done] = replacement
                    token = out[:, step]
                wake(model)  # the callback may have decoded a preview, which swaps models under offloading
            if grammar is not None and state is not None:
                before, state = state, grammar.advance(state, token)
            if seen is not None:
                seen.scatter_(1, token[:, None], True)
            finished = finished | torch.isin(token, stops)
            if len(stops) and done % check_every == 0 and bool(finished.all()):
                break
        lengths = _lengths(out[:, :done], stops)
        width = int(lengths.max()) if done else 0
        return SequenceOutput(out[:, :width], lengths, None if kept is None else kept[:, :width], stream.num_calls)

    @staticmethod
    def _check(
        model: AutoregressiveModel, ids: Tensor, max_tokens: int, mask: Tensor | None, forced_ids: Tensor | None
    ) -> None:
        if ids.dim() != 2 or ids.shape[1] == 0:
            raise ValueError(f"ids must be [batch, tokens] with at least one token, got shape {tuple(ids.shape)}")
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= model.vocab_size):
            raise ValueError(f"ids must lie in 0 .. {model.vocab_size - 1}, got {int(ids.min())} .. {int(ids.max())}")
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
        positions = len(model.layout())
        if ids.shape[1] + max_tokens > positions + 1:
            raise ValueError(
                f"max_tokens={max_tokens} does not fit behind a prompt of {ids.shape[1]} tokens: this model has {positions} positions"
            )
        if mask is not None and (tuple(mask.shape) != tuple(ids.shape) or not bool(mask[:, -1].all())):
            raise ValueError(f"mask must be {tuple(ids.shape)} with padding on the left only, got {tuple(mask.shape)}")
        if forced_ids is not None and (forced_ids.dim() != 2 or len(forced_ids) != len(ids)):
            raise ValueError(f"forced_ids must be [{len(ids)}, tokens], got {tuple(forced_ids.shape)}")


def _penalised(*samplers: Sampler) -> bool:
    return any(sampler.repetition_penalty != 1.0 for sampler in samplers)


def _seen(ids: Tensor, vocab_size: int) -> Tensor:
    seen = torch.zeros(len(ids), vocab_size, dtype=torch.bool, device=ids.device)
    return seen.scatter_(1, ids, True)


def _draw(
    logits: Tensor,
    state: GrammarState | None,
    sampler: Sampler,
    image_sampler: Sampler,
    noise: Tensor | None,
    seen: Tensor | None,
) -> Tensor:
    """Ids [B]: text by one sampler, images by the other."""
    if state is None or sampler == image_sampler:
        return sampler(logits, noise, seen)
    return torch.where(state.open, image_sampler(logits, noise, seen), sampler(logits, noise, seen))


def _lengths(ids: Tensor, stops: Tensor) -> Tensor:
    """Tokens of each row [B] up to and including its first stop token."""
    before = torch.isin(ids, stops).int().cumsum(1).eq(0).sum(1)
    return (before + 1).clamp(max=ids.shape[1])
