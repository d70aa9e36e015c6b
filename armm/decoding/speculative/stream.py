"""What is decoded: a model fed with windows of tokens, whose rows go on at their own pace and forget what turned out wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from armm.condition import Condition, concatenate
from armm.decoding.base import TokenStream, check_guided, prefix_index
from armm.decoding.guidance import ContextGuidance, Guidance
from armm.decoding.sampling import Sampler
from armm.decoding.speculative.tree import DraftTree
from armm.nn.linear import PACKED_ROWS

if TYPE_CHECKING:
    from armm.model import AutoregressiveModel


class Target:
    """A model, its condition and what is made of its logits, for windows of units.

    A unit is what one token of the trunk stands for: a cell of the image, or a square of them (token-shuffle), with S ids (slots):
    the cells of the square, or the sub-codes of the cell. Units are numbered in raster order.

    Args:
        model, condition, null_condition, guidance: as for a decoding strategy; several null conditions are the rows behind the first
            of `ContextGuidance`.
        grid: of the image in tokens.
        low, high: the codes' ids in the vocabulary. Everything here counts ids from `low`.
        sampler: its filters make the distributions; with do_sample=False logits stay as they are.
        spare: places of the cache for windows. width: tokens that most windows have.
        filters: replaces the sampler's: (guided logits [B, L, S, V], numbers of the units they are for [B, L]) -> logits.
        index: flat position ids of the units [U] or [R, U], where they are not those of the model's image.
        random_range: the codes that random drafts are taken from, default all.
    """

    def __init__(
        self,
        model: AutoregressiveModel,
        condition: Condition,
        null_condition: Condition | Sequence[Condition] | None = None,
        grid: Sequence[int] | None = None,
        *,
        guidance: Guidance | ContextGuidance | None = None,
        low: int = 0,
        high: int | None = None,
        sampler: Sampler | None = None,
        spare: int = 16,
        width: int = 1,
        filters: Callable[[Tensor, Tensor], Tensor] | None = None,
        index: Tensor | None = None,
        random_range: tuple[int, int] | None = None,
    ) -> None:
        self.model, self.guidance, self.filters, self.width = model, guidance, filters, width
        self.sampler = sampler or Sampler()
        self.low, self.high = low, model.vocab_size if high is None else high
        self.vocabulary = self.high - self.low
        self.random_range = random_range or (0, self.vocabulary)
        nulls = [null_condition] if isinstance(null_condition, Condition) else list(null_condition or ())
        self.condition, self.null_condition = condition, nulls[0] if nulls else None
        self.batch = condition.batch
        self.guided = check_guided(guidance, condition, self.null_condition)
        self.rows = 1 + len(nulls)
        grid = model.grid if grid is None else model.check_grid(grid)
        trunk_grid = model.trunk_grid(grid)
        self.grid, self.columns = grid, trunk_grid[-1]
        self.slots = model.window**2 * model.sub_codes
        rows = concatenate([condition, *nulls]) if self.guided else condition
        index = model.image_index(grid, rows.embeds.device) if index is None else index
        self.units = index.shape[-1]
        # windows that reach beyond the last unit are filled up there
        fed = torch.cat([index, index[..., -1:].expand(*index.shape[:-1], spare)], dim=-1)
        self.stream = WindowStream(
            model, rows, model.positions_for(prefix_index(model, rows), grid), model.positions_for(fed, grid), spare
        )
        self.device = rows.embeds.device
        self.cached = [0] * self.batch  # units in the cache
        self.hidden: Tensor | None = None

    @property
    def num_calls(self) -> int:
        return self.stream.num_calls

    @property
    def copies(self) -> int:
        """Rows of the batch for each row of the call."""
        return self.rows if self.guided else 1

    def prefill(self) -> Tensor:
        """Logits [B, 1, S, V] of the first unit."""
        self.hidden = self.stream.prefill()[:, None]
        return self._logits(self.hidden, [0] * self.batch, None)

    def forward(self, codes: Tensor, tree: DraftTree | None = None) -> Tensor:
        """Feed windows of codes [B, L, S] behind what is in the cache: logits [B, L, S, V] of the units that follow each.

        tree: how they follow each other, default one after the other.
        """
        count, copies = codes.shape[1], self.copies
        # On a CPU the weights are packed for a number of tokens: a window that is a little short is filled up to it.
        repeated = tree is None and self.width * copies * self.batch in PACKED_ROWS and count <= self.width
        if repeated and 1 < count < self.width and self.device.type == "cpu":
            codes = torch.cat([codes, codes[:, -1:].expand(-1, self.width - count, -1)], dim=1)
        embeds = self.embed(codes)
        if self.guided:
            embeds = torch.cat([embeds] * copies)
        hidden = self.stream.feed_window(embeds, self.cached * copies, tree, repeated and codes.shape[1] == self.width)
        self.hidden = hidden[:, :count]
        return self._logits(self.hidden, [cached + 1 for cached in self.cached], tree)

    def embed(self, codes: Tensor) -> Tensor:
        ids = codes + self.low
        if self.model.window > 1:
            return self.model.embed_windows(ids)
        return self.model.embed(ids if self.model.sub_codes > 1 else ids[..., 0])

    def keep(self, kept: Sequence[int], path: Tensor | None = None) -> None:
        """Of the window that was fed last, keep the first `kept` places of every row's `path` [B, K] (default: 0, 1, 2, ...)."""
        copies = self.copies
        if path is not None and self.guided:
            path = torch.cat([path] * copies)
        self.stream.keep(self.cached * copies, list(kept) * copies, path)
        self.cached = [cached + number for cached, number in zip(self.cached, kept, strict=True)]

    def rewind(self, cached: Sequence[int]) -> None:
        """Forget the units from number cached[b] on."""
        self.cached = list(cached)
        self.stream.cache.crop(self.stream.length + max(self.cached))

    def select(self, rows: Tensor) -> None:
        """Go on with these of the rows only."""
        self.stream.select(torch.cat([rows + copy * self.batch for copy in range(self.copies)]))
        self.batch = len(rows)
        self.rewind([self.cached[row] for row in rows.tolist()])  # a row that is gone may have been the longest

    # Logits.

    def raw_logits(self, hidden: Tensor) -> Tensor:
        """Hidden [R, L, D] -> [R, L, S, V], before guidance."""
        model = self.model
        if model.window > 1:
            return model.window_logits(hidden, low=self.low, high=self.high)
        if model.sub_code_projection is not None:
            return model.logits(hidden)
        if hidden.shape[1] == 1:
            return model.logits(hidden[:, 0], low=self.low, high=self.high)[:, None, None]
        if self.width > 1 and hidden.shape[1] == self.width:
            flat = model.logits(hidden.flatten(0, 1), low=self.low, high=self.high)
            return flat.view(*hidden.shape[:2], 1, -1)
        return model.logits(hidden, low=self.low, high=self.high)[:, :, None]

    def guide(self, logits: Tensor, units: Tensor) -> Tensor:
        """[R, L, S, V] -> [B, L, S, V] for the units with these numbers [B, L]; unguided rows pass."""
        if not self.guided:
            return logits
        return self.guidance.combine_steps(logits, units, self.units)  # type: ignore[union-attr]

    def finish(self, logits: Tensor, units: Tensor) -> Tensor:
        """Filters on guided logits."""
        if self.filters is not None:
            return self.filters(logits, units)
        return self.sampler.filter(logits) if self.sampler.do_sample else logits

    def unit_numbers(self, starts: Sequence[int], length: int, tree: DraftTree | None = None) -> Tensor:
        """Numbers [B, L] of the units predicted by a window whose first token predicts unit starts[b]."""
        if tree is None and len(starts) == 1:
            return torch.arange(starts[0], starts[0] + length)[None]
        depths = torch.arange(length) if tree is None else torch.tensor(tree.depths)
        return torch.tensor(list(starts))[:, None] + depths

    def _logits(self, hidden: Tensor, starts: Sequence[int], tree: DraftTree | None) -> Tensor:
        units = self.unit_numbers(starts, hidden.shape[1], tree)
        if self.guided and not self.guidance.covers(min(starts)):  # type: ignore[union-attr]
            # for good: the null rows are not needed any more
            self.guided = False
            self.stream.narrow(self.batch)
            hidden = self.hidden = hidden[: self.batch]
        return self.finish(self.guide(self.raw_logits(hidden), units), units)


