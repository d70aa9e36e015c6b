"""Next-token decoding and text decoding against teacher forcing and against themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from armm.decoding import DECODING_STRATEGIES, Guidance, NextTokenDecoding, NoiseSource, Sampler, decode_text
from armm.model import AutoregressiveModel

few = settings(max_examples=8, deadline=None)
DECODE = NextTokenDecoding()
GREEDY = Sampler(do_sample=False)


def build(kind="class", grid=(2, 3), vocab=12, seed=0, **transformer):
    """A small model with large random weights, so that greedy choices are far from ties."""
    torch.manual_seed(seed)
    options = {"dim": 16, "num_layers": 2, "num_heads": 2, "mlp_hidden": 24, "rotary_axes": [4, 4], **transformer}
    conditions = {
        "class": {"type": "class", "num_classes": 5},
        "caption": {"type": "caption", "in_dim": 6, "num_tokens": 4},
    }
    slots = {}
    if kind in ("unified", "bidirectional"):
        slots = {"text_slots": 3, "answer_slots": 6, "bidirectional_prompt": kind == "bidirectional"}
        options["rotary_axes"] = [2, 2, 4]
        options["learned_positions"] = 3 + 1 + grid[0] * grid[1] + 6
    model = AutoregressiveModel(vocab, options, conditions.get(kind), grid, **slots).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.35)
    return model


def conditions(model, batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    if model.condition_type == "class":
        return model.condition(labels=torch.arange(batch) % 5), model.null_condition(batch)
    if model.condition_type == "caption":
        mask = torch.arange(4)[None] >= torch.arange(batch)[:, None]
        features = torch.randn(batch, 4, 6, generator=generator)
        condition = model.condition(features=features, mask=mask)
        return condition, model.null_condition(batch, like=condition)
    ids = torch.randint(0, 4, (batch, 3), generator=generator)
    mask = torch.arange(3)[None] >= torch.arange(batch)[:, None] % 2
    return model.prefix_condition(ids, mask), model.prefix_condition(torch.full((batch, 2), 3))


@torch.no_grad()
@few
@given(
    kind=st.sampled_from(["class", "caption", "unified", "bidirectional"]),
    grid=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    fuse=st.booleans(),
)
def test_recorded_logits_equal_teacher_forcing(kind, grid, fuse):
    model = build(kind, grid)
    if fuse:
        model.fuse_projections()
    condition, null = conditions(model)
    out = DECODE(model, condition, null, sampler=GREEDY, guidance=Guidance(1.7), record_logits=True)
    tokens = grid[0] * grid[1]
    assert out.num_calls == tokens == DECODE.num_calls(grid) == out.steps
    full = []
    for part in (condition, null):
        if kind in ("unified", "bidirectional"):
            index = torch.cat([part.index, model.image_index()[None].expand(2, -1)], dim=1)
            mask = torch.ones(2, index.shape[1], dtype=torch.bool)
            if part.mask is not None:
                mask[:, : part.length] = part.mask
            embeds_only = type(part)(part.embeds)
            logits = model(out.ids, embeds_only, index=index, key_mask=mask)
        else:
            logits = model(out.ids, part)
        full.append(logits[:, part.length - 1 : -1])
    expected = full[1] + (full[0] - full[1]) * 1.7
    torch.testing.assert_close(out.logits, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(out.ids, out.logits.argmax(-1))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["class", "caption", "unified", "bidirectional"])
def test_a_sample_is_the_same_alone_and_in_a_batch(kind):
    model = build(kind)
    condition, null = conditions(model, batch=3)
    options = {"sampler": Sampler(top_k=9), "guidance": Guidance(2.0)}
    together = DECODE(model, condition, null, noise=[torch.Generator().manual_seed(s) for s in range(3)], **options)
    for row in range(3):
        window = slice(row, row + 1)
        noise = torch.Generator().manual_seed(row)
        alone = DECODE(model, condition.select(window), null.select(window), noise=noise, **options)
        assert torch.equal(alone.ids[0], together.ids[row])


@torch.no_grad()
def test_recorded_noise_replays_a_generation():
    model = build()
    condition, null = conditions(model)
    source = NoiseSource([torch.Generator().manual_seed(s) for s in (7, 8)], 2, 12)
    recorded = torch.stack([source.draw(step) for step in range(6)], dim=1)
    first = DECODE(model, condition, noise=[torch.Generator().manual_seed(s) for s in (7, 8)])
    assert torch.equal(DECODE(model, condition, noise=recorded).ids, first.ids)


@torch.no_grad()
def test_one_and_two_threads_give_the_same_ids():
    model = build(grid=(4, 4))
    condition, null = conditions(model)
    results, before = [], torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        noise = torch.Generator().manual_seed(0)
        results.append(DECODE(model, condition, null, guidance=Guidance(3.0), noise=noise).ids)
    torch.set_num_threads(before)
    assert torch.equal(*results)


@torch.no_grad()
def test_a_grid_may_have_a_time():
    model = build(grid=(2, 2, 2), rotary_axes=[2, 2, 4])
    condition, _ = conditions(model)
    output = DECODE(model, condition, sampler=GREEDY)
    assert output.ids.shape == (2, 8) and output.num_calls == DECODE.num_calls((2, 2, 2)) == 8


@torch.no_grad()
@pytest.mark.parametrize("kind", ["class", "caption"])
def test_interval_drops_guidance_for_good(kind):
    model = build(kind)
    condition, null = conditions(model)
    guided = DECODE(model, condition, null, sampler=GREEDY, guidance=Guidance(3.0), record_logits=True)
    partly = DECODE(model, condition, null, sampler=GREEDY, guidance=Guidance(3.0, interval=1), record_logits=True)
    torch.testing.assert_close(partly.logits[:, :3], guided.logits[:, :3])
    plain = model(partly.ids, condition)[:, condition.length - 1 : -1]
    torch.testing.assert_close(partly.logits[:, 3:], plain[:, 3:], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_inactive_guidance_runs_one_row():
    model = build()
    condition, null = conditions(model)
    plain = DECODE(model, condition, sampler=GREEDY)
    assert torch.equal(DECODE(model, condition, null, sampler=GREEDY, guidance=Guidance(1.0)).ids, plain.ids)


@torch.no_grad()
def test_reference_attention_gives_the_same_ids():
    model = build("caption")
    condition, null = conditions(model)
    expected = DECODE(model, condition, null, sampler=GREEDY, guidance=Guidance(2.0)).ids
    model.set_attention_backend("reference")
    assert torch.equal(DECODE(model, condition, null, sampler=GREEDY, guidance=Guidance(2.0)).ids, expected)


@torch.no_grad()
def test_known_codes_are_kept_and_seen():
    model = build()
    condition, null = conditions(model)
    known = torch.randint(0, 12, (2, 6))
    mask = torch.tensor([[True, False, True, False, False, True]] * 2)
    options = {"sampler": GREEDY, "guidance": Guidance(2.0), "record_logits": True}
    out = DECODE(model, condition, null, known_ids=known, known_mask=mask, **options)
    assert torch.equal(out.ids[mask], known[mask])
    assert out.num_calls == 6
    conditional, unconditional = (model(out.ids, part)[:, :-1] for part in (condition, null))
    expected = unconditional + (conditional - unconditional) * 2.0
    torch.testing.assert_close(out.logits, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(out.ids[~mask], out.logits.argmax(-1)[~mask])


@torch.no_grad()
def test_codes_count_from_the_start_of_their_range():
    model = build("unified", vocab=20)
    condition, _ = conditions(model)
    out = DECODE(model, condition, sampler=GREEDY, vocabulary=(8, 20), record_logits=True)
    assert out.logits.shape == (2, 6, 12)
    index = torch.cat([condition.index, model.image_index()[None].expand(2, -1)], dim=1)
    key_mask = torch.cat([condition.mask, torch.ones(2, 6, dtype=torch.bool)], dim=1)
    full = model(out.ids + 8, type(condition)(condition.embeds), index=index, key_mask=key_mask)
    torch.testing.assert_close(out.logits, full[:, 2:-1, 8:], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_callback_sees_replaces_and_interrupt_stops():
    model = build()
    condition, _ = conditions(model)
    seen = []

    def callback(step, ids):
        seen.append((step, tuple(ids.shape)))
        return torch.zeros_like(ids) if step == 5 else None

    out = DECODE(model, condition, sampler=GREEDY, callback=callback)
    assert seen == [(step, (2, step + 1)) for step in range(6)]
    assert (out.ids == 0).all()

    forced = torch.full((2, 1), 4)
    out = DECODE(
        model, condition, sampler=GREEDY, record_logits=True, callback=lambda step, ids: forced if step == 0 else None
    )
    assert (out.ids[:, 0] == 4).all()
    torch.testing.assert_close(out.logits, model(out.ids, condition)[:, :-1], atol=1e-4, rtol=1e-4)

    count = iter(range(99))
    stopped = DECODE(model, condition, sampler=GREEDY, interrupt=lambda: next(count) >= 3)
    assert (stopped.steps, stopped.num_calls) == (3, 3)
    plain = DECODE(model, condition, sampler=GREEDY)
    assert torch.equal(stopped.ids[:, :3], plain.ids[:, :3])
    assert (stopped.ids[:, 3:] == 0).all()


@torch.no_grad()
def test_guidance_scale_may_change_between_steps():
    model = build()
    condition, null = conditions(model)
    guidance = Guidance(2.0)

    def callback(step, ids):
        guidance.scale = 5.0

    out = DECODE(model, condition, null, sampler=GREEDY, guidance=guidance, callback=callback, record_logits=True)
    conditional, unconditional = (model(out.ids, part)[:, :-1] for part in (condition, null))
    torch.testing.assert_close(
        out.logits[:, 1:], (unconditional + (conditional - unconditional) * 5.0)[:, 1:], atol=1e-4, rtol=1e-4
    )


def test_strategy_is_a_component_that_saves_and_loads(tmp_path):
    DECODE.save_pretrained(tmp_path)
    assert isinstance(NextTokenDecoding.from_pretrained(tmp_path), NextTokenDecoding)
    assert DECODING_STRATEGIES["next_token"] is NextTokenDecoding


# Text


@torch.no_grad()
@pytest.mark.parametrize("fuse", [False, True])
def test_text_rows_finish_alone_as_in_a_batch(fuse):
    model = build("unified", vocab=20)
    if fuse:
        model.fuse_projections()
    image = torch.randint(8, 20, (3, 6), generator=torch.Generator().manual_seed(0))
    prefix = torch.cat([torch.full((3, 1), 7), image, torch.tensor([[1], [2], [3]])], dim=1)
    out = decode_text(model, prefix, stop_id=0, max_tokens=5, vocabulary=(0, 8), check_every=1)
    assert out.num_calls <= 5
    for row in range(3):
        alone = decode_text(model, prefix[row : row + 1], stop_id=0, max_tokens=5, vocabulary=(0, 8), check_every=1)
        assert alone.tokens()[0] == out.tokens()[row]
    ids = out.ids
    full = model(torch.cat([prefix, ids], dim=1), index=torch.arange(3, 3 + 8 + 5))[:, 7:-1, :8].argmax(-1)
    for row, length in enumerate(out.lengths.tolist()):
        until = min(length + 1, 5)
        assert torch.equal(full[row, :until], ids[row, :until])
        assert (ids[row, length:] == 0).all()


@torch.no_grad()
def test_text_prefixes_of_different_length_are_padded_on_the_left():
    model = build("unified", vocab=20)
    image = torch.randint(8, 20, (1, 6), generator=torch.Generator().manual_seed(3))
    short = torch.cat([torch.full((1, 1), 7), image, torch.tensor([[5]])], dim=1)
    alone = decode_text(model, short, stop_id=0, max_tokens=4, vocabulary=(0, 8))
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), short], dim=1)
    index = torch.cat([torch.zeros(2, dtype=torch.long), torch.arange(3, 11)])[None]
    mask = torch.arange(10)[None] >= 2
    assert torch.equal(
        decode_text(model, padded, stop_id=0, max_tokens=4, index=index, mask=mask, vocabulary=(0, 8)).ids, alone.ids
    )


@torch.no_grad()
def test_text_sampling_is_reproducible():
    model = build("unified", vocab=20)
    prefix = torch.randint(8, 20, (2, 7))
    runs = [
        decode_text(
            model, prefix, stop_id=0, max_tokens=6, sampler=Sampler(), vocabulary=(0, 8),
            noise=[torch.Generator().manual_seed(s) for s in (1, 2)],
        ).ids
        for _ in range(2)
    ]  # fmt: skip
    assert torch.equal(*runs)


# Errors


def test_bad_calls_say_what_is_wrong():
    model = build()
    condition, null = conditions(model)
    ids, mask = torch.zeros(2, 6, dtype=torch.long), torch.ones(2, 6, dtype=torch.bool)

    def bad(message, **options):
        with pytest.raises(ValueError, match=message):
            DECODE(model, options.pop("condition", condition), **options)

    bad("needs a null_condition", guidance=Guidance(2.0))
    bad("null_condition has 1 rows", null_condition=model.null_condition(1), guidance=Guidance(2.0))
    bad("vocabulary must be", vocabulary=(0, 99))
    bad("grid must be two positive", grid=(0, 3))
    bad("belong together", known_ids=ids)
    bad("known_mask must be bool", known_ids=ids, known_mask=ids)
    bad(r"known_ids must be \[2, 6\]", known_ids=ids[:, :3], known_mask=mask)
    bad("known_ids must lie in 0 .. 11", known_ids=ids + 12, known_mask=mask)
    bad("got 1 generators for a batch of 2", noise=[torch.Generator()])
    bad("has 2 tokens, this model expects 1", condition=condition.pad_left(2))

    unified = build("unified", vocab=20)
    with pytest.raises(ValueError, match="max_tokens=99 does not fit"):
        decode_text(unified, torch.zeros(1, 7, dtype=torch.long), stop_id=0, max_tokens=99)
    with pytest.raises(ValueError, match="stop_id must be one of"):
        decode_text(unified, torch.zeros(1, 7, dtype=torch.long), stop_id=9, max_tokens=2, vocabulary=(0, 8))
    with pytest.raises(ValueError, match="at least one token"):
        decode_text(unified, torch.zeros(1, 0, dtype=torch.long), stop_id=0, max_tokens=2)
