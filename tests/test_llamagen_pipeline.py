"""`LlamaGenPipeline`: requests, randomness, callbacks, outputs, and errors for what it cannot do."""

from __future__ import annotations

import inspect

import numpy as np
import PIL.Image
import pytest
import torch
from tiny_llamagen import class_pipeline, text_encoder, text_pipeline

from pipelines.captions import clean_caption
from pipelines.imagenet import class_index
from pipelines.llamagen import LlamaGenPipeline
from pipelines.t5 import align_right
from tokenizers_visual import Codes

CLASSES = [1, 7, 4]


@pytest.fixture(scope="module")
def pipe():
    return class_pipeline()


@pytest.fixture(scope="module")
def text_pipe():
    return text_pipeline(**text_encoder())


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens(pipe, labels=CLASSES, **arguments) -> torch.Tensor:
    return pipe(labels, output_type="latent", **{"generator": generator(), **arguments}).images


# ---------------------------------------------------------------------- randomness


def test_the_same_seed_gives_the_same_tokens(pipe):
    assert torch.equal(tokens(pipe), tokens(pipe))
    assert not torch.equal(tokens(pipe), tokens(pipe, generator=generator(1)))


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_an_image_does_not_depend_on_its_batch(pipe, guidance_scale):
    together = tokens(pipe, generator=[generator(i) for i in range(3)], guidance_scale=guidance_scale)
    for i, label in enumerate(CLASSES):
        alone = tokens(pipe, label, generator=[generator(i)], guidance_scale=guidance_scale)
        assert torch.equal(together[i : i + 1], alone)
        assert torch.equal(alone, tokens(pipe, label, generator=generator(i), guidance_scale=guidance_scale))


def test_one_and_two_threads_agree(pipe):
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            results.append(tokens(pipe))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_recorded_noise_replaces_the_generator(pipe):
    noise = torch.empty(3, 16, 48).exponential_(generator=generator(9))
    assert torch.equal(tokens(pipe, noise=noise), tokens(pipe, noise=noise, generator=generator(1)))
    greedy = tokens(pipe, do_sample=False)
    assert torch.equal(greedy, tokens(pipe, top_k=1)) and not torch.equal(greedy, tokens(pipe, noise=noise))
    assert torch.equal(greedy, tokens(pipe, temperature=0.0))


def test_settings_come_from_the_checkpoint_and_are_overridden():
    pipe = class_pipeline(top_k=1)
    assert torch.equal(tokens(pipe), tokens(pipe, do_sample=False))
    assert not torch.equal(tokens(pipe), tokens(pipe, top_k=0))
    assert not torch.equal(tokens(pipe), tokens(pipe, guidance_scale=1.0))
    assert torch.equal(tokens(pipe, guidance_scale=1.0), tokens(pipe, guidance_scale=0.0))


def test_the_guidance_interval_limits_guidance(pipe):
    guided, plain = tokens(pipe), tokens(pipe, guidance_scale=1.0)
    assert torch.equal(tokens(pipe, guidance_interval=100), guided)
    assert torch.equal(tokens(pipe, guidance_interval=-1), guided)
    limited = tokens(pipe, guidance_interval=3)
    assert torch.equal(limited[:, :5], guided[:, :5])  # the first token and decode steps 0 to 3
    assert not torch.equal(limited, plain)


# ---------------------------------------------------------------------- outputs


def test_output_types(pipe):
    images = pipe(CLASSES, generator=generator()).images
    assert len(images) == 3 and all(isinstance(image, PIL.Image.Image) and image.size == (16, 16) for image in images)
    array = pipe(CLASSES, generator=generator(), output_type="np").images
    assert array.shape == (3, 16, 16, 3) and array.dtype == np.float32 and 0 <= array.min() <= array.max() <= 1
    tensor = pipe(CLASSES, generator=generator(), output_type="pt").images
    assert tensor.shape == (3, 3, 16, 16) and np.allclose(tensor.permute(0, 2, 3, 1).numpy(), array, atol=1e-6)
    assert np.abs(np.asarray(images[0], np.float32) / 255 - array[0]).max() <= 0.5 / 255 + 1e-6
    ids = tokens(pipe)
    assert ids.shape == (3, 16) and ids.dtype == torch.int64
    with torch.no_grad():
        decoded = pipe.decode_codes_to_images(Codes(ids=ids, grid=(1, 4, 4)), "pt")
    assert torch.equal(decoded, tensor)


