"""Linear layers merged for inference.

`FusedLinear` is a plain object, not a module: it holds several `nn.Linear`s that read the same input as ONE weight, of
which the layers' own parameters become views (no second copy in memory, same names in the state dict). For float32 on
a CPU with MKL it also keeps a packed copy of the weight for 4 to 32 rows, where the unpacked product takes up to twice
as long.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

PACKED_ROWS = range(4, 33)


def is_plain(module: nn.Module) -> bool:
    """Whether a module is an unwrapped `nn.Linear`: no adapter, quantisation, hook or offloaded weight."""
    return (
        type(module) is nn.Linear
        and not hasattr(module, "_hf_hook")
        and not hasattr(module, "_diffusers_hook")
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and type(module.weight) is nn.Parameter
        and not module.weight.is_meta
    )


def _can_pack(weight: Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkl, "_mkl_linear")
    )


class FusedLinear:
    """y = x @ W.T + b for the merged rows of several plain linears. Call only without gradients."""

    __slots__ = ("weight", "bias", "_transposed", "_packed", "_packable")

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight.detach()
        self.bias = None if bias is None else bias.detach()
        self._transposed = self.weight.t()
        self._packable = _can_pack(self.weight)
        self._packed: dict[int, Tensor] = {}

    @classmethod
    def merge(cls, layers: Sequence[nn.Linear]) -> FusedLinear:
        """Merge layers that share their input; afterwards their weights are views of the merged one."""
        if len(layers) == 1:
            return cls(layers[0].weight, layers[0].bias)
        weight = torch.cat([layer.weight.detach() for layer in layers])
        bias = None
        if layers[0].bias is not None:
            bias = torch.cat([layer.bias.detach() for layer in layers])
        start = 0
        for layer in layers:
            rows = layer.out_features
            layer.weight.data = weight[start : start + rows]
            if bias is not None:
                layer.bias.data = bias[start : start + rows]
            start += rows
        return cls(weight, bias)

    def __call__(self, x: Tensor) -> Tensor:
        """Any leading shape: [..., in] -> [..., out]."""
        return self.rows(x.reshape(-1, x.shape[-1])).unflatten(0, x.shape[:-1])

    def rows(self, x: Tensor, pack: bool = False) -> Tensor:
        """[R, in] -> [R, out]. `pack`: this row count comes many times, so packing the weight for it pays."""
        if pack and self._use_packed(x):
            return self._packed_linear(x)
        if self.bias is None:
            return torch.mm(x, self._transposed)
        return torch.addmm(self.bias, x, self._transposed)

    def add_rows(self, residual: Tensor, x: Tensor, pack: bool = False, inplace: bool = False) -> Tensor:
        """residual [R, out] + rows(x), in one product where that is possible."""
        if pack and self._use_packed(x):
            product = self._packed_linear(x)
            return residual.add_(product) if inplace else product.add_(residual)
        out = residual.addmm_(x, self._transposed) if inplace else torch.addmm(residual, x, self._transposed)
        return out if self.bias is None else out.add_(self.bias)

    def _use_packed(self, x: Tensor) -> bool:
        return (
            self._packable
            and x.shape[0] in PACKED_ROWS
            and x.dtype == torch.float32
            and not torch.compiler.is_compiling()
        )

    def _packed_linear(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        packed = self._packed.get(rows)
        if packed is None:
            self._packed.clear()  # one row count at a time: a packed weight is as large as the weight
            packed = torch.ops.mkl._mkl_reorder_linear_weight(self.weight.contiguous(), rows)
            self._packed[rows] = packed
        return torch.ops.mkl._mkl_linear(x, packed, self.weight, self.bias, rows)


def separate(layers: Sequence[nn.Linear]) -> None:
    """Give merged layers storage of their own again."""
    for layer in layers:
        layer.weight.data = layer.weight.data.clone()
        if layer.bias is not None:
            layer.bias.data = layer.bias.data.clone()
