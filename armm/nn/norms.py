"""Normalisation layers: statistics always in float32, the result in the dtype the next matmul wants."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def low_precision_dtype(x: Tensor) -> torch.dtype:
    """The dtype a following matmul will use: the autocast dtype when autocast is on, else the dtype of `x`."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMS normalisation over the last axis: float32 statistics, cast back to the input's dtype, then the weight."""
    dtype = low_precision_dtype(x)
    if x.dtype == torch.float32 and dtype == torch.float32:
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    x = x.float()
    x = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)).to(dtype)
    return x if weight is None else x * weight.to(dtype)


class FastRMSNorm:
    """`rms_norm` for inference in float32 on a CPU, where few small operations matter: x [R, D] -> [R, D]."""

    __slots__ = ("_eps", "_inverse", "weight")

    def __init__(self, norm: RMSNorm) -> None:
        self.weight = norm.weight.detach() if norm.weight is not None else None
        self._eps = torch.tensor(norm.eps, dtype=torch.float32)
        self._inverse = 1.0 / norm.dim

    def __call__(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, 2, -1, True)
        x = x * torch.addcmul(self._eps, length, length, value=self._inverse).rsqrt_()
        return x if self.weight is None else x.mul_(self.weight)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation of the last axis; `affine=False` has no weight."""

    def __init__(self, dim: int, eps: float = 1e-5, affine: bool = True) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}, affine={self.weight is not None}"


class LayerNorm(nn.Module):
    """Layer normalisation of the last axis with float32 statistics; `affine=False` has neither weight nor bias."""

    def __init__(self, dim: int, eps: float = 1e-6, affine: bool = True) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        dtype = low_precision_dtype(x)
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), (self.dim,), weight, bias, self.eps).to(dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}, affine={self.weight is not None}"


class HeadLayerNorm(nn.Module):
    """Layer normalisation of the last axis of [..., H, d] with a weight and a bias for each of the H heads."""

    def __init__(self, heads: int, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(heads, dim))
        self.bias = nn.Parameter(torch.zeros(heads, dim))

    def forward(self, x: Tensor) -> Tensor:
        dtype = low_precision_dtype(x)
        x = F.layer_norm(x.float(), x.shape[-1:], None, None, self.eps)
        return torch.addcmul(self.bias.float(), x, self.weight.float()).to(dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class HeadRMSNorm(nn.Module):
    """Vectors [..., H, d] scaled to length sqrt(d), times a weight for each of the H heads (Henry et al., arXiv 2010.04245).

    What is 0 stays 0: there is no epsilon beside the one against division by zero.
    """

    def __init__(self, heads: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, dim))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.float() * self.weight.shape[-1] ** 0.5
        return (F.normalize(x.float(), dim=-1) * scale).to(low_precision_dtype(x))

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}"


def build_norm(kind: str, dim: int, eps: float, affine: bool = True) -> nn.Module:
    """A norm by name: "rms" or "layer"."""
    if kind == "rms":
        return RMSNorm(dim, eps, affine)
    if kind == "layer":
        return LayerNorm(dim, eps, affine)
    raise ValueError(f"norm must be 'rms' or 'layer', got {kind!r}")
