"""Attention masks: a boolean one says True where a query may look at a key, an additive one is 0 or -inf (or a
bias).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def causal_mask(queries: int, keys: int, device: torch.device | str | None = None) -> Tensor:
    """bool [queries, keys]: the queries are the LAST of the keys' positions, each sees itself and everything before."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def block_causal_mask(block_sizes: Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """bool [N, N] for consecutive blocks: full attention inside a block and to every earlier block."""
    sizes = torch.tensor(list(block_sizes), device=device)
    block = torch.arange(len(sizes), device=device).repeat_interleave(sizes)
    return block[:, None] >= block[None, :]


def key_mask(mask: Tensor) -> Tensor:
    """A per-row key mask [B, Nk] in the shape attention takes: [B, 1, 1, Nk]."""
    return mask[:, None, None, :]


def causal_key_mask(mask: Tensor) -> Tensor:
    """Causal, with the keys False in `mask` [B, N] hidden from all but themselves: bool [B, 1, N, N].

    Of floating point weights in [0, 1], a mask of such weights, through which gradients reach them (see `smoothed_weights`).
    """
    length = mask.shape[1]
    causal = causal_mask(length, length, mask.device)
    own = torch.eye(length, dtype=torch.bool, device=mask.device)
    if mask.is_floating_point():
        return (causal * mask[:, None, :]).masked_fill(own, 1.0)[:, None]
    return (causal & mask[:, None, :].bool() | own)[:, None]


def prefix_mask(mask: Tensor, total: int, bidirectional: int = 0) -> Tensor:
    """Causal over `total` positions of which the first T follow a prefix mask [B, T]: bool [B, 1, total, total].

    Columns of padded prefix positions are removed for every row, the diagonal is kept. The first `bidirectional`
    positions see each other whole.
    """
    batch, length = mask.shape
    if total < length:
        raise ValueError(f"total={total} is smaller than the prefix of {length} positions")
    if not 0 <= bidirectional <= total:
        raise ValueError(f"bidirectional must lie between 0 and total={total}, got {bidirectional}")
    keys = torch.cat([mask.bool(), mask.new_ones(batch, total - length, dtype=torch.bool)], dim=1)
    whole = torch.arange(total, device=mask.device) < bidirectional
    allowed = causal_mask(total, total, mask.device) | whole
    return ((allowed & keys[:, None]) | torch.eye(total, dtype=torch.bool, device=mask.device))[:, None]


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as an additive one of `dtype`: 0 where True, -inf where False. Additive masks pass through."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))


def merge_causal(
    mask: Tensor | None, queries: int, keys: int, device: torch.device | str
) -> tuple[Tensor | None, bool]:
    """What attention is to be called with for causal queries at the end of the keys: (mask or None, causal flag).

    One query needs no causal mask, and a square one without an extra mask is left to the kernel's own flag.
    """
    if queries == 1:
        return mask, False
    if mask is None:
        return (None, True) if queries == keys else (causal_mask(queries, keys, device), False)
    allowed = causal_mask(queries, keys, device)
    if mask.dtype == torch.bool:
        return mask & allowed, False
    return mask.masked_fill(~allowed, float("-inf")), False
