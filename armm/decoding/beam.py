"""Beam search over texts: the best of several continuations that are written side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from armm.condition import Condition
from armm.decoding.base import StepCallback, TokenStream, vocabulary_range, wake
from armm.decoding.text import TextOutput, check_room

if TYPE_CHECKING:
    from armm.model import AutoregressiveModel


@dataclass
class Beams:
    """The state of a search: response ids [W, n] so far with their summed log-probabilities [W], and finished texts with the score
    they are ranked by. Lengths count one more token than the text has, the one that ends it."""

    ids: Tensor
    scores: Tensor
    finished: list[tuple[float, list[int]]] = field(default_factory=list)
    done: bool = False

    def copy(self) -> Beams:
        return Beams(self.ids, self.scores, list(self.finished), self.done)


class TextBeam:
    """One prefix [1, T] being continued by a search: the stream of its beams, with room for `spare` tokens that do not stay."""

    def __init__(
        self,
        model: AutoregressiveModel,
        prefix: Condition,
        max_tokens: int,
        grid: Sequence[int] | None,
        spare: int = 0,
    ) -> None:
        self.spare = spare
        if prefix.index is None:
            raise ValueError("a Condition to continue needs position ids: give its index")
        check_room(model, prefix.index, max_tokens, grid)
        self.model, self.prefix, self.grid = model, prefix, grid
        following = prefix.index[..., -1:] + torch.arange(1, max_tokens + 1, device=prefix.embeds.device)
        # The last token is never fed, so what a search asks there may stand at the layout's last position.
        self.positions = following.clamp(max=len(model.layout(grid)) - 1)
        self.num_calls = 0

    def open(self, prefix: Condition, fed: Tensor) -> TokenStream:
        """A stream behind `prefix`, into which tokens at the positions `fed` will go."""
        positions = self.model.positions_for(prefix.index, self.grid)
        following = self.model.positions_for(fed, self.grid)
        return TokenStream(self.model, prefix, positions, following, spare=self.spare)

    def start(self, beams: int) -> Tensor:
        """Run the prefix: hidden states [beams, D], all the same."""
        self.stream = self.open(self.prefix, self.positions)
        hidden = self.stream.prefill()
        self.stream.cache.repeat(beams)
        self.offset = 0
        self.num_calls += 1
        return hidden.repeat(beams, 1)

    def restart(self, ids: Tensor) -> Tensor:
        """Forget everything and run the prefix with the responses `ids` [W, n] anew: hidden states [W, D] of their ends."""
        kept = ids.shape[1] - 1
        rows = self.prefix.repeat(len(ids))
        if kept:
            rows = rows.extend(self.model.embed(ids[:, :-1]), self.positions[0, :kept])
        self.stream = self.open(rows, self.positions[:, kept:].expand(len(ids), -1))
        self.stream.prefill()
        self.offset = kept
        self.num_calls += 1
        return self.feed(ids[:, -1], kept)

    def feed(self, token: Tensor, step: int) -> Tensor:
        """Feed response token `step` of every beam, ids [W]: hidden states [W, D]."""
        self.num_calls += 1
        return self.stream.feed(token, step - self.offset)

    def reorder(self, rows: Tensor) -> None:
        self.stream.cache.reorder(rows)


@dataclass
class BeamSearch:
    """The likeliest of the texts that a beam of `num_beams` finds.

    Args:
        num_beams: texts that are written side by side.
        length_penalty: finished texts are ranked by their log-probability / length ** length_penalty.
        early_stopping: stop with `num_beams` finished texts; otherwise when no running one can be better than they.
    """

    num_beams: int = 5
    length_penalty: float = 1.0
    early_stopping: bool = False

    @property
    def spare(self) -> int:
        """Tokens besides the text that the cache must have room for."""
        return 0

    def __post_init__(self) -> None:
        if not isinstance(self.num_beams, int) or self.num_beams < 1:
            raise ValueError(f"num_beams must be a positive integer, got {self.num_beams!r}")

    @torch.no_grad()
    def __call__(
        self,
        model: AutoregressiveModel,
        prefix: Condition,
        *,
        stop_id: int | None,
        max_tokens: int,
        grid: Sequence[int] | None = None,
        image: tuple[int, int] | None = None,
        vocabulary: tuple[int, int] | None = None,
        callback: StepCallback | None = None,
        interrupt: Callable[[], bool] | None = None,
    ) -> TextOutput:
        """Continue each row of `prefix`, one after the other; arguments as of `stream_text`.

        stop_id: None never stops before `max_tokens`. image: (first, behind the last) of the image's tokens in the prefix, for
        searches that ask where the model looks. callback: sees the ids of the running beams.
        """
        wake(model)
        low, high = vocabulary_range(model, vocabulary)
        texts, calls = [], 0
        for row in range(prefix.batch):
            alone = prefix.select(slice(row, row + 1)).unpadded()
            shift = prefix.length - alone.length
            span = None if image is None else (image[0] - shift, image[1] - shift)
            beam = TextBeam(model, alone, max_tokens, grid, self.spare)
            texts.append(self.search(beam, stop_id, max_tokens, (low, high), span, callback, interrupt))
            calls += beam.num_calls
        device = prefix.embeds.device
        lengths = torch.tensor([len(text) for text in texts], device=device)
        filled = [text + [stop_id or 0] * (max_tokens - len(text)) for text in texts]
        return TextOutput(torch.tensor(filled, dtype=torch.long, device=device), lengths, calls)

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
        """The best continuation of one prefix, without its stop token."""
        low, high = vocabulary
        hidden = beam.start(self.num_beams)
        state = self.begin(hidden)
        for step in range(max_tokens):
            if interrupt is not None and interrupt():
                break
            if step:
                hidden = beam.feed(state.ids[:, -1], step - 1)
            self.advance(state, beam.model.logits(hidden, low=low, high=high), low, stop_id, beam)
            if callback is not None:
                callback(step, state.ids)
            if state.done:
                break
        return self.best(state)

    def begin(self, hidden: Tensor) -> Beams:
        """The empty texts; only the first counts, as all are the same."""
        scores = torch.full((self.num_beams,), -1e9, device=hidden.device)
        scores[0] = 0
        return Beams(torch.empty(self.num_beams, 0, dtype=torch.long, device=hidden.device), scores)

    def advance(
        self, state: Beams, logits: Tensor, low: int, stop_id: int | None, beam: TextBeam
    ) -> tuple[Tensor, Tensor]:
        """One step from the logits [W, V]: every beam gets a token. Returns the tokens [W] and the beams [W] they continue."""
        width, size, length = self.num_beams, logits.shape[-1], state.ids.shape[1] + 1
        total = (logits.log_softmax(-1) + state.scores[:, None]).flatten()
        best, order = total.topk(min(2 * width, total.numel()))
        tokens, rows, scores = [], [], []
        for rank, (score, index) in enumerate(zip(best.tolist(), order.tolist(), strict=True)):
            row, token = index // size, index % size + low
            if token == stop_id:
                if rank < width:
                    self.keep(state, state.ids[row].tolist(), score, length)
                continue
            tokens.append(token)
            rows.append(row)
            scores.append(score)
            if len(tokens) == width:
                break
        device = state.ids.device
        chosen, source = torch.tensor(tokens, device=device), torch.tensor(rows, device=device)
        if len(state.finished) >= width:
            attainable = float(best[0]) / length**self.length_penalty
            state.done = state.done or self.early_stopping or state.finished[-1][0] >= attainable
        state.ids = torch.cat([state.ids[source], chosen[:, None]], dim=1)
        state.scores = torch.tensor(scores, device=device)
        beam.reorder(source)
        return chosen, source

    def keep(self, state: Beams, text: list[int], score: float, length: int) -> None:
        """Add a finished text to the best `num_beams`."""
        state.finished.append((score / length**self.length_penalty, text))
        state.finished.sort(key=lambda item: -item[0])
        del state.finished[self.num_beams :]

    def best(self, state: Beams) -> list[int]:
        if not state.done:
            for text, score in zip(state.ids.tolist(), state.scores.tolist(), strict=True):
                self.keep(state, text, score, len(text) + 1)
        return state.finished[0][1]
