"""Relaxed acceptance (LANTERN, arXiv 2410.03355; LANTERN++, 2502.06352): a draft may borrow probability from its nearest codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from armm.decoding.speculative.stream import Target
from armm.decoding.speculative.tables import TABLES, check_table, code_vectors
from armm.decoding.speculative.verify import Verifier

if TYPE_CHECKING:
    from armm.model import AutoregressiveModel

BOUNDS = ("absolute", "relative")


def nearest_codes(vectors: Tensor, tokens: Tensor, count: int) -> Tensor:
    """The `count` nearest codes of `tokens` [...] by distance between `vectors` [V, C]: [..., count], nearest first, without themselves."""
    chosen = vectors[tokens.reshape(-1)]
    distance = torch.cdist(chosen, vectors, compute_mode="donot_use_mm_for_euclid_dist")
    distance.scatter_(1, tokens.reshape(-1, 1), float("inf"))
    nearest = distance.topk(min(count, len(vectors) - 1), dim=1, largest=False).indices
    return nearest.view(*tokens.shape, -1)


def borrowed(
    p: Tensor, tokens: Tensor, nearest: Tensor, delta: float, bound: str = "absolute"
) -> tuple[Tensor, Tensor]:
    """What `tokens` [...] may borrow in p [..., V] from their `nearest` codes [..., k]: as much as the first few of them have
    together without exceeding the bound, which is `delta` (then the total variation to p is at most delta) or `delta` * p(x).

    Returns:
        the borrowed probability [...], and whether any code was within the bound [...] (it may have had none to lend).
    """
    total = p.gather(-1, nearest).cumsum(-1)
    limit = delta if bound == "absolute" else delta * p.gather(-1, tokens[..., None])
    within = total <= limit
    return torch.where(within, total, 0.0).amax(-1), within.any(-1)


@dataclass(frozen=True)
class RelaxedVerifier(Verifier):
    """Takes a draft with probability (p(x) + what it may borrow) / q(x), see `borrowed`; delta=0 is exact.

    Args:
        delta: how much may be borrowed.
        neighbours: how many nearest codes may lend.
        bound: "absolute" (LANTERN: the total-variation bound) or "relative" to p(x) (LANTERN++'s lambda).
        table: "codebook" (the authors') or "embedding", between whose vectors distances are taken.
    """

    delta: float = 0.1
    neighbours: int = 100
    bound: str = "absolute"
    table: str = "codebook"
    vectors: Tensor | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.delta < float("inf") or (self.bound == "absolute" and self.delta > 1):
            raise ValueError(
                f"delta must lie in 0 .. 1 (0 = exact) with bound='absolute', and be >= 0 with bound='relative', got {self.delta!r}"
            )
        if not isinstance(self.neighbours, int) or isinstance(self.neighbours, bool) or self.neighbours < 1:
            raise ValueError(f"neighbours must be an integer >= 1, got {self.neighbours!r}")
        if self.bound not in BOUNDS:
            raise ValueError(f"bound must be one of {BOUNDS}, got {self.bound!r}")
        if self.table not in TABLES:
            raise ValueError(f"table must be one of {TABLES}, got {self.table!r}")

    @property
    def loosening(self) -> float:
        return self.delta

    def check(self, model: AutoregressiveModel, codebook: Tensor | None) -> None:
        check_table(self.table, model, codebook)

    def prepare(self, target: Target, codebook: Tensor | None) -> RelaxedVerifier:
        if self.vectors is not None:
            return self
        return replace(self, vectors=code_vectors(self.table, target, codebook))

    def nearest(self, tokens: Tensor) -> Tensor:
        # one more than may lend: that one is struck out too when a token is rejected
        return nearest_codes(self.vectors, tokens, self.neighbours + 1)  # type: ignore[arg-type]

    def acceptance(self, logits: Tensor, p: Tensor, q: Tensor | None, tokens: Tensor) -> Tensor:
        mine = p.gather(-1, tokens[..., None]).squeeze(-1)
        if self.delta > 0:
            mine = mine + borrowed(p, tokens, self.nearest(tokens)[..., : self.neighbours], self.delta, self.bound)[0]
        if q is None:
            return mine
        return (mine / q.gather(-1, tokens[..., None]).squeeze(-1)).nan_to_num(nan=0.0).clamp(max=1.0)

    def residual(self, p: Tensor, q: Tensor | None, tokens: Tensor) -> Tensor:
        if self.delta == 0:
            return super().residual(p, q, tokens)
        nearest = self.nearest(tokens)
        widened = borrowed(p, tokens, nearest[..., : self.neighbours], self.delta, self.bound)[1]
        return relaxed_residual(p, q, tokens, nearest, widened)

    def keeps_greedily(self, logits: Tensor, tokens: Tensor) -> Tensor:
        if self.delta == 0:
            return super().keeps_greedily(logits, tokens)
        p = logits.softmax(-1)
        more, _ = borrowed(p, tokens, self.nearest(tokens)[..., : self.neighbours], self.delta, self.bound)
        return p.scatter_add(-1, tokens[..., None], more[..., None]).argmax(-1) == tokens


def relaxed_residual(p: Tensor, q: Tensor | None, tokens: Tensor, nearest: Tensor, widened: Tensor) -> Tensor:
    """Weights after a rejection: max(p - q, 0) with q struck out at the `nearest` codes of widened tokens; without q, p with token
    and, if widened, nearest codes struck out (LANTERN's two modes)."""
    struck = torch.zeros_like(p).scatter(-1, nearest, 1.0).bool() & widened[..., None]
    if q is None:
        return p.scatter(-1, tokens[..., None], 0.0).masked_fill(struck, 0.0)
    return (p - q.masked_fill(struck, 0.0)).clamp(min=0)


def relaxed_posterior(
    verifier: RelaxedVerifier,
    candidates: Tensor,
    nodes: Tensor,
    logits: Tensor,
    nearest: Callable[[Tensor], Tensor],
    uniforms: Sequence[float],
    drafted: Callable[[int, int], tuple[float, Tensor]] | None = None,
) -> tuple[int, int, Tensor]:
    """LANTERN's walk through a tree of drafts, with its two kinds of draft.

    Args:
        candidates, nodes: int64 [leaves, depth + 1], tokens and nodes of the paths to the leaves, -1 behind their ends.
        logits: [n, V], filtered, of every node. nearest: tokens [...] -> nearest codes [..., k + 1].
        uniforms: numbers, one for each test in order.
        drafted: (leaf, level) -> probability of drawing that token after its earlier siblings, and the distribution of its parent
            without them. None: drafts without chance.

    Returns:
        a leaf on the path taken, how many drafts were taken, weights [V] of the next token.
    """
    depth, numbers = candidates.shape[1] - 1, iter(uniforms)
    leaf, accepted, rejected = 0, 0, False
    p = logits[nodes[0, 0]].softmax(-1)
    for level in range(1, depth + 1):
        shared = (candidates[:, :level] == candidates[leaf, :level]).all(1).nonzero()[:, 0].tolist()
        p, rejected, tried = logits[nodes[shared[0], level - 1]].softmax(-1), False, set()
        for other in shared:
            token = candidates[other, level]
            if int(token) == -1 or int(token) in tried:
                continue
            tried.add(int(token))
            number, close = next(numbers), nearest(token)
            more, widened = torch.zeros(()), torch.zeros((), dtype=torch.bool)
            if verifier.delta > 0:
                more, widened = borrowed(p, token, close[: verifier.neighbours], verifier.delta, verifier.bound)
            chance, q = (1.0, None) if drafted is None else drafted(other, level)
            if chance <= 0:
                continue
            if number <= float(p[token] + more) / chance:
                leaf, accepted, rejected = other, level, False
                break
            rejected = True
            p = relaxed_residual(p, q, token, close, widened)
            p = torch.ones_like(p) if float(p.sum()) == 0 else p
            p = p / p.sum()
        if accepted < level:
            break
    if rejected and accepted < depth:
        return leaf, accepted, p
    return leaf, accepted, logits[nodes[leaf, accepted]].softmax(-1)


def relaxed_greedy_posterior(
    verifier: RelaxedVerifier, candidates: Tensor, nodes: Tensor, logits: Tensor, nearest: Callable[[Tensor], Tensor]
) -> tuple[int, int]:
    """LANTERN's walk without sampling: the leaf with the longest path of tokens that are the likeliest once they have borrowed, and
    its length."""
    tokens = candidates[:, 1:].clamp(min=0)
    p = logits[nodes[:, :-1].clamp(min=0)].softmax(-1)
    if verifier.delta > 0:
        more, _ = borrowed(p, tokens, nearest(tokens)[..., : verifier.neighbours], verifier.delta, verifier.bound)
        p = p.scatter_add(-1, tokens[..., None], more[..., None])
    taken = (p.argmax(-1) == tokens) & (candidates[:, 1:] >= 0)
    lengths = taken.long().cumprod(1).sum(1)
    return int(lengths.argmax()), int(lengths.max())
