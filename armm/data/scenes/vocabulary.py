"""The closed vocabulary of the scenes' language, and its tokenizer: one token a word."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from functools import lru_cache

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel

from .graph import COLORS, LIGHTS, MATERIALS, SHAPES, SIZES

SPECIAL_TOKENS = ("<pad>", "<null>", "<image>", "<caption>", "<question>", "<answer>", "<end>")
_WORDS = (
    *SHAPES,
    *COLORS,
    *SIZES,
    *MATERIALS,
    *LIGHTS,
    *("ball", "box", "block", "little", "tiny", "big", "glossy", "dull"),
    *("zero", "one", "two", "three", "yes", "no"),
    *("spheres", "cubes", "cylinders", "cones", "object", "objects"),
    *("a", "an", "another", "the", "it", "and", "or", "with", "which", "is", "are", "there", "you", "see", "do"),
    *("to", "of", "on", "in", "at", "by", "during", "left", "right", "front", "behind", "daylight", "evening"),
    *("what", "where", "how", "many", "color", "shape", "size", "material", "time", "relative", "picture"),
)
VOCABULARY: list[str] = [*SPECIAL_TOKENS, *_WORDS]
MAX_CAPTION_TOKENS = 32
MAX_QUESTION_TOKENS = 20
MAX_ANSWER_TOKENS = 3
_PUNCTUATION = r"[.,;:!?\"'`()]"


@lru_cache(maxsize=1)
def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(VOCABULARY)}, unk_token="<pad>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(_PUNCTUATION), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def tokenize(text: str) -> list[int]:
    """Token ids of a text; case and punctuation do not matter.

    Raises:
        TypeError: not a string.
        ValueError: words outside the vocabulary (the message lists them with near matches).
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be a string, got {type(text).__name__}")
    tokenizer = _tokenizer()
    words = tokenizer.normalizer.normalize_str(text).split()
    unknown = [word for word in dict.fromkeys(words) if word not in _KNOWN]
    if unknown:
        hints = []
        for word in unknown:
            near = difflib.get_close_matches(word, VOCABULARY, n=3, cutoff=0.6)
            hints.append(f"{word!r}" + (f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""))
        raise ValueError(f"text holds unknown words: {', '.join(hints)}; known are: {', '.join(_WORDS)}")
    return tokenizer.encode(text).ids


def detokenize(ids: Iterable[int]) -> str:
    """The words of token ids, without special tokens, up to ``<end>``."""
    words = []
    for number in ids:
        if not 0 <= number < len(VOCABULARY):
            raise ValueError(f"ids must lie between 0 and {len(VOCABULARY) - 1}, got {number}")
        if VOCABULARY[number] == "<end>":
            break
        if VOCABULARY[number] not in SPECIAL_TOKENS:
            words.append(VOCABULARY[number])
    return " ".join(words)


_KNOWN = frozenset(VOCABULARY)
