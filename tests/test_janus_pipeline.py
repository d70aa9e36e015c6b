"""Janus: drawing and reading with one model, alone and in batches, saved and loaded; what it refuses."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
import torch
from tiny_janus import janus_pipeline, language_model

import armm
from armm.convert import CheckpointKeysError, UnreadableCheckpointError, convert
from armm.decoding import Guidance, NextTokenDecoding, Sampler
from pipelines.images import square_pixels


@pytest.fixture(scope="module")
def pipe():
    return janus_pipeline()


@pytest.fixture(scope="module")
def picture():
    return PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# ---------------------------------------------------------------------- drawing


def test_prompts_of_different_lengths_draw_in_one_batch_what_they_draw_alone(pipe):
    prompts = ["a b c d e f", "a", "red bus"]
    together = pipe(prompts, generator=generators(1, 2, 3), output_type="latent").images
    alone = [pipe(p, generator=generators(n + 1), output_type="latent").images for n, p in enumerate(prompts)]
    assert torch.equal(together, torch.cat(alone))


def test_images_are_of_the_right_size_and_reproducible(pipe):
    first, second = (pipe("red bus", generator=generators(7), output_type="pt").images for _ in range(2))
    assert first.shape == (1, 3, 12, 16) and torch.equal(first, second)
    assert len(pipe("a", num_images_per_prompt=2, generator=generators(1, 2)).images) == 2


def test_drawing_with_the_cache_equals_teacher_forcing(pipe):
    model, (low, high) = pipe.transformer, pipe.transformer.code_range
    condition, null = pipe.drawing_conditions(pipe.drawing_rows(["a b", "c d e"], None))
    output = NextTokenDecoding()(
        model, condition, null, sampler=Sampler(do_sample=False), guidance=Guidance(3.0), vocabulary=(low, high),
        record_logits=True,
    )  # fmt: skip
    forced = [
        NextTokenDecoding().image_logits(model, output.ids + low, part, low=low, high=high)
        for part in (condition, null)
    ]
    assert torch.allclose(output.logits, forced[1] + 3.0 * (forced[0] - forced[1]), atol=1e-4)


def test_guidance_may_end_before_the_image_does(pipe):
    model = pipe.transformer
    condition, null = pipe.drawing_conditions(pipe.drawing_rows(["a b", "c d e"], None))
    guidance = Guidance(3.0, interval=4)
    greedy = {"sampler": Sampler(do_sample=False), "vocabulary": model.code_range}
    ids = NextTokenDecoding()(model, condition, null, guidance=guidance, **greedy).ids
    for row in range(2):
        one = [part.select(slice(row, row + 1)) for part in (condition, null)]
        assert torch.equal(NextTokenDecoding()(model, *one, guidance=guidance, **greedy).ids, ids[row : row + 1])


# ---------------------------------------------------------------------- reading


def test_questions_of_different_lengths_get_in_one_batch_the_answers_they_get_alone(pipe, picture):
    questions = ["what is this?", "a b c d e f g", "red"]
    together = pipe.chat([picture] * 3, questions).texts
    assert together == [pipe.chat(picture, question).texts[0] for question in questions]


def test_sampled_answers_do_not_depend_on_the_batch(pipe, picture):
    options = {"temperature": 1.0, "max_new_tokens": 5}
    together = pipe.chat([picture] * 2, ["a", "b c"], generator=generators(4, 5), **options).texts
    alone = [pipe.chat(picture, q, generator=generators(s), **options).texts[0] for q, s in (("a", 4), ("b c", 5))]
    assert together == alone


def test_a_streamed_answer_is_the_answer(pipe, picture):
    pieces = list(pipe.stream_chat(picture, "what is this?"))
    assert "".join(pieces).strip() == pipe.chat(picture, "what is this?").texts[0]


def test_several_images_stand_where_the_conversation_shows_them(pipe, picture):
    other = picture.rotate(90)
    token = "<image_placeholder>"
    messages = [
        {"role": "user", "content": f"a {token} b"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": f"{token} what"},
    ]
    (reading,) = pipe.readings([picture, other], messages=messages)
    assert len(reading.images) == 2 and reading.grids == [(4, 4), (4, 4)]
    assert all(set(reading.ids[a:b]) == {pipe.special_ids["image"]} for a, b in reading.images)
    (turned,) = pipe.readings([other, picture], messages=messages)
    (first, _), (second, end) = reading.images
    assert torch.allclose(
        reading.condition.embeds[:, second:end], turned.condition.embeds[:, first : first + 16], atol=1e-5
    )
    assert len(pipe.chat([picture, other], "red").texts) == 1


def test_the_unguided_row_keeps_only_the_ends_of_the_prompt(pipe):
    (row,) = pipe.drawing_rows("a b", None)
    _, null = pipe.drawing_conditions([row])
    pad = pipe.transformer.embed(torch.tensor([[pipe.special_ids["pad"]]]))
    assert torch.equal(null.embeds[:, 1:-1], pad.expand(-1, len(row) - 2, -1))
    assert row[0] == pipe.special_ids["bos"] and row[-1] == pipe.special_ids["begin_image"]


def test_pictures_are_made_square_on_their_mean_color():
    wide = np.zeros((10, 33, 3), dtype=np.uint8)
    pixels = square_pixels(wide, 16, (0.5, 0.25, 1.0), (0.5, 0.5, 0.5))
    assert pixels.shape == (1, 3, 16, 16)
    ground = torch.tensor([127, 63, 255]) / 255
    expected = (ground - torch.tensor([0.5, 0.25, 1.0])) / 0.5
    assert torch.allclose(pixels[0, :, 0, 0], expected, atol=1e-6)
    assert int((pixels[0, 0] < -0.9).all(1).sum()) == 4  # int(10 / 33 * 16) rows of the picture


# ---------------------------------------------------------------------- saving


def test_a_saved_pipeline_draws_and_says_the_same(pipe, picture, tmp_path):
    pipe.save_pretrained(tmp_path / "janus")
    loaded = armm.JanusPipeline.from_pretrained(tmp_path / "janus")
    loaded.set_progress_bar_config(disable=True)
    assert loaded.special_ids == pipe.special_ids and loaded.generation_config == pipe.generation_config
    drawn = [p("a b", generator=generators(3), output_type="latent").images for p in (pipe, loaded)]
    assert torch.equal(*drawn)
    assert loaded.chat(picture, "red bus").texts == pipe.chat(picture, "red bus").texts


# ---------------------------------------------------------------------- bad input


def test_requests_that_make_no_sense_are_refused(pipe, picture):
    for arguments, message in (
        ({}, "give either"),
        ({"prompt": ""}, "empty"),
        ({"prompt": "a", "height": 13}, "multiple of 4"),
        ({"prompt_ids": [10**6, 2]}, "ids must lie"),
        ({"prompt": "a", "noise": torch.ones(2)}, "`noise`"),
        ({"prompt": "a " * 300}, "shorten"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(**arguments)
    for arguments, message in (
        ((picture,), "one of `question`"),
        ((picture, " "), "empty"),
        (([picture] * 2, ["a", "b", "c"]), "3 questions for 2 images"),
        (([], ""), "empty"),
        ((picture, "<image_placeholder> <image_placeholder> a"), "mention 2 images, 1 were given"),
        ((picture, "a " * 10_000), "shorten"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe.chat(*arguments)
    with pytest.raises(TypeError, match="PIL image"):
        pipe.chat("photo.png", "a")
    with pytest.raises(ValueError, match="given|mention"):
        pipe.chat(None, "<image_placeholder>")
    with pytest.raises(ValueError, match="at most 200000000"):
        pipe.chat(PIL.Image.new("1", (20_000, 20_000)), "a")


def test_parts_that_do_not_belong_together_are_refused(pipe):
    with pytest.raises(ValueError, match="do not belong together"):
        armm.JanusPipeline(
            pipe.tokenizer, language_model(codes=False), pipe.image_encoder, pipe.decoding, pipe.text_tokenizer
        )
    with pytest.raises(ValueError, match="`special_ids` lacks"):
        armm.JanusPipeline(pipe.tokenizer, pipe.transformer, pipe.image_encoder, pipe.decoding)
    with pytest.raises(ValueError, match="rotary axis"):
        armm.MultimodalModel(10, {"dim": 8, "num_layers": 1, "num_heads": 1})
    with pytest.raises(ValueError, match="places for image tokens"):
        ids = torch.zeros(1, 3, dtype=torch.long)
        pipe.transformer.prompt_condition(ids, None, torch.zeros(1, 2, 16), ids == 0)


def test_folders_that_are_not_janus_are_refused(tmp_path):
    with pytest.raises(UnreadableCheckpointError, match="holds no weights"):
        convert("janus", tmp_path)
    torch.save({"something": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointKeysError, match="lacks"):
        convert("janus", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="not of Janus"):
        convert("janus", tmp_path)
