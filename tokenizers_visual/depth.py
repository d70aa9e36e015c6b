"""`DepthVQTokenizer`: depth maps as a few ids (the AiT VQ-VAE, arXiv 2301.02229, as AURORA uses it, arXiv 2412.03548)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook

from .autoencoder import StridedDecoder, StridedEncoder
from .base import VisualTokenizer
from .codes import Codes
from .perception import PerceptionTokens
from .quantizers import Quantized, VectorQuantizer

__all__ = ["ConfigMixin", "DepthVQTokenizer", "ModelMixin"]


class DepthVQTokenizer(VisualTokenizer):
    """Maps of one channel <-> one id per `downsample` x `downsample` pixels, which a language model writes as words.

    `encode` and `decode` speak of pixels in [-1, 1]; `read_depth` and `draw_depth` of depth in [0, 1], where larger is closer.
    `words` is the vocabulary of the ids.

    Args:
        in_channels: channels of the maps.
        base_channels: width of the first level; every level doubles it.
        num_levels: halvings of the resolution.
        num_res_blocks: residual blocks at the lowest resolution of either coder.
        codebook_size, codebook_dim: see `VectorQuantizer`.
        image_size: side of the square maps that depth is resized to.
        first_word: id of the word that begins a depth map in the language model's vocabulary.
    """

    _supports_gradient_checkpointing = False
    _keep_in_fp32_modules = ["quantizer"]
    _skip_layerwise_casting_patterns = ["quantizer"]
    _no_split_modules = ["PlainResidualBlock"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 1,
        base_channels: int = 16,
        num_levels: int = 5,
        num_res_blocks: int = 2,
        codebook_size: int = 128,
        codebook_dim: int = 512,
        image_size: int = 320,
        first_word: int = 32000,
    ) -> None:
        super().__init__()
        if min(in_channels, base_channels, num_levels, codebook_size, codebook_dim) < 1 or num_res_blocks < 0:
            raise ValueError(
                "`in_channels`, `base_channels`, `num_levels` and the codebook's sizes must be positive, got "
                f"{in_channels}, {base_channels}, {num_levels}, {codebook_size} and {codebook_dim}."
            )
        if image_size < 1 or image_size % 2**num_levels:
            raise ValueError(f"`image_size` must be a multiple of {2**num_levels}, got {image_size}.")
        self.encoder = StridedEncoder(in_channels, base_channels, num_levels, num_res_blocks, codebook_dim)
        self.quantizer = VectorQuantizer(codebook_size, codebook_dim, l2_normalize=False)
        self.decoder = StridedDecoder(in_channels, base_channels, num_levels, num_res_blocks, codebook_dim)
        side = image_size // 2**num_levels
        self.words = PerceptionTokens(codebook_size, (side, side), first_word)

    @property
    def codebook_size(self) -> int:
        return self.quantizer.codebook_size

    @property
    def latent_channels(self) -> int:
        return self.quantizer.dim

    @property
    def downsample(self) -> int:
        return 2**self.config.num_levels

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encoder output before quantisation, `[B, codebook_dim, h, w]`."""
        return self.encoder(pixels.to(self.encoder.conv_out.weight.dtype))

    @apply_forward_hook
    def encode(self, pixels: torch.Tensor, *, generator: torch.Generator | None = None) -> Codes:
        """Ids `[B, h*w]` in raster order of maps `[B, 1, H, W]` in [-1, 1]. Deterministic: `generator` is not used."""
        self.check_pixels(pixels)
        features = self.features(pixels)
        height, width = features.shape[-2:]
        vectors = self.quantizer.normalize(features.flatten(2).transpose(1, 2))
        return Codes(ids=self.quantizer.nearest(vectors, self.quantizer.codebook()), grid=(1, height, width))

    def embed(self, codes: Codes) -> torch.Tensor:
        """Code vectors float32 `[B, N, codebook_dim]`."""
        self.check_ids(codes)
        return self.quantizer.lookup(codes.ids)

    @apply_forward_hook
    def decode(self, codes: Codes, *, generator: torch.Generator | None = None) -> torch.Tensor:
        """Maps `[B, 1, H, W]`, nominally in [-1, 1] but not clamped, of codes with a `(1, h, w)` grid."""
        return self.decode_vectors(self.embed(codes), codes.grid)

    def decode_vectors(self, vectors: torch.Tensor, grid: tuple[int, int, int] | None) -> torch.Tensor:
        """Maps of code vectors `[B, N, codebook_dim]` laid out on `grid`."""
        if grid is None or grid[0] != 1:
            raise ValueError(f"`grid` must be (1, h, w) to decode a map, got {grid}.")
        features = vectors.to(self.decoder.conv_in.weight.dtype).transpose(1, 2).unflatten(2, grid[1:])
        return self.decoder(features)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, Quantized]:
        """Reconstruction and quantisation of `pixels`, for training."""
        features = self.features(pixels)
        quantized = self.quantizer(features.flatten(2).transpose(1, 2))
        return self.decode_vectors(quantized.vectors, (1, *features.shape[-2:])), quantized

    # Depth.

    def read_depth(self, depth: torch.Tensor) -> Codes:
        """Ids of depth maps `[B, H, W]` of any size: uint8, or float in [0, 1], larger is closer (as Depth-Anything draws it).

        Maps become squares of `image_size` by nearest neighbours, as in AURORA's training data; their aspect is not kept.
        """
        if depth.ndim != 3 or not depth.numel():
            raise ValueError(f"`depth` must be maps [B, H, W], got shape {tuple(depth.shape)}.")
        if depth.dtype == torch.uint8:
            depth = depth / 255
        if not depth.is_floating_point() or not 0 <= float(depth.min()) <= float(depth.max()) <= 1:
            raise ValueError(
                f"`depth` must be uint8, or float in [0, 1], got {depth.dtype}: subtract the minimum and divide by the range first."
            )
        size = self.config.image_size
        pixels = F.interpolate(depth[:, None].to(self.device), size=(size, size), mode="nearest")
        return self.encode(2 * pixels.expand(-1, self.config.in_channels, -1, -1) - 1)

    def draw_depth(self, codes: Codes, height: int | None = None, width: int | None = None) -> torch.Tensor:
        """Depth maps float32 `[B, height, width]` in [0, 1], larger is closer; by default as large as the decoder makes them."""
        if codes.grid is None and codes.num_tokens == self.words.count:
            codes = Codes(ids=codes.ids, grid=(1, *self.words.grid))
        depth = (self.decode(codes).float().clamp(-1, 1).mean(dim=1, keepdim=True) + 1) / 2
        if height is not None or width is not None:
            size = (depth.shape[-2] if height is None else height, depth.shape[-1] if width is None else width)
            depth = F.interpolate(depth, size=size, mode="nearest")
        return depth[:, 0]
