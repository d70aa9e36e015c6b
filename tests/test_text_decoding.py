"""Searches over texts: beam search against trying everything, OPERA's parts, recorded attention."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_janus import language_model

from armm.decoding import OPERA, BeamSearch, Sampler, decode_text, stream_text
from armm.decoding.opera import column_scores
from armm.nn import attention, attention_backend, record_attention

WORDS = 5


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def prompt(model, seed=0, rows=1, length=6):
    ids = torch.randint(WORDS, (rows, length), generator=torch.Generator().manual_seed(seed))
    return model.prompt_condition(ids)


def best_by_trying(model, condition, stop, length, penalty):
    """The best-ranked text of up to `length` words, of all there are."""
    found = []
    for size in range(length + 1):
        for words in product([w for w in range(WORDS) if w != stop], repeat=size):
            said = [*words, stop] if size < length else list(words)
            row = condition
            if len(said) > 1:
                index = condition.length + torch.arange(len(said) - 1)
                row = condition.extend(model.embed(torch.tensor([said[:-1]])), index)
            logits = model.logits(model.hidden(row)[:, condition.length - 1 :]).log_softmax(-1)[0]
            total = sum(float(logits[place, word]) for place, word in enumerate(said))
            found.append((total / (size + 1) ** penalty, list(words)))
    return max(found)[1]


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 50), penalty=st.sampled_from([0.0, 1.0, 2.0]))
def test_a_wide_beam_finds_the_best_text(seed, penalty):
    model = language_model(WORDS, layers=1, seed=seed, codes=False)
    condition = prompt(model, seed)
    search = BeamSearch(num_beams=WORDS**3, length_penalty=penalty)
    (text,) = search(model, condition, stop_id=0, max_tokens=3).tokens()
    assert text == best_by_trying(model, condition, 0, 3, penalty)


def test_one_beam_is_greedy_and_rows_do_not_mix():
    model = language_model(WORDS, codes=False)
    condition = prompt(model, rows=3)
    greedy = decode_text(model, condition, stop_id=0, max_tokens=7, sampler=Sampler(do_sample=False)).tokens()
    assert BeamSearch(num_beams=1)(model, condition, stop_id=0, max_tokens=7).tokens() == greedy
    steps = list(stream_text(model, condition, stop_id=0, max_tokens=7))
    assert steps[-1].shape[1] <= 7 and torch.equal(steps[1][:, :1], steps[0])


def test_padding_in_front_changes_nothing():
    model = language_model(WORDS, codes=False)
    alone, padded = prompt(model), prompt(model).pad_left(10)
    for search in (BeamSearch(3), OPERA(num_beams=3, candidates=2)):
        texts = [
            search(model, part, stop_id=None, max_tokens=6, image=(first, first + 3)).tokens()
            for part, first in ((alone, 1), (padded, 5))
        ]
        assert texts[0] == texts[1]


def test_without_a_penalty_opera_is_a_beam_search_over_its_candidates():
    model = language_model(WORDS, codes=False)
    options = {"stop_id": 0, "max_tokens": 9, "image": (1, 4)}
    plain = BeamSearch(3)(model, prompt(model), **options).tokens()
    free = OPERA(num_beams=3, candidates=WORDS, penalty=0.0, threshold=500)
    assert free(model, prompt(model), **options).tokens() == plain


def test_candidates_look_where_they_would_look_alone():
    model = language_model(WORDS, codes=False)
    condition, trace = prompt(model), []
    OPERA(num_beams=2, candidates=3, trace=trace)(model, condition, stop_id=None, max_tokens=5, image=(1, 4))
    step = trace[3]
    whole = torch.cat([step["asked"], step["candidates"][:, 1:2]], dim=1)
    row = condition.repeat(2).extend(model.embed(whole), condition.length + torch.arange(whole.shape[1]))
    layer = len(model.trunk.blocks) - 1
    with record_attention([layer]) as record:
        model.hidden(row)
    expected = record[layer][0].amax(1)[:, -1]
    assert torch.allclose(step["rows"][:, 1], expected / expected.sum(-1, keepdim=True), atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 6), seed=st.integers(0, 99))
def test_columns_are_products_from_the_diagonal_down(size, seed):
    window = torch.rand(size, size, generator=torch.Generator().manual_seed(seed)).tril() * 50
    expected = torch.tensor([1e-7 * float(window[j:, j].prod()) for j in range(size)]).half()
    assert torch.allclose(column_scores(window).float(), expected.float(), rtol=2e-3)


def test_recorded_attention_adds_up_and_changes_nothing():
    query, key, value = torch.randn(3, 2, 4, 6, 8).unbind(0)
    with record_attention([1]) as record:
        out = attention(query, key, value, causal=True, layer=1)
        attention(query, key, value, layer=0)
    assert list(record.calls) == [1]
    weights = record[1][0]
    assert torch.allclose(weights.sum(-1), torch.ones(2, 4, 6)) and torch.all(weights.triu(1) == 0)
    with attention_backend("reference"):
        assert torch.allclose(out, attention(query, key, value, causal=True), atol=1e-6)


def test_searches_refuse_what_they_cannot_do():
    model = language_model(WORDS, codes=False)
    with pytest.raises(ValueError, match="num_beams must be a positive"):
        BeamSearch(0)
    with pytest.raises(ValueError, match="at least 2"):
        OPERA(num_beams=1)
    with pytest.raises(ValueError, match="where the image's tokens are"):
        OPERA()(model, prompt(model), stop_id=0, max_tokens=3)
    with pytest.raises(ValueError, match="does not fit"):
        BeamSearch(2)(model, prompt(model), stop_id=0, max_tokens=1000)
