"""The vocabulary of the Chameleon family: which ids stand for image codes, and which frame an image.

The names of image tokens are `IMGIMG`, the code's decimal digits written A .. J, and `Z`. `<reservedNNNNN>` are spare ids that
Lumina-mGPT gave a meaning.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from armm.decoding.vocabulary import ImageBlock

from .containers import CheckpointError
from .folders import read_json

BEGIN, END, END_OF_LINE = "<racm3:break>", "<eoss>", "<reserved08799>"
END_OF_TURN = "<reserved08706>"
_SIZE, _MAX_SIZE = 8800, 64
_DIGITS = str.maketrans("ABCDEFGHIJ", "0123456789")


def read_vocabulary(path: Any) -> dict[str, int]:
    """Name -> id in a file of `tokenizers` (model and added tokens), or in the `vocabulary_map` of a `config.json`."""
    path = Path(path)
    content = read_json(path)
    words = content.get("vocabulary_map") or (content.get("model") or {}).get("vocab")
    if not isinstance(words, Mapping) or not words:
        raise CheckpointError(
            f"{path} holds no vocabulary: neither model.vocab (tokenizers) nor vocabulary_map (config.json)."
        )
    added = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
    return {**words, **added}


def code_of(name: str) -> int | None:
    """The code that an image token's name stands for, None for other names."""
    if not (name.startswith("IMGIMG") and name.endswith("Z")):
        return None
    digits = name[len("IMGIMG") : -1].translate(_DIGITS)
    return int(digits) if digits.isdecimal() else None


def code_runs(vocabulary: Mapping[str, int]) -> list[tuple[int, int]]:
    """Ids of the codes 0, 1, 2, ... as runs (first id, how many); empty where the vocabulary names none."""
    ids = {code: index for name, index in vocabulary.items() if (code := code_of(name)) is not None}
    if set(ids) != set(range(len(ids))):
        missing = sorted(set(range(max(ids) + 1)) - set(ids))
        raise CheckpointError(f"the vocabulary lacks the image codes {missing[:8]} between 0 and {max(ids)}.")
    runs: list[tuple[int, int]] = []
    for code in range(len(ids)):
        if runs and ids[code] == runs[-1][0] + runs[-1][1]:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((ids[code], 1))
    return runs


def image_block(
    vocabulary: Mapping[str, int],
    *,
    vocab_size: int,
    num_codes: int | None = None,
    grid: tuple[int, int] | None = None,
    cells: int = 2,
) -> ImageBlock:
    """How images are written with a vocabulary.

    Args:
        vocab_size: rows of the model's embedding.
        num_codes: of the tokenizer, compared with what the vocabulary names.
        grid: (height, width) in codes of images that have one size (Chameleon); None: sizes are in the sequence (Lumina-mGPT).
        cells: codes of a unit of these sizes along each side.
    """
    missing = [name for name in (BEGIN, END) if name not in vocabulary]
    if missing:
        raise CheckpointError(f"the vocabulary lacks {', '.join(missing)}, which frame an image.")
    begin, end = vocabulary[BEGIN], vocabulary[END]
    # Configs that leave the image tokens' names out: the ids between the four special ones and the end of an image.
    runs = code_runs(vocabulary) or [(4, end - 4)]
    known = sum(count for _, count in runs)
    if num_codes is not None and known != num_codes:
        raise CheckpointError(
            f"the vocabulary names {known} image codes, the tokenizer has {num_codes}: these files do not belong together."
        )
    shared: dict[str, Any] = {"begin": begin, "end": end, "codes": tuple(runs)}
    if grid is not None:
        return ImageBlock(**shared, grid=grid)
    if END_OF_LINE not in vocabulary:
        raise CheckpointError(f"the vocabulary lacks {END_OF_LINE}, the end of a line of an image.")
    line = vocabulary[END_OF_LINE]
    size = vocabulary.get(f"<reserved{_SIZE:05d}>", line + 1)
    named = 0
    while f"<reserved{_SIZE + named + 1:05d}>" in vocabulary and named < _MAX_SIZE:
        named += 1
    return ImageBlock(
        **shared, end_of_line=line, size=size, max_size=min(named or _MAX_SIZE, vocab_size - size - 1), cells=cells
    )
