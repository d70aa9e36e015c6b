"""Binary codes: bit vectors, their ids, and the quantizer that makes them (Wang et al., arXiv 2304.04820; ELM, arXiv 2410.16257)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn


def bits_to_ids(bits: torch.Tensor, sub_codes: int = 1) -> torch.Tensor:
    """Bits `[..., n]` (0 or 1, any dtype) -> int64 ids `[..., sub_codes]`: consecutive chunks, most significant bit first."""
    number = bits.shape[-1]
    if sub_codes < 1 or number % sub_codes:
        raise ValueError(f"`sub_codes` must divide the {number} bits, got {sub_codes}.")
    chunks = bits.long().unflatten(-1, (sub_codes, number // sub_codes))
    return (chunks << _shifts(chunks.shape[-1], bits.device)).sum(-1)


def ids_to_bits(ids: torch.Tensor, bits_per_code: int) -> torch.Tensor:
    """Int64 ids `[..., D]` -> int64 bits `[..., D * bits_per_code]`; the inverse of `bits_to_ids`."""
    return ((ids.unsqueeze(-1) >> _shifts(bits_per_code, ids.device)) & 1).flatten(-2)


def _shifts(number: int, device: torch.device) -> torch.Tensor:
    return torch.arange(number - 1, -1, -1, device=device)


class BinaryQuantized(NamedTuple):
    """`vectors` `[B, N, C]` (gradients pass straight through to the probabilities), `bits` and `probabilities` `[B, N, n]`."""

    vectors: torch.Tensor
    bits: torch.Tensor
    probabilities: torch.Tensor


class BinaryQuantizer(nn.Module):
    """Features -> bit probabilities -> bits; a vector is the sum of the embeddings of the bits that are set.

    Args:
        dim: width of the features and of the vectors.
        bits: number of bits.

    All arithmetic is float32 whatever the input's dtype: half precision would move bits.
    """

    def __init__(self, dim: int, bits: int) -> None:
        super().__init__()
        self.dim = dim
        self.bits = bits
        self.projection = nn.Linear(dim, bits)
        self.embedding = nn.Embedding(bits, dim)

    def probabilities(self, features: torch.Tensor) -> torch.Tensor:
        """How probable a 1 is, float32 `[B, N, bits]`, for features `[B, N, dim]`."""
        with torch.autocast(features.device.type, enabled=False):
            weight, bias = self.projection.weight.float(), self.projection.bias.float()
            return nn.functional.linear(features.float(), weight, bias).sigmoid()

    @staticmethod
    def decide(probabilities: torch.Tensor, uniform: torch.Tensor | float = 0.5) -> torch.Tensor:
        """Bits: 1.0 where the probability exceeds 0.5, or uniform noise of the same shape (a Bernoulli draw)."""
        return (probabilities > uniform).to(probabilities.dtype)

    def lookup(self, bits: torch.Tensor) -> torch.Tensor:
        """Vectors float32 `[..., dim]` of bits `[..., bits]`."""
        with torch.autocast(bits.device.type, enabled=False):
            return bits.float() @ self.embedding.weight.float()

    def forward(self, features: torch.Tensor, uniform: torch.Tensor | float = 0.5) -> BinaryQuantized:
        """Quantizes `features` `[B, N, dim]`; see `decide` for `uniform`."""
        probabilities = self.probabilities(features)
        bits = self.decide(probabilities.detach(), uniform)
        return BinaryQuantized(self.lookup(probabilities + (bits - probabilities).detach()), bits, probabilities)


def uniform_noise(
    shape: Sequence[int], generator: torch.Generator | Sequence[torch.Generator] | None, device: torch.device
) -> torch.Tensor:
    """Float32 noise in [0, 1) `[B, ...]`; with one generator for each sample, a sample's noise does not depend on its batch."""
    if generator is None or isinstance(generator, torch.Generator):
        place = device if generator is None else generator.device
        return torch.rand(tuple(shape), generator=generator, device=place).to(device)
    if len(generator) != shape[0]:
        raise ValueError(f"`generator` holds {len(generator)} generators for a batch of {shape[0]}: give one for each image.")
    rows = [torch.rand(tuple(shape[1:]), generator=item, device=item.device) for item in generator]
    return torch.stack(rows).to(device)
