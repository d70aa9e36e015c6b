"""The head of masked models: a transform, then the token embedding's own rows (BERT, Devlin et al., arXiv 1810.04805)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armm.nn.norms import LayerNorm


class TiedHead(nn.Module):
    """norm(gelu(transform(hidden))) . embedding rows + bias: hidden [..., D] -> float32 logits [..., V].

    The rows are the caller's, given at every call, so that the parameter has one owner and one name.
    """

    num_states = 1  # hidden states of the trunk that the head reads

    def __init__(self, dim: int, vocab_size: int, bias: bool = True, norm_eps: float = 1e-5) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.transform = nn.Linear(dim, dim)
        self.norm = LayerNorm(dim, norm_eps)
        self.bias = nn.Parameter(torch.zeros(vocab_size)) if bias else None
        nn.init.normal_(self.transform.weight, std=0.02)
        nn.init.zeros_(self.transform.bias)

    def forward(self, hidden: Tensor, low: int = 0, high: int | None = None, *, rows: Tensor) -> Tensor:
        """rows: the embedding [at least V, D]; logits of its rows low .. high-1."""
        high = self.vocab_size if high is None else high
        if not 0 <= low < high <= self.vocab_size:
            raise ValueError(
                f"low, high must select rows of the vocabulary (0 .. {self.vocab_size}), got {low}, {high}"
            )
        x = self.norm(F.gelu(self.transform(hidden)))
        return F.linear(x, rows[low:high], None if self.bias is None else self.bias[low:high]).float()

    def fuse(self) -> bool:
        """Nothing to merge."""
        return False

    def unfuse(self) -> None:
        pass
