"""A plain minimal decoding loop: what a good engineer writes in an afternoon (the style of gpt-fast), to measure ours against.

Self-contained on purpose: it shares no code with armm. Llama-like blocks, one fused projection for queries, keys and values, a
static cache, complex rotary tables, guidance as a doubled batch, argmax(p / exponential noise) draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class MinimalConfig:
    dim: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_hidden: int = 2048
    vocab_size: int = 16384
    norm_eps: float = 1e-5
    qk_norm: bool = False


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x.float()
        return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


class Block(nn.Module):
    def __init__(self, config: MinimalConfig) -> None:
        super().__init__()
        dim = config.dim
        self.num_heads, self.head_dim = config.num_heads, dim // config.num_heads
        self.wqkv = nn.Linear(dim, 3 * dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)
        self.w1 = nn.Linear(dim, config.mlp_hidden, bias=False)
        self.w3 = nn.Linear(dim, config.mlp_hidden, bias=False)
        self.w2 = nn.Linear(config.mlp_hidden, dim, bias=False)
        self.attention_norm = RMSNorm(dim, config.norm_eps)
        self.ffn_norm = RMSNorm(dim, config.norm_eps)
        self.q_norm = RMSNorm(self.head_dim, 1e-6) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, 1e-6) if config.qk_norm else None

    def forward(
        self, x: torch.Tensor, rotary: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, position: int
    ) -> torch.Tensor:
        batch, length, dim = x.shape
        q, k, v = self.wqkv(self.attention_norm(x)).view(batch, length, 3, self.num_heads, self.head_dim).unbind(2)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, rotary), rotate(k, rotary)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        end = position + length
        keys[:, :, position:end], values[:, :, position:end] = k, v
        h = F.scaled_dot_product_attention(q, keys[:, :, :end], values[:, :, :end], is_causal=length > 1)
        x = x + self.wo(h.transpose(1, 2).reshape(batch, length, dim))
        h = self.ffn_norm(x)
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h))


def rotate(x: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """Rotates interleaved pairs of `[B, N, H, d]` by a complex table `[N, d/2]`."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotary[None, :, None, :]).flatten(3).type_as(x)


class MinimalTransformer(nn.Module):
    def __init__(self, config: MinimalConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)

    def forward(self, x: torch.Tensor, rotary: torch.Tensor, cache: list, position: int) -> torch.Tensor:
        for layer, (keys, values) in zip(self.layers, cache, strict=True):
            x = layer(x, rotary, keys, values, position)
        return self.output(self.norm(x[:, -1])).float()

    @torch.no_grad()
    def generate(
        self, prefix: torch.Tensor, rotary: torch.Tensor, num_tokens: int, guidance_scale: float, noise: torch.Tensor | None
    ) -> torch.Tensor:
        """Ids `[B, num_tokens]` after embedded prefixes `[2B, T, D]` ([cond; null]); `noise` `[B, num_tokens, V]`, None: greedy."""
        rows, length, dim = prefix.shape
        head_dim = dim // self.config.num_heads
        shape = (rows, self.config.num_heads, length + num_tokens, head_dim)
        cache = [(prefix.new_zeros(shape), prefix.new_zeros(shape)) for _ in self.layers]
        logits = self(prefix, rotary[:length], cache, 0)
        ids = torch.empty(rows // 2, num_tokens, dtype=torch.int64)
        for i in range(num_tokens):
            cond, null = logits.chunk(2)
            probabilities = (null + (cond - null) * guidance_scale).softmax(-1)
            token = (probabilities if noise is None else probabilities / noise[:, i]).argmax(-1)
            ids[:, i] = token
            if i + 1 < num_tokens:
                position = length + i
                x = self.tok_embeddings(torch.cat([token, token]))[:, None]
                logits = self(x, rotary[position : position + 1], cache, position)
        return ids
