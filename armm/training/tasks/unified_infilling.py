"""Training rows with holes for the unified model: images and captions whose missing parts are written at their end (CM3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from armm.decoding.base import Trunk, prefix_index
from armm.decoding.infilling import hole_layout
from armm.model import AutoregressiveModel
from armm.nn.masks import causal_mask

IGNORED = -100


def random_holes(count: int, grid: tuple[int, int], limit: int, generator: torch.Generator) -> Tensor:
    """Masks bool [count, N] with 1 to `limit` holes: half of them a rectangle of cells, half spans of the sequence.

    The spans are drawn as CM3 draws them (section 2.1): about Poisson(1) of them, at least one, with uniform ends.
    """
    height, width = grid
    masks = torch.zeros(count, height, width, dtype=torch.bool)
    for mask in masks:
        if float(torch.rand((), generator=generator)) < 0.5 and height <= limit:
            (top, bottom), (left, right) = (_span(size, generator) for size in grid)
            mask[top:bottom, left:right] = True
        else:
            spans = int(torch.poisson(torch.ones(()), generator=generator).clamp(1, limit))
            for _ in range(spans):
                start, stop = _span(height * width, generator)
                mask.view(-1)[start:stop] = True
    return masks.flatten(1)


def _span(length: int, generator: torch.Generator) -> tuple[int, int]:
    """A span [start, stop) of at least one place, its ends uniform."""
    ends = torch.randint(length + 1, (2,), generator=generator).sort().values.tolist()
    start = min(ends[0], length - 1)
    return start, max(ends[1], start + 1)


def holed_images(
    codes: Tensor, grid: tuple[int, int], holes: Sequence[int], first_code: int, pad: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Rows for images with random holes, all of the same length M = N + 2 * len(holes).

    Args:
        codes: [B, N], counted from 0.
        holes: ids of the sentinels. first_code: id of code 0. pad: id of padding.

    Returns:
        holed [B, M] ids, holed_cells [B, M] the cells at which they stand, holed_targets [B, M], which token is to be predicted at
        the place before (-100: sentinels and padding).
    """
    layout = hole_layout(random_holes(len(codes), grid, len(holes), generator), len(holes))
    tokens = layout.tokens(codes + first_code, torch.tensor(list(holes)), pad)
    missing = codes.shape[1] + 2 * len(holes) - tokens.shape[1]
    trained = layout.sentinels == -1
    return {
        "holed": F.pad(tokens, (0, missing), value=pad),
        "holed_cells": F.pad(layout.cells, (0, missing)),
        "holed_targets": F.pad(torch.where(trained, tokens - first_code, IGNORED), (0, missing), value=IGNORED),
    }


def holed_loss(
    model: AutoregressiveModel, prompts: Tensor, batch: dict[str, Tensor], first_code: int, trunk: Trunk | None = None
) -> Tensor:
    """Cross-entropy of the codes in rows of `holed_images` behind prompts [B, T + 1]."""
    condition = model.prefix_condition(prompts)
    tokens, cells = batch["holed"][:, :-1], batch["holed_cells"][:, :-1]
    embeds = torch.cat([condition.embeds, model.embed(tokens)], dim=1)
    index = torch.cat([prefix_index(model, condition).expand(len(tokens), -1), model.prefix_slots + cells], dim=1)
    mask = causal_mask(embeds.shape[1], embeds.shape[1], embeds.device)
    mask[:, : condition.bidirectional] = True
    output = (trunk or model.trunk)(embeds, positions=model.positions_for(index), mask=mask)
    hidden = output[0] if isinstance(output, tuple) else output
    targets = batch["holed_targets"].flatten()
    wanted = targets != IGNORED
    logits = model.logits(hidden[:, condition.length - 1 :].flatten(0, 1)[wanted], low=first_code)
    return F.cross_entropy(logits.float(), targets[wanted])


def caption_with_hole(
    captions: Tensor, lengths: Tensor, hole: int, end: int, pad: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Captions [B, T] with a random span moved to the end, as tokens and targets [B, T + 4].

    The text is `A B <hole> E F <end> <hole> C D <end>`; sentinels and padding are no targets (-100).
    """
    count, width = captions.shape
    tokens = torch.full((count, width + 4), pad)
    trained = torch.zeros_like(tokens, dtype=torch.bool)
    for row, (caption, length) in enumerate(zip(captions.tolist(), lengths.tolist(), strict=True)):
        start, stop = _span(length, generator)
        words = caption[:length]
        text = [*words[:start], hole, *words[stop:], end, hole, *words[start:stop], end]
        tokens[row, : len(text)] = torch.tensor(text)
        trained[row, : len(text)] = torch.tensor([word != hole for word in text])
    return tokens, torch.where(trained, tokens, IGNORED)
