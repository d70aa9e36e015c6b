"""Heads that denoise continuous tokens: noisy values, a timestep and hidden states -> the noise in the values, or their velocity.

They are called many times for one hidden state, by a solver of `armm.decoding.solvers`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from armm.heads.adaptive import AdaptiveHead
from armm.nn.embedders import TimeEmbedding
from armm.nn.mlp import build_mlp
from armm.nn.modulation import Modulation, modulate
from armm.nn.norms import LayerNorm
from armm.transformer import ARTransformer

__all__ = ["DIFFUSION_HEADS", "DiffusionHead", "DiffusionTransformerHead", "build_diffusion_head"]


class ModulatedMLP(nn.Module):
    """x + gate * mlp(norm(x) * (1 + scale) + shift), all three a linear function of SiLU(condition)."""

    def __init__(self, dim: int, norm_eps: float, mlp: str = "silu", mlp_hidden: int | None = None) -> None:
        super().__init__()
        self.norm = LayerNorm(dim, norm_eps)
        self.modulation = Modulation(dim, dim, chunks=3)
        self.mlp = build_mlp(mlp, dim, mlp_hidden or dim, bias=True)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(condition).chunk(3, dim=-1)
        return x + gate * self.mlp(modulate(self.norm(x), shift, scale))


class _Denoiser(nn.Module):
    """What both heads have: projections in, an embedding of the timestep, an adaptive projection out."""

    num_states = 1
    joint = False  # whether a token is denoised in sight of the others

    def __init__(self, dim: int, channels: int, width: int, learned_variance: bool, norm_eps: float) -> None:
        super().__init__()
        self.channels, self.learned_variance = channels, learned_variance
        self.input_projection = nn.Linear(channels, width)
        self.condition_projection = nn.Linear(dim, width)
        self.time_embedding = TimeEmbedding(width)
        self.output = AdaptiveHead(width, channels * (2 if learned_variance else 1), norm_eps=norm_eps)

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for layer in (self.time_embedding.fc1, self.time_embedding.fc2):
            nn.init.normal_(layer.weight, std=0.02)
        # Nothing is modulated, and nothing predicted, to begin with.
        for module in self.modules():
            if isinstance(module, Modulation):
                nn.init.zeros_(module.linear.weight)
        nn.init.zeros_(self.output.projection.weight)

    def condition(self, hidden: Tensor) -> Tensor:
        """What the head takes of hidden states [B, n, D]; to be computed once for all calls of a solver."""
        return self.condition_projection(hidden)

    def split(self, output: Tensor) -> tuple[Tensor, Tensor | None]:
        """Outputs [..., C or 2C] -> the noise in the values, and where the variance is learned its interpolation."""
        if not self.learned_variance:
            return output, None
        noise, variance = output.chunk(2, dim=-1)
        return noise, variance

    def fuse(self) -> bool:
        """Nothing to merge."""
        return False

    def unfuse(self) -> None:
        pass


class DiffusionHead(_Denoiser):
    """A small network that denoises each token by itself (MAR, arXiv 2406.11838, section 3.3).

    Along a flow (`armm.decoding.solvers.flow`) what it gives is the velocity, and its timesteps are 1000 times the flow's times.

    Args:
        dim: width of the hidden states.
        channels: of a token.
        width, depth: of the residual blocks.
        learned_variance: predict the interpolation between the two bounds of the variance too (arXiv 2102.09672).
        norm_eps: of the norms.
        mlp, mlp_hidden: kind and inner width (default `width`) of the blocks' networks, see `armm.nn.mlp.build_mlp`.
    """

    def __init__(
        self,
        dim: int,
        channels: int,
        width: int = 1024,
        depth: int = 6,
        learned_variance: bool = True,
        norm_eps: float = 1e-6,
        mlp: str = "silu",
        mlp_hidden: int | None = None,
    ) -> None:
        super().__init__(dim, channels, width, learned_variance, norm_eps)
        self.blocks = nn.ModuleList(ModulatedMLP(width, norm_eps, mlp, mlp_hidden) for _ in range(depth))
        self._initialize()

    def forward(self, x: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        """x [B, n, C], timesteps (integers, or floats) that broadcast to [B, n] and `condition(hidden)` [B, n, W] -> float32
        [B, n, C or 2C]."""
        condition = self.time_embedding(timestep) + condition
        x = self.input_projection(x.to(self.input_projection.weight.dtype))
        for block in self.blocks:
            x = block(x, condition)
        return self.output(x, condition)


class DiffusionTransformerHead(_Denoiser):
    """A small transformer that denoises all tokens of a picture together (Hi-MAR, arXiv 2505.20288; DiT, 2212.09748).

    Args:
        dim, channels, learned_variance, norm_eps: as of `DiffusionHead`.
        positions: how many tokens it sees, each with a learned position.
        width, depth, num_heads, mlp_hidden: of the transformer; mlp_hidden defaults to 4 * width.
    """

    joint = True

    def __init__(
        self,
        dim: int,
        channels: int,
        positions: int = 256,
        width: int = 512,
        depth: int = 6,
        num_heads: int = 8,
        mlp_hidden: int | None = None,
        learned_variance: bool = False,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__(dim, channels, width, learned_variance, norm_eps)
        self.trunk = ARTransformer(
            width,
            depth,
            num_heads,
            mlp="gelu_tanh",
            mlp_hidden=mlp_hidden,
            mlp_bias=True,
            norm="layer",
            norm_affine=False,
            norm_eps=norm_eps,
            final_norm=False,
            qkv_bias=True,
            out_bias=True,
            learned_positions=positions,
            modulation="block",
        )
        self._initialize()

    def forward(self, x: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        """As of `DiffusionHead`, with n the number of positions, in raster order."""
        condition = self.time_embedding(timestep) + condition
        x = self.input_projection(x.to(self.input_projection.weight.dtype))
        positions = self.trunk.position_table(None, index=torch.arange(x.shape[1], device=x.device))
        return self.output(self.trunk(x, positions=positions, modulation=condition), condition)


DIFFUSION_HEADS: dict[str, Callable[..., _Denoiser]] = {"mlp": DiffusionHead, "transformer": DiffusionTransformerHead}


def build_diffusion_head(config: Mapping[str, Any] | None, dim: int, channels: int, **defaults: Any) -> _Denoiser:
    """The head that a config names, `{"type": "mlp" or "transformer", **arguments}`; None is an "mlp".

    Raises:
        ValueError: unknown type or arguments.
    """
    options = {**defaults, **(config or {})}
    kind = options.pop("type", "mlp")
    if kind not in DIFFUSION_HEADS:
        raise ValueError(f"head type must be one of {sorted(DIFFUSION_HEADS)}, got {kind!r}")
    try:
        return DIFFUSION_HEADS[kind](dim, channels, **options)
    except TypeError as error:
        raise ValueError(f"head of type {kind!r}: {error}") from error
