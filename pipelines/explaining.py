"""How a pipeline that reads explains an answer; the methods of `UnderstandingPipeline` lead here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import PIL.Image
import torch
from torch import Tensor

from armm.decoding.base import TokenStream, wake
from armm.decoding.text import decode_text
from armm.explain import (
    ActivationMaps,
    Balance,
    Explanation,
    View,
    attention_balance,
    coherence_context,
    combine_views,
    same_piece_context,
    views,
)
from armm.nn.attention import record_attention

from . import loading
from .understanding import Reading, UnderstandingPipeline

METHODS = ("tam", "arc", "msea", "msea+arc", "attention")
FINE = 4  # pixels of a combined map for each token along a side


def one_reading(pipe: UnderstandingPipeline, image: Any, question: Any) -> Reading:
    readings = pipe.readings(image, question)
    if len(readings) != 1 or len(readings[0].images) != 1:
        raise ValueError("an explanation is about one question and one image: give one of each.")
    return readings[0]


def answer_ids(pipe: UnderstandingPipeline, reading: Reading, max_new_tokens: int | None) -> list[int]:
    """What the model says, without pruning: explanations need every image token in every layer."""
    pipe.check_length([reading], max_new_tokens)
    output = decode_text(
        pipe.transformer,
        reading.condition,
        stop_id=pipe.stop_id,
        max_tokens=max_new_tokens or reading.limit,
        vocabulary=pipe.text_range,
        check_every=1,
    )
    return output.tokens()[0]


def say(pipe: UnderstandingPipeline, reading: Reading, ids: Sequence[int]) -> Tensor:
    """Final hidden states [T + n - 1, D] of a prompt and an answer of n given tokens: the last n say the answer."""
    model, condition = pipe.transformer, reading.condition
    wake(model)
    following = condition.index[..., -1:] + torch.arange(1, max(len(ids), 2), device=condition.embeds.device)
    stream = TokenStream(model, condition, model.positions_for(condition.index), model.positions_for(following))
    states = [stream.prefill_states()[-1][0]]
    for step, word in enumerate(ids[:-1]):
        states.append(stream.feed(torch.tensor([word], device=condition.embeds.device), step))
    return torch.cat(states)


def word_maps(
    pipe: UnderstandingPipeline, reading: Reading, ids: Sequence[int], method: str, ranking: int, kernel: int
) -> list[tuple[Tensor, list[float]]]:
    """For each of the answer's tokens, its map and the scores of the words before it."""
    low, high = pipe.text_range
    states = say(pipe, reading, ids)
    (first, end), (asked, answered) = reading.images[0], reading.question
    question = list(range(asked, max(answered, asked)))
    begin = len(reading.ids) - 1  # the position that says the answer's first token
    words = [*(reading.ids[place] for place in question), *ids]
    pieces = [pipe.decode_words([word]).strip() or word for word in words]
    rankings: list[list[int]] = []
    if "arc" in method:
        saying = [*(place - 1 for place in question), *range(begin, begin + len(ids))]
        logits = pipe.transformer.logits(states[saying], low=low, high=high)
        rankings = logits.topk(min(ranking, logits.shape[-1])).indices.tolist()
    maps = ActivationMaps(reading.grids[0], kernel)
    found = []
    for number, word in enumerate(words):
        column = pipe.transformer.logits(states[None], low=word, high=word + 1)[0, :, 0]
        said = max(number - len(question), 0)
        places = [*question, *range(begin, begin + said + 1)]
        context = coherence_context(rankings, number) if rankings else same_piece_context(pieces, number)
        activation = maps.explain(column[first:end].cpu(), column[places].cpu(), context)
        if number >= len(question):
            found.append((activation.map, activation.relative[1].tolist()))
    return found


