"""Training the unified model: rows, losses, other strategies, recipes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from unified_helpers import CODES, SIZE, generators, load

from armm.nn.masks import prefix_mask
from armm.training import load_recipe
from armm.training.tasks.unified import UnifiedTask
from armm.training.tasks.unified_rows import reading_mask, reading_positions
from pipelines.base import ARPipeline
from pipelines.unified_image_to_text import UnifiedImageToTextPipeline
from pipelines.unified_inpaint import UnifiedInpaintPipeline
from pipelines.unified_text_to_image import UnifiedTextToImagePipeline
from tokenizers_visual.vq_tokenizer import VQTokenizer

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


# --- shipped recipes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [64, 128])
def test_the_shipped_recipe_runs(size, tmp_path):
    """Two steps of each recipe as it is, but for the amount of data, the rows of a batch and the tokenizer's width."""
    recipes = Path(__file__).resolve().parents[2] / "recipes"
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
