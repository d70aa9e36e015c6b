"""Where the tokens of a model's sequences stand: grids of images, and the numbering of all positions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from armm.model_base import TrunkModel
from armm.nn.positions import PositionLayout, PositionTable, image_layout, unified_layout
from armm.nn.rotary import rotary_table
from armm.nn.shuffle import TokenShuffle

__all__ = ["ModelMixin", "SequenceModel"]


class SequenceModel(TrunkModel):
    """The sequences of `AutoregressiveModel`, which sets the attributes; see there what they are."""

    grid: tuple[int, ...]
    shuffle: TokenShuffle | None
    text_slots: int
    answer_slots: int
    max_positions: int
    transition_tokens: nn.Embedding | None
    condition_embedding: nn.Module | None
    condition_type: str | None
    _rotary_tables: dict

    @staticmethod
    def check_grid(grid: Sequence[int]) -> tuple[int, ...]:
        values = tuple(grid)
        if len(values) not in (2, 3) or any(not isinstance(v, int) or v < 1 for v in values):
            raise ValueError(
                "grid must be two positive integers (height, width), or three (time, height, width), in tokens, got "
                f"{list(values)}"
            )
        return values

    @property
    def window(self) -> int:
        """Side of the square of image tokens that are one token of the trunk."""
        return 1 if self.shuffle is None else self.shuffle.window

    def trunk_grid(self, grid: Sequence[int] | None = None) -> tuple[int, ...]:
        """The image of `grid` tokens in tokens of the trunk; a ValueError if windows do not fit into it."""
        sizes = self.grid if grid is None else self.check_grid(grid)
        if any(size % self.window for size in sizes):
            raise ValueError(
                f"grid must be a multiple of this model's window of {self.window}x{self.window} tokens, got {list(sizes)}"
            )
        return tuple(size // self.window for size in sizes)

    @property
    def is_unified(self) -> bool:
        """Whether text and image tokens share the vocabulary and the sequence."""
        return bool(self.text_slots or self.answer_slots)

    @property
    def prefix_slots(self) -> int:
        """Number of positions before the first image token."""
        if self.is_unified:
            return self.text_slots + 1
        if self.condition_embedding is None:
            return 0
        return 1 if self.condition_type == "class" else self.condition_embedding.num_tokens

    def layout(self, grid: Sequence[int] | None = None) -> PositionLayout:
        """The numbering of all positions for an image of `grid` tokens."""
        if self.max_positions:
            return PositionLayout(torch.arange(self.max_positions, dtype=torch.float32, device="cpu")[:, None])
        sizes = self.trunk_grid(grid)
        if self.is_unified:
            height, width = sizes
            return unified_layout(self.text_slots, height, width, self.answer_slots)
        layout = image_layout(self.prefix_slots, *sizes)
        if self.transition_tokens is None:
            return layout
        # One more position, without rotary turns like the condition: all transition tokens stand there.
        coordinates = torch.nn.functional.pad(layout.coordinates, (0, 0, 0, 1))
        zero = torch.arange(len(coordinates), device="cpu")
        return PositionLayout(coordinates, (zero < self.prefix_slots) | (zero == len(layout)))

    def transition_index(self, grid: Sequence[int] | None = None) -> int:
        """Flat position id of the transition tokens."""
        return self.prefix_slots + math.prod(self.trunk_grid(grid))

    def positions_for(self, index: Tensor, grid: Sequence[int] | None = None) -> PositionTable:
        """The table for flat position ids `index` [N] or [B, N] (see `layout`)."""
        grid = self.grid if grid is None else self.check_grid(grid)
        trunk = self.trunk
        if trunk.position_embedding is not None and grid != self.grid:
            raise ValueError(f"this model has learned positions for a grid of {self.grid}, so it cannot use {grid}")
        learned = None if trunk.position_embedding is None else trunk.position_embedding(index)
        if not trunk.rotary_axes:
            return PositionTable(None, learned)
        key = (grid, index.device)
        table = self._rotary_tables.get(key)
        if table is None:
            table = self._rotary_base(grid, index.device)
            self._rotary_tables[key] = table
        if table.is_complex():
            return PositionTable(table[index], learned)
        return PositionTable(table[:, index], learned)

    @torch.no_grad()
    def _rotary_base(self, grid: tuple[int, int], device: torch.device) -> Tensor:
        trunk, layout = self.trunk, self.layout(grid).to(device)
        coordinates = layout.coordinates
        axes = len(trunk.rotary_axes)
        if axes == 1:  # a sequence: the flat ids are the positions
            coordinates = torch.arange(len(layout), dtype=torch.float32, device=device)[:, None]
        elif axes != coordinates.shape[1]:
            raise ValueError(
                f"this model needs 1 or {coordinates.shape[1]} rotary axes, its transformer has {axes}: rotary_axes="
                f"{list(trunk.rotary_axes)}"
            )
        zero = None if self.rotary_condition else layout.zero
        return rotary_table(coordinates, trunk.rotary_axes, trunk.rotary_theta, zero, trunk.rotary_layout)

    def image_index(
        self,
        grid: Sequence[int] | None = None,
        device: torch.device | str | None = None,
        *,
        behind: Tensor | None = None,
    ) -> Tensor:
        """Flat position ids of the image's tokens in the trunk, in raster order. behind: of the tokens before it, which matter
        to models whose images stand anywhere in a stream (`MultimodalModel`), not here."""
        count = math.prod(self.trunk_grid(grid))
        return torch.arange(self.prefix_slots, self.prefix_slots + count, device=device or self.device)

    def image_positions(self, grid: Sequence[int] | None = None) -> PositionTable:
        """The table for every prefix position followed by the image in raster order."""
        count = math.prod(self.trunk_grid(grid))
        return self.positions_for(torch.arange(self.prefix_slots + count, device=self.device), grid)
