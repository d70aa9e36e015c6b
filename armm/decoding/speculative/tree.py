"""Trees of drafts: several continuations that one call of the trunk looks at."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class DraftTree:
    """The shape of a tree; node 0 is the last token that is certain, every other node comes after its parent.

    Args:
        parents: of the nodes 1 .. n, each less than the node's own number.
        ranks: which of its parent's candidates a node takes (0 is the likeliest); default: counted among the siblings.
    """

    def __init__(self, parents: Sequence[int], ranks: Sequence[int] | None = None) -> None:
        if any(not 0 <= parent <= node for node, parent in enumerate(parents)):
            raise ValueError(f"parents must point to earlier nodes (0 is the root), got {list(parents)}")
        self.parents = list(parents)
        self.children: list[list[int]] = [[] for _ in range(len(parents) + 1)]
        self.depths = [0]
        counted = []
        for node, parent in enumerate(parents, start=1):
            counted.append(len(self.children[parent]))
            self.children[parent].append(node)
            self.depths.append(self.depths[parent] + 1)
        self.ranks = counted if ranks is None else list(ranks)
        if len(self.ranks) != len(parents) or any(rank < 0 for rank in self.ranks):
            raise ValueError("ranks must be one number >= 0 for every node but the root")

    @classmethod
    def from_paths(cls, paths: Sequence[Sequence[int]]) -> DraftTree:
        """From paths of ranks, such as [[0], [1], [0, 0]]; nodes are ordered by (length, path), as Medusa and EAGLE order them.

        Raises:
            ValueError: a path whose beginning is not in the list, a repeated path, or an empty one.
        """
        ordered = sorted((tuple(path) for path in paths), key=lambda path: (len(path), path))
        places = {(): 0}
        for path in ordered:
            if not path or path in places or path[:-1] not in places:
                raise ValueError(
                    f"the path {list(path)} is empty, repeated, or its beginning {list(path[:-1])} is missing"
                )
            places[path] = len(places)
        return cls([places[path[:-1]] for path in ordered], [path[-1] for path in ordered])

    @classmethod
    def chain(cls, length: int) -> DraftTree:
        """One continuation of `length` drafts."""
        return cls(list(range(length)))

    def __len__(self) -> int:
        """Nodes, the root among them."""
        return len(self.parents) + 1

    @property
    def depth(self) -> int:
        return max(self.depths)

    @property
    def width(self) -> int:
        """The most children of a node."""
        return max(len(children) for children in self.children)

    def mask(self) -> Tensor:
        """bool [n, n]: whether a node (row) looks at another: itself and its ancestors."""
        allowed = torch.eye(len(self), dtype=torch.bool)
        for node, parent in enumerate(self.parents, start=1):
            allowed[node] |= allowed[parent]
        return allowed

    def child_table(self) -> Tensor:
        """int64 [n, width]: the children of every node in order, padded with -1."""
        rows = [children + [-1] * (self.width - len(children)) for children in self.children]
        return torch.tensor(rows).view(len(self), self.width)

    def path(self, node: int) -> list[int]:
        """Nodes from the root to `node`."""
        nodes = [node]
        while nodes[-1]:
            nodes.append(self.parents[nodes[-1] - 1])
        return nodes[::-1]

    def rank_path(self, node: int) -> tuple[int, ...]:
        return tuple(self.ranks[step - 1] for step in self.path(node)[1:])

    def leaf_paths(self) -> list[list[int]]:
        """Nodes from the root to every leaf, the last leaf first."""
        leaves = [node for node in range(1, len(self)) if not self.children[node]]
        return [self.path(leaf) for leaf in reversed(leaves)]

    def shortened(self, depth: int) -> DraftTree:
        """Without the nodes deeper than `depth`."""
        kept = [node for node in range(len(self)) if self.depths[node] <= depth]
        place = {node: index for index, node in enumerate(kept)}
        return DraftTree([place[self.parents[n - 1]] for n in kept[1:]], [self.ranks[n - 1] for n in kept[1:]])