def test_tuples_and_codes(pipe):
    (images,) = pipe(3, generator=generator(), return_dict=False, output_type="pt")
    output = pipe(3, generator=generator(), output_type="pt", output_codes=True)
    assert torch.equal(images, output.images) and output.codes.grid == (1, 4, 4)
    assert torch.equal(output.codes.ids, tokens(pipe, 3))
    assert "codes" not in pipe(3, output_type="pt")
    assert len(pipe(3, return_dict=False, output_codes=True)) == 2


def test_images_per_prompt_are_neighbours(pipe):
    ids = tokens(pipe, [1, 7], num_images_per_prompt=2, generator=[generator(i) for i in (0, 1, 2, 3)])
    assert ids.shape == (4, 16)
    assert torch.equal(ids[1:2], tokens(pipe, 1, generator=generator(1)))
    assert torch.equal(ids[2:3], tokens(pipe, 7, generator=generator(2)))


def test_other_sizes_are_generated_with_a_warning(pipe, caplog):
    images = pipe(3, height=8, width=24, generator=generator(), output_type="pt", output_codes=True)
    assert images.images.shape == (1, 3, 8, 24) and images.codes.grid == (1, 2, 6)
    assert "trained on 4x4 tokens" in caplog.text


def test_known_tokens_are_kept(pipe):
    known = torch.full((3, 16), -1)
    known[:, ::2] = torch.arange(8) + 10
    ids = tokens(pipe, latents=known)
    assert torch.equal(ids[:, ::2], known[:, ::2]) and not torch.equal(ids, tokens(pipe))
    full = tokens(pipe)
    assert torch.equal(tokens(pipe, latents=full, generator=generator(5)), full)


# ---------------------------------------------------------------------- callbacks


def test_callbacks_see_every_step_and_replace_tokens(pipe):
    seen = []

    def callback(pipeline, step, timestep, tensors):
        seen.append((step, timestep, tuple(tensors["latents"].shape)))
        if step == pipeline.num_timesteps - 1:
            return {"latents": torch.zeros_like(tensors["latents"])}
        return {}

    ids = tokens(pipe, callback_on_step_end=callback)
    assert seen == [(i, i, (3, i + 1)) for i in range(16)] and not ids.any()


def test_a_replaced_token_changes_what_follows(pipe):
    def callback(pipeline, step, timestep, tensors):
        return {"latents": torch.full_like(tensors["latents"], 5)} if step == 2 else tensors

    ids = tokens(pipe, callback_on_step_end=callback)
    assert (ids[:, :3] == 5).all() and not torch.equal(ids[:, 3:], tokens(pipe)[:, 3:])


def test_callbacks_change_the_guidance_and_interrupt(pipe):
    def raise_guidance(pipeline, step, timestep, tensors):
        assert tensors == {}
        pipeline._guidance_scale += 1.0

    raised = tokens(pipe, callback_on_step_end=raise_guidance, callback_on_step_end_tensor_inputs=[])
    assert pipe.guidance_scale == 2.0 + pipe.num_timesteps and not torch.equal(raised, tokens(pipe))

    def stop(pipeline, step, timestep, tensors):
        pipeline._interrupt = step == 4
        return tensors

    stopped = tokens(pipe, callback_on_step_end=stop)
    assert torch.equal(stopped[:, :5], tokens(pipe)[:, :5]) and not stopped[:, 5:].any()
    assert pipe.guidance_scale == 2.0 and not pipe.interrupt


# ---------------------------------------------------------------------- classes and texts


def test_classes_come_as_numbers_tensors_and_names(pipe):
    expected = tokens(pipe, [3])
    for labels in (3, np.int64(3), torch.tensor([3]), torch.tensor(3), (3,), np.array([3])):
        assert torch.equal(tokens(pipe, labels), expected)
    assert class_index("Golden Retriever") == 207 and class_index("red fox") == 277 and class_index("n01440764") == 0
    with pytest.raises(ValueError, match="Did you mean 'golden retriever'"):
        class_index("golden retreiver")
    with pytest.raises(ValueError, match=r"name of 2 ImageNet classes.*\[134, 517\]"):
        class_index("crane")


