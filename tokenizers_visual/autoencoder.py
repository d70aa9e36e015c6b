"""The convolutional encoder and decoder shared by every VQGAN-style tokenizer (Esser et al., arXiv 2012.09841).

Residual blocks with group norm, an attention block after each residual block of the lowest resolution, stride-2
convolutions down (zero padding right and bottom) and nearest-neighbour upsampling. What varies between published
tokenizers (widths, depths, attention, groups) are arguments. `StridedEncoder` and `StridedDecoder` are the older kind without norms.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from armm.nn.attention import attention


def _norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """x + conv2(silu(norm2(conv1(silu(norm1(x)))))), with a 1x1 `shortcut` where the width changes.

    first_kernel: side of the first convolution's kernel, odd.
    """

    def __init__(self, in_channels: int, out_channels: int, norm_groups: int = 32, first_kernel: int = 3) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels, norm_groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, first_kernel, padding=first_kernel // 2)
        self.norm2 = _norm(out_channels, norm_groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.shortcut(x) + h


class SpatialAttention(nn.Module):
    """Single-head self-attention over all cells of a feature map `[B, C, H, W]`, with a residual."""

    def __init__(self, channels: int, norm_groups: int = 32) -> None:
        super().__init__()
        self.norm = _norm(channels, norm_groups)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[-2:]
        h = self.norm(x).flatten(2).transpose(1, 2).unsqueeze(1)  # [B, 1, H*W, C]
        h = attention(self.to_q(h), self.to_k(h), self.to_v(h))
        h = self.to_out(h).squeeze(1).transpose(1, 2).unflatten(2, (height, width))
        return x + h


class Downsample(nn.Module):
    """3x3 convolution with stride 2 after zero padding on the right and the bottom."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by two, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution, then an optional change of resolution."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_blocks: int,
        use_attention: bool,
        resample: str | None,
        norm_groups: int,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            ResidualBlock(in_channels if i == 0 else out_channels, out_channels, norm_groups) for i in range(num_blocks)
        )
        self.attentions = nn.ModuleList(
            SpatialAttention(out_channels, norm_groups) for _ in range(num_blocks if use_attention else 0)
        )
        self.downsample = Downsample(out_channels) if resample == "down" else None
        self.upsample = Upsample(out_channels) if resample == "up" else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x)
            if len(self.attentions):
                x = self.attentions[i](x)
        if self.downsample is not None:
            x = self.downsample(x)
        if self.upsample is not None:
            x = self.upsample(x)
        return x


class ConvEncoder(nn.Module):
    """Pixels `[B, in_channels, H, W]` -> features `[B, z_channels, H/f, W/f]`, f = patch_size * 2**(levels - 1).

    Args:
        base_channels: width at the highest resolution; level i has `base_channels * channel_multipliers[i]` channels.
        num_res_blocks: residual blocks of each level, one number or one for each level.
        patch_size: side of the pixel blocks folded into channels before the first convolution (1: none).
        use_attention: attention after each block of the lowest resolution, or one flag for each level, highest resolution first.
        mid_attention: attention between the two middle blocks.
        final_activation: SiLU between the last group norm and the last convolution.
    """

    def __init__(
        self,
        in_channels: int,
        base_channels: int,
        channel_multipliers: Sequence[int],
        num_res_blocks: int | Sequence[int],
        z_channels: int,
        *,
        patch_size: int = 1,
        use_attention: bool | Sequence[bool] = True,
        mid_attention: bool = True,
        norm_groups: int = 32,
        final_activation: bool = True,
    ) -> None:
        super().__init__()
        widths = [base_channels * m for m in channel_multipliers]
        blocks = _per_level(num_res_blocks, len(widths))
        attentive = _attention_levels(use_attention, len(widths))
        last = len(widths) - 1
        self.patch_size = patch_size
        self.conv_in = nn.Conv2d(in_channels * patch_size**2, base_channels, 3, padding=1)
        self.levels = nn.ModuleList(
            Level(
                base_channels if i == 0 else widths[i - 1],
                width,
                blocks[i],
                attentive[i],
                "down" if i < last else None,
                norm_groups,
            )
            for i, width in enumerate(widths)
        )
        self.mid_block1 = ResidualBlock(widths[-1], widths[-1], norm_groups)
        self.mid_attention = SpatialAttention(widths[-1], norm_groups) if mid_attention else nn.Identity()
        self.mid_block2 = ResidualBlock(widths[-1], widths[-1], norm_groups)
        self.norm_out = _norm(widths[-1], norm_groups)
        self.activation = F.silu if final_activation else nn.Identity()
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 3, padding=1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = F.pixel_unshuffle(pixels, self.patch_size) if self.patch_size > 1 else pixels
        x = self.conv_in(x)
        for level in self.levels:
            x = level(x)
        x = self.mid_block2(self.mid_attention(self.mid_block1(x)))
        return self.conv_out(self.activation(self.norm_out(x)))


