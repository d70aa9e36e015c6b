"""A linear head behind an adaptive layer norm: hidden state and condition -> logits (arXiv 2212.09748, 2404.02905)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from armm.heads.categorical import CategoricalHead
from armm.nn.modulation import Modulation


class AdaptiveHead(CategoricalHead):
    """projection(norm(hidden) * (1 + scale) + shift), where scale and shift are a linear function of SiLU(condition).

    The norm has no weights; it and the modulation are computed in float32.

    Args:
        dim, vocab_size, bias: see `CategoricalHead`.
        condition_dim: width of the condition, default `dim`.
        norm_eps: of the norm.
    """

    def __init__(
        self,
        dim: int,
        vocab_size: int,
        condition_dim: int | None = None,
        bias: bool = True,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__(dim, vocab_size, bias)
        self.dim, self.norm_eps = dim, norm_eps
        self.modulation = Modulation(condition_dim or dim, dim, chunks=2)

    def forward(self, hidden: Tensor, condition: Tensor, low: int = 0, high: int | None = None) -> Tensor:
        """`hidden` [B, N, D] and `condition` [B, C] or [B, N, C] -> float32 logits [B, N, V] (rows low .. high-1)."""
        scale, shift = self.modulation(condition).float().chunk(2, dim=-1)
        normed = F.layer_norm(hidden.float(), (self.dim,), eps=self.norm_eps)
        return super().forward((normed * (1 + scale) + shift).to(hidden.dtype), low, high)
