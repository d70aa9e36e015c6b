"""The pipelines of the unified model: drawing, reading, inpainting, words, errors."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
import torch
from unified_helpers import SIZE, generators

from armm.data.scenes import VOCABULARY
from armm.decoding.next_token import NextTokenDecoding
from armm.nn.masks import prefix_mask
from armm.training.tasks.unified_data import scene_vocabulary
from pipelines.text import SPECIAL_TOKENS, WordTokenizer
from pipelines.unified import images_to_pixels
from pipelines.unified_text_to_image import UnifiedTextToImagePipeline

# --- drawing ---------------------------------------------------------------------------------------------------------

PROMPTS = ["a red cube", "a small blue sphere to the left of a green cone", "at night, a shiny cylinder"]


def test_a_seed_names_an_image_alone_and_in_a_batch(draw):
    batch = draw(PROMPTS, generator=generators(1, 2, 3), output_type="latent").images
    again = draw(PROMPTS, generator=generators(1, 2, 3), output_type="latent").images
    assert torch.equal(batch, again) and batch.shape == (3, 16)
    for row in range(3):
        alone = draw(PROMPTS[row], generator=generators(row + 1)[0], output_type="latent").images
        assert torch.equal(alone[0], batch[row])
    pixels = draw(PROMPTS, generator=generators(1, 2, 3), output_type="pt").images
    single = draw(PROMPTS[1], generator=generators(2), output_type="pt").images
    assert torch.allclose(pixels[1], single[0], atol=1e-4)


def test_a_seed_names_an_image_with_one_or_two_threads(draw):
    threads, images = torch.get_num_threads(), []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            images.append(draw(PROMPTS, generator=generators(1, 2, 3), output_type="latent").images)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*images)


def test_several_images_of_a_prompt(draw):
    images = draw(PROMPTS[:2], num_images_per_prompt=2, generator=generators(1, 2, 3, 4), output_type="latent").images
    assert torch.equal(images[3], draw(PROMPTS[1], generator=generators(4), output_type="latent").images[0])


def test_candidates_are_judged_by_what_the_model_would_say_about_them(draw):
    def call(prompt, seeds, **settings):
        return draw(prompt, generator=generators(*seeds), output_type="latent", **settings).images

    kept = call(PROMPTS, (1, 2, 3), num_candidates=4)
    assert kept.shape == (3, 16) and not torch.equal(kept, call(PROMPTS, (1, 2, 3)))
    for row in range(3):  # alone, from a list or a single generator, as in a batch
        assert torch.equal(kept[row], call(PROMPTS[row], (row + 1,), num_candidates=4)[0])
        alone = draw(PROMPTS[row], generator=generators(row + 1)[0], output_type="latent", num_candidates=4)
        assert torch.equal(kept[row], alone.images[0])
    # By hand: the candidates, and the log-likelihood of the caption after each of them, one word at a time.
    seeds = torch.randint(2**62, (4,), generator=generators(2)[0]).tolist()
    candidates = call([PROMPTS[1]] * 4, seeds)
    scores = [log_likelihood(draw, ids, PROMPTS[1]) for ids in candidates]
    assert torch.equal(candidates[int(torch.tensor(scores).argmax())], kept[1])
    with pytest.raises(ValueError, match="num_candidates"):
        draw(PROMPTS[0], num_candidates=0)


@torch.no_grad()
def log_likelihood(pipe, ids: torch.Tensor, prompt: str) -> float:
    model, words = pipe.transformer, pipe.words
    said = [*words.encode(prompt, "prompt", 28), words.end]
    total = 0.0
    for position, word in enumerate(said):
        before = torch.tensor([[words.caption, *said[:position]]])
        given = model.reading_condition(pipe.null_prefix(1), ids[None] + len(words), before)
        seen = prefix_mask(torch.ones(1, given.length, dtype=torch.bool), given.length, given.bidirectional)
        hidden = model.trunk(given.embeds, positions=model.positions_for(given.index), mask=seen)[:, -1]
        total += float(model.logits(hidden, low=0, high=len(words)).log_softmax(-1)[0, word])
    return total


def test_settings_matter_and_default_to_the_checkpoint(draw):
    def call(**settings):
        return draw(PROMPTS[0], generator=generators(1), output_type="latent", **settings).images

    default = call()
    assert torch.equal(default, call(guidance_scale=3.0, temperature=0.7, top_k=0, top_p=1.0))
    assert not torch.equal(default, call(guidance_scale=1.0))
    assert torch.equal(call(temperature=0), call(temperature=0.7, top_k=1))
    assert not torch.equal(default, call(temperature=0))


def test_output_forms(draw):
    result = draw(PROMPTS[0], generator=generators(1), output_codes=True)
    image, codes = result.images[0], result.codes
    assert image.size == (SIZE, SIZE) and codes.ids.shape == (1, 16) and codes.grid == (1, 4, 4)
    array = draw(PROMPTS[0], generator=generators(1), output_type="np").images
    tensor = draw(PROMPTS[0], generator=generators(1), output_type="pt", return_dict=False)[0]
    assert array.shape == (1, SIZE, SIZE, 3) and tensor.shape == (1, 3, SIZE, SIZE)
    assert np.allclose(array[0].transpose(2, 0, 1), tensor[0].numpy(), atol=1e-6)
    assert np.abs(np.asarray(image) / 255.0 - array[0]).max() < 0.003


def test_saved_and_loaded_it_draws_the_same(task, draw):
    ours = task.pipeline()(PROMPTS, generator=generators(1, 2, 3), output_type="latent").images
    assert torch.equal(ours, draw(PROMPTS, generator=generators(1, 2, 3), output_type="latent").images)


def test_callbacks(draw):
    seen = []

    def replace(pipe, step, timestep, tensors):
        seen.append((step, tuple(tensors), tensors["latents"].shape[1]))
        pipe._guidance_scale += 1.0
        return {"latents": torch.full_like(tensors["latents"], 7)} if step == pipe.num_timesteps - 1 else {}

    images = draw(PROMPTS[0], guidance_scale=2.0, callback_on_step_end=replace, output_type="latent").images
    assert seen == [(step, ("latents",), step + 1) for step in range(16)]
    assert draw.guidance_scale == 2.0 + draw.num_timesteps and (images == 7).all()

    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = step == 3
        return {}

    images = draw(PROMPTS[0], generator=generators(1), callback_on_step_end=stop, output_type="latent").images
    whole = draw(PROMPTS[0], generator=generators(1), output_type="latent").images
    assert torch.equal(images[:, :4], whole[:, :4]) and (images[:, 4:] == 0).all()


# --- reading ---------------------------------------------------------------------------------------------------------


def test_reading_is_deterministic_and_independent_of_the_batch(read, picture):
    turned = picture.rotate(90)
    asked = ["what color is the cube?", "is there a small shiny red sphere?", "how many objects are there?"]
    together = read([picture, turned, picture], asked).texts
    assert together == read([picture, turned, picture], asked).texts
    assert together == [
        read(image, text).texts[0] for image, text in zip([picture, turned, picture], asked, strict=True)
    ]
    captions = read([picture, turned]).texts
    assert captions == [read(picture).texts[0], read(turned, return_dict=False)[0][0]]
    assert read(picture, asked).texts == [read(picture, text).texts[0] for text in asked]
    hot = read([picture, turned], asked[0], temperature=2.0, generator=generators(4, 5)).texts
    assert hot[1] == read(turned, asked[0], temperature=2.0, generator=generators(5)).texts[0]
    assert all(word in VOCABULARY for text in together + captions + hot for word in text.split())
    assert "".join(read.stream_chat(picture, asked[0])) == together[0]


def test_reading_matches_teacher_forcing(read, picture):
    words, model = read.words, read.transformer
    said = read(picture, "what color is the cube?", max_new_tokens=1).texts[0]
    question = [words.question, *words.encode("what color is the cube"), words.answer]
    ids = torch.cat([read.null_prefix(1), read.encode_image(picture) + len(words), torch.tensor([question])], 1)
    with torch.no_grad():
        index = torch.arange(ids.shape[1])
        whole = model.bidirectional_tokens(index, reading=True)
        assert whole == model.prefix_slots + model.grid[0] * model.grid[1]
        mask = prefix_mask(torch.ones_like(ids, dtype=torch.bool), ids.shape[1], whole)
        logits = model(ids, index=index, mask=mask, high=len(words))
    assert said == words.decode([int(logits[0, -1].argmax())])


def test_image_forms_agree(picture):
    array = np.asarray(picture)
    size = (SIZE, SIZE)
    expected = images_to_pixels(picture, size)
    assert expected.shape == (1, 3, SIZE, SIZE) and expected.min() >= -1 and expected.max() <= 1
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    for form in (array, array[None], array / 255.0, tensor, tensor.float() / 255, [picture], [array]):
        assert torch.equal(images_to_pixels(form, size), expected)
    wide = PIL.Image.new("RGB", (3 * SIZE, SIZE), "red")
    wide.paste(picture, (SIZE, 0))
    assert torch.equal(images_to_pixels(wide, size), expected)  # the middle square


# --- inpainting ------------------------------------------------------------------------------------------------------


def test_inpainting_keeps_what_is_not_masked(inpaint, read, picture):
    mask = np.zeros((SIZE, SIZE), dtype=np.uint8)
    mask[9, 17] = 255  # one pixel: its whole cell, row 1, column 2
    mask[24:, :3] = 255  # row 3, column 0
    original = read.encode_image(picture)
    arguments = {"generator": generators(3), "temperature": 5.0, "output_codes": True}
    result = inpaint("a red cube", picture, PIL.Image.fromarray(mask), **arguments)
    cells = torch.zeros(4, 4, dtype=torch.bool)
    cells[1, 2] = cells[3, 0] = True
    assert torch.equal(inpaint.mask_to_cells(mask)[0], cells)
    changed = result.codes.ids != original
    assert not changed[~cells.flatten()[None]].any() and changed.any()
    kept = inpaint("a red cube", picture, mask > 0, keep_pixels=True, **{**arguments, "generator": generators(3)})
    assert torch.equal(kept.codes.ids, result.codes.ids)
    outside = ~cells.repeat_interleave(8, 0).repeat_interleave(8, 1).numpy()
    assert (np.asarray(kept.images[0])[outside] == np.asarray(picture)[outside]).all()
    assert (np.asarray(kept.images[0])[~outside] == np.asarray(result.images[0])[~outside]).all()
    many = inpaint(
        "a red cube", [picture, picture.rotate(90)], mask, generator=generators(3, 4), temperature=5.0
    ).images
    assert np.array_equal(np.asarray(many[0]), np.asarray(result.images[0])) and len(many) == 2


def test_a_whole_mask_draws_freely(inpaint, draw, picture):
    everything = np.ones((SIZE, SIZE), dtype=bool)
    codes = inpaint(PROMPTS[0], picture, everything, generator=generators(5), output_type="latent").images
    assert torch.equal(codes, draw(PROMPTS[0], generator=generators(5), output_type="latent").images)


# --- words and errors ------------------------------------------------------------------------------------------------


def test_words():
    assert scene_vocabulary() == list(VOCABULARY)
    words = WordTokenizer([*SPECIAL_TOKENS, "a", "red", "cube"])
    assert words.encode(" A  red, CUBE! ") == [7, 8, 9] and words.decode([7, 0, 8, words.end, 9]) == "a red"
    assert words.encode_batch(["red cube?", "a"]) == [[8, 9], [7]]
    with pytest.raises(ValueError, match="twice"):
        WordTokenizer([*SPECIAL_TOKENS, "a", "a"])
    with pytest.raises(ValueError, match="special tokens <end>"):
        WordTokenizer(SPECIAL_TOKENS[:-1])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompt": ""}, ValueError, "empty"),
        ({"prompt": "  ,. "}, ValueError, "empty"),
        ({"prompt": []}, ValueError, "empty list"),
        ({"prompt": ["a red cube", ""]}, ValueError, "empty"),
        ({"prompt": "a rad cube"}, ValueError, "'rad' .did you mean 'red'"),
        ({"prompt": "a dragon"}, ValueError, "unknown word 'dragon'.*Known words: .*cube"),
        ({"prompt": "a <null> cube"}, ValueError, "<null>"),
        ({"prompt": "a red cube " * 20}, ValueError, "at most 28"),
        ({"prompt": 3}, TypeError, "`prompt`"),
        ({"prompt": [3]}, TypeError, "`prompt`"),
        ({"height": 48}, ValueError, "`height` must be 32"),
        ({"width": 64}, ValueError, "`width` must be 32"),
        ({"num_images_per_prompt": 0}, ValueError, "num_images_per_prompt"),
        ({"guidance_scale": "3"}, TypeError, "guidance_scale"),
        ({"guidance_scale": float("nan")}, ValueError, "guidance_scale"),
        ({"temperature": -1.0}, ValueError, "temperature"),
        ({"top_k": 2.5}, TypeError, "top_k"),
        ({"top_p": 0.0}, ValueError, "top_p"),
        ({"top_p": 1.5}, ValueError, "top_p"),
        ({"generator": generators(1, 2)}, ValueError, "2 generators.*1 image"),
        ({"generator": 3}, TypeError, "generator"),
        ({"output_type": "jpeg"}, ValueError, "output_type"),
        ({"callback_on_step_end": print, "callback_on_step_end_tensor_inputs": ["x"]}, ValueError, "unknown"),
    ],
)
def test_bad_drawing_arguments(draw, arguments, error, message):
    with pytest.raises(error, match=message):
        draw(**{"prompt": "a red cube", **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"image": "scene.png"}, TypeError, "`image` must be a PIL image"),
        ({"image": []}, ValueError, "empty list"),
        ({"image": np.zeros((SIZE, SIZE), np.uint8)}, ValueError, "shape"),
        ({"image": np.full((SIZE, SIZE, 3), 200.0)}, ValueError, r"\[0, 1\]"),
        ({"image": np.zeros((SIZE, SIZE, 3), np.int64)}, TypeError, "uint8"),
        ({"image": torch.zeros(SIZE, SIZE, 3)}, ValueError, "shape"),
        ({"question": ""}, ValueError, "empty"),
        ({"question": []}, ValueError, "empty list"),
        ({"question": "what colour is the cube?"}, ValueError, "did you mean 'color'"),
        ({"question": 3}, TypeError, "`question`"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens"),
        ({"max_new_tokens": 1000}, ValueError, "max_new_tokens"),
        ({"temperature": -1}, ValueError, "temperature"),
        ({"generator": generators(1, 2)}, ValueError, "2 generators"),
    ],
)
def test_bad_reading_arguments(read, picture, arguments, error, message):
    with pytest.raises(error, match=message):
        read(**{"image": picture, **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"mask_image": np.zeros((SIZE, SIZE), bool)}, ValueError, "masks nothing"),
        ({"mask_image": np.zeros((SIZE, SIZE, 3, 1), bool)}, ValueError, "shape"),
        ({"mask_image": np.full((SIZE, SIZE), 2.0)}, ValueError, r"\[0, 1\]"),
        ({"mask_image": "mask.png"}, TypeError, "`mask_image`"),
        (
            {"prompt": ["a red cube"] * 2, "image": [PIL.Image.new("RGB", (SIZE, SIZE))] * 3},
            ValueError,
            "`prompt` has 2",
        ),
    ],
)
def test_bad_inpainting_arguments(inpaint, picture, arguments, error, message):
    mask = np.ones((SIZE, SIZE), dtype=bool)
    with pytest.raises(error, match=message):
        inpaint(**{"prompt": "a red cube", "image": picture, "mask_image": mask, **arguments})


def test_components_must_belong_together(task):
    parts = {"tokenizer": task.tokenizer, "transformer": task.model, "decoding": NextTokenDecoding()}
    with pytest.raises(ValueError, match="`vocabulary`"):
        UnifiedTextToImagePipeline(**parts)
    with pytest.raises(ValueError, match="do not belong together"):
        UnifiedTextToImagePipeline(**parts, vocabulary=[*task.vocabulary, "dragon"])
    with pytest.raises(ValueError, match="did you mean 'temperature'"):
        UnifiedTextToImagePipeline(**parts, vocabulary=task.vocabulary, generation_config={"temprature": 1})