def test_prompts_and_their_embeddings_agree(text_pipe):
    prompts = ["A red  cube", "a green sphere on the left of a large blue cube"]
    expected = text_pipe(prompt=prompts, generator=generator(), output_type="latent").images
    embeds, mask = text_pipe.encode_prompt(prompts)
    assert embeds.shape == (2, 8, 24) and mask.tolist() == [[0] * 4 + [1] * 4, [1] * 8]
    assert not embeds[0, :4].any()
    given = text_pipe(prompt_embeds=embeds, prompt_attention_mask=mask, generator=generator(), output_type="latent")
    assert torch.equal(given.images, expected)
    # without the padding, and with the padding on the other side: the same condition
    real, ones = embeds[:1, 4:], mask[:1, 4:]
    right = torch.cat([real, torch.ones_like(real)], dim=1), torch.cat([ones, torch.zeros_like(ones)], dim=1)
    results = [
        text_pipe(prompt_embeds=e, prompt_attention_mask=m, generator=generator(), output_type="latent").images
        for e, m in ((embeds[:1], mask[:1]), (real, ones), right)
    ]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_a_prompt_alone_equals_the_prompt_in_a_batch(text_pipe):
    prompts = ["a red cube", "a small blue sphere"]
    together = text_pipe(prompt=prompts, generator=[generator(0), generator(1)], output_type="latent").images
    for i, prompt in enumerate(prompts):
        alone = text_pipe(prompt=prompt, generator=generator(i), output_type="latent").images
        assert torch.equal(together[i : i + 1], alone)


