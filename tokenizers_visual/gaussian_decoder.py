"""`GaussianDecoder`: voxels with features -> Gaussians in space, how AToken (Lu et al., arXiv 2509.14476) shows what it decodes of 3-D
things (the Gaussian decoder of structured latents, Xiang et al., arXiv 2412.01506, section 3.1)."""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from armm.nn.norms import LayerNorm
from armm.nn.sincos import sincos_table

from .gaussians import Gaussians, gaussians_of
from .sparse import SparseTokens, voxel_windows
from .vit import ViT

__all__ = ["ConfigMixin", "GaussianDecoder", "ModelMixin"]

AXES = 3
NUMBERS = 14  # of a Gaussian, see `gaussians_of`


class GaussianDecoder(ModelMixin, ConfigMixin):
    """`ATokenTokenizer.decode_tokens` of voxels -> `num_gaussians` Gaussians for each of them.

    A transformer in which voxels see those of the same cube of `window` voxels a side; every second block has its cubes shifted by half
    of that. Width, depth, windows and the number of Gaussians are those of AToken's decoder, offsets are bounded as in its source
    (position = voxel + tanh(offset)). The rest is ours, since nothing that we read says it: sine-cosine positions added at the
    input, attention heads 64 wide, layer norms, and how scales, opacities, rotations and colors come from numbers (`gaussians_of`, as
    in arXiv 2308.04079). So the authors' `3d_decode_gs.pt` cannot be loaded.

    Args:
        in_channels: of the voxels' features that are read, the first ones. AToken's patches are wider than what stands in them of a
            voxel, the rest is filled up (see `ATokenTokenizer.voxel_tokens`).
        dim, num_layers, num_heads, mlp_hidden: of the transformer; `dim` is a multiple of 6, for sines and cosines on three axes.
        window: side of the cubes, in voxels.
        grid_size: voxels along a side of the space that things stand in.
        num_gaussians: for each voxel.
        reach: sides of a voxel that a Gaussian may be away from its middle, along each axis.
    """

    _supports_gradient_checkpointing = False
    _skip_layerwise_casting_patterns = ["norm"]
    _no_split_modules = ["Block"]

    @register_to_config
    def __init__(
        self,
        in_channels: int,
        dim: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        mlp_hidden: int = 3072,
        window: int = 8,
        grid_size: int = 64,
        num_gaussians: int = 32,
        reach: float = 1.0,
    ) -> None:
        super().__init__()
        if min(in_channels, window, grid_size, num_gaussians) < 1:
            raise ValueError(
                f"`in_channels`, `window`, `grid_size` and `num_gaussians` must be positive, got {in_channels}, {window}, {grid_size} "
                f"and {num_gaussians}."
            )
        if dim < 1 or dim % (2 * AXES):
            raise ValueError(f"`dim` must be a multiple of {2 * AXES}, sines and cosines on {AXES} axes, got {dim}.")
        if not reach > 0:
            raise ValueError(f"`reach` must be a positive number of voxels, got {reach!r}.")
        self.proj_in = nn.Linear(in_channels, dim)
        self.vit = ViT(dim, num_layers, num_heads, mlp_hidden=mlp_hidden)
        self.norm_out = LayerNorm(dim)
        self.proj_out = nn.Linear(dim, num_gaussians * NUMBERS)

    def forward(self, voxels: SparseTokens) -> Gaussians:
        """`N * num_gaussians` Gaussians, those of a voxel side by side, of N voxels with features `[N, in_channels or more]`."""
        self.check_voxels(voxels)
        places, weight = voxels.coordinates[:, 2:], self.proj_in.weight
        table = torch.cat([sincos_table(axis, self.config.dim // AXES) for axis in places.unbind(1)], dim=-1)
        x = self.proj_in(voxels.features[:, : self.config.in_channels].to(weight.dtype)) + table.to(weight.dtype)
        window = self.config.window
        placed = [voxel_windows(voxels.coordinates, window, shift) for shift in (0, window // 2)]
        for layer, block in enumerate(self.vit.blocks):
            cubes = placed[layer % 2]
            x = cubes.scatter(block(cubes.gather(x), mask=cubes.mask))
        raw = self.proj_out(self.norm_out(x)).unflatten(1, (self.config.num_gaussians, NUMBERS))
        size = self.config.grid_size
        middles = (places + 0.5) / size - 0.5
        return gaussians_of(raw, middles, 1 / size, self.config.reach, voxels.coordinates[:, 0])

    def check_voxels(self, voxels: SparseTokens) -> None:
        """Raises ValueError unless `voxels` have wide enough features and stand inside the grid, at one time."""
        width, size = self.config.in_channels, self.config.grid_size
        if voxels.features.shape[1] < width:
            raise ValueError(f"features of voxels must be at least {width} wide, got {voxels.features.shape[1]}.")
        last = int(voxels.coordinates[:, 2:].max())
        if last >= size:
            raise ValueError(f"voxels must stand in [0, {size - 1}] along each axis, got one at {last}.")
        if voxels.coordinates[:, 1].unique().numel() > 1:
            raise ValueError("voxels must stand at one time: decode the frames of a moving thing one after the other.")
