"""What decoding strategies share: their output, their registry, and a stream of tokens through trunk and cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from armm.condition import Condition
from armm.nn.masks import additive_mask, key_mask, prefix_mask

if TYPE_CHECKING:
    from armm.model import AutoregressiveModel
    from armm.nn.positions import PositionTable

# callback(step, ids so far [B, step + 1]) -> replacement of them, or None
StepCallback = Callable[[int, Tensor], "Tensor | None"]


@dataclass
class DecodingOutput:
    """ids [B, N] (codes, counted from the start of the vocabulary range); logits [B, N, V] the draws were made from, if
    recorded; num_calls of the trunk; steps: tokens really drawn (fewer than N after an interruption, the rest are
    0)."""

    ids: Tensor
    logits: Tensor | None = None
    num_calls: int = 0
    steps: int = 0


def wake(model: torch.nn.Module) -> None:
    """Let an offloading hook bring the model to its device: strategies call its parts, not its forward."""
    hook = getattr(model, "_hf_hook", None)
    if hook is not None and hasattr(hook, "pre_forward"):
        hook.pre_forward(model)


def vocabulary_range(model: AutoregressiveModel, vocabulary: tuple[int, int] | None) -> tuple[int, int]:
    low, high = (0, model.vocab_size) if vocabulary is None else vocabulary
    if not 0 <= low < high <= model.vocab_size:
        raise ValueError(f"vocabulary must be (low, high) within 0 .. {model.vocab_size}, got {(low, high)}")
    return low, high


class TokenStream:
    """A batch of rows being decoded one token at a time: prefix through the trunk, then token after token.

    following: positions of the tokens that will be fed after the prefix, one table for all rows or one per row.
    """

    def __init__(
        self,
        model: AutoregressiveModel,
        prefix: Condition,
        prefix_positions: PositionTable,
        following: PositionTable,
    ) -> None:
        self.model, self.trunk, self.prefix = model, model.trunk, prefix
        self.prefix_positions = prefix_positions
        fed = following.length
        self.positions = [following[i : i + 1] for i in range(fed)]
        self.length = prefix.length
        self.cache = self.trunk.allocate_cache(prefix.batch, self.length + fed)
        self.bias: Tensor | None = None
        self.num_calls = 0
        self.embed = model.embed

    def prefill(self) -> Tensor:
        """Run the prefix: hidden state of its last position [R, D]."""
        embeds, mask, full = self.prefix.embeds, self.prefix.mask, None
        padded = mask is not None and not bool(mask.all())
        if padded or self.prefix.bidirectional:
            real = embeds.new_ones(embeds.shape[:2], dtype=torch.bool) if mask is None else mask
            full = prefix_mask(real, self.length, self.prefix.bidirectional)
        if mask is not None and padded:
            tail = mask.new_ones(mask.shape[0], len(self.positions))
            self.bias = additive_mask(key_mask(torch.cat([mask, tail], dim=1)), self.cache.buffer.dtype)
        return self._run(embeds.to(self.trunk.dtype), self.prefix_positions, full, full is None)

    def feed(self, ids: Tensor, step: int) -> Tensor:
        """Feed token `step` after the prefix, `ids` [R]: hidden state [R, D]."""
        mask = None if self.bias is None else self.bias.narrow(3, 0, self.length + step + 1)
        return self._run(self.embed(ids.unsqueeze(1)), self.positions[step], mask, False)

    def _run(self, embeds: Tensor, positions: PositionTable, mask: Tensor | None, causal: bool) -> Tensor:
        self.num_calls += 1
        out = self.trunk(embeds, positions=positions, mask=mask, causal=causal, cache=self.cache)
        hidden = out[0] if isinstance(out, tuple) else out
        return hidden[:, -1]

    def narrow(self, rows: int) -> None:
        """Go on with the first `rows` rows only."""
        self.cache.narrow(rows)
        if self.bias is not None:
            self.bias = self.bias[:rows]
