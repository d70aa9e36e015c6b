"""`BinaryTokenizer`: the convolutional autoencoder around one binary quantizer (ELM's BAE, arXiv 2410.16257, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook

from .autoencoder import ConvDecoder, ConvEncoder
from .base import VisualTokenizer
from .binary_quantizer import BinaryQuantized, BinaryQuantizer, bits_to_ids, ids_to_bits, uniform_noise
from .codes import Codes

__all__ = ["BinaryTokenizer", "ConfigMixin", "ModelMixin"]


class BinaryTokenizer(VisualTokenizer):
    """Images <-> `bits` bits per `downsample` x `downsample` pixels, read as one id or as several sub-codes.

    Args:
        in_channels: channels of the pixels.
        base_channels: width at the highest resolution, of both coders.
        channel_multipliers: width of each level relative to `base_channels`, highest resolution first.
        encoder_blocks, decoder_blocks: residual blocks of each level, one number or one for each, highest resolution first.
        encoder_attention, decoder_attention: attention after each block of the lowest resolution, or one flag for each level.
        z_channels: width of the features and of the code vectors.
        bits: number of bits of a position.
        sub_codes: ids per position; each has `bits / sub_codes` bits, the most significant first.
        norm_first: whether the decoder normalises the code vectors.
        norm_groups: groups of every group norm; must divide all widths.

    The coders work on pixels in [0, 1]; outside they are in [-1, 1], as everywhere.
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
        channel_multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        encoder_blocks: int | Sequence[int] = 2,
        decoder_blocks: int | Sequence[int] = 2,
        encoder_attention: bool | Sequence[bool] = True,
        decoder_attention: bool | Sequence[bool] = True,
        z_channels: int = 256,
        bits: int = 16,
        sub_codes: int = 1,
        norm_first: bool = True,
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        if not isinstance(bits, int) or bits < 1:
            raise ValueError(f"`bits` must be a positive integer, got {bits!r}.")
        if not isinstance(sub_codes, int) or sub_codes < 1 or bits % sub_codes or bits // sub_codes > 62:
            raise ValueError(f"`sub_codes` must cut the {bits} bits into equal ids of at most 62 bits, got {sub_codes!r}.")
        widths = {base_channels * m for m in (1, *channel_multipliers)} | ({z_channels} if norm_first else set())
        if any(width % norm_groups for width in widths):
            raise ValueError(f"`norm_groups` {norm_groups} must divide every width, got widths {sorted(widths)}.")
        shared: dict[str, Any] = {"norm_groups": norm_groups, "final_activation": False}
        self.encoder = ConvEncoder(
            in_channels,
            base_channels,
            channel_multipliers,
            encoder_blocks,
            z_channels,
            use_attention=encoder_attention,
            **shared,
        )
        self.decoder = ConvDecoder(
            in_channels,
            base_channels,
            channel_multipliers,
            decoder_blocks,
            z_channels,
            use_attention=decoder_attention,
            norm_first=norm_first,
            **shared,
        )
        self.quantizer = BinaryQuantizer(z_channels, bits)
        self._sub_codes = sub_codes
        self._downsample = 2 ** (len(channel_multipliers) - 1)

    @property
    def bits(self) -> int:
        """Bits of a position."""
        return self.quantizer.bits

    @property
    def sub_codes(self) -> int:
        return self._sub_codes

    @property
    def codebook_size(self) -> int:
        return 2 ** (self.bits // self.sub_codes)

    @property
    def latent_channels(self) -> int:
        return self.quantizer.dim

    @property
    def downsample(self) -> int:
        return self._downsample

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encoder output before quantisation, `[B, z_channels, h, w]`."""
        return self.encoder(((pixels + 1) / 2).to(self.encoder.conv_in.weight.dtype))

    @apply_forward_hook
    def encode(
        self,
        pixels: torch.Tensor,
        *,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        sample: bool = False,
        uniform: torch.Tensor | None = None,
    ) -> Codes:
        """Ids `[B, h*w]`, or `[B, h*w, sub_codes]` if there are several, of pixels `[B, 3, H, W]` in [-1, 1].

        Args:
            sample: draw every bit from its probability, as the authors do in training; otherwise the likelier value is taken.
            generator: of the draws, one, or one for each image.
            uniform: recorded noise in [0, 1) `[B, h*w, bits]` for the draws.
        """
        self.check_pixels(pixels)
        features = self.features(pixels)
        height, width = features.shape[-2:]
        probabilities = self.quantizer.probabilities(features.flatten(2).transpose(1, 2))
        if uniform is not None and (not sample or uniform.shape != probabilities.shape):
            raise ValueError(
                f"`uniform` is noise {list(probabilities.shape)} for `sample=True`, got {list(uniform.shape)} with `sample={sample}`."
            )
        if not sample:
            bits = self.quantizer.decide(probabilities)
        else:
            noise = uniform_noise(probabilities.shape, generator, probabilities.device) if uniform is None else uniform
            bits = self.quantizer.decide(probabilities, noise)
        return self.codes(bits, (1, height, width))

    def codes(self, bits: torch.Tensor, grid: tuple[int, int, int] | None = None) -> Codes:
        """Bits `[B, N, bits]` as ids."""
        ids = bits_to_ids(bits, self.sub_codes)
        return Codes(ids=ids.squeeze(-1) if self.sub_codes == 1 else ids, grid=grid)

    def to_bits(self, codes: Codes) -> torch.Tensor:
        """Ids as bits, int64 `[B, N, bits]`."""
        self._check_codes(codes)
        ids = codes.ids.unsqueeze(-1) if codes.ids.ndim == 2 else codes.ids
        return ids_to_bits(ids, self.bits // self.sub_codes)

    def embed(self, codes: Codes) -> torch.Tensor:
        """Code vectors float32 `[B, N, z_channels]`."""
        return self.quantizer.lookup(self.to_bits(codes))

    @apply_forward_hook
    def decode(self, codes: Codes, *, generator: torch.Generator | None = None) -> torch.Tensor:
        """Pixels `[B, 3, H, W]`, nominally in [-1, 1] but not clamped, of codes with a `(1, h, w)` grid."""
        return self.decode_vectors(self.embed(codes), codes.grid)

    def decode_vectors(self, vectors: torch.Tensor, grid: tuple[int, int, int] | None) -> torch.Tensor:
        """Pixels of code vectors `[B, N, z_channels]` laid out on `grid`."""
        if grid is None or grid[0] != 1:
            raise ValueError(f"`grid` must be (1, h, w) to decode an image, got {grid}.")
        features = vectors.to(self.decoder.conv_in.weight.dtype).transpose(1, 2).unflatten(2, grid[1:])
        return 2 * self.decoder(features) - 1

    def forward(
        self, pixels: torch.Tensor, uniform: torch.Tensor | float = 0.5
    ) -> tuple[torch.Tensor, BinaryQuantized]:
        """Reconstruction and quantisation of `pixels`, for training; `uniform` as for `BinaryQuantizer`."""
        features = self.features(pixels)
        quantized = self.quantizer(features.flatten(2).transpose(1, 2), uniform)
        return self.decode_vectors(quantized.vectors, (1, features.shape[-2], features.shape[-1])), quantized

    def _check_codes(self, codes: Codes) -> None:
        expected = "[B, N]" if self.sub_codes == 1 else f"[B, N, {self.sub_codes}]"
        shape = None if codes.ids is None else codes.ids.shape
        if shape is None or (len(shape) != 2 if self.sub_codes == 1 else shape[2:] != (self.sub_codes,)):
            raise ValueError(f"`codes` must hold discrete `ids` of shape {expected}, got {None if shape is None else list(shape)}.")
        self.check_id_values(codes.ids)
