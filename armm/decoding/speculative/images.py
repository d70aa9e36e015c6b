"""Speculative decoding of the image that a text-and-image model is writing: `InterleavedDecoding` where all tokens are of one image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from armm.condition import Condition
from armm.decoding.base import StepCallback, wake
from armm.decoding.contexts import visible_tokens
from armm.decoding.guidance import ContextGuidance
from armm.decoding.interleaved import SequenceOutput
from armm.decoding.sampling import NoiseSource, Sampler
from armm.decoding.speculative.draft import DraftSource
from armm.decoding.speculative.loop import speculate
from armm.decoding.speculative.statistics import SpeculativeStatistics
from armm.decoding.speculative.strategy import randomness
from armm.decoding.speculative.stream import Target
from armm.decoding.speculative.verify import Verifier
from armm.decoding.vocabulary import CODE, Grammar, ImageBlock

if TYPE_CHECKING:
    from armm.model import AutoregressiveModel

FAR = 1e4  # where ids that are no codes stand among the vectors of codes


class SpeculativeImages:
    """Draws an image of a known size behind prompts that have begun it, with drafts of `source` that `verifier` judges.

    Ends of lines are known and cost nothing but their place in a window.

    Args:
        source, verifier: see `armm.decoding.speculative`.
        codebook: code vectors [V, C] by the ids of the vocabulary, for verifiers that compare codes; see `vectors_by_id`.
    """

    def __init__(self, source: DraftSource, verifier: Verifier, codebook: Tensor | None = None) -> None:
        self.source, self.verifier, self.codebook = source, verifier, codebook
        self.statistics: SpeculativeStatistics | None = None

    @torch.no_grad()
    def __call__(
        self,
        model: AutoregressiveModel,
        ids: Tensor,
        *,
        grammar: Grammar,
        grid: tuple[int, int],
        mask: Tensor | None = None,
        sampler: Sampler | None = None,
        guidance: ContextGuidance | None = None,
        noise: NoiseSource | torch.Generator | Sequence[torch.Generator] | Tensor | None = None,
        callback: StepCallback | None = None,
        interrupt: Callable[[], bool] | None = None,
    ) -> SequenceOutput:
        """Arguments as of `InterleavedDecoding`, but for two: grid is that of the image in codes, whose begin and size end the prompts
        `ids` [B, T]; callback(call, ids) sees all ids after every call of the trunk, -1 where none is certain yet.
        """
        wake(model)
        sampler = sampler or Sampler()
        if sampler.repetition_penalty != 1.0:
            raise ValueError("speculative decoding has no repetition penalty: images are drawn without one")
        block, (height, width), batch = grammar.block, grid, len(ids)
        line = width + (block.end_of_line is not None)
        units = height * line - (line - width)  # what follows the last code is known
        if ids.shape[1] + units > model.max_positions:
            raise ValueError(
                f"an image of {height}x{width} codes does not fit behind a prompt of {ids.shape[1]} tokens: this model has "
                f"{model.max_positions} positions"
            )
        device = ids.device
        grammar = grammar.to(device)
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.to(device=device, dtype=torch.bool)
        views = () if guidance is None else guidance.views
        members = block.members(model.vocab_size).to(device)
        visible = visible_tokens(ids, real, views, grammar, members)
        embeds = model.embed(ids)
        conditions = [
            Condition(embeds, None if bool(seen.all()) else seen, (seen.cumsum(1) - 1).clamp(min=0))
            for seen in visible.split(batch)
        ]
        allowed = grammar.table[CODE]

        def filters(logits: Tensor, numbers: Tensor) -> Tensor:
            logits = logits.masked_fill(~allowed, float("-inf"))
            return sampler.filter(logits) if sampler.do_sample else logits

        codes = block.code_ids
        target = Target(
            model, conditions[0], conditions[1:] or None, (height, line),
            guidance=guidance if views else None, sampler=sampler, filters=filters,
            spare=max(self.source.window, len(self.source.tree) if self.source.tree is not None else 0),
            width=self.source.window, index=visible.sum(1)[:, None] + torch.arange(units, device=device),
            random_range=(int(codes.min()), int(codes.max()) + 1),
        )  # fmt: skip
        known = torch.full((batch, units, 1), -1, dtype=torch.long, device=device)
        if block.end_of_line is not None:
            known[:, width::line] = block.end_of_line
        uniforms, places = randomness(self.verifier, noise, target)

        def report(call: int, found: Tensor) -> Tensor | None:
            replaced = callback(call, found[..., 0])  # type: ignore[misc]
            return None if replaced is None else replaced[..., None]

        self.statistics = SpeculativeStatistics(units, (height, line), torch.arange(units)[:, None])
        found, finished = speculate(
            target,
            self.source,
            self.verifier.prepare(target, self.codebook),
            uniforms=uniforms,
            noise=places,
            known=known,
            statistics=self.statistics,
            callback=None if callback is None else report,
            interrupt=interrupt,
        )
        done = min(finished)
        lengths = torch.full((batch,), done, dtype=torch.long, device=device)
        return SequenceOutput(found[:, :done, 0], lengths, None, target.num_calls)


def vectors_by_id(block: ImageBlock, codebook: Tensor, vocab_size: int) -> Tensor:
    """Code vectors [K, C] -> [vocab_size, C], by the ids that the codes have in a vocabulary; all other ids are far away."""
    table = codebook.new_full((vocab_size, codebook.shape[1]), FAR)
    table[block.code_ids.to(codebook.device)] = codebook
    return table
