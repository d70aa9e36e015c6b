"""Speculative decoding in the place of a plain strategy: the same arguments, the same output, fewer calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from armm.condition import Condition
from armm.decoding.base import DecodingOutput, StepCallback, check_known, vocabulary_range, wake
from armm.decoding.guidance import Guidance
from armm.decoding.next_token import NextTokenDecoding
from armm.decoding.orders import windows
from armm.decoding.sampling import NoiseSource, Sampler
from armm.decoding.speculative.chance import Numbers, PlaceNoise, WindowNumbers
from armm.decoding.speculative.draft import DraftSource
from armm.decoding.speculative.loop import speculate
from armm.decoding.speculative.statistics import SpeculativeStatistics
from armm.decoding.speculative.stream import Target
from armm.decoding.speculative.verify import Verifier
from armm.decoding.token_shuffle import TokenShuffleDecoding

if TYPE_CHECKING:
    from armm.model import AutoregressiveModel

ACCELERATED = (NextTokenDecoding, TokenShuffleDecoding)


class SpeculativeDecoding:
    """`decoding`, with drafts of `source` that `verifier` judges. Called like the strategy it stands for.

    Args:
        decoding: `NextTokenDecoding`, or `TokenShuffleDecoding` (a draft is a whole window then).
        source, verifier: see `armm.decoding.speculative`.
        codebook: the tokenizer's code vectors [V, C], for verifiers that compare codes.
    """

    def __init__(
        self,
        decoding: NextTokenDecoding | TokenShuffleDecoding,
        source: DraftSource,
        verifier: Verifier,
        codebook: Tensor | None = None,
    ) -> None:
        check_accelerated(decoding)
        self.decoding, self.source, self.verifier, self.codebook = decoding, source, verifier, codebook
        self.statistics: SpeculativeStatistics | None = None

    def num_calls(self, grid: Sequence[int]) -> int:
        """Calls of the trunk at most: those of the plain strategy."""
        return self.decoding.num_calls(grid)

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
        noise: NoiseSource | torch.Generator | Sequence[torch.Generator] | Sequence[Numbers] | Tensor | None = None,
        known_ids: Tensor | None = None,
        known_mask: Tensor | None = None,
        vocabulary: tuple[int, int] | None = None,
        callback: StepCallback | None = None,
        interrupt: Callable[[], bool] | None = None,
    ) -> DecodingOutput:
        """Arguments as in `NextTokenDecoding`, but for two: `callback(call, ids)` sees all ids after every call of the trunk, -1
        where none is certain yet, and `noise` is generators, or recorded `Numbers` of every call (Exp(1) noise is taken by
        `MatchVerifier` only).
        """
        wake(model)
        if not model.causal or model.tokens_per_position > 1 or model.head.num_states > 1:
            raise ValueError("speculative decoding needs a causal model with one head and one token a position")
        if model.shuffle is not None and model.shuffle.causal:
            raise ValueError(
                "speculative decoding needs windows whose tokens are independent of each other: this model's shuffle has causal_mlps"
            )
        if model.window != getattr(self.decoding, "window", 1):
            raise ValueError(
                f"the model's window is {model.window}, the strategy's {getattr(self.decoding, 'window', 1)}: they do not belong together"
            )
        low, high = vocabulary_range(model, vocabulary)
        sampler = sampler or Sampler()
        spare = max(self.source.window, len(self.source.tree) if self.source.tree is not None else 0)
        target = Target(
            model, condition, null_condition, grid,
            guidance=guidance, low=low, high=high, sampler=sampler, spare=spare, width=self.source.window,
        )  # fmt: skip
        batch, device, sizes = condition.batch, target.device, target.grid
        cells = (windows(sizes, model.window) if model.window > 1 else torch.arange(_count(sizes))[:, None]).to(device)
        check_known(known_ids, known_mask, batch, cells.numel(), high - low, model.code_shape)
        known = None
        if known_ids is not None and known_mask is not None:
            open_ = ~known_mask.to(device).view(*known_mask.shape, *(1 for _ in model.code_shape))
            known = self._units(known_ids.to(device).masked_fill(open_, -1), cells)
        uniforms, places = randomness(self.verifier, noise, target)

        def report(call: int, codes: Tensor) -> Tensor | None:
            replaced = callback(call, self._image(codes, cells, model))  # type: ignore[misc]
            return None if replaced is None else self._units(replaced.to(device), cells)

        statistics = SpeculativeStatistics(target.units, tuple(sizes), cells.cpu())
        codes, finished = speculate(
            target,
            self.source,
            self.verifier.prepare(target, self.codebook),
            uniforms=uniforms,
            noise=places,
            known=known,
            statistics=statistics,
            callback=None if callback is None else report,
            interrupt=interrupt,
        )
        self.statistics = statistics
        ids = self._image(codes, cells, model).clamp_(min=0)
        return DecodingOutput(ids, None, target.num_calls, min(finished) * cells.shape[1])

    @staticmethod
    def _units(ids: Tensor, cells: Tensor) -> Tensor:
        """Ids [B, N] or [B, N, K] by cell -> [B, U, S] by unit."""
        return ids[:, cells] if ids.dim() == 2 else ids

    @staticmethod
    def _image(codes: Tensor, cells: Tensor, model: AutoregressiveModel) -> Tensor:
        if model.code_shape:
            return codes.clone()
        ids = codes.new_empty(len(codes), cells.numel())
        return ids.index_copy_(1, cells.flatten(), codes.flatten(1))


def randomness(
    verifier: Verifier,
    noise: NoiseSource | torch.Generator | Sequence[torch.Generator] | Sequence[Numbers] | Tensor | None,
    target: Target,
) -> tuple[WindowNumbers, PlaceNoise | None]:
    """The numbers of drafts and of their verification, and the noise of the places for a verifier that draws with it."""
    batch, slots, device = target.batch, target.slots, target.device
    do_sample = target.sampler.do_sample
    if not (verifier.wants_noise and do_sample):
        if isinstance(noise, (Tensor, NoiseSource)) and not do_sample:
            noise = None
        return WindowNumbers(noise, batch, slots, device), None  # type: ignore[arg-type]
    # The noise is all the generator's; drafts, which do not change the result, have numbers of their own.
    generators = [torch.Generator().manual_seed(0) for _ in range(batch)]
    if not isinstance(noise, NoiseSource):
        if isinstance(noise, Tensor) and noise.dim() > 3:
            noise = noise.flatten(2)
        noise = NoiseSource(noise, batch, target.model.sub_codes * target.vocabulary, device)  # type: ignore[arg-type]
    places = PlaceNoise(noise, slots, target.units, target.model.window**2)
    return WindowNumbers(generators, batch, slots, device), places


def check_accelerated(decoding: object) -> None:
    """A ValueError unless speculation suits this strategy."""
    if not isinstance(decoding, ACCELERATED):
        names = " and ".join(kind.__name__ for kind in ACCELERATED)
        raise ValueError(
            f"speculative decoding needs codes that are drawn one after the other ({names}), this pipeline has {type(decoding).__name__}"
        )


def _count(grid: Sequence[int]) -> int:
    total = 1
    for size in grid:
        total *= size
    return total
