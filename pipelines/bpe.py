"""`BPETokenizer`: text <-> ids by a file of the `tokenizers` library, as a component that a pipeline saves and loads."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from tokenizers import Tokenizer

__all__ = ["BPETokenizer", "SchedulerMixin"]

FILE_NAME = "tokenizer.json"


class BPETokenizer(SchedulerMixin, ConfigMixin):
    """The tokenizer of a published model, without special tokens added on its own.

    Made by `from_file` or `from_pretrained`; the constructor alone has no vocabulary.
    """

    config_name = "text_tokenizer_config.json"

    @register_to_config
    def __init__(self) -> None:
        self._tokenizer: Tokenizer | None = None

    @classmethod
    def from_file(cls, path: Any) -> BPETokenizer:
        """From a JSON file of the `tokenizers` library; another file is a ValueError."""
        return cls.from_string(Path(path).read_text(encoding="utf-8"), str(path))

    @classmethod
    def from_string(cls, content: str, name: str = "the text tokenizer") -> BPETokenizer:
        """From the content of such a file."""
        self = cls()
        try:
            self._tokenizer = Tokenizer.from_str(content)
        except Exception as error:  # the library raises plain Exceptions
            raise ValueError(f"{name} is not a file of the tokenizers library ({error}).") from error
        return self

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, subfolder: str | None = None, **kwargs: Any) -> Any:
        """From a folder that `save_pretrained` wrote."""
        folder = Path(pretrained_model_name_or_path) / (subfolder or "")
        if not (folder / FILE_NAME).is_file():
            raise ValueError(f"{folder} holds no {FILE_NAME}.")
        return cls.from_file(folder / FILE_NAME)

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.save_config(folder)
        (folder / FILE_NAME).write_text(self.tokenizer.to_str(), encoding="utf-8")

    @property
    def tokenizer(self) -> Tokenizer:
        """The `tokenizers.Tokenizer` itself."""
        if self._tokenizer is None:
            raise ValueError("this text tokenizer is empty: make it with BPETokenizer.from_file(path).")
        return self._tokenizer

    @property
    def vocabulary(self) -> dict[str, int]:
        """Name -> id of all tokens, added ones included."""
        return self.tokenizer.get_vocab(with_added_tokens=True)

    def __len__(self) -> int:
        return self.tokenizer.get_vocab_size(with_added_tokens=True)

    def id_of(self, name: str) -> int | None:
        """Id of the token `name`, None where there is none."""
        return self.tokenizer.token_to_id(name)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, no special tokens around it."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)
