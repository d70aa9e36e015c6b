"""OPERA: beam search that does not trust texts which look at their own summary words instead of the image (arXiv 2311.17911)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from armm.decoding.base import StepCallback
from armm.decoding.beam import Beams, BeamSearch, TextBeam
from armm.nn.attention import record_attention
from armm.nn.masks import additive_mask

EARLY = 10  # while a response is not longer, looking at the image is rewarded; earlier columns never cause a return
MASKED = -999.0  # what logits of words that are no candidates become
SMALL = 1e-7  # keeps products of scaled attention in the range of half precision


@dataclass
class Snapshot:
    """A step of the search as it was before its words were chosen, and the choice of the step before."""

    beams: Beams
    window: Tensor
    chosen: Tensor
    source: Tensor


@dataclass
class Memory:
    """What OPERA remembers of a search: attention [W, n, n] of the response on itself, where each step pointed, past steps, how
    often it went back to a position, and the (beam, word) pairs rejected there."""

    window: Tensor
    chosen: Tensor
    source: Tensor
    locations: list[Tensor] = field(default_factory=list)
    snapshots: list[Snapshot] = field(default_factory=list)
    returns: dict[int, int] = field(default_factory=dict)
    rejected: dict[int, list[tuple[int, int]]] = field(default_factory=dict)


@dataclass
class OPERA(BeamSearch):
    """Over-trust penalty and retrospection-allocation (arXiv 2311.17911, section 3).

    The last layer's attention of the response on itself shows columns on which all later words lean. Candidates that lean on one
    get a lower logit (for the first ten words those that look at the image get a higher one instead), and when many steps in a row
    point at the same word the search returns to it and chooses another one.

    Args:
        num_beams, length_penalty, early_stopping: see `BeamSearch`; one beam is not enough.
        scale: sigma, of the attention in a column's product.
        threshold: r, how many steps may point at one word before the search returns to it.
        candidates: words of each beam that are tried, and how often the search may return to one position.
        penalty: alpha, weight of the penalty.
        history: how far back, in words, the search can return.
        trace: a list to which every step appends what it computed.
    """

    scale: float = 50.0
    threshold: int = 15
    candidates: int = 5
    penalty: float = 1.0
    history: int = 512
    trace: list[dict[str, Any]] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_beams < 2:
            raise ValueError(f"num_beams must be at least 2: OPERA compares beams, got {self.num_beams}")
        for name in ("threshold", "candidates", "history"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a positive integer, got {getattr(self, name)!r}")

    @property
    def spare(self) -> int:
        return self.candidates

    def search(
        self,
        beam: TextBeam,
        stop_id: int | None,
        max_tokens: int,
        vocabulary: tuple[int, int],
        image: tuple[int, int] | None,
        callback: StepCallback | None,
        interrupt: Callable[[], bool] | None,
    ) -> list[int]:
        if image is None:
            raise ValueError("OPERA needs to know where the image's tokens are: give image=(first, behind the last)")
        low, high = vocabulary
        hidden = beam.start(self.num_beams)
        state = self.begin(hidden)
        empty = torch.empty(0, dtype=torch.long, device=hidden.device)
        memory = Memory(hidden.new_zeros(self.num_beams, 0, 0, dtype=torch.float32), empty, empty)
        step = 0
        while state.ids.shape[1] < max_tokens and not state.done:
            if interrupt is not None and interrupt():
                break
            if state.ids.shape[1]:
                hidden = self.look(beam, state, memory)
            raw = beam.model.logits(hidden, low=low, high=high)
            logits, state = self.judge(beam, state, memory, raw, image, vocabulary)
            memory.chosen, memory.source = self.advance(state, logits, low, stop_id, beam)
            memory.window = memory.window[memory.source]
            if callback is not None:
                callback(step, state.ids)
            step += 1
        return self.best(state)

    def look(self, beam: TextBeam, state: Beams, memory: Memory) -> Tensor:
        """Feed the last words, and remember where they look."""
        layer = len(beam.model.trunk.blocks) - 1
        with record_attention([layer]) as record:
            hidden = beam.feed(state.ids[:, -1], state.ids.shape[1] - 1)
        row = _normalised(record[layer][-1])[:, 0]  # [W, keys]
        memory.window = _grown(memory.window, row[:, beam.prefix.length :])
        return hidden

    def judge(
        self,
        beam: TextBeam,
        state: Beams,
        memory: Memory,
        raw: Tensor,
        image: tuple[int, int],
        vocabulary: tuple[int, int],
    ) -> tuple[Tensor, Beams]:
        """Penalised logits [W, V] of the candidates, or those of an earlier step with the state to go on from."""
        low, high = vocabulary
        values, words = raw.topk(min(self.candidates, raw.shape[-1]))
        rows = self.candidate_rows(beam, words + low, state.ids.shape[1])  # [W, k, keys]
        start = beam.prefix.length
        known = memory.window[:, None].expand(-1, words.shape[1], -1, -1)
        window = self.scale * _grown(known, rows[..., start:])  # [W, k, t, t]
        scores = column_scores(window)
        highest, where = scores.max(-1)
        seen = rows[..., image[0] : image[1]].sum(-1)
        length = window.shape[-1]
        penalty = -seen if length <= EARLY else highest.float()
        judged = torch.full_like(raw, MASKED).scatter(1, words, values - self.penalty * penalty)

        location = where.mode(-1).values  # of each beam
        agreed = int(location.mode(-1).values)
        memory.locations.append(location)
        memory.snapshots.append(Snapshot(state.copy(), memory.window, memory.chosen, memory.source))
        back = self.returns_to(memory, agreed, length)
        if self.trace is not None:
            self.trace.append(
                {
                    "asked": state.ids, "candidates": words + low, "logits": values, "rows": rows, "window": window, "scores": scores,
                    "penalty": penalty, "locations": where, "highest": highest, "image": seen, "length": length, "agreed": agreed,
                    "returned": back,
                }
            )  # fmt: skip
        if back is not None:
            judged, state = self.go_back(beam, memory, back, length, vocabulary)
        if self.trace is not None:
            self.trace[-1] |= {"judged": judged, "ids": state.ids}
        return judged, state

    def candidate_rows(self, beam: TextBeam, words: Tensor, step: int) -> Tensor:
        """Where candidates [W, k] for response word `step` would look: normalised rows [W, k, keys], the last key themselves.

        All go through the trunk in one call, each sees what is written and itself, and none stays in the cache.
        """
        stream, trunk = beam.stream, beam.model.trunk
        layer, count, cached = len(trunk.blocks) - 1, words.shape[1], beam.stream.cache.length
        itself = torch.eye(count, dtype=torch.bool, device=words.device)
        visible = torch.cat([itself.new_ones(count, cached), itself], dim=1)
        index = beam.positions[:, step : step + 1].expand(len(words), count)
        with record_attention([layer]) as record:
            trunk(
                beam.model.embed(words),
                positions=beam.model.positions_for(index, beam.grid),
                mask=additive_mask(visible, stream.cache.buffer.dtype),
                cache=stream.cache,
                discard=count,
            )
        beam.num_calls += 1
        rows = _normalised(record[layer][-1])
        return torch.cat([rows[..., :cached], rows[..., cached:].diagonal(dim1=-2, dim2=-1).unsqueeze(-1)], dim=-1)

    # Going back.

    def returns_to(self, memory: Memory, agreed: int, length: int) -> int | None:
        """How many words of the response stay when the search returns, or None where it goes on."""
        pointed = torch.stack([location == agreed for location in memory.locations]).sum(0)
        if agreed < EARLY or not bool((pointed > self.threshold).all()):
            return None
        position = agreed + 1
        if memory.returns.get(position, 0) >= self.candidates:
            position -= 1
            if memory.returns.get(position, 0) >= self.candidates:
                return None
        memory.returns[position] = memory.returns.get(position, 0) + 1
        return max(1, length - self.history - 1) if length - position > self.history + 1 else position

    def go_back(
        self, beam: TextBeam, memory: Memory, position: int, length: int, vocabulary: tuple[int, int]
    ) -> tuple[Tensor, Beams]:
        """Restore the step that chose word `position`, with the words it chose rejected."""
        dropped = max(length - position - 2, 0)
        if dropped:
            del memory.snapshots[-dropped:], memory.locations[-dropped:]
        after, now = memory.snapshots[-1], memory.snapshots[-2]
        del memory.snapshots[-1], memory.locations[-1]
        rejected = memory.rejected.setdefault(position, [])
        rejected += zip(after.source.tolist(), after.chosen.tolist(), strict=True)
        memory.rejected.pop(position + 1, None)
        state = now.beams.copy()
        memory.window, memory.chosen, memory.source = now.window, now.chosen, now.source
        low, high = vocabulary
        logits = beam.model.logits(beam.restart(state.ids), low=low, high=high)
        logits = logits - logits.amin(-1, keepdim=True) + MASKED
        pairs = torch.tensor(rejected, device=logits.device)
        logits[pairs[:, 0], pairs[:, 1] - low] = MASKED
        return logits, state


def column_scores(window: Tensor) -> Tensor:
    """How much all later rows lean on each column of scaled attention [..., t, t]: products down the columns from the diagonal,
    [..., t]. In half precision, where they run over and under as in the published results."""
    below = torch.ones_like(window).triu(1)
    return (SMALL * torch.where(below.bool(), torch.ones_like(window), window).prod(-2)).half()


def _normalised(weights: Tensor) -> Tensor:
    """Attention [W, H, Nq, Nk] as its largest over the heads, each row adding up to 1 again."""
    rows = weights.amax(1)
    return rows / rows.sum(-1, keepdim=True)


def _grown(window: Tensor, row: Tensor) -> Tensor:
    """Lower triangular [..., n, n] with one more row [..., n + 1]."""
    window = torch.nn.functional.pad(window, (0, 1))
    return torch.cat([window, row.unsqueeze(-2)], dim=-2)
