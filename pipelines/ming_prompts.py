"""Conversations with Ming-UniVision (arXiv 2510.06590) as ids, and what the rows of its guidance see of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import PIL.Image

from .bpe import BPETokenizer
from .conversation import IMAGE, conversation
from .images import pictures

__all__ = ["SPECIAL_TOKENS", "MingPrompt", "build_prompt", "crop_square", "squash"]

# What the ids with a meaning are called in the authors' tokenizer.
SPECIAL_TOKENS = {"begin_image": "<image>", "image": "<imagePatch>", "end_image": "</image>", "eos": "<|endoftext|>"}
USER, ASSISTANT = "<role>HUMAN</role>", "<role>ASSISTANT</role>"


@dataclass
class MingPrompt:
    """One prompt.

    Args:
        ids: of its tokens; each image is `grid` places of the id of an image token.
        images: the pictures in order.
        request: (first, behind the last) of the tokens of the last thing the user said: what guidance hides.
    """

    ids: list[int]
    images: list[PIL.Image.Image] = field(default_factory=list)
    request: tuple[int, int] = (0, 0)

    def seen(self, image_ids: Sequence[int] = ()) -> list[bool]:
        """What a row of the guidance sees: all but the request, of which it sees the ids `image_ids` only."""
        low, high = self.request
        return [not low <= place < high or value in image_ids for place, value in enumerate(self.ids)]


def build_prompt(
    words: BPETokenizer, turns: Any, special: dict[str, int], tokens_per_image: int, draw: bool
) -> MingPrompt:
    """The prompt of a conversation, up to where the model answers.

    Args:
        turns: what the user and the model said, in turns, the user first and last; each a text, an image, or a list of both, see
            `pipelines.conversation`.
        special: ids by the names of `SPECIAL_TOKENS`.
        tokens_per_image: places of an image.
        draw: the answer is an image, which is begun.
    """
    said = conversation(turns)
    if not len(said) % 2:
        raise ValueError(f"a conversation must end with what the user says, got {len(said)} turns of user and model.")
    prompt = MingPrompt([])
    block = [special["begin_image"], *[special["image"]] * tokens_per_image, special["end_image"]]
    for number, (text, images) in enumerate(said):
        shown = pictures(images) if images else []
        if text.count(IMAGE) != len(shown):
            raise ValueError(
                f"turn {number} mentions {text.count(IMAGE)} images ({IMAGE}), but {len(shown)} are given."
            )
        prompt.ids += words.encode(ASSISTANT if number % 2 else USER)
        first = len(prompt.ids)
        pieces = text.split(IMAGE)
        prompt.ids += words.encode(pieces[0]) if pieces[0] else []
        for piece in pieces[1:]:
            prompt.ids += [*block, *words.encode("\n" + piece)]
        prompt.images += shown
        prompt.request = (first, len(prompt.ids))
    prompt.ids += words.encode(ASSISTANT)
    if draw:
        prompt.ids.append(special["begin_image"])
    return prompt


def crop_square(picture: PIL.Image.Image, side: int) -> PIL.Image.Image:
    """The middle of a picture whose shorter side is made `side` long: what is edited."""
    short = min(picture.size)
    width, height = (side if edge == short else int(side * edge / short) for edge in picture.size)
    small = picture.resize((width, height), PIL.Image.Resampling.BICUBIC)
    left, top = round((width - side) / 2), round((height - side) / 2)
    return small.crop((left, top, left + side, top + side))


def squash(picture: PIL.Image.Image, side: int) -> PIL.Image.Image:
    """A picture made square without regard to its shape: what is read."""
    return picture.resize((side, side), PIL.Image.Resampling.BICUBIC)
