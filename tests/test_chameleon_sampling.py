"""Entropy top-k, repetition penalty, draws from uniforms, guidance by contexts and cautious text, each against its definition."""

from __future__ import annotations

import math

import pytest
import tiny_chameleon as tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from armm.condition import Condition
from armm.decoding.cautious import CautiousSampler, decode_text_cautiously
from armm.decoding.guidance import ContextGuidance
from armm.decoding.sampling import (
    NoiseSource,
    Sampler,
    UniformSource,
    entropy,
    entropy_top_k,
    entropy_top_k_filter,
    inverse_cdf,
    repetition_filter,
)

many = settings(max_examples=40, deadline=None)
values = st.lists(st.floats(-5, 5), min_size=2, max_size=12)


@many
@given(value=st.floats(-1, 12), low=st.integers(1, 20), room=st.integers(0, 500))
def test_entropy_says_how_many(value, low, room):
    clamped = min(max(value, 0.0), 10.0)
    expected = round(low + room / (1 + math.exp(5 - clamped)))
    assert int(entropy_top_k(torch.tensor(value, dtype=torch.float64), low, low + room)) == min(
        max(expected, low), low + room
    )


@many
@given(row=values, low=st.integers(1, 4), room=st.integers(0, 20))
def test_entropy_top_k_keeps_so_many_and_ties(row, low, room):
    logits = torch.tensor([row])
    p = torch.tensor(row).softmax(0)
    k = int(entropy_top_k(-(p * (p + 1e-10).log()).sum(), low, low + room))
    threshold = sorted(logits[0].tolist(), reverse=True)[min(k, len(row)) - 1]
    out = entropy_top_k_filter(logits, low, low + room)[0].tolist()
    assert out == [value if value >= threshold else -math.inf for value in logits[0].tolist()]
    assert torch.equal(Sampler(entropy_top_k=(low, low + room)).filter(logits)[0], torch.tensor(out))


def test_a_window_shares_its_mean_entropy():
    logits = torch.stack([torch.zeros(40), torch.arange(40.0)])[None]
    k = int(entropy_top_k(entropy(logits).mean(), 2, 30))
    assert ((entropy_top_k_filter(logits, 2, 30, shared=True)[0, 1] > -math.inf).sum()) == k
    assert int(entropy_top_k(entropy(logits[0, 1]), 2, 30)) != k


@many
@given(row=values, penalty=st.floats(0.5, 2.0), seed=st.integers(0, 100))
def test_repeated_ids_are_penalised(row, penalty, seed):
    seen = torch.rand(len(row), generator=torch.Generator().manual_seed(seed)) < 0.5
    out = repetition_filter(torch.tensor([row], dtype=torch.float64), seen[None], penalty)[0]
    for value, was, got in zip(row, seen.tolist(), out.tolist(), strict=True):
        assert got == pytest.approx((value / penalty if value > 0 else value * penalty) if was else value)


@many
@given(weights=st.lists(st.integers(0, 5), min_size=1, max_size=10).filter(any), u=st.floats(0, 0.999))
def test_inverse_cdf_is_the_first_id_beyond(weights, u):
    total, expected = 0, None
    for index, weight in enumerate(weights):
        total += weight
        if total > u * sum(weights):
            expected = index
            break
    found = inverse_cdf(torch.tensor([weights], dtype=torch.float64), torch.tensor([[u]], dtype=torch.float64))
    assert found.tolist() == [expected]


