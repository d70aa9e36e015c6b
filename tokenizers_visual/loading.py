"""Tokenizers of any class, from the folders that `save_pretrained` wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers_visual

from .base import VisualTokenizer

CONFIG_NAME = "config.json"


class NotATokenizerError(ValueError):
    """A folder of something else."""


def tokenizer_class(name: str) -> type[VisualTokenizer]:
    """The tokenizer class called `name`; a ValueError that lists them all if there is none."""
    if name in tokenizers_visual.__all__:
        found = getattr(tokenizers_visual, name)
        if isinstance(found, type) and issubclass(found, VisualTokenizer):
            return found
    raise NotATokenizerError(f"{name!r} is no visual tokenizer; there are {', '.join(tokenizer_classes())}.")


def tokenizer_classes() -> list[str]:
    """Names of all tokenizer classes but abstract ones, sorted."""
    public = ((name, getattr(tokenizers_visual, name)) for name in tokenizers_visual.__all__)
    return [
        name
        for name, found in public
        if isinstance(found, type) and issubclass(found, VisualTokenizer) and not _is_abstract(found)
    ]


def _is_abstract(kind: type) -> bool:
    return any(getattr(getattr(kind, name), "__isabstractmethod__", False) for name in vars(VisualTokenizer))


def load_tokenizer(folder: str | Path, dtype: Any = None) -> VisualTokenizer:
    """The tokenizer in `folder`, of the class that its config names, in eval mode. dtype: of the weights; None keeps the stored one.

    Raises:
        NotATokenizerError: a folder without a config, or of something else.
    """
    path = Path(folder) / CONFIG_NAME
    try:
        name = json.loads(path.read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NotATokenizerError(
            f"{folder} is no folder of a tokenizer: it has no readable {CONFIG_NAME} that names a class."
        ) from error
    options = {} if dtype is None else {"torch_dtype": dtype}
    return tokenizer_class(name).from_pretrained(folder, **options).eval()  # type: ignore[no-any-return]
