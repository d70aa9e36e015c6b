"""Quantizers: continuous vectors -> ids and code vectors."""

from __future__ import annotations

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
        return (logits - _exponential_noise(logits.shape, generator, logits.device).log()).argmax(-1)

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


def _exponential_noise(shape: torch.Size, generator: Generators, device: torch.device) -> torch.Tensor:
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
