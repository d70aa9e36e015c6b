"""The pipelines of the weights that are shipped with armm, by what they do."""

from __future__ import annotations

import importlib
from typing import Any

from armm import weights

from . import decodings
from .base import ARPipeline
from .loading import check_choice, read_index

# Task -> (module, pipeline class, shipped weights).
TASKS: dict[str, tuple[str, str, str]] = {
    "text-to-image": ("pipelines.unified_text_to_image", "UnifiedTextToImagePipeline", "scenes"),
    "image-to-text": ("pipelines.unified_image_to_text", "UnifiedImageToTextPipeline", "scenes"),
    "inpainting": ("pipelines.unified_inpaint", "UnifiedInpaintPipeline", "scenes"),
}
# Other weights for a task: decodings that are done by them.
MORE_WEIGHTS: dict[str, tuple[str, ...]] = {"text-to-image": ("scenes-next-x",)}


def task_pipeline(task: str, *, decoding: str | None = None, **kwargs: Any) -> ARPipeline:
    """The pipeline of a task with the shipped weights.

    Args:
        decoding: one of `task_decodings`, default next token: "neighboring", ... of the discrete model, or "next_x" and
            "masked_latents", which draw continuous tokens. `-` and `_` mean the same.
        kwargs: passed to the pipeline's `from_pretrained`.
    """
    module, class_name, folder = TASKS[task]
    if decoding is None:
        return getattr(importlib.import_module(module), class_name).from_pretrained(weights.path(folder), **kwargs)
    name = decoding.replace("-", "_")
    check_choice(name, task_decodings(task), f"`decoding` of {task}")
    if name not in _offered(folder):
        folder = next(other for other in _more_weights(task) if name in _offered(other))
        return ARPipeline.from_pretrained(weights.path(folder), decoding=name, **kwargs)
    return getattr(importlib.import_module(module), class_name).from_pretrained(
        weights.path(folder), decoding=name, **kwargs
    )


def task_decodings(task: str) -> list[str]:
    """The decodings that the shipped weights offer for a task, the default first."""
    return [name for folder in (TASKS[task][2], *_more_weights(task)) for name in _offered(folder)]


def _more_weights(task: str) -> list[str]:
    return [name for name in MORE_WEIGHTS.get(task, ()) if name in weights.names()]


def _offered(folder: str) -> list[str]:
    path = weights.path(folder)
    return decodings.offered(path, read_index(path))
