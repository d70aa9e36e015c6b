"""Text from a unified model: token after token behind a prefix, until each row has said its stop token."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from armm.condition import Condition, concatenate
from armm.decoding.base import StepCallback, TokenStream, check_guided, vocabulary_range, wake
from armm.decoding.guidance import Guidance
from armm.decoding.sampling import NoiseSource, Sampler

if TYPE_CHECKING:
    from armm.model import AutoregressiveModel
    from armm.pruning.base import VisualPruning
    from armm.pruning.cost import Cost


@dataclass
class TextOutput:
    """ids [B, M], each row filled up with the stop token; lengths [B] without it; num_calls of the trunk; cost, if tokens were pruned."""

    ids: Tensor
    lengths: Tensor
    num_calls: int = 0
    cost: Cost | None = None

    def tokens(self) -> list[list[int]]:
        """The ids of each row up to its stop token."""
        return [row[:length] for row, length in zip(self.ids.tolist(), self.lengths.tolist(), strict=True)]


@torch.no_grad()
def stream_text(
    model: AutoregressiveModel,
    ids: Tensor | Condition,
    *,
    stop_id: int,
    max_tokens: int,
    last_ids: Sequence[int] = (),
    index: Tensor | None = None,
    mask: Tensor | None = None,
    grid: Sequence[int] | None = None,
    sampler: Sampler | None = None,
    noise: NoiseSource | torch.Generator | Sequence[torch.Generator] | Tensor | None = None,
    vocabulary: tuple[int, int] | None = None,
    callback: StepCallback | None = None,
    interrupt: Callable[[], bool] | None = None,
    check_every: int = 8,
    pruning: VisualPruning | None = None,
    images: Sequence[tuple[int, int]] = (),
    null_condition: Condition | None = None,
    guidance: Guidance | None = None,
    min_tokens: int = 0,
) -> Generator[Tensor, None, TextOutput]:
    """After each token, the ids so far [B, step + 1]; at the end a `TextOutput`.

    Continue the prefix `ids` [B, T] (text, image or both, ordinary ids of the vocabulary), or a `Condition` with embeddings
    and position ids (for images that are not one embedding a token).

    index: flat position ids of the prefix, [T] or [B, T]; default: begin-of-image first, then the image and text after
    it. What is generated takes the positions behind the last one. mask: bool [B, T], False on padding (on the left).
    sampler: default greedy. vocabulary: (low, high), the ids that may be said. All ids here, the stop token and the
    result included, are ids of the whole vocabulary. Whether every row has stopped is looked up every `check_every`
    tokens only. last_ids: further ids that end a row; unlike the stop token they are part of the text. pruning:
    drops image tokens on the way; the prefix is then one row, and images are the (first, behind the last) of its image tokens.
    null_condition: rows with position ids that stand for "no condition", needed with active guidance. min_tokens: the stop
    token is not said before.
    """
    if isinstance(ids, Tensor) and (ids.dim() != 2 or ids.shape[1] == 0):
        raise ValueError(f"ids must be [batch, tokens] with at least one token, got shape {tuple(ids.shape)}")
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    if not 0 <= min_tokens <= max_tokens:
        raise ValueError(f"min_tokens must lie between 0 and max_tokens={max_tokens}, got {min_tokens}")
    wake(model)
    sampler = sampler or Sampler(do_sample=False)
    low, high = vocabulary_range(model, vocabulary)
    if not low <= stop_id < high:
        raise ValueError(f"stop_id must be one of the ids that may be said, {low} .. {high - 1}, got {stop_id}")
    prefix = ids if isinstance(ids, Condition) else _prefix(model, ids, index, mask, grid)
    batch, device = prefix.batch, prefix.embeds.device
    guided = check_guided(guidance, prefix, null_condition)
    rows = concatenate([prefix, null_condition]) if guided and null_condition is not None else prefix
    index = rows.index
    if index is None:
        raise ValueError("a Condition to continue needs position ids: give its index")
    following = index[..., -1:] + torch.arange(1, max_tokens, device=device)
    check_room(model, index, max_tokens, grid)
    if sampler.do_sample and not isinstance(noise, NoiseSource):
        noise = NoiseSource(noise, batch, high - low, device)

    run = None
    if pruning is not None:
        if rows.batch != 1:
            raise ValueError(f"image tokens are dropped from one prompt at a time, without guidance, got {rows.batch} rows")
        run = pruning.begin(model, prefix, images, following.expand(1, -1), grid)
    tables = (model.positions_for(positions, grid) for positions in (index, following))
    stream = TokenStream(model, rows, *tables, hook=run)
    out = torch.full((batch, max_tokens), stop_id, dtype=torch.long, device=device)
    finished = torch.zeros(batch, dtype=torch.bool, device=device)
    lasts = torch.tensor(list(last_ids), dtype=torch.long, device=device)
    token = out[:, 0]
    for step in range(max_tokens):
        if interrupt is not None and interrupt():
            break
        fed = torch.cat([token, token]) if guided else token
        hidden = stream.prefill() if step == 0 else stream.feed(fed, step - 1)
        logits = model.logits(hidden, low=low, high=high)
        if guided and guidance is not None:
            logits = guidance.combine(logits, step, max_tokens)
        if step < min_tokens:
            logits[:, stop_id - low] = float("-inf")
        token = sampler(logits, noise.draw(step) if sampler.do_sample else None) + low
        token = token.masked_fill(finished, stop_id)
        out[:, step] = token
        if callback is not None:
            replacement = callback(step, out[:, : step + 1])
            if replacement is not None:
                out[:, : step + 1] = replacement
                token = out[:, step]
            wake(model)  # the callback may have decoded a preview, which swaps models under offloading
        yield out[:, : step + 1]
        finished = finished | (token == stop_id)
        if len(lasts):
            finished = finished | torch.isin(token, lasts)
        if step % check_every == check_every - 1 and bool(finished.all()):
            break
    lengths = (out == stop_id).int().cumsum(1).eq(0).sum(1)
    return TextOutput(out, lengths, stream.num_calls, None if run is None else run.cost())


def decode_text(model: AutoregressiveModel, ids: Tensor | Condition, **options: Any) -> TextOutput:
    """Continue a prefix to its end; arguments as of `stream_text`."""
    run = stream_text(model, ids, **options)
    while True:
        try:
            next(run)
        except StopIteration as end:
            return end.value


def _prefix(
    model: AutoregressiveModel, ids: Tensor, index: Tensor | None, mask: Tensor | None, grid: Sequence[int] | None
) -> Condition:
    """Ids as a condition; see `decode_text`."""
    if index is None:
        index = torch.arange(model.prefix_slots - 1, model.prefix_slots - 1 + ids.shape[1], device=ids.device)
    if index.shape not in (ids.shape, ids.shape[1:]):
        raise ValueError(f"index must be {tuple(ids.shape)} or {tuple(ids.shape[1:])}, got {tuple(index.shape)}")
    index = index.to(ids.device)
    padding = None if mask is None else mask.to(device=ids.device, dtype=torch.bool)
    bidirectional = model.bidirectional_tokens(index, grid, reading=True)
    return Condition(model.embed(ids), padding, index.expand(ids.shape), bidirectional)


def check_room(model: AutoregressiveModel, index: Tensor, max_tokens: int, grid: Sequence[int] | None) -> None:
    """A ValueError unless `max_tokens` fit behind the prefix at positions `index`."""
    last, positions = int(index[..., -1].max()), len(model.layout(grid))
    if last + max_tokens > positions:
        raise ValueError(
            f"max_tokens={max_tokens} does not fit: the prefix ends at position {last} and this model has {positions}; "
            f"at most {max(positions - last, 0)} tokens can follow"
        )
