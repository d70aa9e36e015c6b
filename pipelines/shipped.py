"""The pipelines of the weights that are shipped with armm, by what they do."""

from __future__ import annotations

import importlib
from typing import Any

from armm import weights

from . import decodings
from .base import ARPipeline
from .loading import read_index

# Task -> (module, pipeline class, shipped weights).
TASKS: dict[str, tuple[str, str, str]] = {
    "text-to-image": ("pipelines.unified_text_to_image", "UnifiedTextToImagePipeline", "scenes"),
    "image-to-text": ("pipelines.unified_image_to_text", "UnifiedImageToTextPipeline", "scenes"),
    "inpainting": ("pipelines.unified_inpaint", "UnifiedInpaintPipeline", "scenes"),
}
# Decodings of a task that are done by shipped weights of their own.
TASK_DECODINGS: dict[tuple[str, str], tuple[str, str, str]] = {
    ("text-to-image", "next_x"): ("pipelines.next_x_text_to_image", "NextXTextToImagePipeline", "scenes-next-x"),
}

def task_pipeline(task: str, *, decoding: str | None = None, **kwargs: Any) -> ARPipeline:
    """The pipeline of a task with the shipped weights.

    Args:
        decoding: a decoding that they offer, default next token: "neighboring", ... of the discrete model, or "next_x", which draws
            continuous tokens. `-` and `_` mean the same.
        kwargs: passed to the pipeline's `from_pretrained`.
    """
    own = None if decoding is None else TASK_DECODINGS.get((task, decoding.replace("-", "_")))
    module, class_name, folder = own or TASKS[task]
    if decoding is not None and own is None:
        kwargs["decoding"] = decoding
    return getattr(importlib.import_module(module), class_name).from_pretrained(weights.path(folder), **kwargs)


def task_decodings(task: str) -> list[str]:
    """The decodings that the shipped weights offer for a task, the default first."""
    folder = weights.path(TASKS[task][2])
    found = decodings.offered(folder, read_index(folder))
    return [*found, *(name for (of, name), (_, _, folder) in TASK_DECODINGS.items() if of == task and folder in weights.names())]
