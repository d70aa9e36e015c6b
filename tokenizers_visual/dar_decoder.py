"""The pixel-space flow decoder of D-AR (Gao et al., arXiv 2505.23660, section 3.1), and a decoding that is under way."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from armm.nn.block import Attention, Block, BlockConfig
from armm.nn.embedders import TimeEmbedding
from armm.nn.norms import LayerNorm
from armm.nn.positions import raster_coordinates
from armm.nn.rotary import rotary_table

if TYPE_CHECKING:
    from .dar import DARTokenizer

HEAD_DIM = 64
SOLVERS = ("adams_bashforth", "euler")
RotaryTables = dict[tuple[int, int, int, torch.device], torch.Tensor]


class GridRotary:
    """Rotary tables of patches at (row, column), followed by so many tokens that are not turned; each kept for the next call."""

    def __init__(self, theta: float) -> None:
        self.theta = theta
        self._tables: RotaryTables = {}

    def __call__(self, height: int, width: int, device: torch.device, unturned: int = 0) -> torch.Tensor:
        key = (height, width, unturned, device)
        if key not in self._tables:
            with torch.inference_mode(False):
                coordinates = F.pad(raster_coordinates(height, width), (0, 0, 0, unturned)).to(device)
                self._tables[key] = rotary_table(coordinates, (HEAD_DIM // 2, HEAD_DIM // 2), self.theta)
        return self._tables[key]


class FlowBlock(nn.Module):
    """A transformer block over patches that is modulated patch by patch: by the time, and by what the patch sees of the tokens.

    The result of the cross-attention is never added to the patches; it only modulates.
    """

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        dim = config.dim
        self.time_embedding = TimeEmbedding(dim, frequencies=dim)
        self.condition_fc1 = nn.Linear(dim, dim)
        self.condition_fc2 = nn.Linear(dim, dim)
        self.condition_norm = LayerNorm(dim, affine=False)
        self.cross_norm = LayerNorm(dim, affine=False)
        self.cross_attention = Attention(config, key_dim=dim)
        self.block = Block(config)

    def forward(self, x: torch.Tensor, times: torch.Tensor, tokens: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
        """Patches [B, P, D], times [B] in [0, 1], tokens [B, q, D] -> patches."""
        tokens = self.condition_norm(self.condition_fc2(F.silu(self.condition_fc1(tokens))))
        seen = self.cross_attention(self.cross_norm(x), rotary, None, False, None, 0, 0, None, tokens)
        return self.block(x, rotary=rotary, condition=self.time_embedding(1000.0 * times)[:, None] + seen)


class PixelFlow(nn.Module):
    """The velocity of pixels [B, C, H, W] at a time, given a window of the condition.

    Args:
        channels, patch_size: of the pixels.
        dim, num_layers, mlp_hidden: of the transformer; heads are 64 wide.
        condition_dim: width of the condition.
        rotary_theta: base of the rotary frequencies.
    """

    def __init__(
        self,
        channels: int,
        patch_size: int,
        dim: int,
        num_layers: int,
        mlp_hidden: int,
        condition_dim: int,
        rotary_theta: float = 10000.0,
    ) -> None:
        super().__init__()
        config = BlockConfig(
            dim=dim,
            num_heads=dim // HEAD_DIM,
            num_kv_heads=dim // HEAD_DIM,
            head_dim=HEAD_DIM,
            mlp="silu",
            mlp_hidden=mlp_hidden,
            mlp_bias=True,
            norm="layer",
            norm_affine=False,
            norm_eps=1e-6,
            qkv_bias=True,
            out_bias=True,
            qk_norm="layer",
            modulation="block",
            context_rotary=False,
        )
        self.patch_size = patch_size
        self.condition_proj = nn.Linear(condition_dim, dim)
        self.condition_norm = LayerNorm(dim, affine=False)
        self.proj_in = nn.Linear(channels * patch_size**2, dim)
        self.blocks = nn.ModuleList(FlowBlock(config) for _ in range(num_layers))
        self.norm_out = LayerNorm(dim, affine=False)
        self.proj_out = nn.Linear(dim, channels * patch_size**2)
        self.rotary = GridRotary(rotary_theta)

    def forward(self, pixels: torch.Tensor, times: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Noisy pixels [B, C, H, W], times [B] in [0, 1] (0 is noise) and condition [B, q, K] -> velocities [B, C, H, W]."""
        tokens = self.condition_norm(self.condition_proj(condition))
        patches = F.pixel_unshuffle(pixels.to(self.proj_in.weight.dtype), self.patch_size)
        height, width = patches.shape[-2:]
        x = self.proj_in(patches.flatten(2).transpose(1, 2))
        rotary = self.rotary(height, width, x.device)
        for block in self.blocks:
            x = block(x, times, tokens, rotary)
        x = self.proj_out(self.norm_out(x)).transpose(1, 2).unflatten(2, (height, width))
        return F.pixel_shuffle(x, self.patch_size)


