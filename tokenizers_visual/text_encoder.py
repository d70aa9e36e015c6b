"""The text tower of SigLIP (Zhai et al., arXiv 2303.15343) on the shared transformer blocks."""

from __future__ import annotations

import torch
from torch import nn

from armm.nn.norms import LayerNorm

from .vit import ViT


class TextEncoder(nn.Module):
    """Padded ids of a text -> one feature: blocks in which all tokens see each other, padding too, read at the last token.

    Args:
        vocab_size: of the word tokenizer.
        max_tokens: rows of the position table; SigLIP's texts are padded to all of them.
        dim, num_layers, num_heads, mlp_hidden: sizes of the transformer.
        out_dim: width of the feature.
    """

    def __init__(
        self, vocab_size: int, max_tokens: int, dim: int, num_layers: int, num_heads: int, mlp_hidden: int, out_dim: int
    ) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, dim)
        self.position_embedding = nn.Embedding(max_tokens, dim)
        self.encoder = ViT(dim, num_layers, num_heads, mlp="gelu_tanh", mlp_hidden=mlp_hidden)
        self.norm = LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, out_dim)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids int64 [B, T] -> features [B, out_dim]."""
        if ids.ndim != 2 or ids.dtype != torch.int64 or not 1 <= ids.shape[1] <= self.position_embedding.num_embeddings:
            raise ValueError(
                f"`ids` must be int64 [B, T] with at most {self.position_embedding.num_embeddings} tokens, got {ids.dtype} of shape "
                f"{tuple(ids.shape)}."
            )
        x = self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]
        return self.head(self.norm(self.encoder(x))[:, -1])
