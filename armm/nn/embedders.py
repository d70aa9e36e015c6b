"""Embedders of conditions: class labels and captions, each with what stands for "no condition"; of times; projectors of features."""

from __future__ import annotations

import math

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

    def checked(self, labels: Tensor) -> Tensor:
        """Labels from outside as int64 [B] on the table's device; a ValueError unless they are classes or the null class."""
        classes = self.num_classes
        labels = torch.as_tensor(labels, device=self.embedding.weight.device)
        if labels.dim() != 1 or labels.dtype.is_floating_point or labels.dtype == torch.bool:
            raise ValueError(f"labels must be a vector of integers, got {labels.dtype} of shape {tuple(labels.shape)}")
        if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) > classes):
            raise ValueError(
                f"labels must lie in 0 .. {classes - 1} ({classes} is the null class), got {labels.tolist()}"
            )
        return labels.long()

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


class TimeEmbedding(nn.Module):
    """Indices of time steps [...] -> [..., D]: a sinusoid of `frequencies` numbers (cosines, then sines), then two layers."""

    def __init__(self, dim: int, frequencies: int = 256, theta: float = 10000.0) -> None:
        super().__init__()
        self.frequencies, self.theta = frequencies, theta
        self.fc1 = nn.Linear(frequencies, dim)
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, index: Tensor) -> Tensor:
        half = self.frequencies // 2
        exponent = torch.arange(half, dtype=torch.float32, device=index.device) / half
        angles = index[..., None].float() * torch.exp(-math.log(self.theta) * exponent)
        table = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.fc2(F.silu(self.fc1(table.to(self.fc1.weight.dtype))))
