"""What methods that drop image tokens share: the run of one prompt, whose layers keep caches of different lengths."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from armm.condition import Condition
from armm.decoding.acceleration import Acceleration
from armm.nn.hooks import LayerHook

from .cost import Cost, text_cost

if TYPE_CHECKING:
    from armm.model import AutoregressiveModel


class VisualPruning(Acceleration):
    """Base of accelerations of pipelines that read images. Prompts are then run one at a time."""

    name: ClassVar[str] = "pruning of image tokens"

    @abstractmethod
    def begin(
        self,
        model: AutoregressiveModel,
        prompt: Condition,
        images: Sequence[tuple[int, int]],
        following: Tensor,
        grid: Sequence[int] | None = None,
    ) -> PruningRun:
        """The run of one prompt.

        Args:
            prompt: [1, T, D], without padding.
            images: (first, behind the last) of the tokens of each image in it.
            following: position ids [1, M] of the tokens that will be fed after it.
        """


class PruningRun(LayerHook):
    """Follows one prompt, and then the tokens after it, through the trunk. Subclasses say after which layer which tokens stay.

    Attributes:
        tokens, visual: the prompt's tokens, and the image tokens among them, that each layer was given.
        kept: for each time tokens were dropped, which of the prompt's stayed.
    """

    def __init__(
        self,
        model: AutoregressiveModel,
        prompt: Condition,
        images: Sequence[tuple[int, int]],
        following: Tensor,
        grid: Sequence[int] | None = None,
        renumber: bool = False,
    ) -> None:
        if prompt.batch != 1 or prompt.mask is not None:
            raise ValueError("image tokens are dropped from one prompt at a time, without padding")
        self.model, self.grid, self.renumber = model, grid, renumber
        self.length, self.bidirectional = prompt.length, prompt.bidirectional
        device = prompt.embeds.device
        self.is_visual = torch.zeros(prompt.length, dtype=torch.bool, device=device)
        for first, end in images:
            self.is_visual[first:end] = True
        self.alive = torch.arange(prompt.length, device=device)
        self.index, self.following = prompt.index, following
        self.tokens: list[int] = []
        self.visual: list[int] = []
        self.kept: list[Tensor] = []
        self.step: int | None = None  # which token after the prompt is being fed
        self.layers = len(model.trunk.blocks)
        self._tables: dict[int, Any] = {}

    @property
    def instruction(self) -> int:
        """The first of the tokens alive that comes after all images."""
        places = self.visible.nonzero()
        return int(places[-1]) + 1 if len(places) else 0

    @property
    def visible(self) -> Tensor:
        """Which of the tokens alive are of an image: bool [n]."""
        return self.is_visual[self.alive]

    def start(self, length: int) -> None:
        if self.tokens:
            self.step = 0 if self.step is None else self.step + 1
            if length != 1:
                raise ValueError("behind a pruned prompt tokens go in one at a time")

    def after(
        self, layer: int, x: Tensor, rotary: Tensor | None, mask: Tensor | None, causal: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None, bool]:
        if self.step is not None:
            return x, self._shifted(layer, rotary, self.step), mask, causal
        self.tokens.append(len(self.alive))
        self.visual.append(int(self.visible.sum()))
        keep = self.keep(layer, x, rotary)
        if keep is not None:
            x, rotary, mask = self._gather(x, rotary, mask, keep)
        return x, rotary, mask, causal

    @abstractmethod
    def keep(self, layer: int, x: Tensor, rotary: Tensor | None) -> Tensor | None:
        """Which of the tokens alive go on behind `layer`, sorted; None is all."""

    def _gather(
        self, x: Tensor, rotary: Tensor | None, mask: Tensor | None, keep: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        before = len(self.alive)
        self.alive = self.alive[keep]
        self.kept.append(self.alive)
        x = x[:, keep]
        if mask is not None:
            for axis in (-2, -1):
                mask = mask.index_select(axis, keep) if mask.shape[axis] == before else mask
        if rotary is not None:
            if self.renumber:
                rotary = self.model.positions_for(self.index[..., : len(keep)], self.grid).rotary
            else:
                rotary = rotary.index_select(-3, keep)
        return x, rotary, mask

    def _shifted(self, layer: int, rotary: Tensor | None, step: int) -> Tensor | None:
        """Renumbered prompts: the table of the token being fed for the layer behind `layer`."""
        if not self.renumber or layer + 1 >= self.layers:
            return rotary
        removed = self.length - self.tokens[layer + 1]
        if removed == self.length - self.tokens[layer]:
            return rotary
        table = self._tables.get(removed)
        if table is None:
            table = self._tables[removed] = self.model.positions_for(self.following - removed, self.grid)
        return table[step : step + 1].rotary

    def cost(self) -> Cost:
        """Of everything so far."""
        return text_cost(
            self.model, self.tokens, self.visual, 0 if self.step is None else self.step + 1, self.bidirectional
        )
