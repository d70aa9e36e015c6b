"""`VQTokenizer`: the convolutional autoencoder around one vector quantizer (VQGAN, arXiv 2012.09841; LlamaGen, 2406.06525)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from .autoencoder import ConvDecoder, ConvEncoder, one_more
from .base import VisualTokenizer
from .codes import Codes
from .quantizers import Quantized, VectorQuantizer

__all__ = ["ConfigMixin", "ModelMixin", "VQTokenizer"]


class VQTokenizer(VisualTokenizer):
    """Images <-> one id per `downsample` x `downsample` pixels.

    Args:
        in_channels: channels of the pixels.
        base_channels: width at the highest resolution, of both coders.
        encoder_multipliers, decoder_multipliers: width of each level relative to `base_channels`, highest resolution first.
        num_res_blocks: residual blocks of each encoder level; the decoder has one more unless `decoder_res_blocks` says.
        z_channels: width between the coders and the 1x1 convolutions around the quantizer.
        codebook_size, codebook_dim, l2_normalize: see `VectorQuantizer`.
        patch_size: side of the pixel blocks folded into channels at both ends.
        encoder_attention, decoder_attention: attention after each block of the lowest resolution, or a flag for each level.
        mid_attention: attention between the middle blocks.
        norm_groups: groups of every group norm; must divide all widths.
        with_decoder: False has no decoder: images can be read, not drawn.
    """

    _supports_gradient_checkpointing = False
    _keep_in_fp32_modules = ["quantizer"]
    _skip_layerwise_casting_patterns = ["quantizer", "norm"]
    _no_split_modules = ["ResidualBlock", "SpatialAttention"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        base_channels: int = 128,
        encoder_multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        decoder_multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int | Sequence[int] = 2,
        decoder_res_blocks: int | Sequence[int] | None = None,
        z_channels: int = 256,
        codebook_size: int = 16384,
        codebook_dim: int = 8,
        l2_normalize: bool = True,
        patch_size: int = 1,
        encoder_attention: bool | Sequence[bool] = True,
        decoder_attention: bool | Sequence[bool] = True,
        mid_attention: bool = True,
        norm_groups: int = 32,
        with_decoder: bool = True,
    ) -> None:
        super().__init__()
        if len(encoder_multipliers) != len(decoder_multipliers):
            raise ValueError(
                f"`encoder_multipliers` ({len(encoder_multipliers)} levels) and `decoder_multipliers` "
                f"({len(decoder_multipliers)} levels) must have the same number of levels."
            )
        widths = {base_channels * m for m in (1, *encoder_multipliers, *decoder_multipliers)}
        if any(width % norm_groups for width in widths):
            raise ValueError(f"`norm_groups` {norm_groups} must divide every width, got widths {sorted(widths)}.")
        if decoder_res_blocks is None:
            decoder_res_blocks = one_more(num_res_blocks)
        shared: dict[str, Any] = {"patch_size": patch_size, "mid_attention": mid_attention, "norm_groups": norm_groups}
        self.encoder = ConvEncoder(
            in_channels,
            base_channels,
            encoder_multipliers,
            num_res_blocks,
            z_channels,
            use_attention=encoder_attention,
            **shared,
        )
        self.decoder = None
        if with_decoder:
            self.decoder = ConvDecoder(
                in_channels,
                base_channels,
                decoder_multipliers,
                decoder_res_blocks,
                z_channels,
                use_attention=decoder_attention,
                **shared,
            )
        self.quantizer = VectorQuantizer(codebook_size, codebook_dim, l2_normalize)
        self.quant_conv = nn.Conv2d(z_channels, codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(codebook_dim, z_channels, 1)
        self._downsample = patch_size * 2 ** (len(encoder_multipliers) - 1)

    @property
    def codebook_size(self) -> int:
        return self.quantizer.codebook_size

    @property
    def latent_channels(self) -> int:
        return self.quantizer.dim

    @property
    def downsample(self) -> int:
        return self._downsample

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encoder output before quantisation, `[B, codebook_dim, h, w]`."""
        return self.quant_conv(self.encoder(pixels.to(self.encoder.conv_in.weight.dtype)))

    @apply_forward_hook
    def encode(self, pixels: torch.Tensor, *, generator: torch.Generator | None = None) -> Codes:
        """Ids `[B, h*w]` in raster order of pixels `[B, 3, H, W]` in [-1, 1]. Deterministic: `generator` is not used."""
        self.check_pixels(pixels)
        features = self.features(pixels)
        height, width = features.shape[-2:]
        vectors = self.quantizer.normalize(features.flatten(2).transpose(1, 2))
        return Codes(ids=self.quantizer.nearest(vectors, self.quantizer.codebook()), grid=(1, height, width))

    def embed(self, codes: Codes) -> torch.Tensor:
        """Code vectors float32 `[B, N, codebook_dim]`; l2-normalised where the codebook is."""
        self.check_ids(codes)
        return self.quantizer.lookup(codes.ids)

    @apply_forward_hook
    def decode(self, codes: Codes, *, generator: torch.Generator | None = None) -> torch.Tensor:
        """Pixels `[B, 3, H, W]`, nominally in [-1, 1] but not clamped, of codes with a `(1, h, w)` grid."""
        return self.decode_vectors(self.embed(codes), codes.grid)

    def decode_vectors(self, vectors: torch.Tensor, grid: tuple[int, int, int] | None) -> torch.Tensor:
        """Pixels of code vectors `[B, N, codebook_dim]` laid out on `grid`."""
        if grid is None or grid[0] != 1:
            raise ValueError(f"`grid` must be (1, h, w) to decode an image, got {grid}.")
        if self.decoder is None:
            raise ValueError(
                "this tokenizer has no decoder: its checkpoint was published for reading images only; load one that has, such "
                "as Meta's vqgan.ckpt for Chameleon."
            )
        features = vectors.to(self.post_quant_conv.weight.dtype).transpose(1, 2).unflatten(2, grid[1:])
        return self.decoder(self.post_quant_conv(features))

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, Quantized]:
        """Reconstruction and quantisation of `pixels`, for training."""
        features = self.features(pixels)
        grid = (1, features.shape[-2], features.shape[-1])
        quantized = self.quantizer(features.flatten(2).transpose(1, 2))
        return self.decode_vectors(quantized.vectors, grid), quantized
