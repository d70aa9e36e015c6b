"""Perception tokens: codes of a map, and boxes, as words of a language model (AURORA, Bigverdi et al., arXiv 2412.03548)."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from .codes import Codes


class PerceptionTokens:
    """Codes <-> words: `<DEPTH_START>`, one `<DEPTH_i>` for each code in raster order, `<DEPTH_END>`.

    In the model's vocabulary begin, end and the codes follow each other from `first` on.

    Args:
        size: number of codes.
        grid: (height, width) of a map in codes.
        first: id of the begin word.
        name: of the words.
    """

    def __init__(self, size: int, grid: tuple[int, int], first: int = 32000, name: str = "DEPTH") -> None:
        if min(size, *grid) < 1 or first < 0 or not re.fullmatch(r"\w+", name):
            raise ValueError(
                f"a vocabulary needs codes, a grid and a name in letters, got size={size}, grid={grid}, first={first}, name={name!r}."
            )
        self.size, self.grid, self.first, self.name = size, grid, first, name
        self._codes = re.compile(rf"<{name}_(\d+)>")
        self._maps = re.compile(rf"<{name}_START>((?:\s*<{name}_\d+>)*)\s*<{name}_END>")

    @property
    def count(self) -> int:
        """Codes of a map."""
        return self.grid[0] * self.grid[1]

    @property
    def begin_id(self) -> int:
        return self.first

    @property
    def end_id(self) -> int:
        return self.first + 1

    @property
    def code_ids(self) -> range:
        """Ids of the codes in the model's vocabulary."""
        return range(self.first + 2, self.first + 2 + self.size)

    @property
    def words(self) -> list[str]:
        """All words in the order of their ids: what is added to the model's word tokenizer."""
        return [f"<{self.name}_START>", f"<{self.name}_END>", *(f"<{self.name}_{i}>" for i in range(self.size))]

    def write(self, codes: Codes) -> list[str]:
        """The maps of `codes` as text."""
        return ["".join(self.words[i] for i in row) for row in (self.to_ids(codes) - self.first).tolist()]

    def read(self, text: str | Sequence[str]) -> Codes:
        """The first map in each text, words around it are passed over; a text without a whole map is a ValueError."""
        rows = []
        for answer in [text] if isinstance(text, str) else text:
            found = self._maps.search(answer)
            if found is None:
                raise ValueError(f"there is no map <{self.name}_START> ... <{self.name}_END> in {answer[:60]!r}.")
            rows.append([int(number) for number in self._codes.findall(found[1])])
        return self._checked(rows)

    def to_ids(self, codes: Codes) -> torch.Tensor:
        """Ids of the model's vocabulary [B, N + 2]: begin, the codes, end."""
        if codes.ids is None or codes.ids.ndim != 2 or codes.num_tokens != self.count:
            raise ValueError(f"`codes` must be {self.count} ids for each map, {self.grid[0]} x {self.grid[1]}.")
        low, high = codes.ids.aminmax()
        if low < 0 or high >= self.size:
            raise ValueError(f"`codes.ids` must lie in [0, {self.size - 1}], got values from {low} to {high}.")
        begin, end = (codes.ids.new_full((codes.batch_size, 1), value) for value in (self.begin_id, self.end_id))
        return torch.cat([begin, codes.ids + self.first + 2, end], dim=1)

    def from_ids(self, ids: torch.Tensor) -> Codes:
        """The first map in each row of ids [B, L] of the model's vocabulary; a row without a whole map is a ValueError."""
        rows = []
        for row in ids.tolist():
            if self.begin_id not in row or self.end_id not in row[row.index(self.begin_id) :]:
                raise ValueError(
                    f"there is no map in a row of ids: begin {self.begin_id} and end {self.end_id} are missing."
                )
            start = row.index(self.begin_id) + 1
            rows.append([value - self.first - 2 for value in row[start : row.index(self.end_id, start)]])
        return self._checked(rows)

    def allowed(self, ids: torch.Tensor, vocabulary: int) -> torch.Tensor:
        """Which ids may follow each row of ids [B, L] in an answer, bool [B, vocabulary].

        After begin come as many codes as a map has, then end. Elsewhere codes and end are not allowed, and a second map neither.
        """
        if vocabulary < self.code_ids.stop:
            raise ValueError(f"`vocabulary` must have the words up to {self.code_ids.stop - 1}, got {vocabulary}.")
        allowed = torch.ones(len(ids), vocabulary, dtype=torch.bool, device=ids.device)
        places = torch.arange(ids.shape[1], device=ids.device)
        started = ids == self.begin_id
        begin = torch.where(started, places, ids.shape[1]).amin(dim=1) if ids.shape[1] else ids.new_zeros(len(ids))
        inside = ids.shape[1] - 1 - begin  # codes written so far; negative before a map
        codes = (inside >= 0) & (inside < self.count)
        closing = inside == self.count
        allowed[:, self.end_id : self.code_ids.stop] = False
        allowed[inside > self.count, self.begin_id] = False
        allowed[codes] = False
        allowed[codes, self.code_ids.start : self.code_ids.stop] = True
        allowed[closing] = False
        allowed[closing, self.end_id] = True
        return allowed

    def _checked(self, rows: list[list[int]]) -> Codes:
        for row in rows:
            if len(row) != self.count:
                raise ValueError(f"a map has {self.count} codes, {self.grid[0]} x {self.grid[1]}, got {len(row)}.")
            if not all(0 <= value < self.size for value in row):
                raise ValueError(f"a map's codes must lie in [0, {self.size - 1}], got {min(row)} to {max(row)}.")
        return Codes(ids=torch.tensor(rows, dtype=torch.int64), grid=(1, *self.grid))


def write_box(box: Sequence[int], size: int = 336) -> str:
    """A box (x1, y1, x2, y2) in pixels of a square image of `size`, as AURORA writes it: `(<PIXEL_x1>,...)`."""
    if len(box) != 4 or not all(isinstance(value, int) and 0 <= value < size for value in box):
        raise ValueError(f"`box` must be four integers (x1, y1, x2, y2) in [0, {size - 1}], got {list(box)}.")
    return "(" + ",".join(f"<PIXEL_{value}>" for value in box) + ")"


def read_boxes(text: str, size: int = 336) -> list[tuple[int, int, int, int]]:
    """All boxes (x1, y1, x2, y2) in `text`; those with pixels outside the image are left out."""
    number = r"<PIXEL_(\d+)>"
    pattern = rf"\(\s*{number}\s*,\s*{number}\s*,\s*{number}\s*,\s*{number}\s*\)"
    found = [tuple(map(int, match)) for match in re.findall(pattern, text)]
    return [box for box in found if max(box) < size]  # type: ignore[misc]
