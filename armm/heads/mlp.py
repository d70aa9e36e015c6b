"""A head with one hidden layer, as for the image codes of Janus (arXiv 2410.13848)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from armm.heads.categorical import CategoricalHead


class MLPHead(CategoricalHead):
    """projection(gelu(transform(hidden))): hidden [..., D] -> float32 logits [..., V], or only the rows low .. high-1.

    Args:
        dim: width of the hidden state.
        vocab_size: rows of the last layer.
        bias: of the last layer; the first one has a bias.
        hidden: width between the layers, default `dim`.
    """

    def __init__(self, dim: int, vocab_size: int, bias: bool = True, hidden: int | None = None) -> None:
        super().__init__(hidden or dim, vocab_size, bias)
        self.transform = nn.Linear(dim, hidden or dim)
        nn.init.normal_(self.transform.weight, std=0.02)
        nn.init.zeros_(self.transform.bias)

    def forward(self, hidden: Tensor, low: int = 0, high: int | None = None) -> Tensor:
        return super().forward(F.gelu(self.transform(hidden)), low, high)
