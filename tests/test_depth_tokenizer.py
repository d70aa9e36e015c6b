"""The depth tokenizer: maps of depth in and out, its ids as words of a language model, the authors' file."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from armm.convert import CheckpointKeysError, CheckpointShapeError, aurora, convert
from tokenizers_visual import Codes, DepthVQTokenizer
from tokenizers_visual.perception import PerceptionTokens, read_boxes, write_box

TINY = {
    "base_channels": 4,
    "num_levels": 2,
    "num_res_blocks": 1,
    "codebook_size": 12,
    "codebook_dim": 6,
    "image_size": 8,
}


@pytest.fixture(scope="module")
def tokenizer() -> DepthVQTokenizer:
    torch.manual_seed(0)
    model = DepthVQTokenizer(**TINY).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


WORDS = PerceptionTokens(12, (2, 2))


# ---------------------------------------------------------------------- depth


def test_depth_of_any_size_is_read_by_nearest_neighbours(tokenizer):
    depth = torch.rand(2, 6, 10, generator=torch.Generator().manual_seed(0))
    codes = tokenizer.read_depth(depth)
    assert codes.ids.shape == (2, 4) and codes.grid == (1, 2, 2)
    rows, columns = torch.arange(8) * 6 // 8, torch.arange(8) * 10 // 8
    square = depth[:, rows][:, :, columns]
    assert torch.equal(tokenizer.encode(2 * square[:, None] - 1).ids, codes.ids)
    bytes_ = (depth * 255).round().to(torch.uint8)
    assert torch.equal(tokenizer.read_depth(bytes_).ids, tokenizer.read_depth(bytes_ / 255).ids)
    drawn = tokenizer.draw_depth(codes)
    assert drawn.shape == (2, 8, 8) and 0 <= drawn.min() and drawn.max() <= 1
    torch.testing.assert_close(drawn, (tokenizer.decode(codes)[:, 0].clamp(-1, 1) + 1) / 2)
    assert torch.equal(tokenizer.draw_depth(Codes(ids=codes.ids)), drawn)
    assert tokenizer.draw_depth(codes, height=5, width=7).shape == (2, 5, 7)


@pytest.mark.parametrize(
    "depth",
    [torch.rand(3, 3), torch.rand(1, 4, 4) * 3, torch.rand(1, 4, 4) - 1, torch.zeros(1, 4, 4, dtype=torch.int64) + 2],
)
def test_depth_that_is_none_is_refused(tokenizer, depth):
    with pytest.raises(ValueError, match="`depth`"):
        tokenizer.read_depth(depth)


def test_impossible_tokenizers_are_refused():
    with pytest.raises(ValueError, match="image_size"):
        DepthVQTokenizer(**{**TINY, "image_size": 10})
    with pytest.raises(ValueError, match="positive"):
        DepthVQTokenizer(**{**TINY, "codebook_size": 0})


# ---------------------------------------------------------------------- words


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.integers(1, 3), st.integers(1, 3), st.integers(0, 40000), st.randoms())
def test_words_and_ids_go_there_and_back(size, height, width, first, source: random.Random):
    words = PerceptionTokens(size, (height, width), first)
    ids = torch.tensor([[source.randrange(size) for _ in range(height * width)] for _ in range(2)])
    codes = Codes(ids=ids, grid=(1, height, width))
    texts = words.write(codes)
    assert texts[0] == "<DEPTH_START>" + "".join(f"<DEPTH_{i}>" for i in ids[0].tolist()) + "<DEPTH_END>"
    around = [f"The depth map is {text}. So the first <DEPTH_2>" for text in texts]
    assert torch.equal(words.read(around).ids, ids) and words.read(texts[0]).grid == (1, height, width)
    model_ids = words.to_ids(codes)
    assert model_ids[0].tolist() == [first, *(i + first + 2 for i in ids[0].tolist()), first + 1]
    answers = torch.cat([torch.full((2, 2), first + size + 9), model_ids, torch.full((2, 1), first + size + 5)], dim=1)
    assert torch.equal(words.from_ids(answers).ids, ids)
    assert [words.words[i - first] for i in model_ids[0].tolist()] == texts[0].replace("><", "> <").split(" ")


def test_published_words_have_their_ids():
    words = PerceptionTokens(128, (10, 10))
    assert (words.begin_id, words.end_id, words.code_ids) == (32000, 32001, range(32002, 32130))
    assert words.count == 100 and len(words.words) == 130 and words.words[2] == "<DEPTH_0>"


@pytest.mark.parametrize(
    "text",
    ["nothing", "<DEPTH_START><DEPTH_1><DEPTH_END>", "<DEPTH_START>" + "<DEPTH_1>" * 3 + "<DEPTH_12><DEPTH_END>"],
)
def test_broken_texts_are_refused(text):
    with pytest.raises(ValueError, match="map"):
        WORDS.read(text)


def test_broken_ids_are_refused():
    for ids in ([[5, 6]], [[32000, 32002, 32001]], [[32000, 7, 8, 9, 10, 32001]], [[32001, 32000, 32002]]):
        with pytest.raises(ValueError, match="map"):
            WORDS.from_ids(torch.tensor(ids))
    with pytest.raises(ValueError, match="4 ids"):
        WORDS.write(Codes(ids=torch.zeros(1, 3, dtype=torch.int64)))
    with pytest.raises(ValueError, match=r"\[0, 11\]"):
        WORDS.write(Codes(ids=torch.full((1, 4), 12)))
    with pytest.raises(ValueError, match="name"):
        PerceptionTokens(3, (1, 1), name="A B")


def allowed_ids(answer: list[int], vocabulary: int) -> set[int]:
    """What may follow, one step of the state machine after the other."""
    begin, end, codes = WORDS.begin_id, WORDS.end_id, set(WORDS.code_ids)
    text = set(range(vocabulary)) - {begin, end} - codes
    left, ended = None, False
    for value in answer:
        if left is not None and left > 0:
            left -= 1
        elif left == 0:
            left, ended = None, True
        elif value == begin:
            left = WORDS.count
    if left is not None:
        return codes if left else {end}
    return text if ended else text | {begin}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 4), st.integers(0, 9), st.integers(1, 3))
def test_grammar_of_an_answer(before, after, rows):
    vocabulary = 32020
    answer = [7] * before + [32000, 32002, 32005, 32003, 32013, 32001, 8, 9, 8, 9][:after]
    found = WORDS.allowed(torch.tensor([answer] * rows, dtype=torch.int64), vocabulary)
    expected = allowed_ids(answer, vocabulary)
    for row in found:
        assert set(row.nonzero().flatten().tolist()) == expected


def test_boxes():
    assert write_box((1, 2, 30, 335)) == "(<PIXEL_1>,<PIXEL_2>,<PIXEL_30>,<PIXEL_335>)"
    text = (
        f"a cup {write_box((1, 2, 3, 4))} and ( <PIXEL_5>, <PIXEL_6>, <PIXEL_7>, <PIXEL_900>) {write_box((0, 0, 9, 9))}"
    )
    assert read_boxes(text) == [(1, 2, 3, 4), (0, 0, 9, 9)]
    for box in ((1, 2, 3), (1, 2, 3, 336), (1, 2, 3, 0.5)):
        with pytest.raises(ValueError, match="`box`"):
            write_box(box)


# ---------------------------------------------------------------------- the authors' file


def authors_state(model: DepthVQTokenizer) -> dict[str, torch.Tensor]:
    rules = aurora.rules_of(model.config.num_levels, model.config.num_res_blocks)
    state = {
        next(found for rule in rules if (found := rule.source_of(name))): value
        for name, value in model.state_dict().items()
    }
    return {**state, "_vq_vae._ema_w": torch.zeros(12, 6), "_vq_vae._ema_cluster_size": torch.zeros(12)}


def test_a_file_of_the_authors_is_read(tokenizer, tmp_path):
    state = authors_state(tokenizer)
    assert state["encoder.0.weight"].shape == (4, 1, 4, 4) and "decoder.7.weight" in state
    torch.save({"weights": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "vae-final.pt")
    loaded = convert(
        "aurora", tmp_path / "vae-final.pt", config={"image_size": 8, "num_tokens": 12, "downsample_ratio": 4}
    )
    assert all(torch.equal(value, tokenizer.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert loaded.words.count == 4 and convert("aurora", tmp_path / "vae-final.pt").words.grid == (80, 80)


def test_files_that_do_not_fit_are_refused(tokenizer):
    state = authors_state(tokenizer)
    for config, words in (
        ({"hidden_dim": 8}, "base_channels"),
        ({"use_norm": True}, "use_norm"),
        ({"color": 1}, "color"),
    ):
        with pytest.raises((ValueError, CheckpointShapeError), match=words):
            aurora.convert_state_dict(state, config=config)
    with pytest.raises(CheckpointKeysError, match=r"decoder\.0\.bias"):
        aurora.convert_state_dict({name: value for name, value in state.items() if name != "decoder.0.bias"})
    with pytest.raises(CheckpointKeysError, match="_embedding"):
        aurora.convert_state_dict({"encoder.0.weight": torch.zeros(1)})
