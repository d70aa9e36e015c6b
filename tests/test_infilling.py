"""Causally masked infilling: the layout of holes, its training rows, and cached filling against teacher forcing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from armm.decoding.guidance import Guidance
from armm.decoding.infilling import fill_image, hole_layout
from armm.decoding.sampling import Sampler
from armm.model import AutoregressiveModel
from armm.training.tasks.unified_infilling import IGNORED, caption_with_hole, holed_images, holed_loss, random_holes

few = settings(max_examples=15, deadline=None)
WORDS, CODES, HOLES, PAD = 8, 12, (5, 6, 7), 0


def build(grid=(3, 4), slots=3) -> AutoregressiveModel:
    torch.manual_seed(0)
    trunk = {"dim": 16, "num_layers": 2, "num_heads": 2, "mlp_hidden": 24, "rotary_axes": [2, 2, 4]}
    trunk["learned_positions"] = slots + 1 + grid[0] * grid[1] + 4
    model = AutoregressiveModel(
        WORDS + CODES, trunk, None, grid, text_slots=slots, answer_slots=4, bidirectional_prompt=True
    ).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.35)
    return model


masks = st.lists(st.booleans(), min_size=1, max_size=14).filter(any)


@few
@given(mask=masks)
def test_moving_the_holes_back_restores_the_image(mask):
    row = torch.tensor([mask])
    codes = torch.arange(len(mask))[None] + 100
    layout = hole_layout(row, len(mask))
    tokens = layout.tokens(codes, torch.arange(len(mask)), PAD)[0].tolist()
    start = int(layout.starts[0])
    seen, written = tokens[:start], tokens[start:]
    holes: dict[int, list[int]] = {}
    for token in written:
        if token < 100:
            holes[token] = []
            current = token
        else:
            holes[current].append(token)
    restored = [part for token in seen for part in (holes[token] if token < 100 else [token])]
    assert restored == codes[0].tolist()
    assert list(holes) == list(range(len(holes))) and layout.num_calls == len(written) - 1
    cells = layout.cells[0].tolist()
    assert all(cell == token - 100 for cell, token in zip(cells, tokens, strict=True) if token >= 100)


@few
@given(count=st.integers(1, 4), height=st.integers(1, 5), width=st.integers(1, 5), limit=st.integers(1, 4), seed=st.integers(0, 99))
def test_random_holes_are_never_too_many(count, height, width, limit, seed):
    holes = random_holes(count, (height, width), limit, torch.Generator().manual_seed(seed))
    assert holes.shape == (count, height * width) and holes.any(1).all()
    assert len(hole_layout(holes, limit).cells) == count


@few
@given(length=st.integers(1, 6), seed=st.integers(0, 99))
def test_a_caption_with_a_hole_holds_all_its_words(length, seed):
    captions = torch.full((1, 6), PAD)
    captions[0, :length] = torch.arange(10, 10 + length)
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = caption_with_hole(captions, torch.tensor([length]), 5, 9, PAD, generator)
    text = [token for token in tokens[0].tolist() if token != PAD]
    first, end = text.index(5), text.index(9)
    hidden = text[end + 2 : -1]
    assert text[end + 1] == 5 and text[-1] == 9
    assert text[:first] + hidden + text[first + 1 : end] == list(range(10, 10 + length))
    assert [t for t in targets[0].tolist() if t != IGNORED] == [token for token in text if token != 5]


@torch.no_grad()
@few
@given(seed=st.integers(0, 999), guided=st.booleans())
def test_cached_filling_equals_teacher_forcing(seed, guided):
    model, generator = build(), torch.Generator().manual_seed(seed)
    codes = torch.randint(CODES, (2, 12), generator=generator)
    mask = random_holes(2, (3, 4), len(HOLES), generator)
    prompts = torch.randint(1, 4, (2, 4), generator=generator)
    condition = model.prefix_condition(prompts)
    null = model.prefix_condition(torch.zeros_like(prompts))
    seen: list[torch.Tensor] = []

    class Watching(Sampler):
        def __call__(self, logits, noise=None):
            seen.append(logits)
            return logits.argmax(-1)

    options = {"sentinel_ids": HOLES, "pad_id": PAD, "vocabulary": (WORDS, WORDS + CODES), "sampler": Watching(do_sample=False)}
    guidance = Guidance(1.6) if guided else None
    out = fill_image(model, condition, codes, mask, null, guidance=guidance, **options)
    assert torch.equal(out.ids[~mask], codes[~mask])
    layout = hole_layout(mask, len(HOLES))
    tokens = layout.tokens(out.ids + WORDS, torch.tensor(HOLES), PAD)

    def forced(part):
        embeds = torch.cat([part.embeds, model.embed(tokens)], dim=1)
        index = torch.cat([part.index, model.prefix_slots + layout.cells], dim=1)
        causal = torch.ones(embeds.shape[1], embeds.shape[1], dtype=torch.bool).tril()
        causal[:, : part.length] = True
        hidden = model.trunk(embeds, positions=model.positions_for(index), mask=causal)
        return model.logits(hidden[:, part.length :], low=WORDS)

    expected = forced(condition)
    if guided:
        expected = forced(null) + (expected - forced(null)) * 1.6
    for row in range(2):
        start, length = int(layout.starts[row]), int(layout.lengths[row])
        for step, place in enumerate(range(start, length - 1)):
            torch.testing.assert_close(seen[step][row], expected[row, place], atol=1e-4, rtol=1e-4)
            if int(layout.sentinels[row, place + 1]) < 0:
                assert int(out.ids[row, layout.cells[row, place + 1]]) == int(expected[row, place].argmax())


def test_the_loss_of_holed_rows_trains_codes_only():
    model, generator = build(), torch.Generator().manual_seed(0)
    codes = torch.randint(CODES, (3, 12), generator=generator)
    batch = holed_images(codes, (3, 4), HOLES, WORDS, PAD, generator)
    assert batch["holed"].shape == (3, 12 + 2 * len(HOLES))
    loss = holed_loss(model, torch.ones(3, 4, dtype=torch.long), batch, WORDS)
    loss.backward()
    assert torch.isfinite(loss) and (batch["holed_targets"] != IGNORED).sum() == 36


@pytest.mark.parametrize(
    ("mask", "message"),
    [([False] * 4, "has 0 holes"), ([True, False] * 4, "has 4 holes")],
)
def test_masks_with_no_or_too_many_holes_are_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        hole_layout(torch.tensor([mask]), 3)


def test_shapes_that_do_not_fit_are_refused():
    model = build()
    condition = model.prefix_condition(torch.ones(2, 4, dtype=torch.long))
    options = {"sentinel_ids": HOLES, "pad_id": PAD, "vocabulary": (WORDS, WORDS + CODES)}
    with pytest.raises(ValueError, match="codes and mask"):
        fill_image(model, condition, torch.zeros(2, 12, dtype=torch.long), torch.ones(2, 11, dtype=torch.bool), **options)
    with pytest.raises(ValueError, match="null_condition"):
        fill_image(
            model, condition, torch.zeros(2, 12, dtype=torch.long), torch.ones(2, 12, dtype=torch.bool), guidance=Guidance(2.0), **options
        )
