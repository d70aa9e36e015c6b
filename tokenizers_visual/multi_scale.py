"""Residual quantization over token maps of growing size (VAR, arXiv 2404.02905, section 3.2).

A feature map is written as a sum of code maps, one for each scale, the coarsest first. Each map holds what the maps before it
left over, seen at its own size. The quantizer works in both directions and scale by scale: `accumulate` adds the codes of one
scale to the sum, `next_input` is the sum as the next scale sees it, `decode` does all scales at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .quantizers import Quantized, VectorQuantizer

__all__ = ["MultiScaleQuantizer", "check_scales", "refiner_index"]


def check_scales(scales: Sequence[int]) -> tuple[int, ...]:
    """`scales` as a tuple; a ValueError unless they are the sides of square token maps, the smallest first."""
    sides = tuple(scales)
    whole = all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides)
    if not sides or not whole or sorted(set(sides)) != list(sides):
        raise ValueError(f"`scales` must be growing positive integers, the sides of the token maps, got {list(sides)}.")
    return sides


def refiner_index(step: int, steps: int, refiners: int) -> int:
    """Which of `refiners` convolutions scale `step` of `steps` uses: the one whose tick is nearest to step / (steps - 1).

    The ticks divide [0, 1] evenly, so as many convolutions as scales means one for each. Ties go to the first.
    """
    edge = 1 / (3 * refiners) if refiners == 4 else 1 / (2 * refiners)
    ticks = np.linspace(edge, 1 - edge, refiners)
    return int(np.argmin(np.abs(ticks - (step / (steps - 1) if steps > 1 else 0.0))))


def _resize_to(features: torch.Tensor, side: int) -> torch.Tensor:
    """Adaptive average pooling of [B, C, h, h] to [B, C, side, side]."""
    return features if features.shape[-1] == side else F.interpolate(features, size=(side, side), mode="area")


class MultiScaleQuantizer(nn.Module):
    """One codebook, shared by all scales.

    Args:
        codebook_size, dim: number and width of the code vectors.
        scales: sides of the square token maps, coarsest first; the last is the side of the feature map. Methods take another
            list for images of another size, or for fewer steps.
        residual_ratio: share of the convolution in the refinement u -> (1 - ratio) u + ratio conv(u) that follows upsampling;
            0 means no refinement.
        shared_refiners: how many convolutions the scales share; 0 gives each scale its own.
        cosine: choose codes by direction only.

    All arithmetic is float32 whatever the input's dtype: the ids of each scale depend on the sum of those before it.
    """

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        scales: Sequence[int],
        residual_ratio: float = 0.5,
        shared_refiners: int = 4,
        cosine: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= residual_ratio <= 1:
            raise ValueError(f"`residual_ratio` must lie in [0, 1], got {residual_ratio!r}.")
        if not isinstance(shared_refiners, int) or shared_refiners < 0:
            raise ValueError(f"`shared_refiners` must be an integer >= 0 (0: one for each scale), got {shared_refiners!r}.")
        self.scales = check_scales(scales)
        self.residual_ratio = float(residual_ratio)
        self.cosine = cosine
        self.codes = VectorQuantizer(codebook_size, dim, l2_normalize=False)
        refiners = (shared_refiners or len(self.scales)) if residual_ratio else 0
        self.refiners = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1) for _ in range(refiners))

    @property
    def codebook_size(self) -> int:
        return self.codes.codebook_size

    @property
    def dim(self) -> int:
        return self.codes.dim

    def codebook(self) -> torch.Tensor:
        """The code vectors, float32 `[codebook_size, dim]`."""
        return self.codes.codebook()

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """Code vectors float32 `[..., dim]` of int64 `ids`."""
        return self.codes.lookup(ids)

    def nearest(self, vectors: torch.Tensor) -> torch.Tensor:
        """Ids `[B, N]` of `vectors` `[B, N, C]`."""
        vectors, codebook = vectors.float(), self.codebook()
        if self.cosine:
            vectors, codebook = F.normalize(vectors, dim=-1), F.normalize(codebook, dim=-1)
        return self.codes.nearest(vectors, codebook)

    # Scale by scale.

    def spread(self, vectors: torch.Tensor, step: int, side: int, scales: Sequence[int] | None = None) -> torch.Tensor:
        """What the code vectors `[B, n, C]` of scale `step` add to a map of `side`: `[B, C, side, side]`."""
        scales = self.scales if scales is None else scales
        with torch.autocast(vectors.device.type, enabled=False):
            grid = vectors.float().transpose(1, 2).unflatten(2, (scales[step], scales[step]))
            if scales[step] != side:
                grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
            if not len(self.refiners):
                return grid
            refiner = self.refiners[refiner_index(step, len(scales), len(self.refiners))]
            return grid * (1 - self.residual_ratio) + refiner(grid) * self.residual_ratio

    def accumulate(
        self, total: torch.Tensor, codes: torch.Tensor, step: int, scales: Sequence[int] | None = None
    ) -> torch.Tensor:
        """`total` `[B, C, h, h]` with scale `step` added: ids `[B, n]`, or vectors `[B, n, C]` of the caller's own."""
        vectors = codes if codes.is_floating_point() else self.lookup(codes)
        return total + self.spread(vectors, step, total.shape[-1], scales)

    def next_input(self, total: torch.Tensor, step: int, scales: Sequence[int] | None = None) -> torch.Tensor:
        """`total` `[B, C, h, h]` at the size of scale `step`, from which that scale is predicted: `[B, n, C]`."""
        scales = self.scales if scales is None else scales
        return _resize_to(total.float(), scales[step]).flatten(2).transpose(1, 2)

    def empty(self, batch: int, scales: Sequence[int] | None = None) -> torch.Tensor:
        """The sum before the first scale: float32 zeros `[batch, C, h, h]`."""
        side = (self.scales if scales is None else scales)[-1]
        return self.codes.embedding.weight.new_zeros(batch, self.dim, side, side, dtype=torch.float32)

    # All scales.

    def steps(
        self, features: torch.Tensor, scales: Sequence[int] | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Quantizes `features` `[B, C, h, h]`: after each scale its ids `[B, n]` and the sum so far `[B, C, h, h]`."""
        scales = self.scales if scales is None else check_scales(scales)
        side = features.shape[-1]
        if features.shape[-2] != side or scales[-1] != side:
            raise ValueError(
                f"the last of `scales` {list(scales)} must be the side of the feature map, which is "
                f"{features.shape[-2]}x{side}: pass the scales of this image size."
            )
        rest = features.detach().float()
        total = torch.zeros_like(rest)
        for step in range(len(scales)):
            ids = self.nearest(self.next_input(rest, step, scales))
            added = self.spread(self.lookup(ids), step, side, scales)
            total, rest = total + added, rest - added.detach()
            yield ids, total

    def encode(self, features: torch.Tensor, scales: Sequence[int] | None = None) -> torch.Tensor:
        """Ids `[B, L]` of all scales, coarsest first, each in raster order, of `features` `[B, C, h, h]`."""
        return torch.cat([ids for ids, _ in self.steps(features, scales)], dim=1)

    def split(self, codes: torch.Tensor, scales: Sequence[int] | None = None) -> tuple[torch.Tensor, ...]:
        """`codes` `[B, L, ...]` cut into the scales; fewer than all are fine if they end with a whole scale."""
        sizes = [side * side for side in (self.scales if scales is None else check_scales(scales))]
        for count in range(1, len(sizes) + 1):
            if sum(sizes[:count]) == codes.shape[1]:
                return codes.split(sizes[:count], dim=1)
        raise ValueError(
            f"{codes.shape[1]} codes do not fill the maps of {sizes} tokens: give those of the first scales, or of all."
        )

    def decode(
        self, codes: torch.Tensor, scales: Sequence[int] | None = None, *, num_scales: int | None = None
    ) -> torch.Tensor:
        """The sum `[B, C, h, h]` of ids `[B, L]` or vectors `[B, L, C]`; only of the first `num_scales` scales if given."""
        parts = self.split(codes, scales)
        if num_scales is not None and not 0 < num_scales <= len(parts):
            raise ValueError(f"`num_scales` must lie between 1 and {len(parts)}, got {num_scales!r}.")
        total = self.empty(codes.shape[0], scales)
        for step, part in enumerate(parts[:num_scales]):
            total = self.accumulate(total, part, step, scales)
        return total

    def inputs(self, ids: torch.Tensor, scales: Sequence[int] | None = None) -> torch.Tensor:
        """What a transformer is fed for scales 2, 3, ... when the ids `[B, L]` are known: `[B, L - n_1, C]`."""
        parts, total, found = self.split(ids, scales), self.empty(ids.shape[0], scales), []
        for step, part in enumerate(parts[:-1]):
            total = self.accumulate(total, part, step, scales)
            found.append(self.next_input(total, step + 1, scales))
        return torch.cat(found, dim=1) if found else total.new_zeros(ids.shape[0], 0, self.dim)

    def forward(self, features: torch.Tensor) -> Quantized:
        """Quantizes `features` `[B, C, h, h]` for training; the losses are means over the scales, vectors are `[B, h*h, C]`."""
        target = features.float()
        found = list(self.steps(features))
        codebook_loss = torch.stack([F.mse_loss(total, target.detach()) for _, total in found]).mean()
        commitment_loss = torch.stack([F.mse_loss(total.detach(), target) for _, total in found]).mean()
        vectors = target + (found[-1][1] - target).detach()
        ids = torch.cat([ids for ids, _ in found], dim=1)
        return Quantized(vectors.flatten(2).transpose(1, 2), ids, codebook_loss, commitment_loss)
