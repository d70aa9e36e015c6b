"""`UnifiedImageToTextPipeline`: describes a picture, or answers a question about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import PIL.Image
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import replace_example_docstring

from armm.decoding.beam import BeamSearch

from .images import images_to_pixels
from .outputs import ARTextOutput
from .understanding import Reading, UnderstandingPipeline
from .unified import UnifiedPipeline

__all__ = ["DiffusionPipeline", "UnifiedImageToTextPipeline"]

_HOLE = "..."

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import armm
        >>> from PIL import Image

        >>> pipe = armm.pipeline("image-to-text")
        >>> image = Image.open("scene.png")
        >>> pipe(image).texts[0]
        >>> pipe(image, "what color is the cube?").texts[0]
        ```
"""


class UnifiedImageToTextPipeline(UnderstandingPipeline, UnifiedPipeline):
    """Reads images: a caption, or the answer to a question."""

    pads_readings = False  # no padding, so a text does not depend on what it is batched with

    @property
    def stop_id(self) -> int:
        return self.words.end

    @property
    def text_range(self) -> tuple[int, int]:
        return 0, len(self.words)

    def decode_words(self, ids: Sequence[int]) -> str:
        return self.words.decode(ids)

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        image: Any,
        question: str | list[str] | None = None,
        caption: str | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        search: BeamSearch | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ARTextOutput | tuple:
        """Reads.

        Args:
            image: a PIL image, an array [H, W, 3] or [B, H, W, 3], a tensor [3, H, W] or [B, 3, H, W] (uint8, or floats in
                [0, 1]), or a list of them. Another size than the model's is cropped in the middle and resized.
            question (`str` or `list[str]`, *optional*): asked about each image; a list holds one question for each image, or
                several about one image. Without it the images are described.
            caption (`str`, *optional*): a caption with one hole, written `...`, to be filled with what the images show: "a small ...
                cube". For models that know holes; each image's caption is returned whole.
            max_new_tokens (`int`, *optional*): longest text; by default as long as the model can say.
            temperature (`float`, *optional*, defaults to 0): 0 says the likeliest word.
            top_k, top_p: filters of the draw when `temperature` is above 0.
            search (`BeamSearch` or `OPERA`, *optional*): looks for the likeliest text with several beams.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): one for the call, or one for each text.
            return_dict (`bool`, *optional*, defaults to `True`): return an `ARTextOutput` rather than a tuple.
            callback_on_step_end (`Callable`, *optional*): called as `callback(pipe, step, timestep, tensors)` after each
                token of a group of texts whose questions are equally long; `"latents"` are the token ids so far.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*): what the callback is given: `"latents"`.

        Examples:

        Returns:
            [`ARTextOutput`] or `tuple`: one text for each image or question.
        """
        return self.answer(
            partial(self.readings, image, question, caption=caption, max_new_tokens=max_new_tokens),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            search=search,
            generator=generator,
            return_dict=return_dict,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            finish=str.strip if caption is None else partial(_filled, caption),
        )

    def ask(self, image: Any, question: Any = None, **options: Any) -> ARTextOutput:
        """The call, by the name that all pipelines share that read."""
        return self(image, question, **options)  # type: ignore[return-value]

    def seen(self, image: Any) -> PIL.Image.Image:
        pixels = images_to_pixels(image, self.image_size)[:1]
        return self.pixels_to_images(pixels, "pil")[0]  # type: ignore[return-value]

    def readings(
        self,
        image: Any,
        question: str | list[str] | None = None,
        *,
        caption: str | None = None,
        max_new_tokens: int | None = None,
    ) -> list[Reading]:
        """The prompts of a call."""
        if caption is not None and question is not None:
            raise ValueError("`caption` and `question` exclude each other: fill a caption, or ask.")
        segments = self._segments(question) if caption is None else [self._holed(caption)]
        slots = self.transformer.answer_slots + 1
        if max_new_tokens is not None:
            room = slots - max(len(ids) for ids in segments)
            self.check_number("max_new_tokens", max_new_tokens, low=1, high=room, integer=True)
        codes, segments = _pair(self.encode_image(image), segments, question)
        model, prefix = self.transformer, self.null_prefix(1)
        first = prefix.shape[1]
        end = first + model.image_index().numel()
        readings = []
        for row, segment in zip(codes, segments, strict=True):
            asked = torch.tensor([segment], device=codes.device)
            condition = model.reading_condition(prefix, row[None] + len(self.words), asked)
            ids = [*prefix[0].tolist(), *[-1] * (end - first), *segment]
            question_span = (end + 1, end + max(len(segment) - 1, 1))
            readings.append(
                Reading(condition, ids, [(first, end)], [model.trunk_grid()], question_span, slots - len(segment))
            )
        return readings

    def _holed(self, caption: Any) -> list[int]:
        """What a caption with a hole is written as (see `armm.decoding.infilling`), up to where the hole's words start."""
        words = self.words
        if not isinstance(caption, str):
            raise TypeError(f"`caption` must be a string, got {type(caption).__name__}.")
        if not words.holes:
            raise ValueError("`caption` needs a model that was trained to fill holes; this one has no sentinels.")
        parts = caption.split(_HOLE)
        if len(parts) != 2:
            raise ValueError(f"`caption` must hold one hole, written {_HOLE!r}, got {caption!r}.")
        before, after = ([] if not words.split(part) else words.encode(part, "caption") for part in parts)
        limit = self.transformer.answer_slots - 5
        if len(before) + len(after) > limit:
            raise ValueError(
                f"`caption` has {len(before) + len(after)} words besides the hole; this model takes {limit}."
            )
        return [words.caption, *before, words.holes[0], *after, words.end, words.holes[0]]

    def _segments(self, question: Any) -> list[list[int]]:
        """What follows the image: the ids that open a caption, or questions up to where their answers start."""
        if question is None:
            return [[self.words.caption]]
        asked = [question] if isinstance(question, str) else question
        if not isinstance(asked, (list, tuple)):
            raise TypeError(f"`question` must be a string or a list of strings, got {type(question).__name__}.")
        if not asked:
            raise ValueError("`question` is an empty list: give at least one question, or None for a caption.")
        limit = self.transformer.answer_slots - 2
        encoded = [self.words.encode(text, "question", limit) for text in asked]
        return [[self.words.question, *ids, self.words.answer] for ids in encoded]


def _filled(caption: str, text: str) -> str:
    """`caption` with `text` in its hole."""
    before, after = caption.split(_HOLE)
    return " ".join(f"{before} {text} {after}".split())


def _pair(codes: torch.Tensor, segments: list[list[int]], question: Any) -> tuple[torch.Tensor, list[list[int]]]:
    """As many images as texts: one question for all images, or several questions about one image."""
    if len(segments) == 1:
        return codes, segments * len(codes)
    if len(codes) == 1:
        return codes.repeat(len(segments), 1), segments
    if len(codes) != len(segments):
        raise ValueError(
            f"`question` has {len(segments)} questions for {len(codes)} images: give one for all, one for each image, or one image."
        )
    return codes, segments
