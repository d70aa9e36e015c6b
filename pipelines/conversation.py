"""Texts with images in them: as ids, and as turns of a conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch

from .bpe import BPETokenizer
from .images import loaded

IMAGE = "<|image|>"  # stands for an image in a text


def encode_text(words: BPETokenizer, text: str, images: Sequence[list[int]] = ()) -> list[int]:
    """Ids of a text, `<|image|>` in it replaced by the ids of `images` in their order; images not mentioned come first."""
    if not isinstance(text, str):
        raise TypeError(f"a text must be a string, got {type(text).__name__}.")
    missing = len(images) - text.count(IMAGE)
    if missing < 0:
        raise ValueError(f"the text mentions {text.count(IMAGE)} images ({IMAGE}), but {len(images)} are given.")
    text = f"{IMAGE} " * missing + text
    blocks = iter(images)
    placeholder = words.id_of(IMAGE)
    if placeholder is not None:
        return [token for index in words.encode(text) for token in (next(blocks) if index == placeholder else [index])]
    pieces = [words.encode(piece) if piece else [] for piece in text.split(IMAGE)]
    ids = list(pieces[0])
    for piece in pieces[1:]:
        ids += [*next(blocks), *piece]
    return ids


def conversation(turns: Any) -> list[tuple[str, list[Any]]]:
    """The turns of a conversation as texts and their images.

    Args:
        turns: a list; each turn is a text, an image, a list of both, or a dict with such a "content". In a list, an image stands where
            it is, unless the texts say with `<|image|>` where.
    """
    if not isinstance(turns, (list, tuple)) or not turns:
        raise TypeError("a conversation must be a non-empty list of turns: texts, images, or lists of both.")
    read = []
    for turn in turns:
        content = turn.get("content") if isinstance(turn, Mapping) else turn
        parts = [_part(part) for part in (content if isinstance(content, (list, tuple)) else [content])]
        texts = [part for part in parts if isinstance(part, str)]
        if not any(IMAGE in text for text in texts):
            texts = [part if isinstance(part, str) else IMAGE for part in parts]
        read.append(("".join(texts), [part for part in parts if not isinstance(part, str)]))
    return read


def _part(part: Any) -> Any:
    """A piece of a turn: a text or an image, also as {"type": "text", "text": ...} or {"type": "image", "image": ...}."""
    if isinstance(part, Mapping):
        kind = part.get("type")
        if kind not in ("text", "image") or kind not in part:
            raise ValueError(
                f"a part of a turn must be {{'type': 'text' or 'image', ...}} with that entry, got {dict(part)}"
            )
        return part[kind]
    return part


def picture(image: Any) -> PIL.Image.Image:
    """A PIL image, an array [H, W, 3] or a tensor [3, H, W] (uint8, or floats in [0, 1]) as a PIL image."""
    if isinstance(image, PIL.Image.Image):
        return loaded(image)
    if isinstance(image, torch.Tensor) and image.is_floating_point():
        image = image.float()  # numpy has no bfloat16
    if isinstance(image, torch.Tensor) and image.dim() == 3 and image.shape[0] == 3:
        image = image.detach().cpu().permute(1, 2, 0).numpy()
    if isinstance(image, np.ndarray) and image.ndim == 3 and image.shape[2] == 3:
        if image.dtype == np.uint8:
            return PIL.Image.fromarray(image)
        if np.issubdtype(image.dtype, np.floating) and 0 <= image.min() and image.max() <= 1:
            return PIL.Image.fromarray((image * 255).round().astype(np.uint8))
    raise TypeError(
        "an image must be a PIL image, an array [H, W, 3] or a tensor [3, H, W], uint8 or floats in [0, 1], got "
        f"{type(image).__name__}."
    )
