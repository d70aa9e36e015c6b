"""Token recycling (arXiv 2408.08696): what the model thought could follow a token is tried the next time the token comes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from armm.decoding.speculative.draft import Draft, Drafting, DraftSource, Outcome, Window, check_window
from armm.decoding.speculative.stream import Target
from armm.decoding.speculative.tree import DraftTree

if TYPE_CHECKING:
    from armm.model import AutoregressiveModel


def recycled_tokens(adjacency: Tensor, root: Tensor, tree: DraftTree) -> Tensor:
    """Tokens [B, n] of all nodes, the root's `root` [B] first: a node takes candidate `rank` of its parent's token in `adjacency`
    [B, V, K]."""
    rows = torch.arange(len(root), device=root.device)[:, None]
    tokens = root[:, None]
    parents = torch.tensor(tree.parents, dtype=torch.long, device=root.device)
    ranks = torch.tensor(tree.ranks, dtype=torch.long, device=root.device)
    depths = torch.tensor(tree.depths[1:])
    for depth in range(1, tree.depth + 1):  # nodes are in the order of their depth
        level = (depths == depth).nonzero()[:, 0].to(root.device)
        new = adjacency[rows, tokens.gather(1, parents[level].expand(len(root), -1)), ranks[level]]
        tokens = torch.cat([tokens, new], dim=1)
    return tokens


def deepest_match(tree: DraftTree, tokens: Sequence[int], following: Sequence[int]) -> list[int]:
    """The longest path of nodes whose tokens are what is likeliest to follow their parents, the root first; the first one found depth
    first, children in order; empty if no draft matches. tokens, following: of every node."""
    best: list[int] = []
    stack = [[0]]
    while stack:
        path = stack.pop()
        if len(path) > max(len(best), 1):
            best = path
        right = [child for child in tree.children[path[-1]] if tokens[child] == following[path[-1]]]
        stack += [[*path, child] for child in reversed(right)]
    return best


@dataclass(frozen=True)
class TokenRecycling(DraftSource):
    """Drafts from an adjacency matrix: for every code the likeliest codes after it when it was seen last, in this picture.

    Args:
        window: tokens that one call takes, without a tree: the likeliest continuation.
        candidates: codes kept for every code (the authors' 8).
        tree: shape of the drafts (the authors use 80 of depth 6); None for one continuation.
    """

    window: int = 8
    candidates: int = 8
    tree: DraftTree | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        check_window(self.window)
        if not isinstance(self.candidates, int) or self.candidates < 1:
            raise ValueError(f"candidates must be an integer >= 1, got {self.candidates!r}")
        if self.tree is not None and max(self.tree.ranks, default=0) >= self.candidates:
            raise ValueError(
                f"the tree asks for candidate {max(self.tree.ranks)} of {self.candidates}; give more candidates"
            )
        if self.tree is not None and sorted(self.tree.depths) != self.tree.depths:
            raise ValueError("the nodes of the tree must be in the order of their depth")

    def check(self, model: AutoregressiveModel) -> None:
        if model.window > 1 or model.sub_codes > 1:
            raise ValueError("token recycling needs models with one code a token; use JacobiWindow")

    def start(self, target: Target) -> Drafting:
        self.check(target.model)
        return _Recycling(self, target)

    def width(self, done: int, before: int, units: int) -> int:
        longest = self.window if self.tree is None else self.tree.depth + 1
        return min(longest, units - done)


class _Recycling(Drafting):
    def __init__(self, source: TokenRecycling, target: Target) -> None:
        self.source = source
        self.candidates = min(source.candidates, target.vocabulary)
        shape = (target.batch, target.vocabulary, self.candidates)
        self.adjacency = torch.zeros(shape, dtype=torch.long, device=target.device)
        self.prefilled = False

    def observe(self, outcome: Outcome) -> None:
        if not self.prefilled:  # of the prefill there is no token that the logits follow
            self.prefilled = True
            return
        likeliest = outcome.logits[:, :, 0].topk(self.candidates, dim=-1).indices
        rows = torch.arange(len(likeliest), device=likeliest.device)[:, None].expand(likeliest.shape[:2])
        tokens = outcome.tokens[..., 0].clamp(0, self.adjacency.shape[1] - 1)
        self.adjacency[rows, tokens] = likeliest

    def select(self, rows: Tensor) -> None:
        self.adjacency = self.adjacency[rows]

    def propose(self, window: Window) -> Draft:
        tree = self.source.tree
        rows = torch.arange(len(window.done), device=window.codes.device)
        last = window.codes[rows, torch.tensor(window.done, device=rows.device) - 1, 0].clamp(
            0, self.adjacency.shape[1] - 1
        )
        shape = DraftTree.chain(window.length - 1) if tree is None else tree
        return Draft(recycled_tokens(self.adjacency, last, shape)[:, 1:, None], None, tree)
