"""Which ids are allowed at a position of a sequence that holds text and images of one vocabulary.

`ImageBlock` describes how an image is written among text: begin, optionally its size, rows of codes, optionally an end of line
behind each, end. `Grammar` follows sequences token by token and says what may come next. It computes with tensors only, so
that rows of a batch may be at different places and nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

# What the next token of a row is; rows of `Grammar.table`. From SIZE on it belongs to an image.
TEXT, TEXT_ONLY, SIZE, CODE, LINE, END = range(6)
_INF = float("-inf")


@dataclass(frozen=True)
class ImageBlock:
    """How an image is written: begin, [height, width,] rows of codes [each with an end of line], end.

    begin, end: ids around the image. codes: the ids of the codes 0, 1, 2, ... as runs (first id, how many). end_of_line: id
    behind each row, None for none. size: id that would say a side of 0 units, so that size + n says n of them; None where all
    images have `grid` (height, width) codes. max_size: largest side in units. cells: codes of a unit along each side.
    """

    begin: int
    end: int
    codes: tuple[tuple[int, int], ...]
    end_of_line: int | None = None
    size: int | None = None
    max_size: int = 0
    cells: int = 1
    grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "codes", tuple((int(first), int(count)) for first, count in self.codes))
        if not self.codes or any(first < 0 or count < 1 for first, count in self.codes):
            raise ValueError(f"codes must be runs (first id, how many), got {list(self.codes)}")
        ids = self.code_ids
        if len(ids.unique()) != len(ids):
            raise ValueError(f"codes must give each code an id of its own, got the overlapping runs {list(self.codes)}")
        if (self.grid is None) == (self.size is None):
            raise ValueError(
                "an image block has either sizes in the sequence (size) or one grid: give exactly one of them"
            )
        if self.grid is not None:
            object.__setattr__(self, "grid", (int(self.grid[0]), int(self.grid[1])))
        if self.size is not None and self.max_size < 1:
            raise ValueError(f"max_size must be the largest side in units, at least 1, got {self.max_size}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ImageBlock:
        """From what `to_dict` gave, also after a round trip through JSON."""
        unknown = sorted(set(values) - set(cls.__dataclass_fields__))
        if unknown:
            raise ValueError(f"an image block has no entries {unknown}; it has {sorted(cls.__dataclass_fields__)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {
            **values,
            "codes": [list(run) for run in self.codes],
            "grid": None if self.grid is None else list(self.grid),
        }

    # Ids and codes.

    @cached_property
    def code_ids(self) -> Tensor:
        """The id of every code, int64 [codebook size]."""
        return torch.cat([torch.arange(first, first + count) for first, count in self.codes])

    @cached_property
    def _codes(self) -> Tensor:
        table = torch.full((int(self.code_ids.max()) + 1,), -1)
        table[self.code_ids] = torch.arange(len(self.code_ids))
        return table

    @property
    def num_codes(self) -> int:
        return sum(count for _, count in self.codes)

    def to_ids(self, codes: Tensor) -> Tensor:
        """Codes of any shape -> ids."""
        if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= self.num_codes):
            raise ValueError(
                f"codes must lie in 0 .. {self.num_codes - 1}, got {int(codes.min())} .. {int(codes.max())}"
            )
        return self.code_ids.to(codes.device)[codes]

    def to_codes(self, ids: Tensor) -> Tensor:
        """Ids of any shape -> codes; an id that is none is a ValueError."""
        table = self._codes.to(ids.device)
        known = (ids >= 0) & (ids < len(table))
        codes = torch.where(known, table[ids.clamp(0, len(table) - 1)], -1)
        if bool((codes < 0).any()):
            raise ValueError(f"these ids stand for no image code: {sorted(set(ids[codes < 0].tolist()))[:8]}")
        return codes

    def members(self, vocab_size: int) -> Tensor:
        """bool [vocab_size]: the ids that images are written with."""
        table = torch.zeros(vocab_size, dtype=torch.bool)
        table[self.code_ids] = True
        table[[self.begin, self.end]] = True
        if self.end_of_line is not None:
            table[self.end_of_line] = True
        if self.size is not None:
            table[self.size + 1 : self.size + self.max_size + 1] = True
        return table

    # Whole images.

    @property
    def header(self) -> int:
        """Tokens between begin and the first code."""
        return 0 if self.size is None else 2

    def opening(self, grid: Sequence[int]) -> list[int]:
        """Begin and size of an image of `grid` (height, width) codes."""
        height, width = grid
        if self.size is None:
            if (height, width) != self.grid:
                raise ValueError(f"images of this model have {self.grid} codes, got {(height, width)}")
            return [self.begin]
        limit = self.max_size * self.cells
        if any(side % self.cells or not self.cells <= side <= limit for side in (height, width)):
            raise ValueError(
                f"the sides of an image must be multiples of {self.cells} codes, at most {limit}, got {(height, width)}"
            )
        return [self.begin, self.size + height // self.cells, self.size + width // self.cells]

    def body(self, grid: Sequence[int]) -> int:
        """Tokens behind the opening, up to and including the end."""
        height, width = grid
        return height * (width + (self.end_of_line is not None)) + 1

    def write(self, codes: Tensor, grid: Sequence[int]) -> list[int]:
        """Codes [h * w] of one image in raster order -> the ids that stand for it."""
        height, width = grid
        rows = self.to_ids(codes).view(height, width).tolist()
        line = [] if self.end_of_line is None else [self.end_of_line]
        return [*self.opening(grid), *(token for row in rows for token in (*row, *line)), self.end]

    def read(self, ids: Sequence[int]) -> tuple[Tensor, tuple[int, int]] | None:
        """The codes [h * w] and the grid of an image, from its ids behind begin and up to (without) end; None where they are not
        those of a whole image."""
        header, values = list(ids[: self.header]), list(ids[self.header :])
        if self.size is None:
            height, width = self.grid  # type: ignore[misc]
        elif len(header) < 2 or any(not 0 < token - self.size <= self.max_size for token in header):
            return None
        else:
            height, width = ((token - self.size) * self.cells for token in header)
        line = width + (self.end_of_line is not None)
        if len(values) not in (height * line, height * line - (line - width)):  # the last end of line may be left out
            return None
        try:
            codes = [self.to_codes(torch.tensor(values[row * line : row * line + width])) for row in range(height)]
        except ValueError:
            return None
        return torch.cat(codes), (height, width)

    def split(self, ids: Sequence[int]) -> list[list[int] | tuple[Tensor, tuple[int, int]]]:
        """A sequence as what it is made of, in order: lists of text ids, and images as (codes, grid). Images that are not whole
        are left out."""
        parts: list[list[int] | tuple[Tensor, tuple[int, int]]] = []
        text: list[int] = []
        ids, place = list(ids), 0
        while place < len(ids):
            if ids[place] != self.begin:
                text.append(ids[place])
                place += 1
                continue
            stop = ids.index(self.end, place) if self.end in ids[place:] else len(ids)
            image = self.read(ids[place + 1 : stop])
            place = stop + 1
            if image is not None:
                if text:
                    parts.append(text)
                text = []
                parts.append(image)
        return [*parts, text] if text else parts


@dataclass(frozen=True)
class GrammarState:
    """Where each row is: `since` [B] tokens behind begin if an image is open, else -1; its `height` and `width` [B] in codes."""

    since: Tensor
    height: Tensor
    width: Tensor

    @property
    def open(self) -> Tensor:
        """bool [B]: whether an image is open."""
        return self.since >= 0


class Grammar:
    """What may follow in sequences of text and images.

    Args:
        block: how images are written; None is text without images.
        vocab_size: of the model.
        images: whether an image may be begun. Without, every token is text, begin included.
        check_sizes: a size must be one that the block can say; without, any id may stand there, as in the authors' code.
        banned: ids that text may not hold, besides the codes and, with images, the ends of images.
    """

    def __init__(
        self,
        block: ImageBlock,
        vocab_size: int,
        *,
        images: bool = True,
        check_sizes: bool = True,
        banned: Sequence[int] = (),
    ) -> None:
        highest = max(int(block.code_ids.max()), block.begin, block.end, block.end_of_line or 0)
        if highest >= vocab_size:
            raise ValueError(f"the image block speaks of the id {highest}, the vocabulary has {vocab_size}")
        self.block, self.images, self.vocab_size = block, images, vocab_size
        table = torch.zeros(6, vocab_size, dtype=torch.bool)
        table[TEXT] = True
        table[TEXT, block.code_ids] = False
        table[TEXT, list(banned)] = False
        if images:
            table[TEXT, block.end] = False
        table[TEXT_ONLY] = table[TEXT]
        table[TEXT_ONLY, block.begin] = False
        if block.size is not None:
            table[SIZE, block.size + 1 : block.size + block.max_size + 1] = True
            if not check_sizes:
                table[SIZE] = True
        table[CODE, block.code_ids] = True
        table[LINE, block.end if block.end_of_line is None else block.end_of_line] = True
        table[END, block.end] = True
        self.table = table

    def to(self, device: torch.device | str) -> Grammar:
        """The same with its table on `device`."""
        self.table = self.table.to(device)
        return self

    def start(self, ids: Tensor) -> GrammarState:
        """The state behind prompts `ids` [B, T] (padded on the left with anything but begin and end)."""
        block, last = self.block, ids.shape[1] - 1
        begins = ids == block.begin
        opened = begins.sum(1) > (ids == block.end).sum(1)
        since = torch.where(opened & self.images, begins.flip(1).int().argmax(1), -1)
        if block.grid is not None:
            height, width = (torch.full_like(since, side) for side in block.grid)
            return GrammarState(since, height, width)
        sides = []
        for number in (1, 2):
            place = (last - since + number).clamp(max=last)
            units = ids.gather(1, place[:, None])[:, 0] - block.size
            sides.append(torch.where(since >= number, self._side(units), block.cells))
        return GrammarState(since, sides[0], sides[1])

    def _side(self, units: Tensor) -> Tensor:
        return units.clamp(1, self.block.max_size) * self.block.cells

    def advance(self, state: GrammarState, token: Tensor) -> GrammarState:
        """The state behind one more token [B] of each row."""
        if not self.images:
            return state
        block = self.block
        since = torch.where(state.open, state.since + 1, torch.where(token == block.begin, 0, -1))
        since = torch.where(state.open & (token == block.end), -1, since)
        state = replace(state, since=since)
        if block.size is None:
            return state
        side = self._side(token - block.size)
        height = torch.where(since == 1, side, state.height)
        return replace(state, height=height, width=torch.where(since == 2, side, state.width))

    def kinds(self, state: GrammarState, count: int = 1, remaining: int | None = None) -> Tensor:
        """What the next `count` tokens are, [B, count], provided the image that is open stays so: TEXT .. END.

        remaining: how many more tokens there will be; no image is begun that they cannot hold.
        """
        header, line = self.block.header, self.block.end_of_line is not None
        since = state.since[:, None] + torch.arange(count, device=state.since.device)
        number = since - header + 1  # of the token behind the header, from 1
        stride = (state.width + line)[:, None]
        body = state.height[:, None] * stride
        kind = torch.where(number > body, END, CODE)
        if line:
            kind = torch.where((number <= body) & (number % stride == 0), LINE, kind)
        if header:
            kind = torch.where(number < 1, SIZE, kind)
        text = TEXT
        if self.images and remaining is not None and remaining < self.smallest:
            text = TEXT_ONLY
        outside = ~state.open[:, None] | (number > body + 1)
        return torch.where(outside, text, kind)

    @property
    def smallest(self) -> int:
        """Tokens of the smallest image, begin and end included."""
        grid = self.block.grid or (self.block.cells, self.block.cells)
        return 1 + self.block.header + self.block.body(grid)

    def mask(self, logits: Tensor, kinds: Tensor) -> Tensor:
        """Logits [..., V] with what tokens of these kinds [...] may not be at -inf."""
        return logits.masked_fill(~self.table[kinds], _INF)
