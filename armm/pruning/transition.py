"""TransPrune: image tokens that the layers change little, and the question does not look at, are dropped (arXiv 2507.20630)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from armm.condition import Condition
from armm.nn.attention import attention_weights

from .base import PruningRun, VisualPruning

if TYPE_CHECKING:
    from armm.model import AutoregressiveModel
    from armm.nn.block import Observer

PUBLISHED_LAYERS = 32  # of the trunk that the published settings are for


class TokenPruning(VisualPruning):
    """Progressive pruning by token transition and instruction-guided attention (arXiv 2507.20630, section 3); no training.

    Args:
        after: after how many blocks tokens are dropped; None scales the published 7, 9 and 12 of 32 to the trunk.
        keep: share of the image's tokens that is left each time.
        accumulate: in which blocks (counted from 1) transitions are measured; None is from the first to the last of `after`.
        renumber: whether the tokens left are numbered anew, as published; None does it where positions are numbers of a sequence,
            and leaves them where tokens stand at coordinates of the image.
        record: keep all scores in the run's `stages`.
    """

    name: ClassVar[str] = "token pruning"

    def __init__(
        self,
        after: Sequence[int] | None = None,
        keep: Sequence[float] = (0.875, 0.625, 0.125),
        accumulate: Sequence[int] | None = None,
        renumber: bool | None = None,
        record: bool = False,
    ) -> None:
        if after is not None and (
            list(after) != sorted(set(after)) or len(after) != len(keep) or min(after, default=1) < 1
        ):
            raise ValueError(
                f"`after` must be rising numbers of blocks, one for each of the {len(keep)} shares in `keep`, got {list(after)}."
            )
        if not keep or any(not 0 <= share <= 1 for share in keep) or list(keep) != sorted(keep, reverse=True):
            raise ValueError(f"`keep` must be falling shares between 0 and 1, got {list(keep)}.")
        self.after = None if after is None else tuple(after)
        self.shares = tuple(keep)
        self.accumulate = None if accumulate is None else tuple(accumulate)
        self.renumber, self.record = renumber, record

    def layers(self, count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(after, accumulate) for a trunk of `count` blocks.

        Raises:
            ValueError: there is no block behind the last pruning.
        """
        after = self.after
        if after is None:
            found: list[int] = []
            for published in (7, 9, 12)[: len(self.shares)]:
                found.append(max(round(published * count / PUBLISHED_LAYERS), found[-1] + 1 if found else 1))
            after = tuple(found)
        if len(after) != len(self.shares) or after[-1] >= count:
            raise ValueError(
                f"tokens are dropped after {list(after)} blocks, but this trunk has {count}: give `after` (one for each of "
                f"{len(self.shares)} shares) below {count}."
            )
        return after, self.accumulate or tuple(range(after[0], after[-1] + 1))

    def check(self, pipe: Any) -> None:
        self.layers(len(pipe.transformer.trunk.blocks))

    def begin(
        self,
        model: AutoregressiveModel,
        prompt: Condition,
        images: Sequence[tuple[int, int]],
        following: Tensor,
        grid: Sequence[int] | None = None,
    ) -> TransitionRun:
        return TransitionRun(self, model, prompt, images, following, grid)


class TransitionRun(PruningRun):
    """A prompt pruned by transitions.

    Attributes:
        stages: for each pruning, if recorded: "transition", "attention", "score" of the image tokens alive, "kept" among them, and
            the "weights" [H, instruction, n] of the instruction.
    """

    def __init__(
        self,
        pruning: TokenPruning,
        model: AutoregressiveModel,
        prompt: Condition,
        images: Sequence[tuple[int, int]],
        following: Tensor,
        grid: Sequence[int] | None = None,
    ) -> None:
        renumber = len(model.trunk.rotary_axes) == 1 if pruning.renumber is None else pruning.renumber
        super().__init__(model, prompt, images, following, grid, renumber)
        after, accumulate = pruning.layers(self.layers)
        self.shares = dict(zip(after, pruning.shares, strict=True))
        self.accumulate, self.record = frozenset(accumulate), pruning.record
        self.total = int(self.is_visual.sum())
        self.transitions: list[Tensor] = []
        self.stages: list[dict[str, Tensor]] = []
        self._current: Tensor | None = None

    def observer(self, layer: int) -> Observer | None:
        return self._observe if self.step is None and layer + 1 in self.accumulate else None

    def _observe(self, branch: str, x: Tensor, y: Tensor) -> None:
        weight = transition_weights(x, y)[0]
        self._current = weight if self._current is None else self._current + weight

    def keep(self, layer: int, x: Tensor, rotary: Tensor | None) -> Tensor | None:
        if self._current is not None:
            self.transitions.append(self._current)
            self._current = None
        share, visible = self.shares.get(layer + 1), self.visible
        if share is None or not self.total:
            return None
        transition = torch.zeros_like(visible, dtype=torch.float32)
        for weight in self.transitions:
            transition = transition + weight
        weights = self._instruction_weights(layer + 1, x, rotary)
        seen = weights.mean((0, 1)) if weights.numel() else torch.zeros_like(transition)
        shares = {
            name: _normalised(value[visible]) for name, value in (("transition", transition), ("attention", seen))
        }
        score = shares["transition"] + shares["attention"]
        kept = score.topk(int(self.total * share)).indices.sort().values
        if self.record:
            self.stages.append({**shares, "score": score, "kept": kept, "weights": weights})
        chosen = ~visible
        chosen[visible.nonzero()[kept, 0]] = True
        keep = chosen.nonzero()[:, 0]
        self.transitions = [weight[keep] for weight in self.transitions]
        return keep

    def _instruction_weights(self, following: int, x: Tensor, rotary: Tensor | None) -> Tensor:
        """Where the tokens after the image would look in the block `following`: [H, instruction, n]."""
        block = self.model.trunk.blocks[following]
        query, key, _ = block.attention.project(block.attention_norm(x), rotary)
        return attention_weights(query[:, :, self.instruction :], key, causal=True, scale=block.attention.scale)[0]


def transition_weights(x: Tensor, y: Tensor) -> Tensor:
    """How much a branch changes each token, by length and direction, as shares of all tokens: normalised input and output [B, N, D]
    -> [B, N] (arXiv 2507.20630, section 3.2)."""
    x, y = x.float(), y.float()
    ratio = y.norm(dim=-1) / x.norm(dim=-1)
    turn = (1 - F.cosine_similarity(x, y, dim=-1, eps=1e-8)).exp()
    return ratio * turn / turn.sum(-1, keepdim=True)


def _normalised(value: Tensor) -> Tensor:
    return value / (value.sum() + 1e-8)
