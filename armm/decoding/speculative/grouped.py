"""Grouped speculative decoding (GSD, arXiv 2508.07747): a draft is tested with the tokens that may as well stand in its place."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from armm.decoding.speculative.stream import Target
from armm.decoding.speculative.tables import TABLES, check_table, code_vectors
from armm.decoding.speculative.verify import Verifier, plain_ratio

if TYPE_CHECKING:
    from armm.model import AutoregressiveModel


def dynamic_clusters(
    logits: Tensor,
    p: Tensor,
    tokens: Tensor,
    vectors: Tensor | None = None,
    *,
    group_size: int = 14,
    p_threshold: float = 0.15,
    distance_threshold: float = 0.5,
    distance_ids: int = 10000,
) -> tuple[Tensor, Tensor]:
    """The groups of `tokens` [...] in the distributions p = softmax(logits) [..., V] (GSD, section 4; the authors' arithmetic).

    A group is taken from the `group_size` tokens around the draft in the order of their logits (half of them below), which differ
    from it by less than `p_threshold` in probability and by less than `distance_threshold` in squared distance of their `vectors`
    [V, C]. As in the authors' code: a draft among the least likely tokens (rank below half the size), or removed by the filters,
    has no group; distances count only if all ids of the group are at most `distance_ids`, of which the table has the first
    `distance_ids` rows, so id `distance_ids` itself voids the group.

    Returns:
        ids int64 [..., G] and bool [..., G], which of them are members. A group without members: the draft stands for itself.
    """
    size, below = logits.shape[-1], group_size // 2
    order = logits.argsort(dim=-1, stable=True)
    rank = (order == tokens[..., None]).long().argmax(-1, keepdim=True)
    start = rank - below
    # a negative start counts from the end, as a slice's does
    start = torch.where(start < 0, (start + size).clamp(min=0), start)
    places = start + torch.arange(group_size, device=logits.device)
    stop = (rank - below + group_size).clamp(max=size)
    ids = order.gather(-1, places.clamp(max=size - 1))
    mine = p.gather(-1, tokens[..., None])
    members = (places < stop) & ((p.gather(-1, ids) - mine).abs() < p_threshold) & (mine > 0)
    if vectors is None:
        return ids, members
    largest = ids.masked_fill(~members, -1).amax(-1, keepdim=True)
    rows = min(distance_ids, len(vectors))
    a, b = vectors[tokens.clamp(max=rows - 1)].unsqueeze(-2), vectors[ids.clamp(max=rows - 1)]
    distance = (a.square().sum(-1) + b.square().sum(-1)) - 2 * (a * b).sum(-1)
    near = members & (distance < distance_threshold)
    void = (tokens[..., None] >= rows) | (largest >= rows)
    return ids, torch.where(largest > distance_ids, members, near & ~void)


def grouped_acceptance(p: Tensor, q: Tensor | None, tokens: Tensor, ids: Tensor, members: Tensor) -> Tensor:
    """min(1, sum of p over the group / sum of q over it); of a draft without group p(x) / q(x)."""
    plain = plain_ratio(p, q, tokens)
    above = p.gather(-1, ids).masked_fill(~members, 0.0).sum(-1)
    if q is not None:
        above = above / q.gather(-1, ids).masked_fill(~members, 0.0).sum(-1)
    return torch.where(members.any(-1), above.nan_to_num(nan=0.0).clamp(max=1.0), plain)


@dataclass(frozen=True)
class GroupedVerifier(Verifier):
    """Takes a draft with the probability of its group, see `dynamic_clusters`. A rejected one is replaced as in exact verification.

    group_size 0 or 1, or p_threshold 0, is exact.
    """

    group_size: int = 14
    p_threshold: float = 0.15
    distance_threshold: float = 0.5
    distance_ids: int = 10000
    table: str = "embedding"
    vectors: Tensor | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.group_size, int) or isinstance(self.group_size, bool) or self.group_size < 0:
            raise ValueError(f"group_size must be an integer >= 0 (0 = exact), got {self.group_size!r}")
        for name in ("p_threshold", "distance_threshold"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)!r}")
        if not isinstance(self.distance_ids, int) or self.distance_ids < 1:
            raise ValueError(f"distance_ids must be a positive integer, got {self.distance_ids!r}")
        if self.table not in TABLES:
            raise ValueError(f"table must be one of {TABLES}, got {self.table!r}")

    @property
    def loosening(self) -> float:
        return float(self.group_size) if self.group_size > 1 and self.p_threshold > 0 else 0.0

    def check(self, model: AutoregressiveModel, codebook: Tensor | None) -> None:
        check_table(self.table, model, codebook)

    def prepare(self, target: Target, codebook: Tensor | None) -> GroupedVerifier:
        if self.vectors is not None:
            return self
        return replace(self, vectors=code_vectors(self.table, target, codebook))

    def acceptance(self, logits: Tensor, p: Tensor, q: Tensor | None, tokens: Tensor) -> Tensor:
        if self.group_size < 2 or self.p_threshold == 0:
            return plain_ratio(p, q, tokens)
        ids, members = dynamic_clusters(
            logits, p, tokens, self.vectors,
            group_size=min(self.group_size, 2 * p.shape[-1]), p_threshold=self.p_threshold,
            distance_threshold=self.distance_threshold, distance_ids=self.distance_ids,
        )  # fmt: skip
        return grouped_acceptance(p, q, tokens, ids, members)
