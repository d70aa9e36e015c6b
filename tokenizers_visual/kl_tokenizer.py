"""`KLTokenizer`: the convolutional autoencoder with a Gaussian bottleneck (LDM, arXiv 2112.10752; the KL-16 of MAR, 2406.11838)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from .autoencoder import ConvDecoder, ConvEncoder, one_more
from .base import VisualTokenizer
from .codes import Codes

__all__ = ["ConfigMixin", "KLTokenizer", "ModelMixin"]


class KLTokenizer(VisualTokenizer):
    """Images <-> one latent vector per `downsample` x `downsample` pixels.

    The coders are the shared ones and the posterior is diffusers' `DiagonalGaussianDistribution`. diffusers' `AutoencoderKL` computes
    the same thing only where the last encoder level has no attention; KL-16 has it there, which in the shared coders is a flag.

    Args:
        in_channels: channels of the pixels.
        base_channels: width at the highest resolution, of both coders.
        channel_multipliers: width of each level relative to `base_channels`, highest resolution first.
        num_res_blocks: residual blocks of each encoder level; the decoder has one more unless `decoder_res_blocks` says.
        latent_channels: width of a latent.
        encoder_attention, decoder_attention: attention after each block of the lowest resolution, or one flag for each level.
        scaling_factor: latents in codes are the autoencoder's times this, so that they have about unit variance.
        norm_groups: groups of every group norm; must divide all widths.
        patch_size: pixel blocks of this side are folded into channels before the encoder and unfolded after the decoder.
        mid_attention: attention in the middle of both coders.
    """

    _supports_gradient_checkpointing = False
    _skip_layerwise_casting_patterns = ["norm"]
    _no_split_modules = ["ResidualBlock", "SpatialAttention"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        base_channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int | Sequence[int] = 2,
        decoder_res_blocks: int | Sequence[int] | None = None,
        latent_channels: int = 16,
        encoder_attention: bool | Sequence[bool] = True,
        decoder_attention: bool | Sequence[bool] = False,
        scaling_factor: float = 0.2325,
        norm_groups: int = 32,
        patch_size: int = 1,
        mid_attention: bool = True,
    ) -> None:
        super().__init__()
        widths = {base_channels * m for m in (1, *channel_multipliers)}
        if any(width % norm_groups for width in widths):
            raise ValueError(f"`norm_groups` {norm_groups} must divide every width, got widths {sorted(widths)}.")
        if not scaling_factor > 0:
            raise ValueError(f"`scaling_factor` must be a positive number, got {scaling_factor!r}.")
        if decoder_res_blocks is None:
            decoder_res_blocks = one_more(num_res_blocks)
        self.encoder = ConvEncoder(
            in_channels,
            base_channels,
            channel_multipliers,
            num_res_blocks,
            2 * latent_channels,
            use_attention=encoder_attention,
            mid_attention=mid_attention,
            norm_groups=norm_groups,
            patch_size=patch_size,
        )
        self.decoder = ConvDecoder(
            in_channels,
            base_channels,
            channel_multipliers,
            decoder_res_blocks,
            latent_channels,
            use_attention=decoder_attention,
            mid_attention=mid_attention,
            norm_groups=norm_groups,
            patch_size=patch_size,
        )
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        self._downsample = patch_size * 2 ** (len(channel_multipliers) - 1)

    @property
    def codebook_size(self) -> int:
        return 0

    @property
    def latent_channels(self) -> int:
        return self.config.latent_channels

    @property
    def downsample(self) -> int:
        return self._downsample

    @property
    def scaling_factor(self) -> float:
        return self.config.scaling_factor

    def posterior(self, pixels: torch.Tensor) -> DiagonalGaussianDistribution:
        """The Gaussian over unscaled latents `[B, C, h, w]` of pixels `[B, 3, H, W]`; its log-variance is clamped to [-30, 20]."""
        return DiagonalGaussianDistribution(self.quant_conv(self.encoder(pixels.to(self.encoder.conv_in.weight.dtype))))

    @apply_forward_hook
    def encode(
        self,
        pixels: torch.Tensor,
        *,
        generator: torch.Generator | list[torch.Generator] | None = None,
        sample: bool = False,
        noise: torch.Tensor | None = None,
    ) -> Codes:
        """Latents `[B, h*w, C]` in raster order of pixels `[B, 3, H, W]` in [-1, 1], scaled.

        Args:
            generator: randomness of `sample=True`; a list has one for each image, which then does not depend on the batch.
            sample: draw from the posterior, as in training; False takes its mean.
            noise: standard normal `[B, C, h, w]` to sample with, in place of the generator's.
        """
        self.check_pixels(pixels)
        posterior = self.posterior(pixels)
        latents = posterior.mean
        if noise is not None:
            if noise.shape != latents.shape:
                raise ValueError(f"`noise` must be {tuple(latents.shape)}, got {tuple(noise.shape)}.")
            latents = latents + posterior.std * noise.to(latents)
        elif sample:
            latents = posterior.sample(generator)
        height, width = latents.shape[-2:]
        return Codes(latents=latents.flatten(2).transpose(1, 2) * self.scaling_factor, grid=(1, height, width))

    def embed(self, codes: Codes) -> torch.Tensor:
        """The unscaled latents `[B, N, C]`, what the decoder sees."""
        self.check_latents(codes)
        return codes.tensor / self.scaling_factor

    @apply_forward_hook
    def decode(self, codes: Codes, *, generator: torch.Generator | None = None) -> torch.Tensor:
        """Pixels `[B, 3, H, W]`, nominally in [-1, 1] but not clamped, of codes with a `(1, h, w)` grid."""
        vectors = self.embed(codes)
        if codes.grid is None or codes.grid[0] != 1:
            raise ValueError(f"`grid` must be (1, h, w) to decode an image, got {codes.grid}.")
        return self.decode_features(vectors.transpose(1, 2).unflatten(2, codes.grid[1:]))

    def decode_features(self, latents: torch.Tensor) -> torch.Tensor:
        """Pixels of unscaled latents `[B, C, h, w]`."""
        return self.decoder(self.post_quant_conv(latents.to(self.post_quant_conv.weight.dtype)))

    def forward(
        self, pixels: torch.Tensor, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, DiagonalGaussianDistribution]:
        """Reconstruction from a sample of the posterior, and the posterior, for training."""
        posterior = self.posterior(pixels)
        return self.decode_features(posterior.sample(generator)), posterior