def test_features_are_aligned_to_the_right():
    features = torch.arange(1.0, 7.0).view(2, 3, 1)
    aligned, mask = align_right(features, torch.tensor([[1, 1, 0], [1, 0, 0]]), 4)
    assert aligned.squeeze(2).tolist() == [[0, 0, 1, 2], [0, 0, 0, 4]] and mask.tolist() == [[0, 0, 1, 1], [0, 0, 0, 1]]
    again, mask_again = align_right(aligned, mask, 4)
    assert torch.equal(again, aligned) and torch.equal(mask_again, mask)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("A Photo of a CAT", "a photo of a cat"),
        ("a cat <b>on</b> a mat &amp; rug", "a cat on a mat rug"),
        ("see http://example.com/cat now", "see now"),
        ("by @someone, 4k", "by , 4k"),
        ("this-is-my-cute-cat", "this is my cute cat"),
        ("\u201cquoted\u201d \u2014 text", '"quoted" - text'),
        ("cat IMG12345.jpg 1234567", "cat"),
        ("free shipping worldwide", "worldwide"),
        ("\u732b cat", "cat"),
    ],
)
def test_captions_are_cleaned(text, clean):
    assert clean_caption(clean_caption(text)) == clean


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({}, ValueError, "conditioned on a class: give `class_labels`, got neither"),
        ({"prompt": "a cat"}, ValueError, "give `class_labels`, got `prompt`"),
        ({"class_labels": 3, "prompt": "a cat"}, ValueError, "got `class_labels`, `prompt`"),
        ({"class_labels": 10}, ValueError, "between 0 and 9, got 10"),
        ({"class_labels": -1}, ValueError, "between 0 and 9"),
        ({"class_labels": []}, ValueError, "`class_labels` is empty"),
        ({"class_labels": [1.5]}, TypeError, "must be class numbers or names"),
        ({"class_labels": True}, TypeError, "must be class numbers or names"),
        ({"class_labels": "tench"}, ValueError, "this checkpoint has 10: give numbers"),
        ({"class_labels": 3, "height": 15}, ValueError, "`height` must be a multiple of 4"),
        ({"class_labels": 3, "width": 0}, ValueError, "`width` must be at least 4"),
        ({"class_labels": 3, "width": 16.0}, TypeError, "`width` must be an integer"),
        ({"class_labels": 3, "guidance_scale": -1.0}, ValueError, "`guidance_scale` must be at least 0"),
        ({"class_labels": 3, "guidance_scale": float("nan")}, ValueError, "`guidance_scale`"),
        ({"class_labels": 3, "guidance_interval": -2}, ValueError, "`guidance_interval`"),
        ({"class_labels": 3, "temperature": -0.1}, ValueError, "`temperature`"),
        ({"class_labels": 3, "temperature": "hot"}, TypeError, "`temperature` must be a number"),
        ({"class_labels": 3, "top_k": -1}, ValueError, "`top_k`"),
        ({"class_labels": 3, "top_k": 2.0}, TypeError, "`top_k` must be an integer"),
        ({"class_labels": 3, "top_p": 1.5}, ValueError, "`top_p` must be between 0.0 and 1.0"),
        ({"class_labels": 3, "do_sample": 1}, TypeError, "`do_sample`"),
        ({"class_labels": 3, "num_images_per_prompt": 0}, ValueError, "`num_images_per_prompt`"),
        ({"class_labels": 3, "output_type": "jpeg"}, ValueError, "`output_type`"),
        ({"class_labels": 3, "generator": 3}, TypeError, "`generator`"),
        ({"class_labels": [3, 4], "generator": [torch.Generator()]}, ValueError, "makes 2 images"),
        (
            {"class_labels": 3, "latents": torch.zeros(1, 15, dtype=torch.long)},
            ValueError,
            r"`latents` must be \[1, 16\]",
        ),
        ({"class_labels": 3, "latents": torch.zeros(1, 16)}, TypeError, "`latents` must be an int64"),
        ({"class_labels": 3, "latents": torch.full((1, 16), 48)}, ValueError, "`latents` must lie between"),
        ({"class_labels": 3, "noise": torch.ones(1, 16, 47)}, ValueError, r"`noise` must be a tensor \[1, 16, 48\]"),
        ({"class_labels": 3, "callback_on_step_end_tensor_inputs": ["logits"]}, ValueError, "unknown \\['logits'\\]"),
        ({"class_labels": 3, "prompt_attention_mask": torch.ones(1, 8)}, ValueError, "`prompt_attention_mask` belongs"),
    ],
)
def test_bad_requests_are_answered(pipe, arguments, error, match):
    with pytest.raises(error, match=match):
        pipe(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({}, ValueError, "conditioned on a text: give `prompt` or `prompt_embeds`, got neither"),
        ({"class_labels": 1}, ValueError, "conditioned on a text"),
        ({"prompt": []}, TypeError, "`prompt` must be a string or a non-empty list"),
        ({"prompt": ["a", 3]}, TypeError, "`prompt`"),
        ({"prompt_embeds": torch.zeros(1, 8, 23)}, ValueError, r"up to 8, 24\]"),
        ({"prompt_embeds": torch.zeros(1, 9, 24)}, ValueError, r"up to 8, 24\]"),
        ({"prompt_embeds": torch.zeros(1, 5, 24)}, ValueError, "need a `prompt_attention_mask`"),
        (
            {"prompt_embeds": torch.zeros(1, 8, 24), "prompt_attention_mask": torch.ones(1, 7)},
            ValueError,
            "`prompt_attention_mask` must be",
        ),
    ],
)
def test_bad_text_requests_are_answered(text_pipe, arguments, error, match):
    with pytest.raises(error, match=match):
        text_pipe(**arguments)


def test_prompts_without_a_text_encoder_say_the_way_out():
    with pytest.raises(ValueError, match="no text encoder: pass `text_encoder`.*prompt_embeds"):
        text_pipeline()("a red cube")


def test_the_call_has_the_names_diffusers_users_know():
    parameters = inspect.signature(LlamaGenPipeline.__call__).parameters
    known = {
        "class_labels", "prompt", "height", "width", "guidance_scale", "num_images_per_prompt", "generator", "latents",
        "prompt_embeds", "output_type", "return_dict", "callback_on_step_end", "callback_on_step_end_tensor_inputs",
    }  # fmt: skip
    assert known <= set(parameters)
    assert all(
        parameter.default is not inspect.Parameter.empty for name, parameter in parameters.items() if name != "self"
    )
    assert "armm.pipeline" in LlamaGenPipeline.__call__.__doc__
