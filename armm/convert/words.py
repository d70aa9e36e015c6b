"""What lies beside the weights of a published language model: its text tokenizer, `tokenizer.json` as it is or sentencepiece's
`tokenizer.model` through transformers, and its `config.json`."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.bpe import BPETokenizer

from . import llama
from .facts import read_options
from .folders import read_json


def load_words(places: Sequence[Path]) -> BPETokenizer | None:
    """The text tokenizer in the first of the folders or files `places` that has one; None where none has.

    Raises:
        ValueError: there is only a `tokenizer.model`, and transformers, which converts it, is not installed.
    """
    for place in places:
        file = place / "tokenizer.json" if place.is_dir() else place
        if file.suffix == ".json" and file.is_file():
            return BPETokenizer.from_file(file)
        folder = place if place.is_dir() else place.parent
        if (folder / "tokenizer.model").is_file():
            if importlib.util.find_spec("transformers") is None:
                raise ValueError(
                    f"{folder / 'tokenizer.model'} is read with transformers: pip install armm[transformers], or pass `text_tokenizer=`."
                )
            from transformers import AutoTokenizer

            return BPETokenizer.from_string(AutoTokenizer.from_pretrained(folder).backend_tokenizer.to_str())
    return None


def published_options(file: Path) -> dict[str, Any]:
    """What transformers' `config.json` says of a language model, where there is one."""
    values = read_json(file) if file.is_file() else {}
    if values.get("rope_scaling"):
        raise ValueError(
            f"{file} asks for scaled rotary positions ({values['rope_scaling']!r}), which are not supported."
        )
    return {name: value for name, value in values.items() if name in llama.OPTION_NAMES}


def llama_options(config: Any) -> dict[str, Any]:
    """Options under transformers' names or ours as a dict."""
    return read_options(config, llama.OPTION_NAMES, llama.OPTIONS)
