"""The unified text-and-image model: its training rows, its pipelines, its errors."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from armm.data.scenes import VOCABULARY
from armm.decoding.infilling import fill_image
from armm.decoding.next_token import NextTokenDecoding
from armm.decoding.sampling import Sampler
from armm.nn.masks import prefix_mask
from armm.training import Recipe, load_recipe
from armm.training.recipe import OptimizerRecipe
from armm.training.tasks.unified import UnifiedTask
from armm.training.tasks.unified_data import scene_vocabulary
from armm.training.tasks.unified_rows import reading_mask, reading_positions
from pipelines.base import ARPipeline
from pipelines.text import SPECIAL_TOKENS, WordTokenizer
from pipelines.unified import images_to_pixels
from pipelines.unified_image_to_text import UnifiedImageToTextPipeline
from pipelines.unified_inpaint import UnifiedInpaintPipeline
from pipelines.unified_text_to_image import UnifiedTextToImagePipeline
from tokenizers_visual.vq_tokenizer import VQTokenizer

SIZE, CODES = 32, 32


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Recipe:
    root = tmp_path_factory.mktemp("unified")
    torch.manual_seed(0)
    VQTokenizer(
        base_channels=8,
        encoder_multipliers=(1, 1, 2),
        decoder_multipliers=(1, 1, 2),
        num_res_blocks=1,
        z_channels=8,
        codebook_size=CODES,
        codebook_dim=4,
        encoder_attention=False,
        decoder_attention=False,
        mid_attention=False,
        norm_groups=4,
        patch_size=2,
    ).save_pretrained(root / "tokenizer")
    return Recipe(
        task="unified",
        output=str(root / "run"),
        steps=30,
        batch_size=8,
        precision="no",
        optimizer=OptimizerRecipe(learning_rate=3e-3),
        model={
            "text_slots": 28,
            "answer_slots": 32,
            "transformer": {
                "dim": 32,
                "num_layers": 2,
                "num_heads": 2,
                "mlp_hidden": 64,
                "qk_norm": "rms",
                "rotary_axes": [4, 6, 6],
                "rotary_theta": 100.0,
            },
        },
        data={"tokenizer": str(root / "tokenizer"), "scenes": 32, "validation": 16, "size": SIZE, "captions": 4},
    )


@pytest.fixture(scope="module")
def task(recipe) -> UnifiedTask:
    torch.manual_seed(0)
    task = UnifiedTask(recipe)
    task.prepare(torch.device("cpu"))
    return task


@pytest.fixture(scope="module")
def directory(task, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "scenes"
    # Larger weights than a fresh model's, so that prompts and codes make a difference.
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in task.model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.3)
    task.module.eval()
    task.pipeline().save_pretrained(path)
    return path


def load(cls, directory):
    pipe = cls.from_pretrained(directory)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def draw(directory) -> UnifiedTextToImagePipeline:
    return load(UnifiedTextToImagePipeline, directory)


@pytest.fixture(scope="module")
def read(directory) -> UnifiedImageToTextPipeline:
    return load(UnifiedImageToTextPipeline, directory)


@pytest.fixture(scope="module")
def inpaint(directory) -> UnifiedInpaintPipeline:
    return load(UnifiedInpaintPipeline, directory)


@pytest.fixture(scope="module")
def picture() -> PIL.Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return PIL.Image.fromarray(values).resize((SIZE, SIZE), PIL.Image.Resampling.BICUBIC)


# --- training rows ---------------------------------------------------------------------------------------------------


def test_a_batch_depends_on_the_step_and_the_rank_only(task):
    first, again, later, other = (task.batch(*key) for key in ((5, 8, 0), (5, 8, 0), (6, 8, 0), (5, 8, 1)))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["drawing"], later["drawing"]) and not torch.equal(first["drawing"], other["drawing"])
    assert {name: value.shape for name, value in first.items()} == {name: value.shape for name, value in later.items()}
    assert len(first["drawing"]) + len(first["reading"]) == 8


@pytest.mark.parametrize("whole", [0, 2, 5])
def test_reading_mask_and_positions_by_brute_force(whole):
    prefix, segments = 5, [3, 2, 4]
    positions, mask = reading_positions(prefix, segments), reading_mask(prefix, segments, whole)
    owner = [0] * prefix + [i + 1 for i, length in enumerate(segments) for _ in range(length)]
    place = list(range(prefix)) + [prefix + j for length in segments for j in range(length)]
    assert positions.tolist() == place
    for i in range(len(owner)):
        for j in range(len(owner)):
            assert bool(mask[i, j]) == ((j <= i or j < whole) and owner[j] in (0, owner[i])), (i, j)


def test_segments_see_the_image_and_themselves_only(task):
    task.module.eval()
    batch = task.batch(0, 8, 0)
    codes, texts, model = batch["reading_codes"], batch["reading"], task.model
    start = task.caption_length  # of the first question
    prompt = torch.cat([task._null(len(codes)), torch.full((len(codes), 1), task.words.image)], 1)
    with torch.no_grad():
        whole = task.reading_states(codes, texts)
        for window in (slice(0, start), slice(start, start + task.question_length)):
            condition = model.reading_condition(prompt, codes + len(task.words), texts[:, window])
            assert condition.bidirectional == model.prefix_slots + task.image_tokens
            mask = prefix_mask(torch.ones(condition.embeds.shape[:2], dtype=torch.bool), condition.length, condition.bidirectional)
            hidden = model.trunk(condition.embeds, positions=model.positions_for(condition.index), mask=mask)
            assert torch.allclose(hidden[:, -texts[:, window].shape[1] :], whole[:, window], atol=1e-5)
        changed = texts.clone()
        changed[:, start] = (changed[:, start] + 1) % 7
        other = task.reading_states(codes, changed)
    differs = (other - whole).abs().amax((0, 2)) > 1e-6
    assert differs[start] and not differs[:start].any() and not differs[start + task.question_length :].any()


def test_targets_are_the_words_after_the_image(task):
    batch = task.batch(3, 8, 0)
    words = task.words
    questions = batch["reading"][:, task.caption_length :].unflatten(1, (-1, task.question_length))
    targets = batch["reading_answers"].unflatten(1, (-1, task.question_length))
    for inputs, wanted in zip(questions.flatten(0, 1).tolist(), targets.flatten(0, 1).tolist(), strict=True):
        answer = inputs.index(words.answer)
        assert inputs[0] == words.question and all(value == -100 for value in wanted[:answer])
        said = [value for value in wanted if value != -100]
        assert wanted[answer] != -100 and said[-1] == words.end and 1 < len(said) < 5
    captions = batch["reading"][:, : task.caption_length]
    for inputs, wanted in zip(captions.tolist(), batch["reading_captions"].tolist(), strict=True):
        text = [value for value in inputs[1:] if value not in (words.pad, words.end)]
        assert inputs[0] == words.caption and [value for value in wanted if value != -100] == [*text, words.end]
    codes = batch["reading_codes"]
    assert 0 <= int(codes.min()) and int(codes.max()) < CODES
    reading = round(8 * task.data["reading_share"])
    rows = torch.multinomial(task.scene_weights, 8, replacement=True, generator=task.generator(3, 0))[:reading]
    assert torch.equal(codes, task.train_data.codes[rows].long())


def test_a_share_of_the_drawing_rows_has_no_caption(task):
    generator = torch.Generator().manual_seed(0)
    rows = torch.arange(30)
    null = torch.tensor([task.words.null] + [task.words.pad] * (task.text_slots - 1))
    for share, low, high in ((0.0, 0, 0), (0.5, 5, 25), (1.0, 30, 30)):
        drawing = task.drawing_rows(task.train_data, rows, generator, share)["drawing"]
        assert low <= int((drawing[:, : task.text_slots] == null).all(1).sum()) <= high


def test_training_and_pipelines_agree_on_prefixes(task, draw):
    generator = torch.Generator().manual_seed(0)
    batch = task.batch(0, 8, 0) | task.drawing_rows(task.train_data, torch.arange(2), generator, 0.0)
    slots = task.text_slots
    prompt = task.words.decode(batch["drawing"][0, :slots].tolist())
    assert torch.equal(draw.encode_prompt(prompt)[0], batch["drawing"][0, : slots + 1])
    null = torch.cat([task._null(1), torch.full((1, 1), task.words.image)], 1)
    assert torch.equal(draw.null_prefix(1), null)


def test_the_loss_falls(recipe):
    torch.manual_seed(0)
    task = UnifiedTask(recipe)
    task.prepare(torch.device("cpu"))
    optimizer = torch.optim.AdamW(task.parameter_groups(), lr=3e-3)
    totals = []
    for step in range(30):
        loss, logs = task.loss(task.batch(step, 8, 0), step, step / 30)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        totals.append({name: value.item() for name, value in logs.items()})
    for name in ("image", "caption", "answer"):
        early, late = (sum(entry[name] for entry in part) for part in (totals[:5], totals[-5:]))
        assert late < 0.9 * early, name
    task.module.eval()
    with torch.no_grad():
        figures = task.validate()
    assert {"image", "null", "prompt_gain", "answers_right"} <= set(figures)


STRATEGIES = {
    "neighboring": {
        "decoding": {"type": "neighboring"},
        "head": {"type": "neighboring", "axes": 2},
        "transformer": {"taps": [1]},
    },
    "token_shuffle": {
        "decoding": {"type": "token_shuffle", "window": 2},
        "shuffle": {"window": 2, "num_mlps": 1, "mlp_hidden": 32},
        "transformer": {},
    },
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_other_strategies_train_draw_and_read(recipe, picture, tmp_path, name):
    torch.manual_seed(0)
    changes = {**STRATEGIES[name], "transformer": {**recipe.model["transformer"], **STRATEGIES[name]["transformer"]}}
    task = UnifiedTask(dataclasses.replace(recipe, model={**recipe.model, **changes}))
    task.prepare(torch.device("cpu"))
    optimizer = torch.optim.AdamW(task.parameter_groups(), lr=3e-3)
    losses = []
    for step in range(12):
        loss, _ = task.loss(task.batch(step, 8, 0), step, step / 12)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    silent = [key for key, value in task.model.named_parameters() if value.grad is None]
    assert not silent
    task.module.eval()
    with torch.no_grad():
        assert set(task.validate()) >= {"image", "prompt_gain"}
    task.export(tmp_path / "export")
    drawer, reader, painter = (
        load(kind, tmp_path / "export")
        for kind in (UnifiedTextToImagePipeline, UnifiedImageToTextPipeline, UnifiedInpaintPipeline)
    )
    assert type(drawer.decoding) is type(task.decoding)
    prompts = ["a red cube", "a small blue sphere at night"]
    together = drawer(prompts, generator=generators(0, 1), output_type="latent").images
    alone = drawer(prompts[1], generator=generators(1), output_type="latent").images
    assert torch.equal(together[1], alone[0]) and drawer.num_timesteps == task.decoding.num_calls(task.grid)
    assert len(reader([picture, picture], ["what color is the cube?", "is it day?"]).texts) == 2
    mask = np.zeros((SIZE, SIZE), dtype=np.uint8)
    mask[:, SIZE // 2 :] = 255
    kept = painter("a red cube", picture, mask, generator=generators(0), output_type="latent").images.view(1, *task.grid)
    known = reader.encode_image(picture).view(1, *task.grid)
    half = task.grid[1] // 2
    assert torch.equal(kept[..., :half], known[..., :half])


# --- infilling -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def infilling(recipe, tmp_path_factory):
    """A briefly trained task with holes, and the folder of its export."""
    torch.manual_seed(0)
    task = UnifiedTask(
        dataclasses.replace(
            recipe,
            model={**recipe.model, "holes": 6, "answer_slots": 34},
            data={**recipe.data, "infilling_share": 0.5},
        )
    )
    task.prepare(torch.device("cpu"))
    optimizer = torch.optim.AdamW(task.parameter_groups(), lr=3e-3)
    task.losses = []
    for step in range(30):
        loss, logs = task.loss(task.batch(step, 8, 0), step, step / 30)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        task.losses.append(logs["infilling"].item())
    task.module.eval()
    directory = tmp_path_factory.mktemp("infilling") / "export"
    task.export(directory)
    return task, directory


def test_infilling_is_learned(infilling):
    losses = infilling[0].losses
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])


def test_holed_rows_hold_the_whole_image_and_train_no_sentinel(infilling):
    task, _ = infilling
    batch = task.batch(3, 8, 0)
    words = task.words
    for tokens, cells, targets, codes in zip(
        *(batch[name] for name in ("holed", "holed_cells", "holed_targets", "drawing_codes")), strict=False
    ):
        seen = {int(cell): int(token) - len(words) for cell, token in zip(cells, tokens, strict=True) if token >= len(words)}
        assert [seen[cell] for cell in range(task.image_tokens)] == codes.tolist()
        sentinels = torch.isin(tokens, torch.tensor(words.holes))
        number = int(sentinels.sum()) // 2
        assert sentinels.sum() == 2 * number and 1 <= number <= 6
        expected = torch.where(sentinels | (tokens == words.pad), -100, tokens - len(words))
        assert torch.equal(targets, expected)


def test_infilled_regions_see_both_sides_and_keep_the_rest(infilling, picture):
    paint = load(UnifiedInpaintPipeline, infilling[1])
    mask = np.zeros((SIZE, SIZE), dtype=np.uint8)
    mask[: SIZE // 2, SIZE // 2 :] = 255
    options = {"output_type": "latent", "guidance_scale": 2.0}
    known = paint.encode_image(picture)
    drawn = paint("a red cube", picture, mask, generator=generators(1), **options).images
    cells = paint.mask_to_cells(mask).flatten(1)
    assert torch.equal(drawn[~cells], known[~cells]) and (drawn >= 0).all()
    assert paint.num_timesteps == int(cells.sum()) + 1  # the second hole's sentinel is fed as well
    # What lies behind the hole in raster order matters to infilling, and not to redrawing in order.
    other = known.clone()
    other[:, -1] = (other[:, -1] + 1) % CODES
    prefix, words = paint.encode_prompt("a red cube"), paint.words
    model, condition = paint.transformer, paint.transformer.prefix_condition(prefix)
    recorded = []
    for codes in (known, other):
        filled: list[torch.Tensor] = []

        class Watching(Sampler):
            def __call__(self, logits, noise=None, filled=filled):
                filled.append(logits)
                return logits.argmax(-1)

        options = {"sentinel_ids": words.holes, "pad_id": words.pad, "vocabulary": paint.code_range}
        fill_image(model, condition, codes, cells, **options, sampler=Watching(do_sample=False))
        recorded.append(torch.stack(filled))
    assert not torch.allclose(recorded[0], recorded[1])


def test_infilling_alone_equals_infilling_in_a_batch(infilling, picture):
    paint = load(UnifiedInpaintPipeline, infilling[1])
    wide, small = np.zeros((SIZE, SIZE), dtype=np.uint8), np.zeros((SIZE, SIZE), dtype=np.uint8)
    wide[: SIZE // 2] = 255
    small[-1, -1] = 255
    options = {"output_type": "latent", "guidance_scale": 2.0}
    both = paint(["a red cube", "a blue cone"], picture, [wide, small], generator=generators(1, 2), **options).images
    for row, (prompt, mask) in enumerate((("a red cube", wide), ("a blue cone", small))):
        alone = paint(prompt, picture, mask, generator=generators(row + 1), **options).images
        assert torch.equal(alone[0], both[row])


def test_captions_with_holes_are_filled(infilling, picture):
    read = load(UnifiedImageToTextPipeline, infilling[1])
    texts = read([picture, picture], caption="a small ... cube").texts
    assert texts[0] == texts[1] and texts[0].startswith("a small") and texts[0].endswith("cube")
    for arguments, message in (
        ({"caption": "a red cube"}, "one hole"),
        ({"caption": "a ... cube", "question": "is it day?"}, "exclude"),
        ({"caption": "a ... walrus"}, "walrus"),
    ):
        with pytest.raises(ValueError, match=message):
            read(picture, **arguments)


def test_models_without_holes_say_so(inpaint, read, picture):
    mask = np.zeros((SIZE, SIZE), dtype=np.uint8)
    mask[0, 0] = 255
    with pytest.raises(ValueError, match="infill"):
        inpaint("a red cube", picture, mask, infill=True)
    with pytest.raises(ValueError, match="fill holes"):
        read(picture, caption="a ... cube")


@pytest.mark.parametrize(
    ("where", "values", "message"),
    [
        ("data", {"tokenizer": None}, "data.tokenizer"),
        ("data", {"reading_share": 1.5}, "reading_share"),
        ("data", {"questions_per_row": 99}, "questions_per_row"),
        ("data", {"scene": 3}, "data.scene.*did you mean scenes"),
        ("model", {"slots": 3}, "model.slots"),
        ("loss", {"caption": 1, "awnser": 1}, "did you mean answer"),
    ],
)
def test_bad_recipes(recipe, where, values, message):
    from dataclasses import replace

    with pytest.raises(ValueError, match=message):
        UnifiedTask(replace(recipe, **{where: {**getattr(recipe, where), **values}}))


def test_sample_and_export(task, recipe, tmp_path):
    task.module.eval()
    task.sample(tmp_path / "grid.png")
    assert PIL.Image.open(tmp_path / "grid.png").width > 700
    task.export(tmp_path / "export")
    stored = UnifiedTextToImagePipeline.from_pretrained(tmp_path / "export", dtype=torch.bfloat16)
    assert stored.transformer.dtype == torch.bfloat16
    pipe = ARPipeline.from_pretrained(tmp_path / "export", dtype=torch.float32)
    assert isinstance(pipe, UnifiedTextToImagePipeline) and pipe.generation_config["guidance_scale"] == 3.0
    for name, value in task.model.state_dict().items():
        assert torch.equal(pipe.transformer.state_dict()[name], value.bfloat16().float()), name


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


# --- shipped recipes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [64, 128])
def test_the_shipped_recipe_runs(size, tmp_path):
    """Two steps of each recipe as it is, but for the amount of data, the rows of a batch and the tokenizer's width."""
    recipes = Path(__file__).resolve().parents[1] / "recipes"
    tokenizer = load_recipe(recipes / f"scenes-tokenizer-{size}.yaml")
    VQTokenizer(**{**tokenizer.model, "base_channels": 8, "z_channels": 8}).save_pretrained(tmp_path / "tokenizer")
    overrides = {
        "data.tokenizer": str(tmp_path / "tokenizer"),
        "data.scenes": 8,
        "data.validation": 4,
        "model.compile": False,
        "precision": "no",
        "steps": 2,
        "batch_size": 4,
        "validate_every": 0,
        "sample_every": 0,
    }
    recipe = load_recipe(recipes / f"scenes-unified-{size}.yaml", overrides, output=tmp_path / "run")
    assert recipe.data["size"] == tokenizer.data["size"] == size
    task = UnifiedTask(recipe)
    assert sum(p.numel() for p in task.module.parameters()) <= 7.5e6 and task.grid == (size // 8, size // 8)
    task.prepare(torch.device("cpu"))
    optimizer = torch.optim.AdamW(task.parameter_groups(), lr=1e-3)
    losses = []
    for _ in range(2):
        loss, _ = task.loss(task.batch(0, 4, 0), 0, 0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