class WindowStream(TokenStream):
    """A `TokenStream` that is fed windows.

    Rows have different numbers of tokens in the cache. A window is written behind the longest row; what lies between a row's own
    end and the window is hidden from it, and what is kept of the window is then moved to the row's own end.
    """

    def __init__(self, model, prefix, prefix_positions, following, spare: int = 16) -> None:  # type: ignore[no-untyped-def]
        super().__init__(model, prefix, prefix_positions, following, spare=spare)
        self.real = prefix.mask if prefix.mask is not None and not bool(prefix.mask.all()) else None
        self.start = self.length  # where the last window was written
        self._chain: Tensor | None = None  # what windows of rows that are level see of the cache
        self._chain_start = 0  # from here on something is hidden
        self._triangle: Tensor | None = None

    def feed_window(
        self, embeds: Tensor, cached: Sequence[int], tree: DraftTree | None = None, repeated: bool = False
    ) -> Tensor:
        """Embeddings [R, L, D] behind the first cached[r] tokens after the prefix of every row: hidden states [R, L, D]."""
        count = embeds.shape[1]
        self.start = self.cache.length
        level = tree is None and min(cached) == max(cached)
        last = self.following.length - 1
        if level and cached[0] + count - 1 <= last:
            positions = self.following[cached[0] : cached[0] + count]
        else:
            depths = torch.arange(count) if tree is None else torch.tensor(tree.depths)
            places = (torch.tensor(list(cached))[:, None] + depths).clamp(max=last)
            positions = self.following.take(places.to(embeds.device))
        if level:
            mask = None if self.real is None and count == 1 else self._chain_mask(count, embeds)
        else:
            mask = self._mask(cached, count, tree, embeds.device)
        self.num_calls += 1
        return self.trunk(embeds, positions=positions, mask=mask, cache=self.cache, repeated=repeated)

    def _chain_mask(self, count: int, embeds: Tensor) -> Tensor:
        """`_mask` of rows that are level, additive [1 or R, 1, L, keys]: one buffer for all windows of a length, whose last columns move
        along."""
        if self._chain is None or self._chain.shape[2] != count:
            rows = 1 if self.real is None else len(self.real)
            self._chain = embeds.new_zeros(rows, 1, count, self.cache.capacity)
            if self.real is not None:
                self._chain[..., : self.length].masked_fill_(~self.real[:, None, None], float("-inf"))
            self._triangle = embeds.new_full((count, count), float("-inf")).triu_(1)
            self._chain_start = self.start
        if self._chain_start < self.start:
            self._chain[..., self._chain_start : self.start].zero_()
        end = self.start + count
        self._chain[..., self.start : end].copy_(self._triangle)
        self._chain_start = self.start
        return self._chain[..., :end]

    def _mask(self, cached: Sequence[int], count: int, tree: DraftTree | None, device: torch.device) -> Tensor:
        """bool [R, 1, L, keys]: the real part of the prefix, the row's own tokens, and in the window what comes before."""
        place = torch.arange(self.start, device=device)
        ends = self.length + torch.tensor(list(cached), device=device)
        before = place < ends[:, None]
        if self.real is not None:
            before[:, : self.length] &= self.real
        own = torch.ones(count, count, dtype=torch.bool).tril() if tree is None else tree.mask()
        shape = (len(cached), count)
        return torch.cat([before[:, None].expand(*shape, -1), own.to(device).expand(len(cached), -1, -1)], dim=2)[
            :, None
        ]

    def keep(self, cached: Sequence[int], kept: Sequence[int], path: Tensor | None = None) -> None:
        """Of the window fed last, keep the first kept[r] places of path [R, K] behind the first cached[r] tokens of every row."""
        ends = [self.length + number for number in cached]
        longest = max(kept)
        if path is not None or any(end != self.start for end in ends):
            device = self.cache.buffer.device
            number = torch.arange(longest, device=device).minimum(torch.tensor(list(kept), device=device)[:, None] - 1)
            place = number if path is None else path.to(device).gather(1, number)
            self.cache.move(self.start + place, torch.tensor(ends, device=device)[:, None] + number)
        self.cache.crop(max(end + number for end, number in zip(ends, kept, strict=True)))

    def select(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        self.cache.reorder(rows)
        self.real = None if self.real is None else self.real[rows]
        self._chain = None
        self.bias = None if self.bias is None else self.bias[rows]
        self.following = self.following.select(rows)

    def narrow(self, rows: int) -> None:
        super().narrow(rows)
        self._chain = None
        self.real = None if self.real is None else self.real[:rows]
