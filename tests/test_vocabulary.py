"""The grammar of sequences of text and images against a plain state machine; rows with views against the visible tokens alone."""

from __future__ import annotations

import pytest
import tiny_chameleon as tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from armm.decoding.contexts import VIEWS, ContextStream
from armm.decoding.guidance import ContextGuidance
from armm.decoding.interleaved import InterleavedDecoding
from armm.decoding.sampling import Sampler
from armm.decoding.vocabulary import CODE, END, LINE, SIZE, TEXT, TEXT_ONLY, Grammar, ImageBlock

many = settings(max_examples=25, deadline=None)
V = len(tiny.VOCABULARY)
WORD = tiny.VOCABULARY["fox"]


def expected_kinds(block: ImageBlock, ids: list[int]) -> list[int]:
    """What each token of a whole sequence is, by reading it from the left."""
    kinds, place = [], 0
    while place < len(ids):
        kinds.append(TEXT)
        if ids[place] != block.begin:
            place += 1
            continue
        place += 1
        height, width = block.grid or (
            (ids[place] - block.size) * block.cells,
            (ids[place + 1] - block.size) * block.cells,
        )
        line = [] if block.end_of_line is None else [LINE]
        kinds += [SIZE] * block.header + ([CODE] * width + line) * height + [END]
        place += block.header + block.body((height, width))
    return kinds


@st.composite
def sequences(draw):
    """A block and the ids of a text with images."""
    block = tiny.sized_block(draw(st.integers(1, 2))) if draw(st.booleans()) else tiny.fixed_block((2, 3))
    ids = [0]
    for _ in range(draw(st.integers(1, 3))):
        ids += [WORD] * draw(st.integers(0, 3))
        grid = block.grid or tuple(block.cells * draw(st.integers(1, 2)) for _ in range(2))
        codes = torch.tensor(draw(st.lists(st.integers(0, 15), min_size=grid[0] * grid[1], max_size=grid[0] * grid[1])))
        ids += block.write(codes, grid)
    return block, [*ids, WORD, WORD]


@many
@given(made=sequences(), cut=st.integers(1, 200))
def test_kinds_follow_the_sequence(made, cut):
    block, ids = made
    expected = expected_kinds(block, ids)
    grammar = Grammar(block, V)
    cut = min(cut, len(ids) - 1)
    state = grammar.start(torch.tensor([ids[:cut]]))
    for place in range(cut, len(ids)):
        kind = grammar.kinds(state)[0, 0]
        assert int(kind) == expected[place]
        allowed = grammar.mask(torch.zeros(1, V), kind[None])[0] == 0
        assert bool(allowed[ids[place]]), "what the sequence says is allowed"
        assert bool(allowed[4:20].any()) == (expected[place] == CODE), "codes are allowed where codes stand"
        state = grammar.advance(state, torch.tensor([ids[place]]))
    assert not bool(state.open)


@many
@given(made=sequences(), cut=st.integers(1, 200), count=st.integers(1, 6))
def test_a_window_is_what_stepping_gives_within_an_image(made, cut, count):
    block, ids = made
    cut = min(cut, len(ids) - 1)
    grammar = Grammar(block, V)
    state = grammar.start(torch.tensor([ids[:cut]]))
    if block.size is not None and -1 < int(state.since) < 2:
        return  # the size is not known yet
    expected = expected_kinds(block, ids)[cut : cut + count]
    if not bool(state.open):
        expected = expected[:1]
    found = grammar.kinds(state, count)[0].tolist()[: len(expected)]
    stop = expected.index(END) + 1 if END in expected else len(expected)
    assert found[:stop] == expected[:stop]


@many
@given(made=sequences())
def test_images_are_read_as_they_were_written(made):
    block, ids = made
    parts = block.split(ids)
    again = []
    for part in parts:
        again += block.write(*part) if isinstance(part, tuple) else part
    assert again == ids


