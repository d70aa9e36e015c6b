"""Texts of Ming-UniVision, and reading: conversations about images (arXiv 2510.06590)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import PIL.Image
import torch
from diffusers import DiffusionPipeline

from armm.condition import Condition, concatenate
from armm.decoding.acceleration import Acceleration
from armm.decoding.beam import BeamSearch

from .images import images_to_pixels, pictures
from .janus_reading import flat, paired
from .ming_prompts import MingPrompt, build_prompt, crop_square, squash
from .outputs import ARTextOutput
from .understanding import Reading, UnderstandingPipeline

__all__ = ["DiffusionPipeline", "MingReading"]


class MingReading(UnderstandingPipeline):
    """The half of `MingUniVisionPipeline` that deals with texts and reads images."""

    tokenizer: Any
    text_tokenizer: Any
    special_ids: dict[str, int]
    # Routers go by the place of a token, which pruning would change.
    _accelerations: ClassVar[tuple[type[Acceleration], ...]] = ()

    # ------------------------------------------------------------------ texts

    def special(self, name: str) -> int:
        """The id with the meaning `name`; a ValueError where neither `special_ids` nor the text tokenizer has it."""
        if name not in self.special_ids:
            raise ValueError(
                f"this pipeline does not know the id of {name!r}: give it in `special_ids`, or a `text_tokenizer`."
            )
        return self.special_ids[name]

    @property
    def stop_id(self) -> int:
        return self.special("eos")

    @property
    def text_range(self) -> tuple[int, int]:
        return self.transformer.text_range

    def decode_words(self, ids: Sequence[int]) -> str:
        if self.text_tokenizer is None:
            return " ".join(map(str, ids))
        return self.text_tokenizer.decode(ids)

    def prompt(self, turns: Any, *, draw: bool = False) -> MingPrompt:
        """The prompt of a conversation, see `build_prompt`; images are those to edit if `draw`, else those to read."""
        if self.text_tokenizer is None:
            raise ValueError("this pipeline has no `text_tokenizer`: give it one, or make `MingPrompt`s of ids.")
        special = {name: self.special(name) for name in ("begin_image", "image", "end_image")}
        height, width = self.image_grid(draw)
        return build_prompt(self.text_tokenizer, turns, special, height * width, draw)

    # ------------------------------------------------------------------ images in prompts

    def image_grid(self, draw: bool) -> tuple[int, int]:
        """(height, width) in tokens of an image in a prompt: one that is edited if `draw`, else one that is read."""
        side = self.tokenizer.config.image_size if draw else self.config.reading_size
        return (side // self.tokenizer.downsample,) * 2

    def preprocess(self, image: Any, *, draw: bool = False) -> torch.Tensor:
        """Images in any form (see `pictures`) as pixels float32 [B, 3, S, S] in [-1, 1]: cropped for editing, squashed for reading."""
        step = self.tokenizer.downsample
        height, width = (side * step for side in self.image_grid(draw))
        prepare = crop_square if draw else squash
        return images_to_pixels([prepare(item, height) for item in pictures(image)], (height, width))

    def seen(self, image: Any) -> PIL.Image.Image:
        return self.pixels_to_images(self.preprocess(image)[:1], "pil")[0]  # type: ignore[return-value]

    def prompt_condition(self, prompt: MingPrompt, pixels: torch.Tensor | None = None) -> Condition:
        """A prompt as a condition; pixels [images, 3, H, W] of its images."""
        limit, words = self.transformer.max_positions, self.transformer.text_vocab_size
        if not prompt.ids or min(prompt.ids) < 0 or max(prompt.ids) >= words:
            raise ValueError(f"ids must lie in 0 .. {words - 1}, at least one of them.")
        if len(prompt.ids) >= limit:
            raise ValueError(
                f"the prompt has {len(prompt.ids)} tokens, this model takes less than {limit}: shorten it."
            )
        ids = torch.tensor([prompt.ids], device=self._execution_device)
        if pixels is None:
            return self.transformer.prompt_condition(ids)
        # One image at a time: its features do not depend on what it is batched with, bit for bit.
        shown = [self.tokenizer.features(item[None].to(self._execution_device)) for item in pixels]
        return self.transformer.prompt_condition(ids, None, torch.cat(shown), ids == self.special("image"))

    def conditions(self, prompts: Sequence[MingPrompt], *, draw: bool) -> Condition:
        """Prompts with their images as one condition, padded on the left."""
        parts = []
        for prompt in prompts:
            pixels = self.preprocess(prompt.images, draw=draw) if prompt.images else None
            parts.append(self.prompt_condition(prompt, pixels))
        return concatenate(parts)

    # ------------------------------------------------------------------ reading

    def readings(self, image: Any = None, question: Any = None, *, messages: Any = None) -> list[Reading]:
        """The prompts of a call of `chat`."""
        if (question is None) == (messages is None) or (messages is not None and image is not None):
            raise ValueError("give either `question` (with images or without) or `messages`, which hold their images.")
        if messages is not None:
            prompts = [self.prompt(messages)]
        else:
            shown = [] if image is None else list(image) if isinstance(image, (list, tuple)) else [image]
            rows = zip(*paired(question, shown), strict=True)
            prompts = [self.prompt([[*flat(seen), text]]) for text, seen in rows]
        return [self.reading(prompt) for prompt in prompts]

    def reading(self, prompt: MingPrompt) -> Reading:
        """One prompt, ready to be continued."""
        condition = self.conditions([prompt], draw=False)
        grid = self.image_grid(False)
        count = grid[0] * grid[1]
        starts = [place for place, value in enumerate(prompt.ids) if value == self.special_ids.get("image")][::count]
        low, high = prompt.request
        behind = max([start + count + 1 for start in starts if low <= start < high], default=low)
        return Reading(
            condition,
            prompt.ids,
            [(start, start + count) for start in starts],
            [grid] * len(starts),
            (behind, high),
            self.transformer.max_positions - len(prompt.ids),
        )

    @torch.no_grad()
    def chat(
        self,
        image: Any = None,
        question: str | Sequence[str] | None = None,
        *,
        messages: Any = None,
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
        r"""Answers questions about images in words, or continues a conversation.

        Args:
            image (*optional*): a PIL image, an array or a tensor (see `pictures`), or a list of them: all shown together to one
                question, or one for each of several (a list in the list shows several to its question).
            question (`str` or `list[str]`, *optional*): asked about the image; several go in one batch.
            messages (`list`, *optional*): a conversation instead, in turns of user and model; each is a text, an image, a list of both, or
                a dict with such a "content".
            max_new_tokens (`int`, *optional*): longest text; by default the checkpoint's.
            temperature (`float`, *optional*, defaults to 0): 0 says the likeliest token.
            top_k, top_p: filters of the draw when `temperature` is above 0.
            search (`BeamSearch` or `OPERA`, *optional*): looks for the likeliest text with several beams.
            generator (`torch.Generator` or `list`, *optional*): one for the call, or one for each text.
            return_dict (`bool`, *optional*, defaults to `True`): return an `ARTextOutput` rather than a tuple.
            callback_on_step_end (`Callable`, *optional*): called as `callback(pipe, step, timestep, tensors)` after each token;
                `"latents"` are the ids so far.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*): what the callback is given: `"latents"`.

        Returns:
            [`ARTextOutput`] or `tuple`: one text for each question.
        """
        return self.answer(
            partial(self.readings, image, question, messages=messages),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            search=search,
            generator=generator,
            return_dict=return_dict,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
