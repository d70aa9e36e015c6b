"""`MultiScaleVQTokenizer`: the convolutional autoencoder around a multi-scale residual quantizer (VAR, arXiv 2404.02905)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from .autoencoder import ConvDecoder, ConvEncoder
from .base import VisualTokenizer
from .codes import Codes
from .multi_scale import MultiScaleQuantizer, check_scales
from .quantizers import Quantized

__all__ = ["ConfigMixin", "ModelMixin", "MultiScaleVQTokenizer"]


class MultiScaleVQTokenizer(VisualTokenizer):
    """Square images <-> token maps of growing size; `Codes.ids` are `[B, L]`, the maps one after another.

    Args:
        in_channels: channels of the pixels.
        base_channels, channel_multipliers, num_res_blocks: widths and depth of both coders, highest resolution first; the
            decoder has one block more on each level.
        latent_channels: width of a code vector.
        codebook_size, scales, residual_ratio, shared_refiners, cosine: see `MultiScaleQuantizer`. `scales` are those of the
            image size that is encoded unless a call says otherwise.
        quant_kernel: side of the convolutions before and after the quantizer.
        norm_groups: groups of every group norm; must divide all widths.
    """

    _supports_gradient_checkpointing = False
    _keep_in_fp32_modules = ["quantizer"]
    _skip_layerwise_casting_patterns = ["quantizer", "norm"]
    _no_split_modules = ["ResidualBlock", "SpatialAttention"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        base_channels: int = 160,
        channel_multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        latent_channels: int = 32,
        codebook_size: int = 4096,
        scales: Sequence[int] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        residual_ratio: float = 0.5,
        shared_refiners: int = 4,
        cosine: bool = False,
        quant_kernel: int = 3,
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        widths = {base_channels * multiplier for multiplier in (1, *channel_multipliers)}
        if any(width % norm_groups for width in widths):
            raise ValueError(f"`norm_groups` {norm_groups} must divide every width, got widths {sorted(widths)}.")
        if quant_kernel < 1 or quant_kernel % 2 == 0:
            raise ValueError(f"`quant_kernel` must be a positive odd number, got {quant_kernel!r}.")
        coder = (in_channels, base_channels, channel_multipliers)
        self.encoder = ConvEncoder(*coder, num_res_blocks, latent_channels, norm_groups=norm_groups)
        self.decoder = ConvDecoder(*coder, num_res_blocks + 1, latent_channels, norm_groups=norm_groups)
        self.quantizer = MultiScaleQuantizer(
            codebook_size, latent_channels, scales, residual_ratio, shared_refiners, cosine
        )
        padding = quant_kernel // 2
        self.quant_conv = nn.Conv2d(latent_channels, latent_channels, quant_kernel, padding=padding)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, quant_kernel, padding=padding)
        self._downsample = 2 ** (len(channel_multipliers) - 1)

    @property
    def codebook_size(self) -> int:
        return self.quantizer.codebook_size

    @property
    def latent_channels(self) -> int:
        return self.quantizer.dim

    @property
    def downsample(self) -> int:
        """Pixels along a side of a token of the last, finest map."""
        return self._downsample

    @property
    def required_size(self) -> tuple[int, int]:
        side = self.scales[-1] * self.downsample
        return (side, side)

    @property
    def scales(self) -> tuple[int, ...]:
        """Sides of the token maps an image is encoded to by default."""
        return self.quantizer.scales

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encoder output before quantization, `[B, C, h, h]`."""
        return self.quant_conv(self.encoder(pixels.to(self.encoder.conv_in.weight.dtype)))

    @apply_forward_hook
    def encode(
        self,
        pixels: torch.Tensor,
        *,
        generator: torch.Generator | None = None,
        scales: Sequence[int] | None = None,
    ) -> Codes:
        """Codes of square pixels `[B, 3, H, H]` in [-1, 1]. Deterministic: `generator` is not used.

        Args:
            scales: sides of the token maps; the last must be H / downsample. Default: the tokenizer's own.
        """
        self.check_pixels(pixels)
        scales = self.scales if scales is None else check_scales(scales)
        side = scales[-1] * self.downsample
        if tuple(pixels.shape[-2:]) != (side, side):
            raise ValueError(
                f"`pixels` are {pixels.shape[-2]}x{pixels.shape[-1]}, but the scales {list(scales)} are those of {side}x{side}: "
                "resize the image, or pass `scales` that end with its size in tokens."
            )
        return Codes(ids=self.quantizer.encode(self.features(pixels), scales), scales=tuple(scales))

    def embed(self, codes: Codes) -> torch.Tensor:
        """Code vectors float32 `[B, L, C]` of all scales, before they are upsampled and added."""
        self._check_codes(codes)
        return self.quantizer.lookup(codes.ids)

    @apply_forward_hook
    def decode(
        self,
        codes: Codes,
        *,
        generator: torch.Generator | None = None,
        num_scales: int | None = None,
    ) -> torch.Tensor:
        """Pixels `[B, 3, H, H]`, nominally in [-1, 1] but not clamped.

        Args:
            num_scales: decode only the first so many scales, which gives the whole image with less detail.
        """
        self._check_codes(codes)
        return self.decode_features(self.quantizer.decode(codes.ids, codes.scales, num_scales=num_scales))

    @apply_forward_hook
    def decode_features(self, features: torch.Tensor) -> torch.Tensor:
        """Pixels of the accumulated codes `[B, C, h, h]`, complete or not."""
        return self.decoder(self.post_quant_conv(features.to(self.post_quant_conv.weight.dtype)))

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, Quantized]:
        """Reconstruction and quantization of `pixels`, for training."""
        features = self.features(pixels)
        quantized = self.quantizer(features)
        return self.decode_features(quantized.vectors.transpose(1, 2).unflatten(2, features.shape[-2:])), quantized

    def _check_codes(self, codes: Codes) -> None:
        if codes.ids is None or codes.ids.ndim != 2 or codes.scales is None:
            raise ValueError("`codes` must hold discrete `ids` [B, L] and the `scales` of their token maps.")
        self.check_id_values(codes.ids)
