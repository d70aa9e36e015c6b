"""Rotary position tables over any number of axes, and the two ways of applying them.

A table is a value, computed in float32 for the positions at hand; it is never a buffer of a module. Tables carry an
axis of size 1 for the heads so that they multiply `[B, N, H, d]` queries and keys directly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LAYOUTS = ("interleaved", "half_split")


def rotary_table(
    positions: Tensor,
    axes_dims: Sequence[int],
    theta: float = 10000.0,
    zero: Tensor | None = None,
    layout: str = "interleaved",
) -> Tensor:
    """Rotary factors for `positions` [N, A] or [B, N, A].

    Axis a turns `axes_dims[a] / 2` pairs with the frequencies `theta ** (-2j / axes_dims[a])`; the axes follow each
    other. Rows flagged in `zero` ([N] or [B, N], bool) get cos = sin = 0, which makes their queries and keys exactly
    zero.

    Returns complex64 [..., N, 1, d/2] for "interleaved" and float32 [2, ..., N, 1, d] (cos, sin) for "half_split".
    """
    if positions.shape[-1] != len(axes_dims):
        raise ValueError(
            f"positions have {positions.shape[-1]} axes, but axes_dims has {len(axes_dims)}: {list(axes_dims)}"
        )
    if any(size % 2 for size in axes_dims):
        raise ValueError(f"axes_dims must be even numbers, got {list(axes_dims)}")
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    device = positions.device
    angles = []
    for axis, size in enumerate(axes_dims):
        exponent = torch.arange(0, size, 2, dtype=torch.float32, device=device) / size
        frequency = 1.0 / (torch.full((), theta, dtype=torch.float32, device=device) ** exponent)
        angles.append(positions[..., axis, None].to(torch.float32) * frequency)
    angle = torch.cat(angles, dim=-1)  # [..., N, d/2]
    if layout == "half_split":
        angle = torch.cat([angle, angle], dim=-1)  # [..., N, d]
    cos, sin = angle.cos(), angle.sin()
    if zero is not None:
        keep = (~zero.to(device=device, dtype=torch.bool)).unsqueeze(-1).to(torch.float32)
        cos, sin = cos * keep, sin * keep
    if layout == "interleaved":
        return torch.complex(cos, sin).unsqueeze(-2)
    return torch.stack([cos, sin]).unsqueeze(-2)


def apply_rotary_interleaved(x: Tensor, table: Tensor) -> Tensor:
    """Rotate the pairs (2j, 2j+1) of `x` [B, N, H, d] by a complex `table` [N, 1, d/2]; float32 inside, cast back."""
    if torch.compiler.is_compiling():  # the compiler has no complex arithmetic; it fuses the real form into one kernel
        cos, sin = torch.view_as_real(table).unbind(-1)
        even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], x.shape[-1] // 2, 2))
    return torch.view_as_real(pairs * table).flatten(-2).to(x.dtype)


def apply_rotary_half_split(x: Tensor, table: Tensor) -> Tensor:
    """Rotate the pairs (j, j + d/2) of `x` [B, N, H, d] by `table` [2, N, 1, d]; float32 inside, cast back."""
    cos, sin = table[0], table[1]
    value = x.float()
    first, second = value.chunk(2, dim=-1)
    return (value * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def apply_rotary(x: Tensor, table: Tensor) -> Tensor:
    """Apply a table of either layout (a complex table is interleaved)."""
    return apply_rotary_interleaved(x, table) if table.is_complex() else apply_rotary_half_split(x, table)
