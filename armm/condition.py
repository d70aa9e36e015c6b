"""What a model is conditioned on, ready to be fed: embedded tokens, their mask, their positions."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass
class Condition:
    """Prefix tokens of a generation.

    embeds: [B, T, D]. mask: bool [B, T], False where a slot is padding (None: all are real). index: flat position ids
    [B, T] for models with a position layout of their own (None: the first T positions). bidirectional: how many of the
    first tokens see each other whole instead of causally. vector: [B, D], what modulates the blocks of models that have
    one; such models may do without tokens, T = 0. routes: int64 [B, T], the router that chooses each token's experts, in models that have
    several (None: the first). origin: what a model made this from, as arguments [B, ...] of
    its `condition` or `prefix_condition`, for another model that is to be given the same (None: not known).
    """

    embeds: Tensor
    mask: Tensor | None = None
    index: Tensor | None = None
    bidirectional: int = 0
    vector: Tensor | None = None
    routes: Tensor | None = None
    origin: dict[str, Tensor] | None = None

    def __post_init__(self) -> None:
        if self.embeds.dim() != 3:
            raise ValueError(f"embeds must be [batch, tokens, width], got shape {tuple(self.embeds.shape)}")
        for name in ("mask", "index", "routes"):
            value = getattr(self, name)
            if value is not None and tuple(value.shape) != tuple(self.embeds.shape[:2]):
                raise ValueError(f"{name} must be {tuple(self.embeds.shape[:2])}, got {tuple(value.shape)}")
        if self.vector is not None and (self.vector.dim() != 2 or len(self.vector) != len(self.embeds)):
            raise ValueError(f"vector must be [{len(self.embeds)}, width], got {tuple(self.vector.shape)}")
        if not 0 <= self.bidirectional <= self.length:
            raise ValueError(f"bidirectional must lie between 0 and {self.length} tokens, got {self.bidirectional}")

    @property
    def batch(self) -> int:
        return self.embeds.shape[0]

    @property
    def length(self) -> int:
        return self.embeds.shape[1]

    def select(self, rows: slice | Tensor) -> Condition:
        """Some of the rows."""
        return Condition(
            self.embeds[rows],
            None if self.mask is None else self.mask[rows],
            None if self.index is None else self.index[rows],
            self.bidirectional,
            None if self.vector is None else self.vector[rows],
            None if self.routes is None else self.routes[rows],
            None if self.origin is None else {name: value[rows] for name, value in self.origin.items()},
        )

    def unpadded(self) -> Condition:
        """One row without the masked slots in front of it."""
        if self.batch != 1:
            raise ValueError(f"only one row can be unpadded, got {self.batch}")
        if self.mask is None:
            return self
        missing = int((~self.mask.bool()).sum())
        index = None if self.index is None else self.index[:, missing:]
        routes = None if self.routes is None else self.routes[:, missing:]
        whole = max(self.bidirectional - missing, 0)
        return Condition(self.embeds[:, missing:], None, index, whole, self.vector, routes)

    def repeat(self, times: int) -> Condition:
        """Every row `times` times, copies next to each other."""
        return Condition(
            self.embeds.repeat_interleave(times, 0),
            None if self.mask is None else self.mask.repeat_interleave(times, 0),
            None if self.index is None else self.index.repeat_interleave(times, 0),
            self.bidirectional,
            None if self.vector is None else self.vector.repeat_interleave(times, 0),
            None if self.routes is None else self.routes.repeat_interleave(times, 0),
            None if self.origin is None else {name: value.repeat_interleave(times, 0) for name, value in self.origin.items()},
        )

    def spread(self, times: int) -> Condition:
        """Every token `times` times, copies next to each other."""
        if times == 1:
            return self
        return Condition(
            self.embeds.repeat_interleave(times, 1),
            None if self.mask is None else self.mask.repeat_interleave(times, 1),
            None if self.index is None else self.index.repeat_interleave(times, 1),
            self.bidirectional * times,
            self.vector,
            None if self.routes is None else self.routes.repeat_interleave(times, 1),
            self.origin,
        )

    def extend(self, embeds: Tensor, index: Tensor) -> Condition:
        """These tokens followed by `embeds` [B, n, D], which are real and stand at the flat position ids `index` [n]."""
        mask, own, routes = self.mask, self.index, self.routes
        if routes is not None:
            routes = torch.cat([routes, routes.new_zeros(embeds.shape[:2])], dim=1)
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(embeds.shape[:2])], dim=1)
        if own is not None:
            own = torch.cat([own, index.expand(self.batch, -1)], dim=1)
        embeds = torch.cat([self.embeds.to(embeds.dtype), embeds], dim=1)
        return replace(self, embeds=embeds, mask=mask, index=own, routes=routes)

    def pad_left(self, length: int) -> Condition:
        """Masked slots in front, up to `length` tokens."""
        missing = length - self.length
        if missing <= 0:
            return self
        embeds = torch.cat([self.embeds.new_zeros(self.batch, missing, self.embeds.shape[2]), self.embeds], dim=1)
        real = self.mask
        if real is None:
            real = torch.ones(self.batch, self.length, dtype=torch.bool, device=embeds.device)
        mask = torch.cat([real.new_zeros(self.batch, missing), real], dim=1)
        index = self.index
        if index is not None:
            index = torch.cat([index.new_zeros(self.batch, missing), index], dim=1)
        routes = self.routes
        if routes is not None:
            routes = torch.cat([routes.new_zeros(self.batch, missing), routes], dim=1)
        whole = self.bidirectional + missing if self.bidirectional else 0
        return Condition(embeds, mask, index, whole, self.vector, routes)


def concatenate(conditions: list[Condition]) -> Condition:
    """All rows of several conditions; shorter ones are padded on the left with masked slots."""
    length = max(condition.length for condition in conditions)
    parts = [condition.pad_left(length) for condition in conditions]
    mask = None
    if any(part.mask is not None for part in parts):
        mask = torch.cat(
            [
                torch.ones(part.batch, length, dtype=torch.bool, device=part.embeds.device)
                if part.mask is None
                else part.mask.bool()
                for part in parts
            ]
        )
    index = None
    if any(part.index is not None for part in parts):
        if any(part.index is None for part in parts):
            raise ValueError("some of the conditions have position ids and some have none; give them to all or to none")
        index = torch.cat([part.index for part in parts])
    bidirectional = {part.bidirectional for part in parts}
    if len(bidirectional) > 1:
        raise ValueError(f"the conditions must agree in how many tokens are bidirectional, got {sorted(bidirectional)}")
    vectors = [part.vector for part in parts if part.vector is not None]
    if vectors and len(vectors) < len(parts):
        raise ValueError("some of the conditions have a vector and some have none; give one to all or to none")
    vector = torch.cat(vectors) if vectors else None
    routes = None
    if any(part.routes is not None for part in parts):
        routes = torch.cat(
            [
                part.embeds.new_zeros(part.batch, length, dtype=torch.long) if part.routes is None else part.routes
                for part in parts
            ]
        )
    return Condition(torch.cat([part.embeds for part in parts]), mask, index, bidirectional.pop(), vector, routes)
