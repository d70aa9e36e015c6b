"""Rows that see different parts of one sequence: what guidance of text-and-image sequences is made of.

All rows are fed the same tokens. A view hides keys from its rows and numbers the tokens that it sees from 0, which is the same as
running the model on those tokens alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from armm.decoding.vocabulary import Grammar, GrammarState
from armm.nn.masks import additive_mask, key_mask, prefix_mask

if TYPE_CHECKING:
    from armm.model import AutoregressiveModel

# "image": the open image. "start_image": the first token and the open image. "images": the first token and all images.
VIEWS = ("image", "start_image", "images")


def visible_tokens(
    ids: Tensor, real: Tensor, views: Sequence[str], grammar: Grammar | None, images: Tensor | None
) -> Tensor:
    """bool [R, T]: what the full rows and those of the `views` see of prompts `ids` [B, T].

    real: bool [B, T], False on padding. images: bool [V], the ids that images are written with.
    """
    first = torch.zeros_like(real)
    first.scatter_(1, real.int().argmax(1, keepdim=True), True)
    rows = [real]
    for view in views:
        if view == "images":
            rows.append(real & (images[ids] | first))  # type: ignore[index]
            continue
        since = grammar.start(ids).since[:, None]  # type: ignore[union-attr]
        place = torch.arange(ids.shape[1] - 1, -1, -1, device=ids.device)  # tokens behind each
        seen = (since >= 0) & (place <= since)
        rows.append(seen | first if view == "start_image" else seen)
    return torch.cat(rows)


class ContextStream:
    """Sequences through trunk and cache in 1 + len(views) rows each, the full ones first.

    ids: prompts [B, T]. mask: bool [B, T], False on padding (left). capacity: tokens to be fed after them. Views need the
    `grammar`.
    """

    def __init__(
        self,
        model: AutoregressiveModel,
        ids: Tensor,
        capacity: int,
        mask: Tensor | None = None,
        views: Sequence[str] = (),
        grammar: Grammar | None = None,
    ) -> None:
        if any(view not in VIEWS for view in views):
            raise ValueError(f"views must be among {VIEWS}, got {list(views)}")
        if views and grammar is None:
            raise ValueError("rows that see only images need a grammar that says where images are")
        self.model, self.ids, self.views = model, ids, tuple(views)
        self.batch, self.length = ids.shape
        self.rows, self.num_calls = (1 + len(self.views)) * self.batch, 0
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.to(device=ids.device, dtype=torch.bool)
        self.images = None if grammar is None else grammar.block.members(model.vocab_size).to(ids.device)
        self.visible = visible_tokens(ids, real, self.views, grammar, self.images)
        self.next = self.visible.sum(1)  # position of the next token of each row
        self.whole = mask is None and not self.views
        self.cache = model.trunk.allocate_cache(self.rows, self.length + capacity)
        self.bias: Tensor | None = None
        if not self.whole:
            tail = self.visible.new_ones(self.rows, capacity)
            self.bias = additive_mask(key_mask(torch.cat([self.visible, tail], dim=1)), self.cache.buffer.dtype)
            first = torch.zeros_like(real)
            first.scatter_(1, real.int().argmax(1, keepdim=True), True)
            empty = torch.zeros(self.batch, capacity, dtype=torch.bool, device=ids.device)
            self.start = torch.cat([first, empty], dim=1)  # the first real token of each row

    def prefill(self) -> Tensor:
        """Run the prompts: hidden state of the last position of all rows [R, D]."""
        index = (self.visible.cumsum(1) - 1).clamp(min=0)
        embeds = self.model.embed(self.ids).repeat(1 + len(self.views), 1, 1)
        if self.whole:
            return self._run(embeds, index[:1, :].squeeze(0), None, True)
        return self._run(embeds, index, prefix_mask(self.visible, self.length), False)

    def feed(self, token: Tensor, before: GrammarState | None = None, after: GrammarState | None = None) -> Tensor:
        """Feed one token [B] of each sequence: hidden states [R, D]. before, after: the grammar's states around it."""
        slot = self.cache.length
        hidden_text: list[tuple[slice, Tensor]] = []
        for number, view in enumerate(self.views):
            rows = slice((1 + number) * self.batch, (2 + number) * self.batch)
            if view == "images":
                hidden_text.append((rows, ~self.images[token]))  # type: ignore[index]
                continue
            opened = after.open & ~before.open  # type: ignore[union-attr]
            keep = self.start[:, :slot] if view == "start_image" else torch.zeros_like(self.start[:, :slot])
            past = self.bias[rows, 0, 0, :slot]  # type: ignore[index]
            fresh = additive_mask(keep, past.dtype)
            past.copy_(torch.where(opened[:, None], fresh, past))
            position = 1 if view == "start_image" else 0
            self.next[rows] = torch.where(opened, position, self.next[rows])
        mask = None if self.bias is None else self.bias.narrow(3, 0, slot + 1)
        embeds = self.model.embed(token.unsqueeze(1)).repeat(1 + len(self.views), 1, 1)
        hidden = self._run(embeds, self.next[:, None], mask, False)
        self.next = self.next + 1
        for rows, hide in hidden_text:  # a token always sees itself; later ones do not see it
            self.next[rows] -= hide.long()
            column = self.bias[rows, 0, 0, slot]  # type: ignore[index]
            column.copy_(torch.where(hide, float("-inf"), column))
        return hidden

    def _run(self, embeds: Tensor, index: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        self.num_calls += 1
        positions = self.model.positions_for(index)
        hidden = self.model.trunk(
            embeds.to(self.model.trunk.dtype), positions=positions, mask=mask, causal=causal, cache=self.cache
        )
        return (hidden[0] if isinstance(hidden, tuple) else hidden)[:, -1]
