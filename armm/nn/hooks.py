"""What may look into the trunk between its blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from armm.nn.block import Observer


class LayerHook:
    """Follows the calls of a trunk block by block. This one changes nothing."""

    def start(self, length: int) -> None:
        """A call with `length` tokens begins."""

    def observer(self, layer: int) -> Observer | None:
        """What is shown the branches of the block `layer` (counted from 0), or None."""
        return None

    def after(
        self, layer: int, x: Tensor, rotary: Tensor | None, mask: Tensor | None, causal: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None, bool]:
        """What the blocks behind `layer` are given in place of its output [B, N, D] and of the positions and the mask so far. A
        sequence that gets shorter here is shorter in the cache of the following layers as well."""
        return x, rotary, mask, causal
