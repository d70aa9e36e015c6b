"""A tiny trained-like unified model, its pipelines and a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from unified_helpers import CODES, SIZE, load

from armm.training import Recipe
from armm.training.recipe import OptimizerRecipe
from armm.training.tasks.unified import UnifiedTask
from pipelines.unified_image_to_text import UnifiedImageToTextPipeline
from pipelines.unified_inpaint import UnifiedInpaintPipeline
from pipelines.unified_text_to_image import UnifiedTextToImagePipeline
from tokenizers_visual.vq_tokenizer import VQTokenizer


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def task(recipe) -> UnifiedTask:
    torch.manual_seed(0)
    task = UnifiedTask(recipe)
    task.prepare(torch.device("cpu"))
    return task


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def draw(directory) -> UnifiedTextToImagePipeline:
    return load(UnifiedTextToImagePipeline, directory)


@pytest.fixture(scope="session")
def read(directory) -> UnifiedImageToTextPipeline:
    return load(UnifiedImageToTextPipeline, directory)


@pytest.fixture(scope="session")
def inpaint(directory) -> UnifiedInpaintPipeline:
    return load(UnifiedInpaintPipeline, directory)


@pytest.fixture(scope="session")
def picture() -> PIL.Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return PIL.Image.fromarray(values).resize((SIZE, SIZE), PIL.Image.Resampling.BICUBIC)