class ConvDecoder(nn.Module):
    """Features `[B, z_channels, h, w]` -> pixels `[B, out_channels, h*f, w*f]`: the encoder's mirror, not clamped.

    `levels[0]` is the lowest resolution. `channel_multipliers` are given from the highest resolution to the lowest, as for
    `ConvEncoder`; `num_res_blocks` and `use_attention`, where they are lists, likewise. norm_first: a group norm of the features
    comes before the first convolution.
    """

    def __init__(
        self,
        out_channels: int,
        base_channels: int,
        channel_multipliers: Sequence[int],
        num_res_blocks: int | Sequence[int],
        z_channels: int,
        *,
        patch_size: int = 1,
        use_attention: bool | Sequence[bool] = True,
        mid_attention: bool = True,
        norm_groups: int = 32,
        final_activation: bool = True,
        norm_first: bool = False,
    ) -> None:
        super().__init__()
        widths = [base_channels * m for m in reversed(channel_multipliers)]
        blocks = list(reversed(_per_level(num_res_blocks, len(widths))))
        attentive = list(reversed(_attention_levels(use_attention, len(widths))))
        last = len(widths) - 1
        self.patch_size = patch_size
        self.norm_in = _norm(z_channels, norm_groups) if norm_first else nn.Identity()
        self.conv_in = nn.Conv2d(z_channels, widths[0], 3, padding=1)
        self.mid_block1 = ResidualBlock(widths[0], widths[0], norm_groups)
        self.mid_attention = SpatialAttention(widths[0], norm_groups) if mid_attention else nn.Identity()
        self.mid_block2 = ResidualBlock(widths[0], widths[0], norm_groups)
        self.levels = nn.ModuleList(
            Level(
                widths[0] if i == 0 else widths[i - 1],
                width,
                blocks[i],
                attentive[i],
                "up" if i < last else None,
                norm_groups,
            )
            for i, width in enumerate(widths)
        )
        self.norm_out = _norm(widths[-1], norm_groups)
        self.activation = F.silu if final_activation else nn.Identity()
        self.conv_out = nn.Conv2d(widths[-1], out_channels * patch_size**2, 3, padding=1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(self.norm_in(features))
        x = self.mid_block2(self.mid_attention(self.mid_block1(x)))
        for level in self.levels:
            x = level(x)
        x = self.conv_out(self.activation(self.norm_out(x)))
        return F.pixel_shuffle(x, self.patch_size) if self.patch_size > 1 else x


def one_more(number: int | Sequence[int]) -> int | list[int]:
    """What decoders have by default: a residual block more than the encoder on every level."""
    return number + 1 if isinstance(number, int) else [value + 1 for value in number]


class PlainResidualBlock(nn.Module):
    """x + conv3(relu(conv2(relu(conv1(x))))), the last one 1x1; without norms."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv3 = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv3(F.relu(self.conv2(F.relu(self.conv1(x)))))


class StridedEncoder(nn.Module):
    """The encoder of the first VQ-VAEs (arXiv 1711.00937): 4x4 convolutions with stride 2 and ReLU, then residual blocks.

    Pixels `[B, in_channels, H, W]` -> features `[B, z_channels, H/f, W/f]`, f = 2**levels. Level i is `base_channels * 2**i` wide.
    """

    def __init__(self, in_channels: int, base_channels: int, levels: int, num_res_blocks: int, z_channels: int) -> None:
        super().__init__()
        widths = [in_channels, *(base_channels * 2**level for level in range(levels))]
        self.downsamples = nn.ModuleList(
            nn.Conv2d(before, width, 4, stride=2, padding=1) for before, width in zip(widths, widths[1:], strict=False)
        )
        self.blocks = nn.ModuleList(PlainResidualBlock(widths[-1]) for _ in range(num_res_blocks))
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = pixels
        for downsample in self.downsamples:
            x = F.relu(downsample(x))
        for block in self.blocks:
            x = block(x)
        return self.conv_out(x)


class StridedDecoder(nn.Module):
    """Features `[B, z_channels, h, w]` -> pixels `[B, out_channels, h*f, w*f]`: mirrors `StridedEncoder`, not clamped."""

    def __init__(
        self, out_channels: int, base_channels: int, levels: int, num_res_blocks: int, z_channels: int
    ) -> None:
        super().__init__()
        widths = [base_channels * 2**level for level in reversed(range(levels))]
        self.conv_in = nn.Conv2d(z_channels, widths[0], 1)
        self.blocks = nn.ModuleList(PlainResidualBlock(widths[0]) for _ in range(num_res_blocks))
        self.upsamples = nn.ModuleList(
            nn.ConvTranspose2d(before, width, 4, stride=2, padding=1)
            for before, width in zip([widths[0], *widths], widths, strict=False)
        )
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.conv_in(features))
        for block in self.blocks:
            x = block(x)
        for upsample in self.upsamples:
            x = F.relu(upsample(x))
        return self.conv_out(x)


def _per_level(number: int | Sequence[int], levels: int) -> list[int]:
    if levels < 1:
        raise ValueError("the multipliers of the channels must name at least one level, got none.")
    numbers = [number] * levels if isinstance(number, int) else list(number)
    if len(numbers) != levels:
        raise ValueError(f"`num_res_blocks` {numbers} must be one number, or one for each of the {levels} levels.")
    return numbers


def _attention_levels(use_attention: bool | Sequence[bool], levels: int) -> list[bool]:
    """Which levels, highest resolution first, have attention; one flag speaks of the lowest resolution."""
    if isinstance(use_attention, bool):
        return [False] * (levels - 1) + [use_attention]
    flags = list(use_attention)
    if len(flags) != levels:
        raise ValueError(f"`use_attention` {flags} must be one flag, or one for each of the {levels} levels.")
    return flags
