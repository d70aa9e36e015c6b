"""Ming-UniVision: drawing, editing, reading and conversing with one model, alone and in batches, saved and loaded."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
import torch
from tiny_ming import image_tokenizer, language_model, ming_pipeline

import armm
from armm.convert import CheckpointKeysError, UnreadableCheckpointError, convert
from armm.decoding.guidance import ContextGuidance
from armm.decoding.next_latent import NextLatentDecoding, flow_sample
from armm.decoding.solvers.flow import FlowSolver
from pipelines.ming_prompts import MingPrompt, crop_square, squash


@pytest.fixture(scope="module")
def pipe():
    return ming_pipeline()


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
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_edits_in_one_batch_are_what_they_are_alone(pipe, picture):
    images, prompts = [picture, picture.rotate(90)], ["a b c", "red"]
    together = pipe(prompts, images, generator=generators(1, 2), output_type="latent").images
    alone = [
        pipe(p, i, generator=generators(n + 1), output_type="latent").images
        for n, (p, i) in enumerate(zip(prompts, images, strict=True))
    ]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)
    one = pipe(prompts[0], images[1], generator=generators(1), output_type="latent").images
    assert not torch.allclose(one, together[:1], atol=1e-3)  # the image matters


def test_images_are_of_the_right_size_and_reproducible(pipe):
    first, second = (pipe("red bus", generator=generators(7), output_type="pt").images for _ in range(2))
    assert first.shape == (1, 3, 8, 8) and torch.equal(first, second)
    assert len(pipe("a", num_images_per_prompt=2, generator=generators(1, 2)).images) == 2
    assert pipe("a", height=12, width=8, generator=generators(1), output_type="np").images.shape == (1, 12, 8, 3)
    codes = pipe("a", generator=generators(1), output_codes=True).codes
    assert codes.grid == (1, 2, 2) and codes.latents.shape == (1, 4, 4)


@torch.no_grad()
def test_drawing_with_the_cache_equals_the_whole_sequence_at_once(pipe):
    model, noise = pipe.transformer, torch.randn(4, 2, 1, 4)
    condition = pipe.conditions([pipe.prompt(["a b"], draw=True), pipe.prompt(["c d e"], draw=True)], draw=True)
    settings = pipe.check_settings()
    output = pipe.draw(condition, [], (2, 2), settings, noise=list(noise), next_word=True)
    assert (output.num_calls, output.head_calls, output.steps) == (1 + 4 + 1, 4 * 3, 4)
    length = condition.length
    whole = condition.extend(
        model.embed_features(pipe.tokenizer.read(output.latents)), torch.arange(length, length + 4)
    )
    whole.index = (whole.mask.cumsum(1) - 1).clamp(min=0)
    hidden = model.hidden(whole)
    for step in range(4):
        place = length - 1 + step
        drawn = flow_sample(
            model.latent_head, model.latent_condition(hidden[:, place : place + 1]), noise[step], FlowSolver(), 3
        )
        torch.testing.assert_close(drawn[:, 0], output.latents[:, step], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output.logits, model.logits(hidden[:, -1]), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_rows_that_see_everything_guide_nowhere(pipe):
    condition = pipe.conditions([pipe.prompt(["a b c"], draw=True)], draw=True)
    noise, settings = list(torch.randn(4, 1, 1, 4)), pipe.check_settings()
    plain = pipe.draw(condition, [], (2, 2), settings, noise=noise).latents
    everything = torch.ones(1, condition.length, dtype=torch.bool)
    for guidance in (ContextGuidance(3.0), ContextGuidance(3.0, 1.5), ContextGuidance(2.0, shorten=True)):
        views = [everything] * len(guidance.views)
        found = pipe.draw(condition, views, (2, 2), settings, guidance=guidance, noise=noise).latents
        torch.testing.assert_close(found, plain, atol=1e-4, rtol=1e-4)
    hidden = everything.clone()
    hidden[:, 3:5] = False
    guided = pipe.draw(condition, [hidden], (2, 2), settings, guidance=ContextGuidance(3.0), noise=noise).latents
    assert not torch.allclose(guided, plain, atol=1e-3)


def test_shortened_results_are_no_longer_than_the_full_row():
    rows = torch.randn(3, 5, 4)
    for guidance, full in (
        (ContextGuidance(4.0, 1.5, shorten=True), rows),
        (ContextGuidance(4.0, shorten=True), rows[:2]),
    ):
        combined, plain = guidance.combine(full), ContextGuidance(4.0, guidance.image_scale).combine(full)
        lengths, limit = combined.norm(dim=-1), full[0].norm(dim=-1)
        assert (lengths <= limit * (1 + 1e-5)).all()
        torch.testing.assert_close(lengths, torch.minimum(plain.norm(dim=-1), limit), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shift", [0.5, 2.0, 3.0])
def test_shifted_times_are_the_usual_ones_bent(shift):
    times = FlowSolver(shift=shift).times(7)
    u = torch.linspace(0, 1, 8, dtype=torch.float64)
    torch.testing.assert_close(times, 1 - u / (u + shift - shift * u))
    assert times[0] == 1 and times[-1] == 0 and (times.diff() < 0).all()
    with pytest.raises(ValueError, match="shift="):
        FlowSolver("euler", "dense_end", shift=2.0)
    with pytest.raises(ValueError, match="shift must be"):
        FlowSolver(shift=0.0)


def test_callbacks_replace_latents_change_guidance_and_end_the_call(pipe):
    seen = []

    def step_end(pipe, step, timestep, tensors):
        seen.append(tuple(tensors["latents"].shape))
        pipe._guidance_scale = 5.0
        if step == 2:
            pipe._interrupt = True
        return {"latents": torch.zeros_like(tensors["latents"])}

    latents = pipe("a b", generator=generators(1), output_type="latent", callback_on_step_end=step_end).images
    assert seen == [(1, 1, 4), (1, 2, 4), (1, 3, 4)] and not latents.any() and pipe.guidance_scale == 5.0
    assert pipe.num_timesteps == 4


# ---------------------------------------------------------------------- prompts


def test_guidance_hides_the_last_request_and_keeps_its_images(pipe, picture):
    prompt = pipe.prompt(["a b", [picture, "c"], [picture, "d e"]], draw=True)
    special = pipe.special_ids
    place = [special["image"]] * 4
    words = pipe.text_tokenizer.encode
    user, model = words("<role>HUMAN</role>"), words("<role>ASSISTANT</role>")
    block = [special["begin_image"], *place, special["end_image"]]
    expected = [
        *user,
        *words("a b"),
        *model,
        *block,
        *words("c"),
        *user,
        *block,
        *words("d e"),
        *model,
        special["begin_image"],
    ]
    assert prompt.ids == expected and len(prompt.images) == 2
    low, high = prompt.request
    assert prompt.ids[low:high] == [*block, *words("d e")]
    null, images = pipe.views([prompt], ContextGuidance(3.0))[0], pipe.views([prompt], ContextGuidance(3.0, 1.1))[0]
    assert null[0].tolist() == [not low <= n < high for n in range(len(expected))]
    assert images[0].tolist() == [not low + 6 <= n < high for n in range(len(expected))]
    assert MingPrompt([1, 2, 3], request=(1, 2)).seen() == [True, False, True]
    # only an image in the last request brings a row of its own
    settings = pipe.check_settings()
    pipe._guidance_scale = 3.0
    assert pipe.guidance_of([prompt], settings).image_scale == 1.1
    assert pipe.guidance_of([pipe.prompt([[picture, "a"], "b", "c"], draw=True)], settings).image_scale is None


def test_pictures_are_cropped_to_be_edited_and_squashed_to_be_read(pipe, picture):
    assert crop_square(picture, 8).size == (8, 8) and squash(picture, 16).size == (16, 16)
    assert crop_square(picture.resize((9, 8)), 8).size == (8, 8)
    assert pipe.preprocess(picture, draw=True).shape == (1, 3, 8, 8) and pipe.preprocess(picture).shape == (
        1,
        3,
        16,
        16,
    )
    square = PIL.Image.new("RGB", (8, 8), (255, 0, 128))
    assert torch.allclose(
        pipe.preprocess(square, draw=True)[0, :, 0, 0], torch.tensor([1.0, -1.0, 128 / 127.5 - 1]), atol=1e-6
    )


# ---------------------------------------------------------------------- reading and conversing


def test_questions_of_different_lengths_get_in_one_batch_the_answers_they_get_alone(pipe, picture):
    questions = ["what is this?", "a b c d e f g", "red"]
    together = pipe.chat([picture] * 3, questions).texts
    assert together == [pipe.chat(picture, question).texts[0] for question in questions]
    assert pipe.ask(picture, "red").texts == [together[2]]


def test_a_streamed_answer_is_the_answer(pipe, picture):
    pieces = list(pipe.stream_chat(picture, "what is this?"))
    assert "".join(pieces).strip() == pipe.chat(picture, "what is this?").texts[0]
    messages = [{"content": [picture, "a"]}, {"content": "b"}, {"content": "c"}]
    assert isinstance(pipe.chat(messages=messages).texts[0], str)


def test_answers_may_hold_images_that_are_drawn_where_the_model_begins_them(pipe, monkeypatch):
    begin, said = pipe.special("begin_image"), []
    logits = pipe.transformer.logits

    def first_an_image(hidden, *, low=0, high=None):
        out = logits(hidden, low=low, high=high)
        said.append(len(said))
        if len(said) in (2, 4):  # a word, an image, a word, an image
            out[..., begin - low] = out.max() + 1
        return out

    monkeypatch.setattr(pipe.transformer, "logits", first_an_image)
    answer = pipe.converse(["a b"], generator=generators(1)[0], max_images=2)
    (images,) = answer.images
    assert [image.size for image in images] == [(8, 8)] * 2 and len(said) == 4
    monkeypatch.undo()
    assert pipe.converse(["a b"], max_new_tokens=3).contents[0]


def test_a_conversation_goes_on_behind_an_image_as_if_it_had_been_read_at_once(pipe):
    """What `converse` relies on: a condition extended by an image that was drawn is the cache it was drawn with."""
    condition = pipe.conditions([pipe.prompt(["a b"], draw=True)], draw=True)
    output = pipe.draw(
        condition, [], (2, 2), pipe.check_settings(), noise=list(torch.randn(4, 1, 1, 4)), next_word=True
    )
    with torch.no_grad():
        extended = pipe._extend(condition, pipe.transformer.embed_features(output.features))
        logits = pipe.transformer.logits(pipe.transformer.hidden(extended)[:, -1])
    torch.testing.assert_close(logits, output.logits, atol=1e-4, rtol=1e-4)


def test_answers_are_explained(pipe, picture):
    explanation = pipe.explain(picture, "what is this?", max_new_tokens=2)
    assert pipe.seen(picture).size == (16, 16) and len(explanation.words) <= 2
    assert pipe.attention_balance(picture, "red", max_new_tokens=2) is not None


def test_offloading_leaves_the_tokenizer_where_it_is_asked_after_every_token(pipe):
    assert "tokenizer" not in pipe.model_cpu_offload_seq and "tokenizer" in pipe._exclude_from_cpu_offload


# ---------------------------------------------------------------------- saved, loaded, refused


def test_pipelines_are_saved_and_loaded(pipe, picture, tmp_path):
    pipe.save_pretrained(tmp_path / "ming")
    again = armm.pipeline(tmp_path / "ming")
    again.set_progress_bar_config(disable=True)
    assert isinstance(again, armm.MingUniVisionPipeline) and again.special_ids == pipe.special_ids
    assert again.generation_config == pipe.generation_config and again.config.reading_size == 16
    drawn = [p("a b", picture, generator=generators(3), output_type="latent").images for p in (pipe, again)]
    torch.testing.assert_close(*drawn, atol=5e-4, rtol=1e-3)  # the loaded one is fused
    assert again.chat(picture, "what is this?").texts == pipe.chat(picture, "what is this?").texts


def test_bad_requests_are_named(pipe, picture):
    for call, match in (
        (lambda: pipe(), "either `prompt` or `messages`"),
        (lambda: pipe("  "), "`prompt` is empty"),
        (lambda: pipe(["a", "b", "c"], [picture] * 2), "2 images for 3 prompts"),
        (lambda: pipe("a", height=9), "multiple of 4"),
        (lambda: pipe("a", num_inference_steps=0), "`num_inference_steps` must be at least 1"),
        (lambda: pipe("a", temperature=-1.0), "`temperature`"),
        (lambda: pipe("a", generator=generators(1, 2)), "2 generators"),
        (lambda: pipe(messages=["a", "b"]), "must end with what the user says"),
        (lambda: pipe(messages=["a"], image=picture), "leave `image` out"),
        (lambda: pipe.chat(picture), "give either `question`"),
        (lambda: pipe.chat(messages=["a <|image|>"]), "mentions 1 images"),
        (lambda: pipe("a", noise=[torch.zeros(1, 1, 3)]), "the next recorded noise must be"),
        (lambda: pipe.prompt_condition(MingPrompt([10_000])), "ids must lie in"),
        (lambda: pipe.prompt_condition(MingPrompt([1] * 256)), "takes less than 256"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    with pytest.raises(TypeError, match="`prompt` must be a string"):
        pipe(3)
    with pytest.raises(ValueError, match="supports no acceleration"):
        pipe.enable_acceleration(armm.TokenPruning())


def test_bad_calls_of_the_strategy_are_named(pipe):
    condition = pipe.conditions([pipe.prompt(["a b"], draw=True)], draw=True)
    decoding, model = NextLatentDecoding(), pipe.transformer
    seen = torch.ones(1, condition.length, dtype=torch.bool)
    blind = seen.clone()
    blind[:, -1] = False
    for options, views, match in (
        ({}, [], "guidance needs 1 views"),
        ({}, [seen[:, 1:]], "guidance needs 1 views"),
        ({}, [blind], "must see the last token"),
        ({"num_tokens": 300}, [seen], "does not fit behind a prompt"),
        ({"temperature": float("inf")}, [seen], "temperature must be"),
        ({"num_steps": 0}, [seen], "num_steps must be"),
    ):
        with pytest.raises(ValueError, match=match):
            decoding(
                model, condition, views, **{"num_tokens": 4, "read": None, "guidance": ContextGuidance(2.0), **options}
            )
    with pytest.raises(ValueError, match="no head for latents"):
        decoding(language_model(24, latents=False), condition, num_tokens=4, read=None)


def test_parts_that_do_not_belong_together_are_refused(pipe):
    with pytest.raises(ValueError, match="do not belong together"):
        armm.MingUniVisionPipeline(image_tokenizer(latent_channels=8), pipe.transformer, pipe.decoding)
    with pytest.raises(ValueError, match="draws no latents"):
        armm.MingUniVisionPipeline(pipe.tokenizer, language_model(24, latents=False), pipe.decoding)
    with pytest.raises(ValueError, match="`reading_size` must be a multiple"):
        armm.MingUniVisionPipeline(pipe.tokenizer, pipe.transformer, pipe.decoding, reading_size=9)
    bare = armm.MingUniVisionPipeline(pipe.tokenizer, pipe.transformer, pipe.decoding)
    with pytest.raises(ValueError, match="no `text_tokenizer`"):
        bare("a")
    with pytest.raises(ValueError, match="does not know the id of 'eos'"):
        bare.stop_id  # noqa: B018


def test_folders_that_are_no_ming_univision_are_refused(tmp_path):
    with pytest.raises(UnreadableCheckpointError, match="holds no weights"):
        convert("ming_univision", tmp_path)
    torch.save({"something": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointKeysError, match="lacks vision"):
        convert("ming_univision", tmp_path)
    with pytest.raises(ValueError, match="unknown `config` options heads"):
        convert("ming_univision", tmp_path, config={"heads": 3})
