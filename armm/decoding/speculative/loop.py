"""The one loop of speculative decoding: draft, one call of the trunk, verify, roll back what was wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from armm.decoding.base import wake
from armm.decoding.speculative.chance import PlaceNoise, WindowNumbers
from armm.decoding.speculative.draft import Draft, DraftSource, Outcome, Window
from armm.decoding.speculative.statistics import SpeculativeStatistics
from armm.decoding.speculative.stream import Target
from armm.decoding.speculative.verify import Evidence, Verdict, Verifier

# callback(number of the call, codes [B, U, S], -1 where none is certain) -> their replacement, or None
UnitCallback = Callable[[int, Tensor], "Tensor | None"]


def speculate(
    target: Target,
    source: DraftSource,
    verifier: Verifier,
    *,
    uniforms: WindowNumbers,
    noise: PlaceNoise | None = None,
    known: Tensor | None = None,
    statistics: SpeculativeStatistics | None = None,
    callback: UnitCallback | None = None,
    interrupt: Callable[[], bool] | None = None,
    units: int | None = None,
    trace: Callable[[Draft | None, Verdict, Outcome], None] | None = None,
) -> tuple[Tensor, list[int]]:
    """Decode all units of every row.

    Rows go on at their own pace, and leave the batch when they are finished. There is one exchange with the host for each call of
    the trunk: how many drafts every row keeps.

    Args:
        target: the model. source: of the drafts. verifier: of the drafts.
        uniforms, noise: randomness; `noise` for a verifier with `wants_noise`.
        known: int64 [B, U, S], codes that are given, -1 where they are to be drawn.
        statistics: filled. callback, interrupt: asked after, and before, every call of the trunk.
        units: how many to decode, default all of the target's.
        trace: called after every call with draft, verdict and outcome.

    Returns:
        codes int64 [B, U, S], -1 where the call was interrupted, and the certain units of every row.
    """
    units = target.units if units is None else units
    batch, slots, device = target.batch, target.slots, target.device
    codes = torch.full((batch, units, slots), -1, dtype=torch.long, device=device)
    rows, done, before = list(range(batch)), [0] * batch, [0] * batch
    finished = [0] * batch
    drafting = source.start(target)
    do_sample = target.sampler.do_sample
    draft: Draft | None = None
    lengths, iteration = [1] * batch, 0
    while rows and not (interrupt is not None and interrupt()):
        size = 1 if draft is None else max(lengths) if draft.tree is None else len(draft.tree)
        if iteration == 0:
            numbers = uniforms.draw(0, rows, lengths)
            logits = target.prefill()
            tokens = codes.new_zeros(batch, 1, slots)
        else:
            if len(rows) == 1:
                last = codes[rows[0], done[0] - 1][None]
            else:
                last = codes[torch.tensor(rows, device=device), torch.tensor(done, device=device) - 1]
            tokens = last[:, None] if draft is None else torch.cat([last[:, None], draft.tokens], dim=1)
            logits = target.forward(tokens, None if draft is None else draft.tree)
        tree = None if draft is None else draft.tree
        evidence = Evidence(
            logits,
            draft,
            lengths,
            numbers,
            do_sample,
            None if known is None else _known_at(known, rows, target.unit_numbers(done, size, tree)),
            _noise_at(noise, rows, done, size, tree) if verifier.wants_noise and do_sample else None,
            source.draws,
            source.coupled,
        )
        verdict = verifier(evidence)
        accepted: list[int] = verdict.accepted.tolist()  # the one exchange with the host
        new = [number + 1 for number in accepted]
        _commit(codes, rows, done, draft, verdict, new)
        if iteration:
            target.keep(new, None if tree is None else verdict.path)
        outcome = Outcome(
            tokens, logits, verdict.probabilities, verdict.draws if verdict.draws is not None else verdict.next[:, None],
            verdict.path, new, lengths, target.hidden,
        )  # fmt: skip
        drafting.observe(outcome)
        if trace is not None:
            trace(draft, verdict, outcome)
        if statistics is not None:
            statistics.calls = target.num_calls
            if iteration:
                drafts = [0 if draft is None else length - 1 for length in lengths]
                statistics.record(done, accepted, drafts, new)
        before, done = done, [min(first + number, units) for first, number in zip(done, new, strict=True)]
        if callback is not None:
            replacement = callback(iteration, codes)
            wake(target.model)  # the callback may have decoded a preview, which swaps models under offloading
            if replacement is not None:
                codes = torch.where(codes >= 0, replacement.to(device), codes)
        for row, number in zip(rows, done, strict=True):
            finished[row] = number
        iteration += 1
        running = [place for place, number in enumerate(done) if number < units]
        if len(running) < len(rows):
            rows, done, before = ([values[place] for place in running] for values in (rows, done, before))
            if running:
                kept = torch.tensor(running, device=device)
                target.select(kept)
                drafting.select(kept)
        if not rows:
            break
        lengths = [source.width(number, earlier, units) for number, earlier in zip(done, before, strict=True)]
        draft, numbers = _next_draft(source, drafting, uniforms, codes, rows, done, lengths, iteration, known, target)
    return codes, finished


def _next_draft(source, drafting, uniforms, codes, rows, done, lengths, iteration, known, target):  # type: ignore[no-untyped-def]
    """The drafts of the next window (None for a window of one token) and the randomness of the iteration."""
    tree = source.tree if max(lengths) > 1 else None
    sizes = lengths if tree is None else [len(tree) if length > 1 else 1 for length in lengths]
    numbers = uniforms.draw(iteration, rows, sizes)
    if max(lengths) == 1:
        return None, numbers
    current = codes if len(rows) == len(codes) else codes[torch.tensor(rows, device=codes.device)]
    draft = drafting.propose(Window(current, done, lengths, numbers))
    if known is not None:
        given = _known_at(
            known, rows, target.unit_numbers(done, len(draft.tree) if draft.tree else max(lengths), draft.tree)
        )
        # drafts stand one unit after the token they follow
        if draft.tree is None:
            given = given[:, :-1]
        else:
            given = given[:, torch.tensor(draft.tree.parents, device=given.device)]
        draft = Draft(torch.where(given >= 0, given, draft.tokens), draft.q, draft.tree)
    return draft, numbers


def _known_at(known: Tensor | None, rows: Sequence[int], numbers: Tensor) -> Tensor | None:
    """What is known [B, L, S] of the units with these numbers [B, L]."""
    if known is None:
        return None
    index = torch.tensor(list(rows), device=known.device)[:, None]
    return known[index, numbers.to(known.device).clamp(max=known.shape[1] - 1)]


def _noise_at(noise: PlaceNoise | None, rows, done, size, tree) -> Tensor:  # type: ignore[no-untyped-def]
    if noise is None:
        raise ValueError("this verifier draws with noise of the places: give it")
    return noise.window(rows, done, torch.arange(size) if tree is None else torch.tensor(tree.depths))


def _commit(
    codes: Tensor, rows: Sequence[int], done: Sequence[int], draft: Draft | None, verdict: Verdict, new: Sequence[int]
) -> None:
    """Write the taken drafts and the token after them."""
    device, count, units = codes.device, max(new), codes.shape[1]
    if len(rows) == 1 and (draft is None or draft.tree is None):
        row, first = codes[rows[0]], done[0]
        if count > 1:
            row[first : first + count - 1] = draft.tokens[0, : min(count - 1, units - first)]  # type: ignore[union-attr]
        if first + count <= units:
            row[first + count - 1] = verdict.next[0]
        return
    tokens = verdict.next[:, None].expand(-1, count, -1)
    place = torch.arange(count, device=device)
    if count > 1:
        index = torch.arange(len(rows), device=device)[:, None]
        path = verdict.path[:, 1:count] - 1
        taken = draft.tokens[index, path]  # type: ignore[union-attr]
        taken = torch.cat([taken, tokens[:, :1]], dim=1)
        tokens = torch.where((place < verdict.accepted[:, None])[:, :, None], taken, tokens)
    units_of = torch.tensor(list(done), device=device)[:, None] + place
    valid = (place <= verdict.accepted[:, None]) & (units_of < units)
    row = torch.tensor(list(rows), device=device)[:, None].expand_as(units_of)
    codes[row[valid], units_of[valid]] = tokens[valid]