def shifted_times(steps: int, shift: float) -> list[float]:
    """The times of `steps` steps, and 1: t / (t + shift * (1 - t)) of t = 0, 1/steps, ..., 1."""
    return [t / (t + shift * (1.0 - t)) for t in (step / steps for step in range(steps + 1))]


def window_starts(steps: int, groups: int, tokens: int, window: int) -> list[int]:
    """The first token of the window that conditions each of `steps` steps: that of the nearest of `groups` groups."""
    nearest = [math.floor(step / steps * groups + 0.5) for step in range(steps)]
    return [min(tokens - window, int(group / groups * tokens)) for group in nearest]


class ProgressiveDecoding:
    """A decoding of images that goes on as their tokens arrive, made by `DARTokenizer.start_decoding`.

    Each `step` needs the first `tokens_needed` ids of every image and makes one step of denoising. After it, `preview` is the image
    as it would be without further tokens: a jump to the end with the velocity at hand, which costs nothing. After the last step
    it is the image.
    """

    def __init__(self, tokenizer: DARTokenizer, noise: torch.Tensor, steps: int, solver: str) -> None:
        config = tokenizer.config
        self.tokenizer, self.solver, self.steps, self.done = tokenizer, solver, steps, 0
        self.times = shifted_times(steps, config.time_shift)
        self.starts = window_starts(steps, config.num_groups, config.num_tokens, config.window)
        self.pixels = noise  # at the time of the last velocity
        self.velocity: torch.Tensor | None = None
        self.slope: torch.Tensor | None = None

    @property
    def finished(self) -> bool:
        return self.done == self.steps

    @property
    def tokens_needed(self) -> int:
        """How many ids of each image the next step reads."""
        return self.tokens_of(self.done + 1)

    def tokens_of(self, steps: int) -> int:
        """How many ids of each image the first `steps` steps read."""
        return max(self.starts[:steps]) + self.tokenizer.config.window

    def step(self, ids: torch.Tensor) -> None:
        """One step from ids [B, n] of the first n tokens, n at least `tokens_needed`."""
        if self.finished:
            raise ValueError(f"all {self.steps} steps of this decoding are done.")
        if ids.shape[1] < self.tokens_needed:
            raise ValueError(
                f"step {self.done + 1} needs {self.tokens_needed} tokens of each image, got {ids.shape[1]}."
            )
        if self.slope is not None:
            self.pixels = self.pixels + (self.times[self.done] - self.times[self.done - 1]) * self.slope
        start = self.starts[self.done]
        velocity = self.tokenizer.decode_step(self.pixels, self.times[self.done], ids[:, : self.tokens_needed], start)
        if self.velocity is None or self.solver == "euler":
            self.slope = velocity
        else:  # the coefficients of equal steps, though these are not
            self.slope = 1.5 * velocity - 0.5 * self.velocity
        self.velocity = velocity
        self.done += 1

    def preview(self) -> torch.Tensor:
        """Pixels [B, C, H, W] of the tokens so far, nominally in [-1, 1] but not clamped."""
        if self.slope is None:
            raise ValueError("there is no preview before the first step.")
        return (self.pixels + (1.0 - self.times[self.done - 1]) * self.slope) / self.tokenizer.config.data_std
