"""Causally masked infilling: holes are moved to the end and written left to right (CM3, arXiv 2201.07520, section 2).

A sequence with holes reads `A B <mask:0> E F <mask:0> C D`: each hole leaves a sentinel in its place, and behind the sequence
every sentinel is followed by what its hole held. So a causal model that fills a hole has seen what comes after it. Our images
keep the coordinates of their cells wherever in the sequence they stand; a sentinel stands at its hole's first cell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from armm.condition import Condition, concatenate
from armm.decoding.base import (
    DecodingOutput,
    StepCallback,
    TokenStream,
    check_guided,
    prefix_index,
    vocabulary_range,
    wake,
)
from armm.decoding.guidance import Guidance
from armm.decoding.sampling import NoiseSource, Sampler

if TYPE_CHECKING:
    from armm.model import AutoregressiveModel

__all__ = ["HoleLayout", "fill_image", "hole_layout"]


@dataclass(frozen=True)
class HoleLayout:
    """The order of an image's tokens once its holes are at the end, for B images, padded to the longest.

    cells: int64 [B, L], the cell at which each place stands. sentinels: int64 [B, L], the number of the sentinel at a place, -1
    where the place holds the cell's code and -2 behind the end. starts: int64 [B], the place of the first sentinel at the end.
    lengths: int64 [B].
    """

    cells: Tensor
    sentinels: Tensor
    starts: Tensor
    lengths: Tensor

    @property
    def num_calls(self) -> int:
        """Calls of the trunk that write the end: one for every token behind the first sentinel of the longest row."""
        return int((self.lengths - self.starts).max()) - 1

    def tokens(self, codes: Tensor, sentinel_ids: Tensor, pad: int) -> Tensor:
        """Ids [B, L] of the sequence, from ids of the images [B, N] and of the sentinels [K]."""
        ids = codes.gather(1, self.cells.to(codes.device))
        sentinels = self.sentinels.to(codes.device)
        ids = torch.where(sentinels >= 0, sentinel_ids.to(codes.device)[sentinels.clamp(min=0)], ids)
        return ids.masked_fill(sentinels == -2, pad)


def hole_layout(mask: Tensor, sentinels: int) -> HoleLayout:
    """The layout for holes where `mask` [B, N] is True; every maximal run of masked cells in raster order is one hole.

    Raises:
        ValueError: no hole in a row, or more than `sentinels`.
    """
    rows: list[list[tuple[int, int]]] = []
    starts = []
    for number, row in enumerate(mask.tolist()):
        visible: list[tuple[int, int]] = []
        holes: list[list[int]] = []
        for cell, hidden in enumerate(row):
            if not hidden:
                visible.append((cell, -1))
            elif cell and row[cell - 1]:
                holes[-1].append(cell)
            else:
                visible.append((cell, len(holes)))
                holes.append([cell])
        if not 1 <= len(holes) <= sentinels:
            raise ValueError(
                f"mask {number} has {len(holes)} holes (runs of masked cells, row by row); this model fills 1 to {sentinels} at once"
            )
        starts.append(len(visible))
        for index, cells in enumerate(holes):
            visible += [(cells[0], index), *((cell, -1) for cell in cells)]
        rows.append(visible)
    lengths = [len(row) for row in rows]
    padded = torch.tensor([row + [(0, -2)] * (max(lengths) - len(row)) for row in rows])
    return HoleLayout(padded[..., 0], padded[..., 1], torch.tensor(starts), torch.tensor(lengths))


@torch.no_grad()
def fill_image(
    model: AutoregressiveModel,
    condition: Condition,
    codes: Tensor,
    mask: Tensor,
    null_condition: Condition | None = None,
    *,
    sentinel_ids: Sequence[int],
    pad_id: int,
    vocabulary: tuple[int, int] | None = None,
    sampler: Sampler | None = None,
    guidance: Guidance | None = None,
    noise: NoiseSource | torch.Generator | Sequence[torch.Generator] | Tensor | None = None,
    callback: StepCallback | None = None,
    interrupt: Callable[[], bool] | None = None,
) -> DecodingOutput:
    """Draw the cells of images anew where `mask` [B, N] is True, seeing the others `codes` [B, N] on all sides.

    condition: prompts up to begin-of-image. sentinel_ids, pad_id: ids of the whole vocabulary. vocabulary: (low, high) of the
    codes. callback(step, ids): all ids [B, N], -1 in what is still open. The rest as in `NextTokenDecoding`.

    Raises:
        ValueError: shapes, or masks with no or too many holes.
    """
    wake(model)
    batch, device = condition.batch, condition.embeds.device
    if codes.shape != mask.shape or codes.dim() != 2 or len(codes) != batch or mask.dtype != torch.bool:
        raise ValueError(
            f"codes and mask must be ids and bools [{batch}, N], got {tuple(codes.shape)} and {mask.dtype} {tuple(mask.shape)}"
        )
    sampler = sampler or Sampler()
    guided = check_guided(guidance, condition, null_condition)
    low, high = vocabulary_range(model, vocabulary)
    layout = hole_layout(mask, len(sentinel_ids))
    sentinels = torch.tensor(list(sentinel_ids), device=device)
    tokens = layout.tokens(codes.to(device) + low, sentinels, pad_id)
    positions = model.image_index(None, device)[layout.cells.to(device)]
    steps = layout.num_calls
    # What is written at the end, place by place: a sentinel is given, a code is drawn.
    places = layout.starts[:, None] + torch.arange(steps + 1)
    inside = (places < layout.lengths[:, None]).to(device)
    places = places.clamp(max=tokens.shape[1] - 1).to(device)
    given = (layout.sentinels.to(device).gather(1, places) >= 0) | ~inside
    wanted, index = tokens.gather(1, places), positions.gather(1, places)
    cells = layout.cells.to(device).gather(1, places)

    parts = [condition, null_condition] if guided else [condition]
    prefix = concatenate([_with_image(part, model, tokens, positions, layout.starts) for part in parts])  # type: ignore[arg-type]
    copies = len(parts)
    following = model.positions_for(index[:, 1:].repeat(copies, 1))
    stream = TokenStream(model, prefix, model.positions_for(prefix_index(model, prefix)), following)
    if sampler.do_sample and not isinstance(noise, NoiseSource):
        noise = NoiseSource(noise, batch, high - low, device)
    ids = codes.to(device).masked_fill(mask.to(device), -1)
    done = 0
    token = wanted[:, 0]
    for step in range(1, steps + 1):
        if interrupt is not None and interrupt():
            break
        hidden = stream.prefill() if step == 1 else stream.feed(token.repeat(copies), step - 2)
        logits = model.logits(hidden, low=low, high=high)
        if guided:
            logits = guidance.combine(logits, step - 1, steps)  # type: ignore[union-attr]
        drawn = sampler(logits, noise.draw(step - 1) if sampler.do_sample else None)  # type: ignore[union-attr]
        place = cells[:, step : step + 1]
        kept = ids.gather(1, place)
        ids.scatter_(1, place, torch.where(given[:, step : step + 1], kept, drawn[:, None]))
        token = torch.where(given[:, step], wanted[:, step], drawn + low)
        done = step
        if callback is not None:
            replacement = callback(step - 1, ids)
            if replacement is not None:
                ids = replacement.to(device).clone()
                token = torch.where(given[:, step], wanted[:, step], ids.gather(1, place)[:, 0] + low)
    return DecodingOutput(ids.clamp_(min=0), None, stream.num_calls, done)


def _with_image(
    condition: Condition, model: AutoregressiveModel, tokens: Tensor, positions: Tensor, starts: Tensor
) -> Condition:
    """A prompt followed by what can be seen of its image and the first sentinel at the end, all rows ending together."""
    longest = int(starts.max()) + 1
    # Rows are shifted to the right: place p of the result is place p - (longest - 1 - start) of the row.
    place = torch.arange(longest) - (longest - 1 - starts)[:, None]
    real = (place >= 0).to(tokens.device)
    place = place.clamp(min=0).to(tokens.device)
    index = prefix_index(model, condition).expand(condition.batch, -1)
    mask = condition.mask
    if mask is None:
        mask = torch.ones_like(index, dtype=torch.bool)
    return Condition(
        torch.cat([condition.embeds, model.embed(tokens.gather(1, place))], dim=1),
        torch.cat([mask, real], dim=1),
        torch.cat([index, positions.gather(1, place)], dim=1),
        condition.bidirectional,
    )
