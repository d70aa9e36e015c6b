"""Attention that takes features from one width to another, around a quantizer (VILA-U, arXiv 2409.04429; DualToken, 2503.14324)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from armm.nn.attention import attention
from armm.nn.mlp import GatedMLP
from armm.nn.norms import LayerNorm


class AttentionProjection(nn.Module):
    """y = proj(norm(x)) + attention(norm(x)); y + mlp(norm(norm(y))).

    Narrower output: the heads are averaged, and pooled along their channels where they are wider than the output. Wider output: the
    heads stand side by side.

    Args:
        in_dim, out_dim: widths of a token before and after.
        num_heads: of the attention, which is as wide as the wider of the two.
        causal: each token sees itself and those before it.
    """

    def __init__(self, in_dim: int, out_dim: int, num_heads: int, causal: bool) -> None:
        super().__init__()
        width = max(in_dim, out_dim)
        if num_heads < 1 or width % num_heads:
            raise ValueError(f"`num_heads` must divide the width {width}, got {num_heads}.")
        self.in_dim, self.out_dim, self.num_heads, self.causal = in_dim, out_dim, num_heads, causal
        self.attention_norm = LayerNorm(in_dim, eps=1e-5)
        self.to_q = nn.Linear(in_dim, width)
        self.to_k = nn.Linear(in_dim, width, bias=False)
        self.to_v = nn.Linear(in_dim, width)
        self.to_out = nn.Linear(min(width, out_dim), out_dim)
        self.proj_norm = LayerNorm(in_dim, eps=1e-5)
        self.proj = nn.Linear(in_dim, out_dim)
        self.mlp_norm = LayerNorm(out_dim, eps=1e-5)
        self.inner_norm = LayerNorm(out_dim, eps=1e-6)
        self.mlp = GatedMLP(out_dim, 2 * out_dim, "geglu_tanh", bias=True)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [B, N, in_dim] -> [B, N, out_dim]."""
        query, key, value = (
            layer(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v)
        )
        heads = attention(query, key, value, causal=self.causal)  # [B, H, N, d]
        if self.in_dim <= self.out_dim:
            return self.to_out(heads.transpose(1, 2).flatten(2))
        mean = heads.mean(dim=1)
        if mean.shape[-1] != self.out_dim:
            mean = F.adaptive_avg_pool1d(mean, self.out_dim)
        return self.to_out(mean)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.proj(self.proj_norm(x)) + self.attend(self.attention_norm(x))
        return y + self.mlp(self.inner_norm(self.mlp_norm(y)))
