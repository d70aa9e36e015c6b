"""Where tokens are: layouts of flat position ids, and the table of what the trunk needs for the positions at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class PositionTable:
    """What the trunk needs to know about N positions: rotary factors and learned rows, either may be absent.

    `rotary` is what `rotary_table` returns, `learned` is [N, D] or [B, N, D], and so are the learned rows of each of the
    trunk's `bridges`. Slicing `table[a:b]` slices positions.
    """

    rotary: Tensor | None = None
    learned: Tensor | None = None
    bridges: tuple[Tensor, ...] = ()

    @property
    def length(self) -> int:
        if self.rotary is not None:
            return self.rotary.shape[-3]
        return 0 if self.learned is None else self.learned.shape[-2]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, window: slice) -> PositionTable:
        start, stop, step = window.indices(self.length)
        if step != 1:
            raise ValueError(f"a PositionTable is sliced with step 1, got {step}")
        size = max(stop - start, 0)
        return PositionTable(
            None if self.rotary is None else self.rotary.narrow(-3, start, size),
            None if self.learned is None else self.learned.narrow(-2, start, size),
            tuple(rows.narrow(-2, start, size) for rows in self.bridges),
        )

    def narrow(self, rows: int) -> PositionTable:
        """The first `rows` rows of a table that has one row for each sample; others are what they are."""
        rotary, learned = self.rotary, self.learned
        if rotary is not None and rotary.is_complex() and rotary.dim() == 4:
            rotary = rotary[:rows]
        elif rotary is not None and not rotary.is_complex() and rotary.dim() == 5:
            rotary = rotary[:, :rows]
        if learned is not None and learned.dim() == 3:
            learned = learned[:rows]
        bridges = tuple(table[:rows] if table.dim() == 3 else table for table in self.bridges)
        return PositionTable(rotary, learned, bridges)

    def take(self, index: Tensor) -> PositionTable:
        """The positions with these numbers [R, n] in this table, row by row."""
        rows = torch.arange(len(index), device=index.device)[:, None]

        def learned(table: Tensor) -> Tensor:
            return table[rows, index] if table.dim() > 2 else table[index]

        rotary = self.rotary
        if rotary is not None:
            axis = 0 if rotary.is_complex() else 1  # of the rows, where they have positions of their own
            if rotary.dim() > 3 + axis:
                rotary = rotary[rows, index] if axis == 0 else rotary[:, rows, index]
            else:
                rotary = rotary[index] if axis == 0 else rotary[:, index]
        own = None if self.learned is None else learned(self.learned)
        return PositionTable(rotary, own, tuple(learned(table) for table in self.bridges))

    def select(self, rows: Tensor) -> PositionTable:
        """Some of the rows, where rows have positions of their own."""
        rotary = self.rotary
        if rotary is not None and rotary.dim() > (3 if rotary.is_complex() else 4):
            rotary = rotary[rows] if rotary.is_complex() else rotary[:, rows]
        learned = self.learned
        if learned is not None and learned.dim() > 2:
            learned = learned[rows]
        return PositionTable(rotary, learned, tuple(table[rows] if table.dim() > 2 else table for table in self.bridges))


@dataclass(frozen=True)
class PositionLayout:
    """A numbering of every position a model knows: flat id -> coordinates [P, A] and zero-rotary flags [P]."""

    coordinates: Tensor
    zero: Tensor | None = None

    def __len__(self) -> int:
        return self.coordinates.shape[0]

    def to(self, device: torch.device | str) -> PositionLayout:
        return PositionLayout(self.coordinates.to(device), None if self.zero is None else self.zero.to(device))


def raster_coordinates(*sizes: int) -> Tensor:
    """Coordinates of every cell of a grid in raster order: float32 [cells, axes]; (row, column) for (height, width)."""
    axes = [torch.arange(size, dtype=torch.float32, device="cpu") for size in sizes]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)


def resize_positions(
    table: Tensor, height: int, width: int, *, mode: str = "bicubic", antialias: bool = False, offset: float = 0.0
) -> Tensor:
    """A learned position for each cell of a grid [H, W, D], interpolated to another grid: [height * width, D] in raster order.

    mode: "bicubic" or "bilinear", pixel centres aligned. offset: with one, the grid is sampled as if it were
    (height + offset) x (width + offset) cells large, which keeps rounding from losing a row (DINO, arXiv 2104.14294). A table of the
    right size comes back as it is. Computed in float32.
    """
    rows, columns, _ = table.shape
    if (rows, columns) == (height, width):
        return table.flatten(0, 1)
    picture = table.float().permute(2, 0, 1)[None]
    if offset:
        scale = ((height + offset) / rows, (width + offset) / columns)
        picture = F.interpolate(picture, scale_factor=scale, mode=mode, align_corners=False, antialias=antialias)
    else:
        picture = F.interpolate(picture, size=(height, width), mode=mode, align_corners=False, antialias=antialias)
    return picture[0].flatten(1).transpose(0, 1).to(table.dtype)


def image_layout(prefix: int, *sizes: int) -> PositionLayout:
    """`prefix` condition positions whose rotary rows are zero, then the cells of the grid in raster order."""
    cells = raster_coordinates(*sizes)
    coordinates = torch.cat([torch.zeros(prefix, len(sizes), device="cpu"), cells])
    zero = torch.arange(prefix + len(cells), device="cpu") < prefix
    return PositionLayout(coordinates, zero if prefix else None)


def captioned_coordinates(words: int, cells: Tensor, grid: Sequence[int]) -> Tensor:
    """`words` words before tokens at `cells` [..., N, 2] of a grid (height, width) -> [..., words + N, 3]: (order, row, column).

    As in `unified_layout`: the words count up to the picture, which has order 0, and stand at its middle.
    """
    middle = [torch.full((words, 1), (side - 1) / 2, device=cells.device) for side in grid]
    order = torch.arange(-words, 0, dtype=torch.float32, device=cells.device)[:, None]
    text = torch.cat([order, *middle], dim=1).expand(*cells.shape[:-2], -1, -1)
    return torch.cat([text, torch.nn.functional.pad(cells, (1, 0))], dim=-2)


def unified_layout(text_slots: int, height: int, width: int, answer_slots: int) -> PositionLayout:
    """Text before an image, begin-of-image, the image, text after it, at (order in the text, row, column).

    Ids: 0 .. text_slots-1 text before, text_slots begin-of-image, height * width cells, answer_slots positions of text
    after. All text stands at the middle of the image's plane and differs in its order only: it counts up to begin-of-image
    at 0, the image's cells have order 0, text after the image counts on from 1. So words are as near to one cell as to
    another, and their distance to each other is that of a sentence.
    """
    middle = torch.tensor([(height - 1) / 2, (width - 1) / 2], device="cpu")
    order = torch.arange(-text_slots, answer_slots + 1, dtype=torch.float32, device="cpu")[:, None]
    text = torch.cat([order, middle.expand(len(order), 2)], dim=1)
    cells = torch.nn.functional.pad(raster_coordinates(height, width), (1, 0))
    return PositionLayout(torch.cat([text[: text_slots + 1], cells, text[text_slots + 1 :]]))
