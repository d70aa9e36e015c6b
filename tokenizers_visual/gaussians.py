"""Things as Gaussians in space (Kerbl et al., arXiv 2308.04079)."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

# Value of the constant spherical harmonic, 1 / (2 sqrt(pi)): colors are 0.5 + this times a coefficient.
CONSTANT_HARMONIC = 0.28209479177387814


@dataclass(frozen=True)
class Gaussians:
    """The Gaussians of a batch of things.

    Args:
        positions: float `[M, 3]`, (row, column, depth) in the cube from -0.5 to 0.5.
        scales: float `[M, 3]`, positive: standard deviations along the axes of each.
        rotations: float `[M, 4]`, unit quaternions (w, x, y, z) that turn these axes.
        opacities: float `[M]` in (0, 1).
        colors: float `[M, 3]`, red, green and blue, nominally in [0, 1] but not clamped; the same from all sides.
        batch: int64 `[M]`, the thing that each belongs to.
    """

    positions: torch.Tensor
    scales: torch.Tensor
    rotations: torch.Tensor
    opacities: torch.Tensor
    colors: torch.Tensor
    batch: torch.Tensor

    def __post_init__(self) -> None:
        widths = {"positions": (3,), "scales": (3,), "rotations": (4,), "opacities": (), "colors": (3,), "batch": ()}
        for name, width in widths.items():
            found = tuple(getattr(self, name).shape)
            if found != (len(self.positions), *width):
                raise ValueError(f"`{name}` must be {[len(self.positions), *width]}, got {list(found)}.")

    def __len__(self) -> int:
        return len(self.positions)

    def of(self, number: int) -> Gaussians:
        """Those of one thing of the batch."""
        own = self.batch == number
        return Gaussians(**{field.name: getattr(self, field.name)[own] for field in fields(self)})

    def covariances(self) -> torch.Tensor:
        """`[M, 3, 3]`."""
        w, x, y, z = self.rotations.unbind(-1)
        rows = (
            (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
            (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
            (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
        )
        axes = torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2) * self.scales.unsqueeze(-2)
        return axes @ axes.transpose(-1, -2)

    def save_ply(self, path: str | Path) -> None:
        """Writes the file that viewers of Gaussian splats open: all things of the batch, with colors as constant harmonics, opacities
        as logits and scales as logarithms."""
        columns = {
            **{name: self.positions[:, axis] for axis, name in enumerate("xyz")},
            **{name: torch.zeros_like(self.opacities) for name in ("nx", "ny", "nz")},
            **{f"f_dc_{i}": (self.colors[:, i] - 0.5) / CONSTANT_HARMONIC for i in range(3)},
            "opacity": self.opacities.logit(eps=1e-6),
            **{f"scale_{i}": self.scales[:, i].log() for i in range(3)},
            **{f"rot_{i}": self.rotations[:, i] for i in range(4)},
        }
        header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(self)}"]
        header += [*(f"property float {name}" for name in columns), "end_header", ""]
        rows = torch.stack([column.detach().float() for column in columns.values()], dim=-1).cpu().numpy()
        Path(path).write_bytes("\n".join(header).encode("ascii") + rows.astype(np.dtype("<f4")).tobytes())


def gaussians_of(raw: torch.Tensor, middles: torch.Tensor, cell: float, reach: float, batch: torch.Tensor) -> Gaussians:
    """The Gaussians of unbounded numbers.

    Args:
        raw: float `[N, K, 14]`, K for each cell: offset (3), color (3), scale (3), opacity (1), rotation (4).
        middles: of the cells, `[N, 3]`.
        cell: side of a cell. Zeros in `raw` are a ball of a quarter of it, half transparent, grey and in the middle.
        reach: sides of a cell that a Gaussian may be away from its middle, along each axis.
        batch: `[N]`.
    """
    offsets, colors, scales, opacities, rotations = raw.float().split([3, 3, 3, 1, 4], dim=-1)
    upright = F.pad(rotations.new_ones(1), (0, 3))
    return Gaussians(
        positions=(middles[:, None] + cell * reach * offsets.tanh()).flatten(0, 1),
        scales=(scales.exp() * (cell / 4)).flatten(0, 1),
        rotations=F.normalize(rotations + upright, dim=-1).flatten(0, 1),
        opacities=opacities.sigmoid().flatten(),
        colors=(0.5 + CONSTANT_HARMONIC * colors).flatten(0, 1),
        batch=batch.repeat_interleave(raw.shape[1]),
    )
