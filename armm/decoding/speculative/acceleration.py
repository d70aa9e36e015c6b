"""What `pipe.enable_acceleration` takes to decode speculatively: a draft source and a verifier, with names for the usual pairs."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from armm.decoding.acceleration import Acceleration
from armm.decoding.interleaved import InterleavedDecoding
from armm.decoding.speculative.draft import DraftSource
from armm.decoding.speculative.draft_model import DraftModel
from armm.decoding.speculative.grouped import GroupedVerifier
from armm.decoding.speculative.images import SpeculativeImages, vectors_by_id
from armm.decoding.speculative.jacobi import JacobiWindow
from armm.decoding.speculative.relaxed import RelaxedVerifier
from armm.decoding.speculative.statistics import SpeculativeStatistics
from armm.decoding.speculative.strategy import SpeculativeDecoding, check_accelerated
from armm.decoding.speculative.verify import MatchVerifier, Verifier

RULES = ("ratio", "match")


class Speculative(Acceleration):
    """Several codes from one call of the transformer: `draft` guesses them, one call looks at all guesses, `verifier` takes those
    that may stand.

    Works on pipelines that draw discrete codes one after the other (`NextTokenDecoding`, `TokenShuffleDecoding`; of
    `InterleavedDecoding` the images that a call draws), with guidance, in batches; the model needs no training.

    Args:
        draft: where guesses come from: `JacobiWindow` (default), `TokenRecycling`, `DraftModel`, `MedusaDrafts`.
        verifier: `Verifier` (exact, the default), `MatchVerifier`, `GroupedVerifier`, `RelaxedVerifier`, `TypicalVerifier`.

    Attributes:
        statistics: of the last call (`SpeculativeStatistics`): calls of the transformer, mean accepted length, a heat map of where drafts
            were taken.
    """

    name: ClassVar[str] = "speculative decoding"

    def __init__(self, draft: DraftSource | None = None, verifier: Verifier | None = None) -> None:
        draft = JacobiWindow() if draft is None else draft
        verifier = Verifier() if verifier is None else verifier
        if not isinstance(draft, DraftSource):
            raise TypeError(f"draft must be a draft source such as JacobiWindow(), got {draft!r}")
        if not isinstance(verifier, Verifier):
            raise TypeError(f"verifier must be a verifier such as GroupedVerifier(), got {verifier!r}")
        self.draft, self.verifier = draft, verifier
        self._last: SpeculativeDecoding | SpeculativeImages | None = None

    @property
    def loosening(self) -> float:
        """How far results may be from plain sampling, in the unit of the verifier; 0 is exact."""
        return self.verifier.loosening

    @property
    def statistics(self) -> SpeculativeStatistics | None:
        return None if self._last is None else self._last.statistics

    def check(self, pipe: Any) -> None:
        decoding = getattr(pipe, "decoding", None)
        if not isinstance(decoding, InterleavedDecoding):
            check_accelerated(decoding)
        elif isinstance(self.draft, DraftModel):
            raise ValueError(
                "a draft model cannot draft for sequences of text and images: use JacobiWindow or TokenRecycling"
            )
        self.draft.check(pipe.transformer)
        self.verifier.check(pipe.transformer, _codebook(pipe))

    def strategy(self, pipe: Any) -> SpeculativeDecoding:
        last = SpeculativeDecoding(pipe.decoding, self.draft, self.verifier, _codebook(pipe))
        self._last = last
        return last

    def image_strategy(self, pipe: Any) -> SpeculativeImages:
        """What draws the images of a pipeline of text and images."""
        last = SpeculativeImages(self.draft, self.verifier, _codebook(pipe))
        self._last = last
        return last

    def __repr__(self) -> str:
        return f"{type(self).__name__}(draft={self.draft!r}, verifier={self.verifier!r})"


class JacobiSpeculative(Speculative):
    """Speculative Jacobi decoding (SJD, arXiv 2410.01699): drafts are the last call's own draws further on. Exact.

    Args:
        window: tokens that one call takes, the last certain one among them; 1 is next-token decoding.
        init: what stands where no draft was yet: "random", "repeat_left", "likeliest_left" or "repeat_above".
        rule: "ratio" is distributed as plain sampling; "match" is the very result of plain sampling with the same generator, in a
            few more calls.
        redraw: "fresh" (the authors'), or "coupled": drafts change from call to call no more than they must (MC-SJD, arXiv 2510.24211);
            exact as well, and fewer calls.
        draft: another source in place of the Jacobi window.
    """

    def __init__(
        self,
        window: int = 16,
        init: str = "random",
        rule: str = "ratio",
        draft: DraftSource | None = None,
        redraw: str = "fresh",
    ) -> None:
        if rule not in RULES:
            raise ValueError(f"rule must be one of {RULES}, got {rule!r}")
        super().__init__(
            draft or JacobiWindow(window, init, redraw=redraw), Verifier() if rule == "ratio" else MatchVerifier()
        )


class GroupedSpeculative(Speculative):
    """Grouped speculative decoding (GSD, arXiv 2508.07747): a draft is judged with the tokens that could stand in its place.

    Lossy: `group_size` says how many tokens a group may have; 0 is exact. The defaults are the authors'.

    Args:
        window: tokens that one call takes, the last certain one among them.
        group_size: tokens around the draft, in the order of their logits, that may be in its group.
        p_threshold: how far their probability may be from the draft's; 0 is exact as well.
        distance_threshold: how far their vectors may be from the draft's, as squared distance.
        table: "embedding" (the transformer's input embedding, the authors' choice) or "codebook" (the tokenizer's vectors).
        distance_ids: only so many ids have vectors to be compared.
        init, redraw: see `JacobiSpeculative`.
        draft: another source in place of the Jacobi window.
    """

    def __init__(
        self,
        window: int = 16,
        group_size: int = 14,
        p_threshold: float = 0.15,
        distance_threshold: float = 0.5,
        table: str = "embedding",
        distance_ids: int = 10000,
        init: str = "random",
        draft: DraftSource | None = None,
        redraw: str = "fresh",
    ) -> None:
        verifier = GroupedVerifier(group_size, p_threshold, distance_threshold, distance_ids, table)
        super().__init__(draft or JacobiWindow(window, init, redraw=redraw), verifier)


class RelaxedSpeculative(Speculative):
    """Relaxed acceptance (LANTERN, arXiv 2410.03355): a draft may borrow the probability of the codes nearest to it.

    Lossy: `delta` bounds how much, 0 is exact. With bound="absolute" every draw is from a distribution that is at most delta away from
    the model's in total variation, for each test.

    Args:
        window: tokens that one call takes, the last certain one among them.
        delta: how much may be borrowed (LANTERN's delta, or with bound="relative" LANTERN++'s lambda, in units of p(x)).
        neighbours: how many of the nearest codes may lend (LANTERN's k).
        bound: "absolute" or "relative".
        table: "codebook" (the tokenizer's vectors, the authors' choice) or "embedding".
        init, redraw: see `JacobiSpeculative`.
        draft: another source in place of the Jacobi window.
    """

    def __init__(
        self,
        window: int = 16,
        delta: float = 0.1,
        neighbours: int = 100,
        bound: str = "absolute",
        table: str = "codebook",
        init: str = "random",
        draft: DraftSource | None = None,
        redraw: str = "fresh",
    ) -> None:
        super().__init__(
            draft or JacobiWindow(window, init, redraw=redraw), RelaxedVerifier(delta, neighbours, bound, table)
        )


def _codebook(pipe: Any) -> Tensor | None:
    """The vectors of the codes of a pipeline's tokenizer, by the ids that its strategy draws, or None."""
    quantizer = getattr(getattr(pipe, "tokenizer", None), "quantizer", None)
    vectors = getattr(quantizer, "codebook", None)
    if not callable(vectors):
        return None
    if isinstance(pipe.decoding, InterleavedDecoding):
        return vectors_by_id(pipe.block, vectors(), pipe.transformer.vocab_size)
    return vectors()
