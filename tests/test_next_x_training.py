"""Training of next-X models on scenes with every entity, and drawing from captions with the result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from armm.evaluation.common import load_pipeline
from armm.training import load_recipe, run
from armm.training.task import build_task
from pipelines.next_x_text_to_image import NextXTextToImagePipeline
from tokenizers_visual.kl_tokenizer import KLTokenizer

RECIPES = sorted((Path(__file__).resolve().parents[1] / "recipes").glob("scenes-next-x-*.yaml"))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder with a tiny KL tokenizer of eight pixels a token."""
    root = tmp_path_factory.mktemp("next-x")
    torch.manual_seed(0)
    tokenizer = KLTokenizer(
        base_channels=8, channel_multipliers=[1, 1, 1, 1], num_res_blocks=1, latent_channels=4, norm_groups=4
    )
    tokenizer.save_pretrained(root / "tokenizer")
    return root


def tiny(path: Path, root: Path, **overrides):
    """A shipped recipe with a few steps of a narrow trunk."""
    values = {
        "output": str(root / path.stem),
        "steps": 2,
        "batch_size": 4,
        "precision": "no",
        "validate_every": 2,
        "sample_every": 0,
        "model.compile": False,
        "model.transformer.dim": 16,
        "model.transformer.num_layers": 2,
        "model.transformer.num_heads": 2,
        "model.transformer.mlp_hidden": 24,
        "model.transformer.rotary_axes": [2, 2, 4],
        "model.generation.num_flow_steps": 2,
        "data.tokenizer": str(root / "tokenizer"),
        "data.scenes": 16,
        "data.validation": 4,
        "data.captions": 3,
    }
    return load_recipe(path, {**values, **overrides})


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem.split("-")[3])
def test_every_recipe_trains_and_its_export_draws(path, root):
    export = run(tiny(path, root), progress=False)
    figures = [json.loads(line) for line in (root / path.stem / "log.jsonl").read_text().splitlines()]
    assert any("prompt_gain" in json.dumps(entry) for entry in figures)
    pipe = load_pipeline("text-to-image", export)  # as `armm evaluate` does
    assert type(pipe) is NextXTextToImagePipeline
    assert pipe.transformer.dtype == torch.float32
    assert pipe.decoding.config.entity == path.stem.split("-")[3] and pipe.grid == (8, 8)
    prompts = ["a small red sphere", "a large blue cube behind a green cone"]

    def draw(prompts, *seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipe(prompts, generator=generators, output_type="pt").images

    both = draw(prompts, 1, 2)
    assert both.shape == (2, 3, 64, 64) and torch.allclose(draw(prompts[1], 2)[0], both[1], atol=1e-4)


def test_there_is_a_recipe_for_every_entity():
    assert {path.stem.split("-")[3] for path in RECIPES} == {"patch", "cell", "subsample", "scale", "image"}


def test_batches_are_what_they_say(root):
    torch.manual_seed(0)
    recipe = tiny(RECIPES[0], root, **{"data.null_share": 0.5})
    task = build_task(recipe)
    task.prepare(torch.device("cpu"))
    batch = task.batch(3, 16, 0)
    again = task.batch(3, 16, 0)
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    null = (batch["captions"][:, 0] == task.words.null).float()
    assert 0 < float(null.mean()) < 1 and (batch["captions"][null.bool()][:, 1:] == task.words.pad).all()
    assert batch["latents"].shape == (16, 64, 4) and 0 < float(batch["times"].min()) < float(batch["times"].max()) < 1
    rows = torch.arange(4)
    mean = task.train_data.latents(rows, None)
    drawn = task.train_data.latents(rows, torch.Generator().manual_seed(0))
    assert torch.equal(mean, task.train_data.mean[rows].float())
    assert torch.allclose(
        (drawn - mean) / task.train_data.spread[rows],
        torch.randn(4, 64, 4, generator=torch.Generator().manual_seed(0)),
        atol=1e-2,
    )


def test_the_loss_falls(root):
    torch.manual_seed(0)
    task = build_task(tiny(RECIPES[0], root))
    task.prepare(torch.device("cpu"))
    task.module.train()
    optimizer = torch.optim.AdamW(task.module.parameters(), lr=3e-3)
    batch, losses = task.batch(0, 16, 0), []
    for _ in range(12):
        loss, logs = task.loss(batch, 0, 0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(logs["velocity"]))
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data.tokenizer": None}, "data.tokenizer"),
        ({"model.decoding.entities": "cell"}, "model.decoding"),
        ({"model.decoding.entity": "cell", "model.decoding.size": 3}, "cells of 3x3"),
        ({"model.text_slot": 3}, "did you mean text_slots"),
        ({"loss.l1": 1.0}, "loss.l1"),
    ],
)
def test_bad_recipes_are_refused(overrides, message, root):
    with pytest.raises(ValueError, match=message):
        build_task(tiny(RECIPES[0], root, **overrides))


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        (7, TypeError, "must be a string"),
        ([], ValueError, "empty list"),
        ("a red dragon", ValueError, "dragon"),
    ],
)
def test_bad_prompts_are_refused(prompt, error, message, root):
    pipe = build_task(tiny(RECIPES[0], root)).pipeline()
    with pytest.raises(error, match=message):
        pipe(prompt)


def test_vocabulary_and_transformer_belong_together(root):
    task = build_task(tiny(RECIPES[0], root))
    parts = {"tokenizer": task.tokenizer, "transformer": task.model, "decoding": task.decoding}
    with pytest.raises(ValueError, match="must list the words"):
        NextXTextToImagePipeline(**parts)
    with pytest.raises(ValueError, match="do not belong together"):
        NextXTextToImagePipeline(**parts, vocabulary=[*task.vocabulary, "more"])


def test_the_recipe_of_the_tokenizer_trains(tmp_path):
    path = RECIPES[0].parent / "scenes-kl-tokenizer-64.yaml"
    values = {
        "output": str(tmp_path / "run"),
        "steps": 3,
        "batch_size": 4,
        "precision": "no",
        "model.base_channels": 8,
        "model.latent_channels": 4,
        "data.scenes": 8,
        "data.validation": 4,
        "validate_every": 3,
        "sample_every": 3,
    }
    tokenizer = KLTokenizer.from_pretrained(run(load_recipe(path, values), progress=False), dtype=torch.float32)
    assert tokenizer.downsample == 8 and tokenizer.scaling_factor != 0.2325
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    assert tokenizer.decode(tokenizer.encode(pixels)).shape == pixels.shape
    posterior = tokenizer.posterior(pixels)
    assert torch.allclose(tokenizer.encode(pixels).latents, posterior.mean.flatten(2).mT * tokenizer.scaling_factor)
    with pytest.raises(ValueError, match="channels"):
        build_task(load_recipe(path, {**values, "model.channels": 8}))
