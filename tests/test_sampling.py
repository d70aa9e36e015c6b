"""Filters, draws and noise against naive definitions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from armm.decoding.guidance import Guidance
from armm.decoding.sampling import NoiseSource, Sampler, top_k_filter, top_p_filter

many = settings(max_examples=40, deadline=None)
rows = st.lists(st.integers(-4, 4).map(float), min_size=2, max_size=9)


@many
@given(row=rows, k=st.integers(0, 12))
def test_top_k_keeps_everything_not_below_the_kth(row, k):
    out = top_k_filter(torch.tensor([row]), k)[0].tolist()
    threshold = sorted(row, reverse=True)[k - 1] if 0 < k <= len(row) else -math.inf
    assert out == [value if value >= threshold else -math.inf for value in row]


@many
@given(row=st.lists(st.floats(-4, 4), min_size=2, max_size=9, unique=True), p=st.floats(0.05, 1.0))
def test_top_p_keeps_up_to_the_crossing_entry(row, p):
    logits = torch.tensor([row], dtype=torch.float64)
    out = top_p_filter(logits, p)[0]
    probabilities = logits.softmax(-1)[0].tolist()
    total, kept = 0.0, set()
    for index in sorted(range(len(row)), key=lambda i: -row[i]):
        if p < 1 and abs(total - p) < 1e-9:
            return  # on the edge: rounding decides
        if total > p:
            break
        kept.add(index)
        total += probabilities[index]
    assert {i for i in range(len(row)) if out[i] > -math.inf} == kept


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 0.99])
def test_top_p_of_many_rows_is_that_of_each(p: float) -> None:
    """Rows together look at a few entries first, a row alone at all: flat rows need more than those few."""
    torch.manual_seed(1)
    for scale in (0.1, 1.0, 4.0):
        logits = torch.randn(3, 5, 300) * scale
        logits[0, 0, 40:] = -math.inf
        together = top_p_filter(logits, p)
        alone = torch.stack([top_p_filter(row, p) for row in logits.view(15, 300)]).view_as(logits)
        assert torch.equal(together, alone)


def test_filters_apply_in_order_and_keep_at_least_one():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    sampler = Sampler(temperature=0.5, top_k=3, top_p=0.9)
    scaled = logits / 0.5
    assert torch.equal(sampler.filter(logits), top_p_filter(top_k_filter(scaled, 3), 0.9))
    assert (Sampler(top_p=1e-6).filter(logits) > -math.inf).sum() == 1
    assert Sampler(temperature=0.0)(logits, torch.ones(1, 4)).item() == 0


def test_draw_is_argmax_of_probability_over_noise():
    logits, noise = torch.randn(5, 7), torch.rand(5, 7) + 0.1
    expected = (logits.softmax(-1) / noise).argmax(-1)
    assert torch.equal(Sampler()(logits.clone(), noise), expected)
    assert torch.equal(Sampler(do_sample=False)(logits), logits.argmax(-1))


def test_draws_follow_the_distribution():
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.0, 1.0, 2.0]).expand(20000, 3)
    ids = Sampler()(logits, NoiseSource(generator, 20000, 3).draw(0))
    frequency = torch.bincount(ids, minlength=3) / 20000
    torch.testing.assert_close(frequency, logits[0].softmax(-1), atol=0.015, rtol=0)


def test_noise_of_a_sample_does_not_depend_on_its_batch():
    seeds = [3, 4, 5]
    batch = NoiseSource([torch.Generator().manual_seed(seed) for seed in seeds], 3, 50)
    lists = [NoiseSource([torch.Generator().manual_seed(seed)], 1, 50) for seed in seeds]
    singles = [NoiseSource(torch.Generator().manual_seed(seed), 1, 50) for seed in seeds]
    for step in range(3):
        together = batch.draw(step)
        assert torch.equal(together, torch.cat([source.draw(step) for source in lists]))
        assert torch.equal(together, torch.cat([source.draw(step) for source in singles]))


def test_noise_is_the_same_with_one_and_two_threads():
    draws = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        draws.append(NoiseSource(torch.Generator().manual_seed(1), 1, 16384).draw(0))
    torch.set_num_threads(before)
    assert torch.equal(*draws)


def test_recorded_noise_is_returned_step_by_step():
    recorded = torch.rand(2, 3, 4)
    source = NoiseSource(recorded, 2, 4)
    for step in range(3):
        assert torch.equal(source.draw(step), recorded[:, step])
    with pytest.raises(ValueError, match="has 3 steps, step 3"):
        source.draw(3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 2.5}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
    ],
)
def test_sampler_refuses_bad_values(options, message):
    with pytest.raises(ValueError, match=f"{message} must be"):
        Sampler(**options)


def test_noise_source_refuses_bad_sources():
    with pytest.raises(ValueError, match="got 1 generators for a batch of 2"):
        NoiseSource([torch.Generator()], 2, 4)
    with pytest.raises(ValueError, match="recorded noise must be"):
        NoiseSource(torch.rand(2, 3, 5), 2, 4)
    with pytest.raises(TypeError, match="noise must be"):
        NoiseSource([1, 2], 2, 4)


# Guidance


def test_guidance_formula_and_interval():
    conditional, null = torch.randn(2, 3, 5)
    guidance = Guidance(2.5, interval=2)
    torch.testing.assert_close(guidance.combine(torch.cat([conditional, null])), null + (conditional - null) * 2.5)
    assert [guidance.covers(step) for step in range(6)] == [True, True, True, True, False, False]
    assert all(Guidance(2.0).covers(step) for step in range(100))
    assert not Guidance(1.0).active
    assert Guidance(1.01).active


def test_guidance_log_softmax_equals_logits_up_to_a_constant():
    logits = torch.randn(4, 6)
    plain = Guidance(3.0).combine(logits).softmax(-1)
    torch.testing.assert_close(Guidance(3.0, formula="log_softmax").combine(logits).softmax(-1), plain)


@pytest.mark.parametrize("schedule", ["constant", "linear", "half_linear", "cosine"])
def test_guidance_schedules_end_at_the_scale(schedule):
    guidance = Guidance(4.0, schedule=schedule)
    scales = [guidance.scale_at(step, 9) for step in range(9)]
    assert scales[-1] == pytest.approx(4.0)
    assert scales == sorted(scales)
    assert scales[0] == pytest.approx(4.0 if schedule == "constant" else 1.0)
    assert guidance.scale_at(0, 1) == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": float("inf")}, "scale must be a finite"),
        ({"schedule": "wavy"}, "schedule must be one of"),
        ({"formula": "sum"}, "formula must be one of"),
        ({"interval": -2}, "interval must be"),
    ],
)
def test_guidance_refuses_bad_values(options, message):
    with pytest.raises(ValueError, match=message):
        Guidance(**options)
