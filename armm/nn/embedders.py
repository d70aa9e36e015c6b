"""Embedders of conditions: class labels and captions, each with what stands for "no condition"; projectors of features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LabelEmbedding(nn.Module):
    """Class labels [B] -> one token [B, 1, D]. The row with index `num_classes` is the null class."""

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding = nn.Embedding(num_classes + 1, dim)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding(labels).unsqueeze(1)

    def null(self, batch: int) -> Tensor:
        """The null class for `batch` rows: [batch, 1, D]."""
        return self.embedding.weight[self.num_classes].expand(batch, 1, -1)


class CaptionEmbedding(nn.Module):
    """Text features [B, T, C] -> T tokens [B, T, D]; `null_embedding` [T, C] stands for the empty caption."""

    def __init__(self, in_dim: int, dim: int, num_tokens: int) -> None:
        super().__init__()
        self.in_dim = in_dim
        self.num_tokens = num_tokens
        self.fc1 = nn.Linear(in_dim, dim, bias=False)
        self.fc2 = nn.Linear(dim, dim, bias=False)
        self.null_embedding = nn.Parameter(torch.randn(num_tokens, in_dim) / in_dim**0.5)

    def forward(self, features: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(features), approximate="tanh"))

    def null(self, batch: int) -> Tensor:
        """The empty caption for `batch` rows: [batch, T, D]."""
        return self(self.null_embedding).expand(batch, -1, -1)


class Projector(nn.Module):
    """Features of another network [..., C] -> tokens of the trunk [..., D]: linear layers with an exact GELU between them."""

    def __init__(self, in_dim: int, dim: int, depth: int = 2) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth must be at least 1 (one linear layer), got {depth}")
        self.in_dim = in_dim
        self.layers = nn.ModuleList(nn.Linear(dim if layer else in_dim, dim) for layer in range(depth))

    def forward(self, features: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            features = layer(F.gelu(features) if number else features)
        return features
