"""Texts of Janus, and reading: conversations about images (arXiv 2410.13848)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import PIL.Image
import torch
from diffusers import DiffusionPipeline

from armm.decoding.beam import BeamSearch

from .chat import TEMPLATES, UNDERSTANDING_PROMPT, expand_images
from .images import pictures, square_pixels
from .outputs import ARTextOutput
from .understanding import Reading, UnderstandingPipeline

__all__ = ["DiffusionPipeline", "JanusReading", "SPECIAL_TOKENS", "flat", "id_rows", "paired"]

# What the ids with a meaning are called in the authors' tokenizer.
SPECIAL_TOKENS = {
    "bos": "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
    "eos": "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "pad": "<\uff5c\u2581pad\u2581\uff5c>",
    "image": "<image_placeholder>",
    "begin_image": "<begin_of_image>",
    "end_image": "<end_of_image>",
}


class JanusReading(UnderstandingPipeline):
    """The half of `JanusPipeline` that deals with texts and reads images."""

    image_encoder: Any
    text_tokenizer: Any
    special_ids: dict[str, int]

    # ------------------------------------------------------------------ texts

    @property
    def stop_id(self) -> int:
        return self.special_ids["eos"]

    @property
    def text_range(self) -> tuple[int, int]:
        return self.transformer.text_range

    def decode_words(self, ids: Sequence[int]) -> str:
        if self.text_tokenizer is None:
            return " ".join(map(str, ids))
        return self.text_tokenizer.decode(list(ids), skip_special_tokens=True)

    def format(self, messages: Sequence[Mapping[str, Any]], system_prompt: str = "") -> str:
        """The text of a conversation, see `ChatTemplate.format`."""
        return TEMPLATES[self.config.template].format(messages, system_prompt, SPECIAL_TOKENS["eos"])

    def encode_words(self, text: str) -> list[int]:
        """Ids of a text, the first of which begins the sentence."""
        if self.text_tokenizer is None:
            raise ValueError(
                "this pipeline has no `text_tokenizer`: give `prompt_ids`, or load it with transformers installed "
                "(pip install armm[transformers])."
            )
        ids = list(self.text_tokenizer.encode(text))
        # An early tokenizer of the authors did not begin the sentence, and guidance fell apart without it.
        return ids if ids[:1] == [self.special_ids["bos"]] else [self.special_ids["bos"], *ids]

    def pad(self, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids int64 [B, T] of rows of different lengths, padded on the left, and where they are real, bool [B, T]."""
        length = max(len(row) for row in rows)
        ids = torch.full((len(rows), length), self.special_ids["pad"], dtype=torch.long)
        real = torch.zeros(len(rows), length, dtype=torch.bool)
        for number, row in enumerate(rows):
            ids[number, length - len(row) :] = torch.tensor(list(row))
            real[number, length - len(row) :] = True
        device = self._execution_device
        return ids.to(device), real.to(device)

    def check_row(self, row: list[int]) -> list[int]:
        """`row` of ids, if it lies in the vocabulary and leaves room in the context."""
        limit = self.transformer.max_positions
        if len(row) < 2 or min(row) < 0 or max(row) >= self.transformer.text_vocab_size:
            raise ValueError(f"ids must lie in 0 .. {self.transformer.text_vocab_size - 1}, at least two of them.")
        if len(row) >= limit:
            raise ValueError(f"the prompt has {len(row)} tokens, this model takes less than {limit}: shorten it.")
        return row

    # ------------------------------------------------------------------ reading

    def preprocess(self, image: Any) -> torch.Tensor:
        """Images in any form (see `pictures`) as what the image encoder takes: float32 [B, 3, S, S]."""
        config = self.image_encoder.config
        return square_pixels(image, config.image_size, config.image_mean, config.image_std, config.min_size)

    def seen(self, image: Any) -> PIL.Image.Image:
        size = self.image_encoder.image_size
        pixels = square_pixels(image, size, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), self.image_encoder.config.min_size)[:1]
        return self.pixels_to_images(pixels, "pil")[0]  # type: ignore[return-value]

    def readings(
        self,
        image: Any = None,
        question: str | Sequence[str] | None = None,
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        prompt_ids: Any = None,
        system_prompt: str = UNDERSTANDING_PROMPT,
    ) -> list[Reading]:
        """The prompts of a call of `chat`."""
        shown = [] if image is None else list(image) if isinstance(image, (list, tuple)) else [image]
        if sum(value is not None for value in (question, messages, prompt_ids)) != 1:
            raise ValueError("give one of `question`, `messages` or `prompt_ids`.")
        if prompt_ids is not None:
            rows = id_rows(prompt_ids)
        elif messages is not None:
            rows = [self.encode_words(self.format(_placed(messages, len(flat(shown))), system_prompt))]
        else:
            rows = []
            for text, seen in zip(*paired(question, shown), strict=True):
                turn = _placed(
                    [{"role": "user", "content": text}, {"role": "assistant", "content": ""}], len(flat(seen))
                )
                rows.append(self.encode_words(self.format(turn, system_prompt)))
            shown = [picture for seen in paired(question, shown)[1] for picture in flat(seen)]
        return self.reading_rows(rows, flat(shown))

    def reading_rows(self, rows: Sequence[Sequence[int]], images: Sequence[Any]) -> list[Reading]:
        """Readings of rows of ids, in which each image token stands for the next one of `images`."""
        special, found = self.special_ids, [list(row).count(self.special_ids["image"]) for row in rows]
        if sum(found) != len(images):
            raise ValueError(f"the prompts mention {sum(found)} images, {len(images)} were given.")
        features = None
        if len(images):
            # One image at a time: its features do not depend on what it is batched with, bit for bit.
            pixels = [self.preprocess(item).to(self._execution_device) for item in images]
            features = torch.cat([self.image_encoder.encode(item) for item in pixels])
        count, grid = self.image_encoder.num_tokens, self.image_encoder.grid
        readings, first = [], 0
        for row, number in zip(rows, found, strict=True):
            ids = expand_images(row, special["image"], special["begin_image"], special["end_image"], count)
            self.check_row(ids)
            tensor = torch.tensor([ids], device=self._execution_device)
            own = None if not number or features is None else features[first : first + number]
            first += number
            places = None if own is None else tensor == special["image"]
            condition = self.transformer.prompt_condition(tensor, None, own, places)
            starts = [i for i, value in enumerate(ids) if value == special["image"]][:: max(count, 1)]
            readings.append(
                Reading(
                    condition,
                    ids,
                    [(start, start + count) for start in starts],
                    [grid] * number,
                    (starts[-1] + count + 1 if starts else 0, len(ids) - 1),
                    self.transformer.max_positions - len(ids),
                )
            )
        return readings

    @torch.no_grad()
    def chat(
        self,
        image: Any = None,
        question: str | Sequence[str] | None = None,
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        prompt_ids: Any = None,
        system_prompt: str = UNDERSTANDING_PROMPT,
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
        r"""Answers questions about images, or continues a conversation.

        Args:
            image (*optional*): a PIL image, an array or a tensor (see `pictures`), or a list of them: all shown together to one
                question, or one for each of several (a list in the list shows several to its question). With `messages` or
                `prompt_ids` it lists all images in their order.
            question (`str` or `list[str]`, *optional*): asked about the image; several go in one batch.
            messages (`list[dict]`, *optional*): a conversation, `{"role": "user" or "assistant", "content": text}`; where its texts
                say `<image_placeholder>` an image is shown, otherwise all images come first.
            prompt_ids (`list` or `torch.Tensor`, *optional*): ids in place of texts, with one image token for each image.
            system_prompt (`str`, *optional*): in front of the conversation.
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
            partial(
                self.readings, image, question, messages=messages, prompt_ids=prompt_ids, system_prompt=system_prompt
            ),
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


def id_rows(ids: Any) -> list[list[int]]:
    """Ids given as one row or several, as lists."""
    values = ids.tolist() if isinstance(ids, torch.Tensor) else list(ids)
    rows = [values] if values and not isinstance(values[0], (list, tuple, torch.Tensor)) else values
    rows = [row.tolist() if isinstance(row, torch.Tensor) else list(row) for row in rows]
    if not rows or not all(row and all(isinstance(value, int) for value in row) for row in rows):
        raise TypeError("`prompt_ids` must be ids, or a list of lists of ids, none of them empty.")
    return rows


def flat(images: Any) -> list[Any]:
    """Pictures of anything that holds images."""
    items = list(images) if isinstance(images, (list, tuple)) else [images]
    return pictures(items) if items else []


def paired(question: Any, shown: list[Any]) -> tuple[list[str], list[Any]]:
    """As many questions as (groups of) images: one question about each image, or several about one."""
    asked = [question] if isinstance(question, str) else question
    if not isinstance(asked, (list, tuple)) or not all(isinstance(text, str) for text in asked):
        raise TypeError(f"`question` must be a string or a list of strings, got {type(question).__name__}.")
    if not asked or not all(text.strip() for text in asked):
        raise ValueError("`question` is empty: ask something.")
    if not shown:
        return list(asked), [[] for _ in asked]
    if len(asked) == 1:
        # One question about all the images at once.
        return list(asked), [shown]
    if len(shown) == 1:
        return list(asked), shown * len(asked)
    if len(shown) != len(asked):
        raise ValueError(
            f"`question` has {len(asked)} questions for {len(shown)} images: give one for each image, or one image or question."
        )
    return list(asked), shown


def _placed(messages: Sequence[Mapping[str, Any]], images: int) -> list[dict[str, Any]]:
    """`messages` with a placeholder for each of the images, in front of the first turn where the texts have none."""
    token = SPECIAL_TOKENS["image"]
    if not isinstance(messages, (list, tuple)) or not messages:
        raise TypeError("`messages` must be a non-empty list of {'role', 'content'}.")
    placed = [dict(message) for message in messages]
    if images and not any(token in str(message.get("content")) for message in placed):
        placed[0]["content"] = f"{token}\n" * images + str(placed[0].get("content"))
    if placed[-1].get("role") not in ("assistant", "<|Assistant|>", "Assistant"):
        placed.append({"role": "assistant", "content": ""})
    return placed
