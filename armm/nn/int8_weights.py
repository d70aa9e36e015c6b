"""Weights stored as 8-bit integers with one scale per row: half the size of bfloat16 on disk, floating point once loaded.

`pack_file` rewrites a saved model; models that inherit `Int8Weights` load such files. Rounding error: at most half of 1/127 of the
largest entry of the row.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Mapping, MutableMapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["Int8Weights", "pack_file", "pack_rows", "parameter_names", "unpack_rows"]

SCALE = "_scale"
MIN_COLUMNS = 16


def pack_rows(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Matrices [R, C] and kernels [R, C, ...] with rows of at least 16 entries become int8 with float32 `<name>_scale` [R]; all other
    tensors stay as they are."""
    packed = {}
    for name, tensor in weights.items():
        if tensor.ndim < 2 or tensor[0].numel() < MIN_COLUMNS or not tensor.is_floating_point():
            packed[name] = tensor
            continue
        scale = tensor.float().abs().flatten(1).amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        packed[name] = (tensor.float() / _per_row(scale, tensor)).round().to(torch.int8)
        packed[name + SCALE] = scale
    return packed


def _per_row(scale: Tensor, tensor: Tensor) -> Tensor:
    return scale.view(-1, *[1] * (tensor.ndim - 1))


def unpack_rows(weights: MutableMapping[str, Tensor]) -> None:
    """Undoes `pack_rows` in place, to float32."""
    for name in [name for name, tensor in weights.items() if tensor.dtype == torch.int8]:
        if name.removesuffix("weight") + "SCB" in weights:
            continue  # of bitsandbytes, which unpacks it itself
        scale = weights.pop(name + SCALE, None)
        if scale is None:
            raise ValueError(
                f"{name} is stored as int8 without its {name + SCALE}: the file is damaged or of another kind."
            )
        weights[name] = weights[name].float() * _per_row(scale, weights[name])


class Int8Weights:
    """Mixin of diffusers models, before `ModelMixin`: loads what `pack_file` wrote."""

    def _fix_state_dict_keys_on_load(self, state_dict: MutableMapping[str, Tensor]) -> None:
        # Called by diffusers between reading a file and filling the parameters.
        unpack_rows(state_dict)
        super()._fix_state_dict_keys_on_load(state_dict)  # type: ignore[misc]


def parameter_names(names: Collection[str]) -> set[str]:
    """The names of the tensors that a file's tensors `names` stand for: without the scales."""
    return {name for name in names if not (name.endswith(SCALE) and name.removesuffix(SCALE) in names)}


def pack_file(path: str | Path) -> None:
    """Rewrites a safetensors file with `pack_rows`; on failure the file stays as it was."""
    path = Path(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        packed = pack_rows({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".safetensors")
    os.close(handle)
    try:
        save_file(packed, temporary, metadata)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