def test_images_that_are_not_whole_are_left_out():
    block = tiny.sized_block(1)
    image = block.write(torch.arange(4), (2, 2))
    codes, grid = block.split([*image[:-2], image[-1]])[0]  # the last end of line may be missing
    assert codes.tolist() == [0, 1, 2, 3] and grid == (2, 2)
    for broken in (image[:-3], [*image[:4], *image[5:]], [*image[:1], WORD, *image[2:]], image[:2]):
        assert block.split([WORD, *broken]) == [[WORD]]


def test_codes_need_not_follow_each_other():
    block = ImageBlock(begin=2, end=3, codes=((4, 3), (20, 2)), grid=(1, 5))
    ids = block.to_ids(torch.arange(5))
    assert ids.tolist() == [4, 5, 6, 20, 21] and block.to_codes(ids).tolist() == [0, 1, 2, 3, 4]
    assert ImageBlock.from_dict(block.to_dict()) == block
    with pytest.raises(ValueError, match="stand for no image code"):
        block.to_codes(torch.tensor([7]))
    with pytest.raises(ValueError, match="codes must lie in 0 .. 4"):
        block.to_ids(torch.tensor([5]))


def test_no_image_is_begun_that_does_not_fit():
    block = tiny.fixed_block((2, 2))
    grammar = Grammar(block, V)
    state = grammar.start(torch.tensor([[0, WORD]]))
    assert grammar.smallest == 6
    assert int(grammar.kinds(state, remaining=6)) == TEXT and int(grammar.kinds(state, remaining=5)) == TEXT_ONLY
    assert not bool(grammar.table[TEXT_ONLY, block.begin])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"codes": ()}, "codes must be runs"),
        ({"codes": ((4, 3), (6, 2))}, "overlapping"),
        ({"size": 9}, "exactly one of them"),
        ({"grid": None}, "exactly one of them"),
        ({"grid": None, "size": 9}, "max_size"),
    ],
)
def test_bad_blocks_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ImageBlock(**{"begin": 2, "end": 3, "codes": ((4, 3),), "grid": (1, 3), **arguments})


def test_a_block_must_fit_its_vocabulary():
    with pytest.raises(ValueError, match="the vocabulary has 10"):
        Grammar(tiny.sized_block(), 10)
    with pytest.raises(ValueError, match="no entries"):
        ImageBlock.from_dict({**tiny.fixed_block().to_dict(), "rows": 3})
    with pytest.raises(ValueError, match="multiples of 2 codes, at most 16"):
        tiny.sized_block().opening((3, 2))


# ---------------------------------------------------------------------- views


def visible(view: str, block: ImageBlock, ids: list[int], upto: int) -> list[int]:
    """The tokens before `upto` that a view sees, by reading the sequence."""
    begins = [place for place in range(upto) if ids[place] == block.begin]
    if view == "images":
        kinds = expected_kinds(block, ids)
        return [place for place in range(upto) if place == 0 or kinds[place] != TEXT or ids[place] == block.begin]
    seen = list(range(begins[-1], upto))
    return [0, *seen] if view == "start_image" else seen