def test_uniforms_replace_the_noise():
    source = UniformSource(torch.tensor([[0.0, 0.99]], dtype=torch.float64))
    logits = torch.zeros(1, 4)
    assert Sampler()(logits, source.draw(0)).tolist() == [0] and Sampler()(logits, source.draw(1)).tolist() == [3]
    with pytest.raises(ValueError, match=r"numbers in \[0, 1\)"):
        UniformSource(torch.tensor([[1.0]]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sampler(entropy_top_k=(0, 5)), "entropy_top_k must be None or"),
        (lambda: Sampler(entropy_top_k=(6, 5)), "entropy_top_k must be None or"),
        (lambda: Sampler(repetition_penalty=0.0), "repetition_penalty must be"),
        (lambda: ContextGuidance(math.nan), "scale must be a finite"),
        (lambda: ContextGuidance(2.0, math.inf), "image_scale must be a finite"),
        (lambda: ContextGuidance(2.0, null="text"), "null must be"),
        (lambda: CautiousSampler(max_trials=0), "max_trials must be"),
        (lambda: CautiousSampler(low=1.0, high=1.0), "low < high"),
        (lambda: CautiousSampler(do_sample=False), "plain Sampler"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_guidance_combines_its_rows():
    full, images, null = torch.randn(3, 2, 5)
    two = ContextGuidance(0.8).combine(torch.cat([full, null]))
    torch.testing.assert_close(two, null + 0.8 * (full - null))
    three = ContextGuidance(3.0, 1.2, "start_image")
    assert three.views == ("images", "start_image") and ContextGuidance(1.0).views == ()
    expected = null + 1.2 * (images - null) + 3.0 * (full - images)
    torch.testing.assert_close(three.combine(torch.cat([full, images, null])), expected)


# ---------------------------------------------------------------------- cautious text


def brute_force(made, ids: list[int], stop: int, max_tokens: int, sampler: CautiousSampler, generator) -> list[int]:
    """Cautious text without a cache: each trial from the whole sequence."""
    text: list[int] = []

    def filtered(sequence):
        return sampler.filter(made(torch.tensor([sequence]))[0, -1])

    while len(text) < max_tokens:
        value = float(entropy(filtered([*ids, *text])))
        share = min(max((value - sampler.low) / (sampler.high - sampler.low), 0), 1)
        trials = int(1 + (sampler.max_trials - 1) * share)
        tried: list[list[int]] = [[] for _ in range(trials)]
        scores, going = [0.0] * trials, [True] * trials
        while any(going) and max(map(len, tried)) < (max_tokens - len(text) if trials > 1 else 1):
            noise = NoiseSource(generator, trials, made.vocab_size).draw(0)
            for row in range(trials):
                if not going[row]:
                    continue
                p = filtered([*ids, *text, *tried[row]]).softmax(-1)
                token = int((p / noise[row]).argmax())
                scores[row] -= math.log(float(p[token]))
                tried[row].append(token)
                going[row] = token != stop and not (trials > 1 and token in sampler.pause_ids)
        best = min(range(trials), key=lambda row: scores[row] / len(tried[row]))
        text += tried[best]
        if text[-1] == stop:
            break
    return text


@torch.no_grad()
@pytest.mark.parametrize("trials", [1, 4])
def test_cautious_text_equals_its_definition(trials):
    made = tiny.model()
    stop, prompts = tiny.VOCABULARY["</s>"], [[0, 40, 41], [0, 36, 44]]
    sampler = CautiousSampler(0.7, top_k=8, max_trials=trials, pause_ids=tuple(range(30, 40)))
    ids = torch.tensor(prompts)
    prefix = Condition(made.embed(ids), None, torch.arange(3).expand(2, -1))
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    output = decode_text_cautiously(made, prefix, stop_ids=[stop], max_tokens=8, sampler=sampler, noise=generators)
    for row, prompt in enumerate(prompts):
        expected = brute_force(made, prompt, stop, 8, sampler, torch.Generator().manual_seed(5 + row))
        assert output.tokens()[row] == [token for token in expected if token != stop]


def test_cautious_text_says_only_what_is_allowed():
    made = tiny.model()
    allowed = torch.zeros(made.vocab_size, dtype=torch.bool)
    allowed[[40, 41, 42]] = True
    prefix = Condition(made.embed(torch.tensor([[0, 40]])), None, torch.arange(2)[None])
    options = {"stop_ids": [42], "max_tokens": 9, "sampler": CautiousSampler(pause_ids=(41,))}
    output = decode_text_cautiously(made, prefix, allowed=allowed, noise=torch.Generator().manual_seed(0), **options)
    assert set(output.ids.flatten().tolist()) <= {40, 41, 42}
    with pytest.raises(ValueError, match="whole continuations"):
        CautiousSampler()(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="one per sample"):
        decode_text_cautiously(made, prefix, noise=[torch.Generator()] * 2, **options)
    with pytest.raises(ValueError, match="at least one stop id"):
        decode_text_cautiously(made, prefix, **{**options, "stop_ids": []})
