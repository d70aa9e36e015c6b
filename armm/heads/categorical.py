"""A linear head: hidden state -> logits over a vocabulary."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armm.nn.linear import FusedLinear, is_plain


class CategoricalHead(nn.Module):
    """`projection`: hidden [..., D] -> float32 logits [..., V], or only the vocabulary rows low .. high-1."""

    num_states = 1  # hidden states of the trunk that the head reads

    def __init__(self, dim: int, vocab_size: int, bias: bool = False) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.projection = nn.Linear(dim, vocab_size, bias=bias)
        self._fused: dict[tuple[int, int], FusedLinear] | None = None
        nn.init.normal_(self.projection.weight, std=0.02)
        if bias:
            nn.init.zeros_(self.projection.bias)

    def forward(self, hidden: Tensor, low: int = 0, high: int | None = None) -> Tensor:
        high = self.vocab_size if high is None else high
        if not 0 <= low < high <= self.vocab_size:
            raise ValueError(
                f"low, high must select rows of the vocabulary (0 .. {self.vocab_size}), got {low}, {high}"
            )
        if self._fused is not None and not torch.is_grad_enabled():
            fused = self._fused_rows(low, high)
            # [R, D] comes from a decoder, again and again with the same R
            return (fused.rows(hidden, pack=True) if hidden.dim() == 2 else fused(hidden)).float()
        if high - low == self.vocab_size:
            return self.projection(hidden).float()
        if not is_plain(self.projection):
            return self.projection(hidden)[..., low:high].float()
        bias = None if self.projection.bias is None else self.projection.bias[low:high]
        return F.linear(hidden, self.projection.weight[low:high], bias).float()

    def _fused_rows(self, low: int, high: int) -> FusedLinear:
        rows = self._fused.get((low, high))
        if rows is None:
            bias = None if self.projection.bias is None else self.projection.bias[low:high]
            rows = self._fused[(low, high)] = FusedLinear(self.projection.weight[low:high], bias)
        return rows

    def fuse(self) -> bool:
        """Let slices of the vocabulary use the packed products of `FusedLinear`; inference only."""
        if self.training or not is_plain(self.projection):
            return False
        if self._fused is None:
            self._fused = {}
        return True

    def unfuse(self) -> None:
        self._fused = None

    def train(self, mode: bool = True) -> CategoricalHead:
        if mode:
            self.unfuse()
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True):
        fused = self._fused is not None
        self.unfuse()
        super()._apply(fn, recurse)
        if fused:
            self.fuse()
        return self

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self.unfuse()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_fused": None}