@torch.no_grad()
@pytest.mark.parametrize("sized", [True, False])
def test_views_equal_the_model_on_the_visible_tokens(sized):
    block = tiny.sized_block(1) if sized else tiny.fixed_block((2, 2))
    made, grammar = tiny.model(), Grammar(block, V)
    torch.manual_seed(0)
    rows = []
    for length in (3, 2):
        first, second = (block.write(torch.randint(16, (4,)), (2, 2)) for _ in range(2))
        rows.append([0, *[WORD] * length, *first, WORD + 1, WORD, *second, WORD + 2])
    pad = len(rows[0]) - len(rows[1])
    ids = torch.tensor([rows[0], [1] * pad + rows[1]])
    mask = torch.tensor([[True] * len(rows[0]), [False] * pad + [True] * len(rows[1])])
    prompt = 9
    stream = ContextStream(made, ids[:, :prompt], ids.shape[1] - prompt, mask[:, :prompt], VIEWS, grammar)
    state = grammar.start(ids[:, :prompt])
    hidden = [stream.prefill()]
    for place in range(prompt, ids.shape[1]):
        before, state = state, grammar.advance(state, ids[:, place])
        hidden.append(stream.feed(ids[:, place], before, state))
    checked = 0
    for step, states in enumerate(hidden):
        for row, own in enumerate(rows):
            upto = prompt + step - (pad if row else 0)
            full = made.hidden(torch.tensor([own[:upto]]))[0, -1]
            torch.testing.assert_close(states[row], full, atol=1e-4, rtol=0)
            if not bool(grammar.start(torch.tensor([own[:upto]])).open):
                continue
            for number, view in enumerate(VIEWS):
                seen = [own[place] for place in visible(view, block, own, upto)]
                alone = made.hidden(torch.tensor([seen]))[0, -1]
                torch.testing.assert_close(states[2 * (1 + number) + row], alone, atol=1e-4, rtol=0)
                checked += 1
    assert checked > 20


@pytest.mark.parametrize(
    "guidance",
    [None, ContextGuidance(3.0), ContextGuidance(0.5), ContextGuidance(2.0, 1.5, "start_image")],
)
def test_a_row_does_not_depend_on_its_batch(guidance):
    made, block = tiny.model(), tiny.sized_block(1)
    grammar, decoding = Grammar(block, V), InterleavedDecoding()
    prompts = [[0, WORD, WORD + 1, *block.opening((2, 2))], [0, WORD, *block.opening((2, 3))], [0, WORD + 3]]
    length = max(map(len, prompts))
    ids = torch.tensor([[1] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[False] * (length - len(prompt)) + [True] * len(prompt) for prompt in prompts])
    options = {
        "max_tokens": 12, "grammar": grammar, "guidance": guidance, "sampler": Sampler(0.8, top_k=9, repetition_penalty=1.3),
        "image_sampler": Sampler(entropy_top_k=(2, 12)),
    }  # fmt: skip
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    together = decoding(made, ids, mask=mask, noise=generators, **options)
    for row, prompt in enumerate(prompts):
        alone = decoding(made, torch.tensor([prompt]), noise=torch.Generator().manual_seed(row), **options)
        assert alone.ids[0].tolist() == together.ids[row].tolist()
    assert together.num_calls == 12
    for row, prompt in enumerate(prompts[:2]):  # whole images, as the grammar wants them
        assert (
            len([part for part in block.split([*prompt, *together.ids[row].tolist()]) if isinstance(part, tuple)]) == 1
        )


def test_a_row_ends_at_its_stop_token():
    made, stop = tiny.model(), WORD + 2
    ids = torch.tensor([[0, WORD], [0, WORD + 1]])
    forced = torch.tensor([[WORD, stop, WORD], [WORD, WORD, WORD]])
    output = InterleavedDecoding()(
        made, ids, max_tokens=4, stop_ids=[stop], forced_ids=forced, sampler=Sampler(do_sample=False), check_every=1
    )
    assert output.tokens()[0] == [WORD, stop] and output.ids[0, 2:].eq(stop).all()
    assert len(output.tokens()[1]) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ids": torch.zeros(1, 0, dtype=torch.long)}, "at least one token"),
        ({"ids": torch.tensor([[V]])}, "ids must lie in"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"max_tokens": 1000}, "does not fit"),
        ({"mask": torch.tensor([[True, False]])}, "padding on the left"),
        ({"guidance": ContextGuidance(2.0)}, "needs a grammar"),
        ({"forced_ids": torch.zeros(3, 1, dtype=torch.long)}, "forced_ids must be"),
    ],
)
def test_bad_requests_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        InterleavedDecoding()(tiny.model(), **{"ids": torch.tensor([[0, WORD]]), "max_tokens": 2, **arguments})
