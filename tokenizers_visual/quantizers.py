"""Quantizers: continuous vectors -> ids and code vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import nn

# Randomness of a batch: torch's own, one generator, or one for each sample.
Generators: TypeAlias = torch.Generator | Sequence[torch.Generator] | None


class Quantized(NamedTuple):
    """`vectors` `[B, N, C]` (gradients pass straight through to the input), `ids` int64 `[B, N]`, scalar losses."""

    vectors: torch.Tensor
    ids: torch.Tensor
    codebook_loss: torch.Tensor
    commitment_loss: torch.Tensor


class VectorQuantizer(nn.Module):
    """Nearest code of a learned codebook (van den Oord et al., arXiv 1711.00937), optionally on the unit sphere.

    Args:
        codebook_size: number of codes.
        dim: width of a code vector.
        l2_normalize: compare and return l2-normalised vectors (Yu et al., arXiv 2110.04627).

    All arithmetic is float32 whatever the input's dtype: half precision would move ids.
    """

    def __init__(self, codebook_size: int, dim: int, l2_normalize: bool = True) -> None:
        super().__init__()
        self.codebook_size = codebook_size
        self.dim = dim
        self.l2_normalize = l2_normalize
        self.embedding = nn.Embedding(codebook_size, dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / codebook_size, 1.0 / codebook_size)

    def codebook(self) -> torch.Tensor:
        """The code vectors as the decoder sees them, float32 `[codebook_size, dim]`."""
        weight = self.embedding.weight.float()
        return F.normalize(weight, dim=-1) if self.l2_normalize else weight

    def normalize(self, vectors: torch.Tensor) -> torch.Tensor:
        """`vectors` in float32, on the unit sphere if this codebook lives there."""
        vectors = vectors.float()
        return F.normalize(vectors, dim=-1) if self.l2_normalize else vectors

    def nearest(self, vectors: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
        """Ids `[B, N]` of the codes at the smallest squared distance to `vectors` `[B, N, C]` (ties: the first)."""
        with torch.autocast(vectors.device.type, enabled=False):
            distances = (
                vectors.square().sum(-1, keepdim=True) + codebook.square().sum(-1) - 2.0 * vectors @ codebook.transpose(0, 1)
            )
        return distances.argmin(-1)

    def draw(self, vectors: torch.Tensor, temperature: float, generator: Generators = None) -> torch.Tensor:
        """Ids `[B, N]` drawn from softmax(<vector, code> / temperature) for normalised `vectors` `[B, N, C]`.

        Args:
            generator: a list has one generator for each row of the batch, which then does not depend on the others.
        """
        with torch.autocast(vectors.device.type, enabled=False):
            logits = vectors @ self.codebook().transpose(0, 1) / temperature
        # argmax(p / exponential noise), in logarithms
        return (logits - exponential_noise(logits.shape, generator, logits.device).log()).argmax(-1)

    def forward(self, vectors: torch.Tensor, ids: torch.Tensor | None = None) -> Quantized:
        """Quantizes `vectors` `[B, N, C]` to the nearest codes, or to the codes `ids` `[B, N]`."""
        with torch.autocast(vectors.device.type, enabled=False):
            vectors = self.normalize(vectors)
            codebook = self.codebook()
            if ids is None:
                ids = self.nearest(vectors.detach(), codebook.detach())
            codes = F.embedding(ids, codebook)
            codebook_loss = F.mse_loss(codes, vectors.detach())
            commitment_loss = F.mse_loss(vectors, codes.detach())
            return Quantized(vectors + (codes - vectors).detach(), ids, codebook_loss, commitment_loss)

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """Code vectors float32 `[..., dim]` of int64 `ids`; ids outside the codebook raise IndexError on a CPU."""
        return self.normalize(F.embedding(ids, self.embedding.weight))


class ResidualQuantizer(nn.Module):
    """A vector as the sum of codes, each the nearest to what the codes before it left over (Lee et al., arXiv 2203.01941).

    Args:
        codebook_size, dim: number and width of the code vectors.
        depth: codes of a vector.
        shared: whether all depths have one codebook.

    All arithmetic is float32 whatever the input's dtype.
    """

    def __init__(self, codebook_size: int, dim: int, depth: int, shared: bool = True) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"`depth` must be a positive integer, got {depth!r}.")
        self.codebook_size, self.dim, self.depth = codebook_size, dim, depth
        self.codebooks = nn.ModuleList(
            VectorQuantizer(codebook_size, dim, l2_normalize=False) for _ in range(1 if shared else depth)
        )

    def at(self, level: int) -> VectorQuantizer:
        """The codebook of a depth."""
        return self.codebooks[level if len(self.codebooks) > 1 else 0]  # type: ignore[return-value]

    @torch.no_grad()
    def encode(self, vectors: torch.Tensor) -> torch.Tensor:
        """Ids `[B, N, depth]` of `vectors` `[B, N, C]`, the coarsest first."""
        rest, found = vectors.float(), []
        for level in range(self.depth):
            found.append(self.at(level).nearest(rest, self.at(level).codebook()))
            rest = rest - self.at(level).lookup(found[-1])
        return torch.stack(found, dim=-1)

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """The code vectors of each depth, float32 `[..., depth, C]`, of ids `[..., depth]`; their sum stands for the vector."""
        return torch.stack([self.at(level).lookup(ids[..., level]) for level in range(self.depth)], dim=-2)

    def forward(self, vectors: torch.Tensor) -> Quantized:
        """Quantizes `vectors` `[B, N, C]`; ids are `[B, N, depth]`, the losses means over the sums after each depth."""
        vectors = vectors.float()
        ids = self.encode(vectors)
        sums = self.lookup(ids).cumsum(dim=-2)
        target = vectors.unsqueeze(-2).expand_as(sums)
        codebook_loss, commitment_loss = F.mse_loss(sums, target.detach()), F.mse_loss(target, sums.detach())
        return Quantized(vectors + (sums[..., -1, :] - vectors).detach(), ids, codebook_loss, commitment_loss)


def exponential_noise(shape: torch.Size, generator: Generators, device: torch.device) -> torch.Tensor:
    """Positive noise of `shape` [B, ...] on `device`, made where the generators are."""
    if generator is None or isinstance(generator, torch.Generator):
        generators: Sequence[torch.Generator | None] = [generator]
        rows = shape
    else:
        generators, rows = generator, torch.Size((1, *shape[1:]))
        if len(generators) != shape[0]:
            raise ValueError(f"`generator` holds {len(generators)} generators for a batch of {shape[0]}: give one for each.")
    noise = [
        torch.empty(rows, device=device if source is None else source.device).exponential_(generator=source).to(device)
        for source in generators
    ]
    return torch.cat(noise).clamp_(min=torch.finfo(torch.float32).tiny)


class MovingAverageCodebook(nn.Module):
    """Trains a `VectorQuantizer`'s codebook by exponential moving averages and restarts codes that nobody uses.

    The codebook starts from features of the first batch; while `restart` is on, codes whose moving usage falls under
    `dead_fraction` of the mean are replaced by the worst-quantised features of the current batch (arXiv 1711.00937, appendix
    A.1, and Dhariwal et al., arXiv 2005.00341, section 3.1).

    Args:
        quantizer: the quantizer whose `embedding` is updated; it then needs no gradient.
        decay: of the moving averages, in (0, 1).
        dead_fraction: usage, relative to the mean usage, under which a code counts as dead.
        restarts: at most this many codes are replaced at once.
    """

    def __init__(self, quantizer: VectorQuantizer, decay: float = 0.98, dead_fraction: float = 0.03, restarts: int = 64) -> None:
        super().__init__()
        self.decay = decay
        self.dead_fraction = dead_fraction
        self.restarts = restarts
        quantizer.embedding.weight.requires_grad_(False)
        self.register_buffer("usage", torch.zeros(quantizer.codebook_size))
        self.register_buffer("sums", torch.zeros(quantizer.codebook_size, quantizer.dim))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def initialise(self, quantizer: VectorQuantizer, vectors: torch.Tensor, generator: torch.Generator) -> None:
        """Takes the first codes from `vectors` `[M, C]` (already normalised)."""
        pick = torch.randint(len(vectors), (quantizer.codebook_size,), generator=generator).to(vectors.device)
        noise = torch.randn(quantizer.codebook_size, quantizer.dim, generator=generator).to(vectors.device)
        codes = quantizer.normalize(vectors[pick] + 0.01 * noise)
        quantizer.embedding.weight.copy_(codes)
        self.usage.fill_(1.0)
        self.sums.copy_(codes)
        self.started.fill_(True)

    @torch.no_grad()
    def adopt(self, quantizer: VectorQuantizer) -> None:
        """Starts from the codebook as it is, to continue the training of a tokenizer."""
        self.usage.fill_(1.0)
        self.sums.copy_(quantizer.normalize(quantizer.embedding.weight))
        self.started.fill_(True)

    @torch.no_grad()
    def update(self, quantizer: VectorQuantizer, vectors: torch.Tensor, ids: torch.Tensor, *, restart: bool) -> int:
        """One step from `vectors` `[M, C]` (normalised) and their `ids` `[M]`; returns how many codes were restarted."""
        size = quantizer.codebook_size
        counts = torch.bincount(ids, minlength=size).to(self.usage.dtype)
        sums = torch.zeros_like(self.sums).index_add_(0, ids, vectors)
        self.usage.lerp_(counts, 1.0 - self.decay)
        self.sums.lerp_(sums, 1.0 - self.decay)
        quantizer.embedding.weight.copy_(quantizer.normalize(self.sums / self.usage.clamp(min=1e-5).unsqueeze(1)))
        if not restart:
            return 0
        dead = (self.usage < self.dead_fraction * self.usage.mean()).nonzero().flatten()[: self.restarts]
        if len(dead) == 0:
            return 0
        errors = (quantizer.lookup(ids) - vectors).square().sum(-1)
        worst = errors.topk(min(len(dead), len(vectors))).indices
        dead = dead[: len(worst)]
        quantizer.embedding.weight[dead] = vectors[worst]
        self.usage[dead] = self.usage.mean()
        self.sums[dead] = vectors[worst] * self.usage.mean()
        return len(dead)


# About so many codes in a codebook -> levels of its channels, whose product is the exact number (Mentzer et al., arXiv
# 2309.15505, table 1, and as AToken, 2509.14476, extends it).
FSQ_LEVELS: dict[int, tuple[int, ...]] = {
    16: (5, 3),
    64: (8, 8),
    256: (8, 6, 5),
    512: (8, 8, 8),
    1024: (8, 5, 5, 5),
    2048: (8, 8, 6, 5),
    4096: (4, 4, 4, 4, 4, 4),
    8192: (8, 8, 8, 4, 4),
    16384: (8, 8, 8, 6, 5),
    65536: (8, 8, 8, 5, 5, 5),
    262144: (8, 8, 6, 5, 5, 5, 5),
}


class FiniteScalarQuantizer(nn.Module):
    """Rounds each channel, squashed by tanh, to one of a few levels (FSQ, Mentzer et al., arXiv 2309.15505).

    Args:
        levels: number of levels of each channel of a codebook.
        num_codebooks: codebooks; each has the next `len(levels)` channels.
        dim: width of the vectors; where that of a row is not that of all codebooks, linear layers lie in front and behind.
        chunks: rows that a vector is cut into; each is quantised by itself, with the same codebooks and layers. A vector has
            `chunks * num_codebooks` ids, those of its first row first.

    All arithmetic is float32 whatever the input's dtype: half precision would move ids.
    """

    def __init__(
        self, levels: Sequence[int], num_codebooks: int = 1, dim: int | None = None, chunks: int = 1
    ) -> None:
        super().__init__()
        if not levels or min(levels) < 2 or num_codebooks < 1:
            raise ValueError(
                f"`levels` must be numbers of at least 2 and `num_codebooks` positive, got {list(levels)} and {num_codebooks}."
            )
        self.levels, self.num_codebooks, self.chunks = tuple(levels), num_codebooks, chunks
        width = len(self.levels) * num_codebooks
        self.dim = width * chunks if dim is None else dim
        if chunks < 1 or self.dim < 1 or self.dim % chunks:
            raise ValueError(f"`chunks` must be positive and divide the width of a vector, {self.dim}, got {chunks}.")
        row = self.dim // chunks
        self.project_in = nn.Linear(row, width) if row != width else None
        self.project_out = nn.Linear(width, row) if row != width else None

    @property
    def ids_per_vector(self) -> int:
        """Ids of a vector, one for each codebook and row."""
        return self.chunks * self.num_codebooks

    @property
    def codebook_size(self) -> int:
        """Ids of one codebook."""
        return math.prod(self.levels)

    def _level_table(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """int64 `[channels]`: levels, the one that stands for 0, and the factor in the id."""
        basis = [math.prod(self.levels[:number]) for number in range(len(self.levels))]
        levels = torch.tensor(self.levels, device=device)
        return levels, levels // 2, torch.tensor(basis, device=device)

    def round(self, vectors: torch.Tensor) -> torch.Tensor:
        """Float32 `[..., channels]` -> level numbers around 0, whole, as floats; gradients pass straight through."""
        levels, _, _ = self._level_table(vectors.device)
        half = (levels - 1) * 1.001 / 2
        offset = torch.where(levels % 2 == 0, 0.5, 0.0)
        bounded = torch.tanh(vectors + torch.atanh(offset / half)) * half - offset
        return bounded + (bounded.round() - bounded).detach()

    def _quantize(self, vectors: torch.Tensor) -> torch.Tensor:
        """Vectors `[..., dim]` -> level numbers `[..., ids_per_vector, channels]`."""
        rows = vectors.float().unflatten(-1, (self.chunks, -1))
        if self.project_in is not None:
            rows = F.linear(rows, self.project_in.weight.float(), self.project_in.bias.float())
        return self.round(rows.unflatten(-1, (self.num_codebooks, -1)).flatten(-3, -2))

    def _vectors(self, rounded: torch.Tensor) -> torch.Tensor:
        """Undoes `_quantize`, but for the rounding."""
        _, zero, _ = self._level_table(rounded.device)
        rows = (rounded / zero).unflatten(-2, (self.chunks, -1)).flatten(-2)
        if self.project_out is not None:
            rows = F.linear(rows, self.project_out.weight.float(), self.project_out.bias.float())
        return rows.flatten(-2)

    def _ids(self, rounded: torch.Tensor) -> torch.Tensor:
        _, zero, basis = self._level_table(rounded.device)
        return ((rounded.detach().round().long() + zero) * basis).sum(-1)

    def ids(self, vectors: torch.Tensor) -> torch.Tensor:
        """Ids int64 `[..., ids_per_vector]` of vectors `[..., dim]`."""
        with torch.autocast(vectors.device.type, enabled=False):
            return self._ids(self._quantize(vectors))

    def forward(self, vectors: torch.Tensor) -> Quantized:
        """Quantizes `vectors` `[..., dim]`; there is nothing to learn about the codes, so both losses are 0."""
        with torch.autocast(vectors.device.type, enabled=False):
            rounded = self._quantize(vectors)
            nothing = rounded.new_zeros(())
            return Quantized(self._vectors(rounded), self._ids(rounded), nothing, nothing)

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """Code vectors float32 `[..., dim]` of ids int64 `[..., ids_per_vector]`."""
        levels, zero, basis = self._level_table(ids.device)
        return self._vectors(((ids[..., None] // basis) % levels - zero).float())
