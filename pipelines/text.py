"""Words of a unified text-and-image vocabulary: a closed list of words, each one token.

Token ids `0 .. len(vocabulary) - 1` are the special tokens and the words, in the order of the list; the visual codes follow.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel

# What separates the parts of a sequence; they lead the vocabulary.
PAD, NULL, IMAGE, CAPTION, QUESTION, ANSWER, END = SPECIAL_TOKENS = (
    "<pad>",
    "<null>",
    "<image>",
    "<caption>",
    "<question>",
    "<answer>",
    "<end>",
)
# What stands for a hole, by its number; models that fill holes know some of them.
HOLE = "<mask:{}>"
_PUNCTUATION = r"[.,;:!?\"'`()]"


class WordTokenizer:
    """Text <-> ids of a closed vocabulary; case and punctuation do not matter.

    Args:
        vocabulary: the special tokens and the words; a word's index is its id.

    Attributes:
        holes: ids of the sentinels `<mask:0>`, `<mask:1>`, ... that the vocabulary has.
    """

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self.vocabulary = list(vocabulary)
        ids = {word: index for index, word in enumerate(self.vocabulary)}
        if len(ids) != len(self.vocabulary):
            raise ValueError("`vocabulary` lists a word twice: each word must have one id.")
        missing = [token for token in SPECIAL_TOKENS if token not in ids]
        if missing:
            raise ValueError(f"`vocabulary` lacks the special tokens {', '.join(missing)}.")
        self.pad, self.null, self.image, self.caption, self.question, self.answer, self.end = (
            ids[token] for token in SPECIAL_TOKENS
        )
        self.holes: list[int] = []
        while HOLE.format(len(self.holes)) in ids:
            self.holes.append(ids[HOLE.format(len(self.holes))])
        self._special = {*(ids[token] for token in SPECIAL_TOKENS), *self.holes}
        self.words = [word for word, index in ids.items() if index not in self._special]
        self._known = set(self.words)
        self._tokenizer = Tokenizer(WordLevel(ids, unk_token=PAD))
        self._tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Lowercase(), normalizers.Replace(Regex(_PUNCTUATION), " ")]
        )
        self._tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()

    def __len__(self) -> int:
        return len(self.vocabulary)

    def split(self, text: str) -> list[str]:
        """The words of a text as the model sees them: lower case, without punctuation."""
        normalized = self._tokenizer.normalizer.normalize_str(text)
        return normalized.split()

    def encode(self, text: Any, name: str = "text", limit: int | None = None) -> list[int]:
        """Ids of a text.

        Args:
            text: what a person wrote.
            name: of the argument that held it, for error messages.
            limit: largest number of words.

        Raises:
            TypeError: not a string.
            ValueError: no words, unknown words (with near matches), or more than `limit` words.
        """
        if not isinstance(text, str):
            raise TypeError(f"`{name}` must be a string or a list of strings, got {type(text).__name__}.")
        words = self.split(text)
        if not words:
            raise ValueError(f"`{name}` is empty: describe a scene, for example 'a red cube', got {text!r}.")
        unknown = list(dict.fromkeys(word for word in words if word not in self._known))
        if unknown:
            raise ValueError(
                f"`{name}` holds {self._unknown(unknown)} in {text!r}. Known words: {', '.join(self.words)}."
            )
        if limit is not None and len(words) > limit:
            raise ValueError(
                f"`{name}` has {len(words)} words, but this model reads at most {limit}: shorten {text!r}."
            )
        return self._tokenizer.encode(" ".join(words)).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts that are known to be within the vocabulary."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]

    def decode(self, ids: Iterable[int]) -> str:
        """The words of ids up to the end token, without special tokens."""
        words = []
        for index in ids:
            if index == self.end:
                break
            if 0 <= index < len(self.vocabulary) and index not in self._special:
                words.append(self.vocabulary[index])
        return " ".join(words)

    def _unknown(self, words: list[str]) -> str:
        parts = []
        for word in words:
            near = difflib.get_close_matches(word, self.words, n=3, cutoff=0.6)
            parts.append(f"{word!r} (did you mean {' or '.join(map(repr, near))}?)" if near else repr(word))
        return f"the unknown word{'s' if len(words) > 1 else ''} {', '.join(parts)}"
