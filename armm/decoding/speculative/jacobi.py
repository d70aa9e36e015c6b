"""Jacobi windows: the drafts are what the last call itself would draw at every place (SJD, arXiv 2410.01699, section 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from armm.decoding.speculative.draft import Draft, Drafting, DraftSource, Outcome, Window, check_window
from armm.decoding.speculative.stream import Target

INITIALISATIONS = ("random", "repeat_left", "likeliest_left", "repeat_above")
REDRAWS = ("fresh", "coupled")


def initial_drafts(
    scheme: str,
    random: Tensor,
    last: Tensor,
    likeliest: Tensor | None = None,
    above: Tensor | None = None,
    keep_random: Tensor | None = None,
) -> Tensor:
    """Tokens for places of the window that were never drafted (SJD, section 3.3).

    Args:
        scheme: "random"; "repeat_left" (the authors' repeat_horizon), the token to the left; "likeliest_left" (sample_horizon), the
            likeliest token of the distribution at the place to the left; "repeat_above", the token of the row above. New places
            follow each other, so "to the left" is the last known place for all of them.
        random: int64 [B, n, S], tokens drawn uniformly.
        last: int64 [B, S], the last known token. likeliest: [B, S], the likeliest token at its place.
        above: int64 [B, n, S], the token above, negative where there is none.
        keep_random: bool [B, n], places that stay random (there is nothing to the left of a row's first).
    """
    if scheme == "random":
        return random
    if scheme == "repeat_above":
        return torch.where(above >= 0, above, random)  # type: ignore[operator,arg-type]
    source = last if scheme == "repeat_left" else likeliest
    tokens = source[:, None].expand_as(random)
    return tokens if keep_random is None else torch.where(keep_random[:, :, None], random, tokens)


@dataclass(frozen=True)
class JacobiWindow(DraftSource):
    """Drafts of one call are the draws of the last one at the same places, and keep the distribution they were drawn from.

    Args:
        window: tokens that one call takes: the last certain one and window - 1 drafts.
        init: what stands at a place when the window first reaches it, see `initial_drafts`.
        redraw: how the drafts of the next window are drawn, "fresh" (SJD) or "coupled": a draft stays what it was as often as a draw from
            the new distribution may, so that those behind it see the same as before (MC-SJD, arXiv 2510.24211; the ratio rule only).
        interval: (l, r): windows are used while at least l and fewer than r units were certain before the last call, and may reach
            up to r: the authors' count, which looks at the state before the last commit, with their margins. None: everywhere,
            up to the last unit and never beyond.
    """

    window: int = 16
    init: str = "random"
    interval: tuple[int, int] | None = None
    redraw: str = "fresh"
    draws = True

    def __post_init__(self) -> None:
        check_window(self.window)
        if self.init not in INITIALISATIONS:
            raise ValueError(f"init must be one of {INITIALISATIONS}, got {self.init!r}")
        if self.redraw not in REDRAWS:
            raise ValueError(f"redraw must be one of {REDRAWS}, got {self.redraw!r}")
        if self.interval is not None and not 0 <= self.interval[0] <= self.interval[1]:
            raise ValueError(f"interval must be two numbers 0 <= l <= r, got {self.interval}")

    @property
    def coupled(self) -> bool:  # type: ignore[override]
        return self.redraw == "coupled"

    def start(self, target: Target) -> Drafting:
        return _Jacobi(self, target)

    def width(self, done: int, before: int, units: int) -> int:
        if self.interval is None:
            return super().width(done, before, units)
        low, high = self.interval
        return min(self.window, high - before) if low <= before < high else 1


class _Jacobi(Drafting):
    def __init__(self, source: JacobiWindow, target: Target) -> None:
        self.source, self.target = source, target
        self.tokens: Tensor | None = None  # left-over drafts [B, K, S] of the places that come next, and
        self.q: Tensor | None = None  # their distributions
        self.left: list[int] = []  # how many of them a row has
        self.likeliest: Tensor | None = None

    def observe(self, outcome: Outcome) -> None:
        self.left = [length - kept for length, kept in zip(outcome.lengths, outcome.kept, strict=True)]
        if len(self.left) == 1:
            behind = slice(outcome.kept[0], outcome.lengths[0])
            self.tokens, self.q = outcome.draws[:, behind], outcome.probabilities[:, behind]
            if self.source.init == "likeliest_left":
                self.likeliest = outcome.logits[:, outcome.lengths[0] - 1].argmax(-1)
            return
        places = torch.tensor(outcome.kept, device=outcome.draws.device)[:, None]
        places = (places + torch.arange(max(max(self.left), 1), device=places.device)).clamp(
            max=outcome.draws.shape[1] - 1
        )
        rows = torch.arange(len(places), device=places.device)[:, None]
        self.tokens, self.q = outcome.draws[rows, places], outcome.probabilities[rows, places]
        if self.source.init == "likeliest_left":
            ends = torch.tensor(outcome.lengths, device=places.device) - 1
            self.likeliest = outcome.logits[rows[:, 0], ends].argmax(-1)

    def select(self, rows: Tensor) -> None:
        self.tokens, self.q = self.tokens[rows], self.q[rows]
        self.left = [self.left[row] for row in rows.tolist()]
        self.likeliest = None if self.likeliest is None else self.likeliest[rows]

    def propose(self, window: Window) -> Draft:
        count, vocabulary = window.length - 1, self.target.vocabulary
        batch, slots, device = len(window.done), self.target.slots, window.codes.device
        held = [min(left, length - 1) for left, length in zip(self.left, window.lengths, strict=True)]
        if min(held) >= count:
            return Draft(self.tokens[:, :count], self.q[:, :count])
        if batch == 1 and self.source.init == "repeat_left":
            return self._repeated(window, held[0], count)
        tokens = window.codes.new_zeros(batch, count, slots)
        q = torch.zeros(batch, count, slots, vocabulary, device=device)
        have = min(max(held), count)
        if have:
            tokens[:, :have], q[:, :have] = self.tokens[:, :have], self.q[:, :have]
        fresh = torch.arange(count, device=device) >= torch.tensor(held, device=device)[:, None]
        new = self._initial(window, tokens, held)
        tokens = torch.where(fresh[:, :, None], new, tokens)
        certain = torch.zeros_like(q).scatter_(-1, tokens.clamp(0, vocabulary - 1)[..., None], 1.0)
        return Draft(tokens, torch.where(fresh[:, :, None, None], certain, q))

    def _repeated(self, window: Window, held: int, count: int) -> Draft:
        """What `propose` makes of one row with init="repeat_left", in fewer steps."""
        done, columns, slots = window.done[0], self.target.columns, self.target.slots
        old = self.tokens[:, :held]  # type: ignore[index]
        last = old[:, -1:] if held else window.codes[:, done - 1 : done]
        new = last.expand(-1, count - held, -1)
        first = done + held
        if first % columns + count - held > columns or first % columns == 0:
            low, high = self.target.random_range
            random = (low + window.numbers.draft[:, : count - held] * (high - low)).long()
            starts = [number % columns == 0 for number in range(first, done + count)]
            new = torch.where(torch.tensor(starts, device=new.device)[:, None], random, new)
        q = torch.zeros(1, count, slots, self.target.vocabulary, device=old.device)
        if held:
            q[:, :held] = self.q[:, :held]  # type: ignore[index]
        q[:, held:].scatter_(-1, new.clamp(0, self.target.vocabulary - 1)[..., None], 1.0)
        return Draft(torch.cat([old, new], dim=1), q)

    def _initial(self, window: Window, tokens: Tensor, held: list[int]) -> Tensor:
        target, scheme, count = self.target, self.source.init, tokens.shape[1]
        device = tokens.device
        low, high = target.random_range
        # new drafts take the numbers in their own order, whatever the number of old ones
        held_at = torch.tensor(held, device=device)
        order = (torch.arange(count, device=device) - held_at[:, None]).clamp(min=0)
        random = window.numbers.draft.gather(1, order[:, :, None].expand(-1, -1, tokens.shape[2]))
        random = (low + random * (high - low)).long()
        if scheme == "random":
            return random
        rows = torch.arange(len(tokens), device=device)
        done = torch.tensor(window.done, device=device)
        # everything known of a row, certain or drafted, in the order of the units
        known = torch.cat([window.codes, window.codes.new_zeros(len(tokens), count + 1, tokens.shape[2])], dim=1)
        units = done[:, None] + torch.arange(count, device=device)
        drafted = torch.arange(count, device=device) < held_at[:, None]
        known[rows[:, None], units] = torch.where(drafted[:, :, None], tokens, known[rows[:, None], units])
        last = known[rows, done + held_at - 1]
        columns = target.columns
        if scheme == "repeat_above":
            for offset in range(count):  # a token above may itself be a new draft
                unit = done + offset
                above = torch.where((unit >= columns)[:, None], known[rows, (unit - columns).clamp(min=0)], -1)
                value = initial_drafts(scheme, random[:, offset : offset + 1], last, above=above[:, None])[:, 0]
                known[rows, unit] = torch.where(drafted[:, offset, None], known[rows, unit], value)
            return known[rows[:, None], units]
        likeliest = last if self.likeliest is None else self.likeliest
        return initial_drafts(scheme, random, last, likeliest, keep_random=units % columns == 0)
