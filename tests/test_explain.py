"""Explanations: their parts against plain arithmetic, and the pipelines' methods on tiny models."""

from __future__ import annotations

import math

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_janus import janus_pipeline
from tiny_unified import unified_pipeline

from armm.explain import (
    ActivationMaps,
    Explanation,
    attention_balance,
    coherence_context,
    combine_views,
    rank_biased_overlap,
    rank_gaussian,
    same_piece_context,
    views,
)
from pipelines.unified_image_to_text import UnifiedImageToTextPipeline


@pytest.fixture(scope="module")
def reader():
    parts = unified_pipeline()
    pipe = UnifiedImageToTextPipeline(parts.tokenizer, parts.transformer, parts.decoding, parts.words.vocabulary)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def picture():
    return PIL.Image.fromarray(np.random.default_rng(2).integers(0, 256, (32, 32, 3), dtype=np.uint8))


# ---------------------------------------------------------------------- parts


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), kernel=st.sampled_from([3, 5]))
def test_the_rank_filter_is_a_mean_of_each_window(seed, kernel):
    scores = torch.rand(5, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    half = kernel // 2
    padded = np.pad(scores.numpy(), half, mode="reflect")
    found = rank_gaussian(scores, kernel)
    for y, x in ((0, 0), (2, 3), (4, 5)):
        window = np.sort(padded[y : y + kernel, x : x + kernel].flatten())
        sigma = window.std() / window.mean()
        weights = np.exp(-((np.arange(kernel**2) - kernel**2 // 2) ** 2) / (2 * sigma**2))
        assert float(found[y, x]) == pytest.approx((weights * window).sum() / weights.sum())


def test_flat_and_negative_windows_are_guarded():
    assert torch.allclose(rank_gaussian(torch.full((4, 4), 0.5)), torch.full((4, 4), 0.5, dtype=torch.float64))
    assert torch.all(rank_gaussian(torch.zeros(4, 4)) == 0)
    with pytest.raises(ValueError, match="needs a map"):
        rank_gaussian(torch.zeros(1, 4))


def test_what_earlier_words_draw_is_taken_away():
    maps = ActivationMaps((2, 2), kernel=1)
    first = maps.explain(torch.tensor([1.0, 0, 0, 0]), torch.tensor([1.0]), torch.zeros(0))
    assert first.interference is None and first.map[0, 0] == 1
    both = torch.tensor([2.0, 0, 0, 3.0])
    other = maps.explain(both, torch.tensor([1.0, 1.0]), same_piece_context(["a", "b"], 1))
    assert other.image.tolist() == pytest.approx([0, 0, 0, 3]) and other.scale == pytest.approx(2)
    same = maps.explain(both, torch.tensor([0.0, 1.0, 1.0]), same_piece_context(["a", "b", "b"], 2))
    assert same.image.tolist() == pytest.approx(both.tolist())


@settings(max_examples=30, deadline=None)
@given(order=st.permutations(range(8)), p=st.floats(0.2, 0.95))
def test_overlap_of_rankings_counts_shared_prefixes(order, p):
    straight = list(range(8))
    expected = sum(p ** (d - 1) * len({*straight[:d]} & {*order[:d]}) / d for d in range(1, 9)) * (1 - p) / (1 - p**8)
    assert rank_biased_overlap(straight, order, p) == pytest.approx(expected)
    assert rank_biased_overlap(order, order, p) == pytest.approx(1)
    assert rank_biased_overlap(straight, [value + 8 for value in order], p) == 0


def test_words_that_go_on_alike_are_no_interference():
    context = coherence_context([[1, 2, 3], [7, 8, 9], [1, 2, 3]], 2)
    assert context.tolist() == pytest.approx([0, 1])


def test_views_cover_the_picture_and_maps_go_back_to_their_places():
    for scale in (0.5, 1.0, 1.25, 2.0):
        assert len(views(scale)) == (1 if scale <= 1 else 4)
        where = [(view, torch.ones(4, 4)) for view in views(scale)]
        assert torch.all(combine_views([where], (8, 8)) == 0)  # flat maps say nothing
    corner = torch.zeros(4, 4)
    corner[0, 0] = 1
    parts = [(view, corner if view.box[:2] == (0.0, 0.0) else torch.zeros(4, 4)) for view in views(2.0)]
    combined = combine_views([parts], (8, 8))
    assert combined.argmax() == 0 and float(combined[4:].max()) < 0.5
    with pytest.raises(ValueError, match="scale must lie"):
        views(10)


def test_a_view_shows_its_part_of_the_picture():
    picture = PIL.Image.new("RGB", (8, 8), "black")
    picture.paste("white", (4, 4, 8, 8))
    last = views(2.0)[-1].of(picture)
    assert last.size == (8, 8) and last.getpixel((5, 5)) == (255, 255, 255)
    assert views(0.5)[0].of(picture).getpixel((0, 0)) == (64, 64, 64)


def test_balance_of_even_attention_is_one():
    rows = torch.full((2, 3, 10), 0.1)
    text, cells = torch.arange(10) < 2, (torch.arange(10) >= 2) & (torch.arange(10) < 8)
    balance = attention_balance([rows] * 6, [text] * 6, [cells] * 6)
    assert balance.dominance == pytest.approx([1] * 6) and balance.text_efficiency == pytest.approx([1] * 6)
    assert balance.text_tokens == [2] * 6 and set(balance.groups()) == {"early", "middle", "late"}
    half = rows.clone()
    half[..., 2:8] /= 2
    doubled = attention_balance([half], [text], [cells])
    assert doubled.dominance == pytest.approx([2])
    (efficiency, other), ratio = (doubled.text_efficiency + doubled.image_efficiency), doubled.dominance[0]
    assert efficiency / other == pytest.approx(ratio)
    assert balance.picture().size == (480, 200)


def test_mass_inside_is_a_share():
    maps = [torch.tensor([[1.0, 0], [0, 1]], dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)]
    explanation = Explanation(PIL.Image.new("RGB", (8, 8)), "q", "a b", ["a", "b"], maps)
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[:4, :4] = True
    share, empty = explanation.mass_inside(mask)
    assert share == 0.5 and math.isnan(empty)
    assert explanation.overlay("a", 16).size == (16, 16) and explanation.image(32).width == 3 * 40 + 8


# ---------------------------------------------------------------------- pipelines


@pytest.mark.parametrize("method", ["tam", "arc", "msea", "msea+arc", "attention"])
@pytest.mark.parametrize("kind", ["janus", "unified"])
def test_pipelines_explain_their_answers(kind, method, reader, picture):
    pipe = janus_pipeline() if kind == "janus" else reader
    question = "what is this?" if kind == "janus" else "what color is the cube?"
    try:
        explanation = pipe.explain(picture, question, method=method, max_new_tokens=3)
    except ValueError as error:
        assert "says nothing" in str(error)
        return
    assert explanation.answer == pipe.ask(picture, question, max_new_tokens=3).texts[0]
    assert len(explanation.maps) == len(explanation.words) <= 3
    for values in explanation.maps:
        assert values.shape == ((16, 16) if "msea" in method else (4, 4)) and 0 <= float(values.min())
        assert float(values.max()) <= 1 + 1e-9
    assert explanation.image(64).mode == "RGB"


def test_attention_of_the_answer_is_measured(reader, picture):
    balance = reader.attention_balance(picture, "what color is the cube?", max_new_tokens=2)
    assert len(balance.dominance) == 2 and set(balance.image_tokens) == {16}
    without = reader.attention_balance(picture, "what color is the cube?", max_new_tokens=2, ignore_first=True)
    assert without.text_tokens[0] == balance.text_tokens[0] - 1


def test_requests_that_make_no_sense_are_refused(reader, picture):
    with pytest.raises(ValueError, match="did you mean 'tam'"):
        reader.explain(picture, "is it day?", method="tams")
    with pytest.raises(ValueError, match="one question and one image"):
        reader.explain([picture, picture], "is it day?")
    with pytest.raises(ValueError, match="empty"):
        reader.explain(picture, "")
    with pytest.raises(TypeError, match="PIL image"):
        reader.explain(None, "is it day?")
