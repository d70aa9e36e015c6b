"""Where in the image a word comes from: Token Activation Map (arXiv 2506.23270), and its relatives by interactions between tokens
(arXiv 2509.22415)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-8


@dataclass
class Activation:
    """How one word was explained.

    Args:
        map: float64 [h, w] in 0 .. 1, denoised.
        raw: scores of the image's tokens [N] before anything is taken away.
        text: scores of the words before it [n].
        interference: what the words before it draw from the image [N], or None for the first word.
        scale: how much of that was taken away.
        image: scores [N] after it was taken away.
        relative: of the image [h, w] and the words [n - 1], scaled together to 0 .. 1.
    """

    map: Tensor
    raw: Tensor
    text: Tensor
    interference: Tensor | None
    scale: float
    image: Tensor
    relative: tuple[Tensor, Tensor]


class ActivationMaps:
    """Explains words one after the other; each takes away what it shares with those before it.

    Args:
        grid: (height, width) of the image in tokens.
        kernel: side of the denoising window; 1 turns it off.
    """

    def __init__(self, grid: tuple[int, int], kernel: int = 3) -> None:
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel must be an odd number, got {kernel}")
        self.grid, self.kernel = grid, kernel
        self.history: list[Tensor] = []

    def explain(self, image: Tensor, text: Tensor, context: Tensor) -> Activation:
        """The next word.

        Args:
            image: logits of the word at the image's tokens [N].
            text: logits of the word at the words before it and, last, at the position that says it [n].
            context: how much of each earlier word's map counts as interference [number of earlier words], 0 .. 1: in TAM 0 for
                pieces that read like the word and 1 for others.
        """
        raw, text = image.double().clamp(min=0), text.double().clamp(min=0)
        self.history.append(raw)
        interference, scale, cleaned = None, 0.0, raw
        if len(self.history) > 1:
            earlier = len(self.history) - 1
            weights = text[:earlier] * context.double()
            total = text[:earlier][context > 0].sum()
            interference = (weights / (total + EPSILON)) @ torch.stack(self.history[:earlier])
            scale = least_squares(raw, interference)
            cleaned = (raw - scale * interference).clamp(min=0)
        both = _unit(torch.cat([cleaned, text[:-1]]))
        relative = both[: raw.numel()].view(self.grid), both[raw.numel() :]
        return Activation(rank_gaussian(relative[0], self.kernel), raw, text, interference, scale, cleaned, relative)


def same_piece_context(pieces: Sequence[object], own: int) -> Tensor:
    """TAM's context of piece number `own`: 1 for earlier pieces that differ from it."""
    return torch.tensor([float(piece != pieces[own]) for piece in pieces[:own]], dtype=torch.float64)


def rank_biased_overlap(first: Sequence[int], second: Sequence[int], p: float = 0.9) -> float:
    """Agreement of two rankings in 0 .. 1, the first places counting most (Webber et al., 2010; cut off where the shorter ends)."""
    depth = min(len(first), len(second))
    if not 0 < p < 1 or not depth:
        raise ValueError(f"p must lie between 0 and 1 and the rankings must not be empty, got p={p}")
    seen_first: set[int] = set()
    seen_second: set[int] = set()
    total, shared = 0.0, 0
    for place, (a, b) in enumerate(zip(first, second, strict=False)):
        shared += (a in seen_second) + (b in seen_first) + (a == b)
        seen_first.add(a)
        seen_second.add(b)
        total += p**place * shared / (place + 1)
    return (1 - p) * total / (1 - p**depth)


def coherence_context(rankings: Sequence[Sequence[int]], own: int, p: float = 0.9) -> Tensor:
    """ARC's context of word number `own`: words before it whose next words rank like its own do not count as interference.

    rankings: for each word, the likeliest ids at the position that says it.
    """
    return torch.tensor(
        [1 - rank_biased_overlap(rankings[own], ranking, p) for ranking in rankings[:own]], dtype=torch.float64
    )


def least_squares(target: Tensor, source: Tensor) -> float:
    """The s that makes s * source nearest to target; 0 for a source of zeros."""
    power = float(source @ source)
    return float(target @ source) / power if power > 0 else 0.0


def rank_gaussian(scores: Tensor, kernel: int = 3) -> Tensor:
    """Denoise a map [h, w]: each value becomes a mean of its window's sorted values that is narrower around the middle one the less
    the window varies (arXiv 2506.23270, section 3.3); windows that are not positive on average become 0."""
    if kernel == 1:
        return scores.double()
    half = kernel // 2
    height, width = scores.shape
    if min(height, width) <= half:
        raise ValueError(f"a window of {kernel} needs a map with sides above {half}, got {height} x {width}")
    padded = F.pad(scores.double()[None, None], (half, half, half, half), mode="reflect")
    ranked = F.unfold(padded, kernel)[0].sort(0).values  # [kernel^2, h * w]
    mean, spread = ranked.mean(0), ranked.std(0, unbiased=False)
    sigma = spread / mean.clamp(min=torch.finfo(torch.float64).tiny)
    places = torch.arange(kernel * kernel, dtype=torch.float64, device=scores.device)[:, None] - (kernel * kernel // 2)
    weights = torch.exp(-places.square() / (2 * sigma.square()).clamp(min=1e-300))
    value = (weights * ranked).sum(0) / weights.sum(0)
    return torch.where(mean > 0, value, torch.zeros_like(value)).view(height, width)


def _unit(values: Tensor) -> Tensor:
    low, high = values.aminmax()
    return (values - low) / (high - low) if high > low else torch.zeros_like(values)
