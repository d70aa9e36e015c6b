"""What decoding strategies share: their output, their registry, and a stream of tokens through trunk and cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from armm.condition import Condition
from armm.nn.masks import additive_mask, key_mask, prefix_mask

if TYPE_CHECKING:
    from armm.decoding.guidance import ContextGuidance, Guidance
    from armm.model import AutoregressiveModel
    from armm.nn.hooks import LayerHook
    from armm.nn.positions import PositionTable

# What runs embeddings through the trunk: the trunk itself, or a compiled form of it.
Trunk = Callable[..., "Tensor | tuple[Tensor, dict[int, Tensor]]"]
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
    if hook is None or not hasattr(hook, "pre_forward"):
        return
    # Asked after every step that calls back: a model that is there already is left alone.
    there, parameter = getattr(hook, "execution_device", None), next(model.parameters(), None)
    if there is not None and parameter is not None:
        there = torch.device(there) if not isinstance(there, int) else torch.device("cuda", there)
        if parameter.device.type == there.type and there.index in (None, parameter.device.index):
            return
    hook.pre_forward(model)


def check_guided(guidance: Guidance | ContextGuidance | None, condition: Condition, null_condition: Condition | None) -> bool:
    """Whether guidance is on; a ValueError if its rows are missing or too few."""
    if guidance is None or not guidance.active:
        return False
    if null_condition is None:
        raise ValueError(f"guidance with scale {guidance.scale} needs a null_condition")
    if null_condition.batch != condition.batch:
        raise ValueError(f"null_condition has {null_condition.batch} rows, condition has {condition.batch}")
    return True


def check_known(
    ids: Tensor | None, mask: Tensor | None, batch: int, tokens: int, codes: int, code_shape: tuple[int, ...] = ()
) -> None:
    """A ValueError unless given codes [B, N, *code_shape] and their mask [B, N] belong together and fit the call."""
    if (ids is None) != (mask is None):
        raise ValueError("known_ids and known_mask belong together: give both or neither")
    if ids is None or mask is None:
        return
    for name, value, extra in (("known_ids", ids, code_shape), ("known_mask", mask, ())):
        if tuple(value.shape) != (batch, tokens, *extra):
            raise ValueError(f"{name} must be {[batch, tokens, *extra]}, got {tuple(value.shape)}")
    if mask.dtype != torch.bool:
        raise ValueError(f"known_mask must be bool, got {mask.dtype}")
    values = ids[mask]
    if values.numel() and (int(values.min()) < 0 or int(values.max()) >= codes):
        raise ValueError(f"known_ids must lie in 0 .. {codes - 1} where known_mask is True")


def run_image(
    model: AutoregressiveModel,
    condition: Condition,
    embeds: Tensor,
    index: Tensor,
    mask: Tensor,
    grid: Sequence[int] | None = None,
    trunk: Trunk | None = None,
) -> tuple[Tensor, ...]:
    """Teacher forcing without a cache: the states (see `TokenStream`) of a condition followed by an image.

    embeds: the image's tokens [B, L, D]. index: their flat position ids [L]. mask: bool [T + L, T + L], to which what the
    condition says of itself is added. trunk: a compiled form of the model's.
    """
    prefix = prefix_index(model, condition)
    index = torch.cat([prefix, index.expand(*prefix.shape[:-1], -1)], dim=-1)
    if condition.bidirectional:
        mask = mask.clone()
        mask[:, : condition.bidirectional] = True
    if condition.mask is not None:
        real = torch.cat([condition.mask.bool(), condition.mask.new_ones(embeds.shape[:2], dtype=torch.bool)], dim=1)
        mask = ((mask & real[:, None]) | torch.eye(len(mask), dtype=torch.bool, device=mask.device))[:, None]
    sequence = torch.cat([condition.embeds.to(embeds.dtype), embeds], dim=1)
    return _states((trunk or model.trunk)(sequence, positions=model.positions_for(index, grid), mask=mask))


def _states(output: Tensor | tuple[Tensor, dict[int, Tensor]]) -> tuple[Tensor, ...]:
    """What the trunk hands out as a tuple: its taps in their order, then its final hidden state."""
    if isinstance(output, tuple):
        hidden, taps = output
        return (*(taps[tap] for tap in sorted(taps)), hidden)
    return (output,)


def prefix_index(model: AutoregressiveModel, rows: Condition) -> Tensor:
    """Flat position ids of the tokens of a condition, [T] or [R, T]."""
    if rows.index is not None:
        return rows.index
    if rows.length != model.prefix_slots:
        raise ValueError(f"the condition has {rows.length} tokens, this model expects {model.prefix_slots}")
    return torch.arange(rows.length, device=rows.embeds.device)


def vocabulary_range(model: AutoregressiveModel, vocabulary: tuple[int, int] | None) -> tuple[int, int]:
    low, high = (0, model.vocab_size) if vocabulary is None else vocabulary
    if not 0 <= low < high <= model.vocab_size:
        raise ValueError(f"vocabulary must be (low, high) within 0 .. {model.vocab_size}, got {(low, high)}")
    return low, high


class TokenStream:
    """A batch of rows being decoded one token at a time: prefix through the trunk, then token after token.

    following: positions of the tokens that will be fed after the prefix, in the order in which they are fed; one table
    for all rows or one per row. Tokens go in one at a time (`feed`) or in groups that see each other (`feed_group`). spare: room
    in the cache for tokens that do not stay. hook: looks in between the blocks, see `ARTransformer.forward`.
    """

    def __init__(
        self,
        model: AutoregressiveModel,
        prefix: Condition,
        prefix_positions: PositionTable,
        following: PositionTable,
        *,
        spare: int = 0,
        hook: LayerHook | None = None,
    ) -> None:
        self.hook = hook
        self.model, self.trunk, self.prefix = model, model.trunk, prefix
        self.prefix_positions = prefix_positions
        self.following = following
        self._positions: list[PositionTable] | None = None
        self.length = prefix.length
        self.cache = self.trunk.allocate_cache(prefix.batch, self.length + following.length + spare)
        self.bias: Tensor | None = None
        self.num_calls = 0
        self.embed = model.embed

    @property
    def positions(self) -> list[PositionTable]:
        """Of each of the tokens that follow the prefix by itself."""
        if self._positions is None:
            self._positions = [self.following[i : i + 1] for i in range(self.following.length)]
        return self._positions

    def prefill(self) -> Tensor:
        """Run the prefix: hidden state of its last position [R, D]."""
        return self.prefill_states()[-1][:, -1]

    def prefill_states(self) -> tuple[Tensor, ...]:
        """Run the prefix: the trunk's taps in their order and its final hidden state, each [R, T, D]."""
        embeds, mask, full = self.prefix.embeds, self.prefix.mask, None
        padded = mask is not None and not bool(mask.all())
        if padded or self.prefix.bidirectional:
            real = embeds.new_ones(embeds.shape[:2], dtype=torch.bool) if mask is None else mask
            full = prefix_mask(real, self.length, self.prefix.bidirectional)
        if mask is not None and padded:
            tail = mask.new_ones(mask.shape[0], self.following.length)
            self.bias = additive_mask(key_mask(torch.cat([mask, tail], dim=1)), self.cache.buffer.dtype)
        embeds, routes = embeds.to(self.trunk.dtype), self.prefix.routes
        return self._run(embeds, self.prefix_positions, full, full is None, routes)

    def feed(self, ids: Tensor, step: int) -> Tensor:
        """Feed token `step` after the prefix, `ids` [R]: hidden state [R, D]."""
        mask = None if self.bias is None else self.bias.narrow(3, 0, self.length + step + 1)
        return self._run(self.embed(ids.unsqueeze(1)), self.positions[step], mask, False)[-1][:, -1]

    def feed_group(self, embeds: Tensor) -> tuple[Tensor, ...]:
        """Feed the next tokens [R, n, D], which see each other and all before: taps and final hidden state, each [R, n, D]."""
        start = self.cache.length - self.length
        stop = start + embeds.shape[1]
        mask = None if self.bias is None else self.bias.narrow(3, 0, self.length + stop)
        return self._run(embeds, self.following[start:stop], mask, False)

    def _run(
        self, embeds: Tensor, positions: PositionTable, mask: Tensor | None, causal: bool, routes: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        self.num_calls += 1
        options = {} if routes is None else {"routes": routes}
        return _states(
            self.trunk(
                embeds, positions=positions, mask=mask, causal=causal, cache=self.cache, hook=self.hook, **options
            )
        )

    def narrow(self, rows: int) -> None:
        """Go on with the first `rows` rows only."""
        self.cache.narrow(rows)
        self.following = self.following.narrow(rows)
        self._positions = None
        if self.bias is not None:
            self.bias = self.bias[:rows]
