"""What the pipelines share that draw captions in a closed vocabulary out of continuous tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline

from .continuous import ContinuousPipeline
from .text import WordTokenizer

__all__ = ["CaptionedPipeline", "DiffusionPipeline"]


class CaptionedPipeline(ContinuousPipeline):
    """Base of these pipelines, to be named before the one that draws. The transformer has `vocab_size` words and `text_length` slots
    for them."""

    def register_vocabulary(self, vocabulary: list[str] | None, transformer: Any) -> None:
        """Keeps the words of the model; a ValueError unless they are as many as the transformer knows."""
        if not vocabulary:
            raise ValueError("`vocabulary` must list the words of the model: it is kept in model_index.json.")
        if transformer is not None and transformer.vocab_size != len(vocabulary):
            raise ValueError(
                f"`transformer` knows {transformer.vocab_size} words, `vocabulary` lists {len(vocabulary)}: they do not belong together."
            )
        self.register_to_config(vocabulary=list(vocabulary))
        self.words = WordTokenizer(vocabulary)

    def conditions(self, request: Any, num_images_per_prompt: int) -> tuple[int, Callable[[], Any], Callable[[], Any]]:
        """The number of images of prompts, and what makes their condition and what stands for none."""
        prompts = [request] if isinstance(request, str) else request
        if not isinstance(prompts, (list, tuple)):
            raise TypeError(f"`prompt` must be a string or a list of strings, got {type(request).__name__}.")
        if not prompts:
            raise ValueError("`prompt` is an empty list: give at least one prompt.")
        slots = self.transformer.text_length
        rows = [self.words.encode(text, "prompt", slots) for text in prompts for _ in range(num_images_per_prompt)]

        def condition(rows: list[list[int]]) -> Any:
            padded = [ids + [self.words.pad] * (slots - len(ids)) for ids in rows]
            return self.transformer.caption_condition(torch.tensor(padded, device=self._execution_device))

        return len(rows), lambda: condition(rows), lambda: condition([[self.words.null]] * len(rows))
