"""What the evaluations share: loading what is measured and what judges, fresh scenes, progress."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pipelines
from armm import weights
from armm.data.scenes import Scenes, render, sample_scenes
from pipelines.loading import read_index
from pipelines.shipped import task_pipeline

from .recogniser import SceneRecogniser

PIPELINES = {"text-to-image": "UnifiedTextToImagePipeline", "image-to-text": "UnifiedImageToTextPipeline"}
# Other pipelines that do a task with the same call; a folder says whether it holds one of them.
OTHERS = {"text-to-image": ("NextXTextToImagePipeline", "MARTextToImagePipeline"), "image-to-text": ()}
RECOGNISER_WEIGHTS = "scenes-recogniser"
# Added to every seed, so that no evaluation draws the sequence of scenes that a training recipe names by the same number.
SEED_OFFSET = 7_000_000_000


def load_pipeline(task: str, model: Any = None, decoding: str | None = None) -> Any:
    """The pipeline of a task: with the shipped weights (None), from a folder, or the pipeline given; with one of the decodings
    that a folder offers."""
    if model is not None and not isinstance(model, (str, Path)):
        return model
    options = {} if decoding is None else {"decoding": decoding}
    if model is None:
        loaded: Any = task_pipeline(task, **options)
        loaded.set_progress_bar_config(disable=True)
        return loaded
    folder = Path(model)
    if not folder.is_dir():
        raise FileNotFoundError(f"model: no folder {str(model)!r}; give a folder written by `save_pretrained`.")
    found = read_index(folder)["_class_name"]
    loaded = getattr(pipelines, found if found in OTHERS[task] else PIPELINES[task]).from_pretrained(folder, **options)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def load_recogniser(recogniser: SceneRecogniser | str | Path | None = None) -> SceneRecogniser:
    """The shipped recogniser (None), one from a folder, or the one given; in float32, ready to read."""
    if isinstance(recogniser, SceneRecogniser):
        return recogniser.eval()
    folder = weights.path(RECOGNISER_WEIGHTS) if recogniser is None else recogniser
    return SceneRecogniser.from_pretrained(folder, torch_dtype=torch.float32).eval()


def rendered(scenes: Scenes, size: int = 64, batch_size: int = 128) -> Iterator[tuple[Tensor, Scenes]]:
    """Batches of (pixels [B, 3, size, size] in [-1, 1], scenes)."""
    for first in range(0, len(scenes), batch_size):
        part = scenes[first : first + batch_size]
        yield to_pixels(render(part, size)), part


def fresh_scenes(n: int, seed: int, split: str, start: int = 0) -> Scenes:
    """Scenes of a sequence that no recipe draws."""
    return sample_scenes(n, SEED_OFFSET + seed, split, start=start)


def sample_generator(seed: int, index: int) -> torch.Generator:
    """The generator of sample number `index`: the same one in every batch."""
    return torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)


def to_pixels(images: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def picture_size(pipe: Any) -> int:
    """Side in pixels of the pictures that a pipeline's model was made for (64 where it does not say)."""
    size = getattr(pipe, "image_size", 64)
    return int(size[0] if isinstance(size, (tuple, list)) else size)


def check_count(name: str, value: Any) -> None:
    """Raises unless `value` is a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}.")


def figures(values: dict[str, Any], digits: int = 5) -> dict[str, Any]:
    """The same mapping with rounded floats, ready for JSON."""
    return {
        key: figures(value, digits)
        if isinstance(value, dict)
        else round(value, digits)
        if isinstance(value, float)
        else value
        for key, value in values.items()
    }
