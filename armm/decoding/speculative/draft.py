"""What a draft source is asked, and what it answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from armm.decoding.speculative.tree import DraftTree

if TYPE_CHECKING:
    from armm.decoding.speculative.chance import Numbers
    from armm.decoding.speculative.stream import Target
    from armm.model import AutoregressiveModel


@dataclass
class Draft:
    """Guesses of what follows the last certain token of every row.

    tokens: int64 [B, n, S], codes. q: float [B, n, S, V], the distribution each was drawn from; None for guesses without chance
    (all of q at the token). tree: how the guesses follow each other, None for one after the other.
    """

    tokens: Tensor
    q: Tensor | None = None
    tree: DraftTree | None = None


@dataclass
class Window:
    """The rows that still run, before a call of the trunk.

    codes: int64 [B, U, S], certain where a unit's number is below done[b]. done: certain units of every row. lengths: tokens of the
    row that the next call may take, the last certain one among them. numbers: randomness of the iteration.
    """

    codes: Tensor
    done: list[int]
    lengths: list[int]
    numbers: Numbers

    @property
    def length(self) -> int:
        return max(self.lengths)


@dataclass
class Outcome:
    """What became of a window [B, L, S] that was fed.

    tokens: what was fed (the last certain token, then the drafts). logits, probabilities: [B, L, S, V] of what follows each of them,
    filtered. draws: a draw from each. path: int64 [B, K], the places of the window that were right, 0 among them; `kept`: how many
    of them. hidden: [R, L, D], the trunk's states; `lengths` as in `Window`.
    """

    tokens: Tensor
    logits: Tensor
    probabilities: Tensor
    draws: Tensor
    path: Tensor
    kept: list[int]
    lengths: list[int]
    hidden: Tensor | None = None


class Drafting(ABC):
    """A draft source at work on one generation."""

    @abstractmethod
    def propose(self, window: Window) -> Draft:
        """Guesses for windows of window.length tokens: n = length - 1 of them, or as many as the tree has."""

    def observe(self, outcome: Outcome) -> None:  # noqa: B027
        """Learn from a call of the trunk; the first one is the prefill, with one token a row."""

    def select(self, rows: Tensor) -> None:  # noqa: B027
        """Go on with these of the rows only."""


class DraftSource(ABC):
    """Where drafts come from: settings, and `start`, which sets to work.

    window: tokens that one call of the trunk takes at most, the last certain one among them.
    tree: the shape of all its drafts, or None. draws: whether it needs a draw at every place of the window. coupled: whether these are
    to be the drafts again wherever that is possible.
    """

    window: int = 16
    tree: DraftTree | None = None
    draws: bool = False
    coupled: bool = False

    def check(self, model: AutoregressiveModel) -> None:  # noqa: B027
        """Raises ValueError where it cannot draft for `model`."""

    @abstractmethod
    def start(self, target: Target) -> Drafting:
        """A fresh state for a generation by `target`."""

    def width(self, done: int, before: int, units: int) -> int:
        """Tokens of the next window of a row with `done` certain units of `units`, `before` of them before the last call."""
        return min(self.window, units - done)


def check_window(window: int) -> int:
    """A ValueError unless `window` is an integer >= 1."""
    if not isinstance(window, int) or isinstance(window, bool) or window < 1:
        raise ValueError(
            f"window must be an integer >= 1 (tokens that one call takes, the last certain one among them), got {window!r}"
        )
    return window