def attention_maps(
    pipe: UnderstandingPipeline, reading: Reading, ids: Sequence[int]
) -> list[tuple[Tensor, list[float]]]:
    """For each of the answer's tokens, where the position that says it looks: the mean over the heads of the last third of the layers,
    on the image scaled to a largest value of 1, and on the question."""
    layers = len(pipe.transformer.trunk.blocks)
    chosen = range(layers - max(layers // 3, 1), layers)
    with record_attention(chosen) as record:
        say(pipe, reading, ids)
    (first, end), (asked, answered) = reading.images[0], reading.question
    found = []
    for number in range(len(ids)):
        # The first call is the prompt's, whose last row says the first token.
        row = torch.stack([record[layer][number][0, :, -1].mean(0) for layer in chosen]).mean(0).double().cpu()
        values = row[first:end]
        largest = values.max().clamp(min=torch.finfo(torch.float64).tiny)
        found.append(((values / largest).view(reading.grids[0]), (row[asked:answered] / largest).tolist()))
    return found


def explain(
    pipe: UnderstandingPipeline,
    image: Any,
    question: Any,
    method: str,
    scales: Sequence[float],
    ranking: int,
    kernel: int,
    max_new_tokens: int | None,
) -> Explanation:
    loading.check_choice(method, list(METHODS), "`method`")
    reading = one_reading(pipe, image, question)
    ids = answer_ids(pipe, reading, max_new_tokens)
    if not ids:
        raise ValueError("the model says nothing about this image: there is nothing to explain.")
    seen = pipe.seen(image)
    if method == "attention":
        own = attention_maps(pipe, reading, ids)
    else:
        own = word_maps(pipe, reading, ids, method, ranking, kernel)
    maps = [values for values, _ in own]
    if "msea" in method:
        maps = _combined(pipe, seen, question, ids, method, scales, ranking, kernel, maps)
    words = [pipe.decode_words([word]) for word in ids]
    answer = pipe.decode_words(ids).strip()
    context = [scores for _, scores in own]
    pipe.maybe_free_model_hooks()
    return Explanation(seen, question or "", answer, words, maps, context, method)


def _combined(
    pipe: UnderstandingPipeline,
    seen: PIL.Image.Image,
    question: Any,
    ids: Sequence[int],
    method: str,
    scales: Sequence[float],
    ranking: int,
    kernel: int,
    whole: list[Tensor],
) -> list[Tensor]:
    """Maps of the same answer to the picture at several scales, as one for each word."""
    if not scales:
        raise ValueError("`scales` is empty: give at least one scale, 1.0 is the picture as it is.")
    by_scale: list[list[tuple[View, list[Tensor]]]] = []
    for scale in scales:
        parts = []
        for view in views(scale):
            if scale == 1:
                parts.append((view, whole))
                continue
            reading = one_reading(pipe, view.of(seen), question)
            parts.append((view, [values for values, _ in word_maps(pipe, reading, ids, method, ranking, kernel)]))
        by_scale.append(parts)
    height, width = whole[0].shape
    size = (FINE * height, FINE * width)
    return [
        combine_views([[(view, maps[number]) for view, maps in parts] for parts in by_scale], size)
        for number in range(len(ids))
    ]


def balance(
    pipe: UnderstandingPipeline, image: Any, question: Any, max_new_tokens: int | None, ignore_first: bool
) -> Balance:
    reading = one_reading(pipe, image, question)
    ids = answer_ids(pipe, reading, max_new_tokens) or [pipe.stop_id]
    with record_attention() as record:
        # The last answer token is fed as well: its row is one of the words'.
        say(pipe, reading, [*ids, pipe.stop_id])
    length, (first, end) = len(reading.ids), reading.images[0]
    rows = []
    for layer in range(len(pipe.transformer.trunk.blocks)):
        _, *steps = record[layer]  # the first call is the prompt's
        rows.append(torch.cat([step[0, :, :, :length] for step in steps], dim=1).cpu())
    cells = torch.zeros(length, dtype=torch.bool)
    cells[first:end] = True
    words = ~cells
    words[0] &= not ignore_first
    pipe.maybe_free_model_hooks()
    return attention_balance(rows, [words] * len(rows), [cells] * len(rows))
