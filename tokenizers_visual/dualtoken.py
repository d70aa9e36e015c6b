"""`DualTokenTokenizer`: semantic and pixel codes of one vision transformer (DualToken, Song et al., arXiv 2503.14324)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from .attention_projection import AttentionProjection
from .autoencoder import ConvDecoder, ResidualBlock
from .base import VisualTokenizer
from .codes import Codes
from .quantizers import Quantized, ResidualQuantizer
from .text_encoder import TextEncoder
from .vision_encoder import VisionEncoder

__all__ = ["ConfigMixin", "DualTokenTokenizer", "ModelMixin"]


class DualFeatures(NamedTuple):
    """`semantic` and `pixel` `[B, N, codebook_dim]` as the quantizers see them; `hidden` `[B, N, dim]` is what the semantic features
    were made of."""

    semantic: torch.Tensor
    pixel: torch.Tensor
    hidden: torch.Tensor


class DualTokenTokenizer(VisualTokenizer):
    """Images of one size <-> `semantic_depth + pixel_depth` ids for each patch, in this order.

    A shallow layer of a SigLIP tower gives pixel features, a deep one semantic features; both are quantised residually. Pixels are
    decoded from the pixel codes alone. The semantic codes take the place of the tower's hidden state: `semantic_tokens` is what its
    last layers, or a language model, understand.

    Args:
        image_size, patch_size, dim, num_layers, num_heads, mlp_hidden: of the vision transformer.
        semantic_layer, pixel_layer: after so many layers features are taken.
        shortcut_layer: features after this layer are added to the pixel features, None: none are; shortcut_weight: their factor.
        semantic_codebook_size, pixel_codebook_size, codebook_dim: of the codebooks.
        semantic_depth, pixel_depth: codes of a patch.
        shared_codebook: whether the depths of a residual quantizer have one codebook.
        base_channels, channel_multipliers, num_res_blocks, decoder_attention, norm_groups: of the decoder, as of `ConvDecoder`; it has
            one residual block more in each level.
        decoder_channels: width of the decoder's input.
        decoder_grid: (height, width) that the patches are resized to before the decoder.
        text: None, or the arguments of a `TextEncoder` for zero-shot classification.
        in_channels: channels of the pixels.
    """

    _supports_gradient_checkpointing = False
    _keep_in_fp32_modules = ["semantic_quantizer", "pixel_quantizer"]
    _skip_layerwise_casting_patterns = ["quantizer", "norm", "pos_embed", "position_embedding"]
    _no_split_modules = ["Block", "ResidualBlock", "AttentionProjection"]

    @register_to_config
    def __init__(
        self,
        image_size: int = 384,
        patch_size: int = 14,
        dim: int = 1152,
        num_layers: int = 27,
        num_heads: int = 16,
        mlp_hidden: int = 4304,
        semantic_layer: int = 26,
        pixel_layer: int = 6,
        shortcut_layer: int | None = 4,
        shortcut_weight: float = 0.6,
        semantic_codebook_size: int = 16384,
        pixel_codebook_size: int = 16384,
        codebook_dim: int = 32,
        semantic_depth: int = 8,
        pixel_depth: int = 8,
        shared_codebook: bool = True,
        base_channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 1, 4, 4, 8),
        num_res_blocks: int = 2,
        decoder_attention: bool | Sequence[bool] = True,
        norm_groups: int = 32,
        decoder_channels: int = 1024,
        decoder_grid: Sequence[int] = (24, 24),
        text: dict[str, Any] | None = None,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        first = pixel_layer if shortcut_layer is None else shortcut_layer
        if not 0 < first <= pixel_layer <= semantic_layer <= num_layers:
            raise ValueError(
                "`shortcut_layer`, `pixel_layer`, `semantic_layer` and `num_layers` must be positive and in this order, got "
                f"{shortcut_layer}, {pixel_layer}, {semantic_layer} and {num_layers}."
            )
        if in_channels != 3 or dim % codebook_dim:
            raise ValueError(
                f"`in_channels` must be 3 and `codebook_dim` divide `dim`, got in_channels={in_channels}, dim={dim}, "
                f"codebook_dim={codebook_dim}."
            )
        self.vision = VisionEncoder(
            image_size, patch_size, dim, num_layers, num_heads, mlp_hidden, activation="gelu_tanh", pooling=True
        )
        heads = dim // codebook_dim

        def before() -> AttentionProjection:
            return AttentionProjection(dim, codebook_dim, heads, causal=False)

        def behind() -> AttentionProjection:
            return AttentionProjection(codebook_dim, dim, heads, causal=True)

        self.semantic_in, self.pixel_in = before(), before()
        self.shortcut_in = None if shortcut_layer is None else before()
        self.semantic_quantizer = ResidualQuantizer(
            semantic_codebook_size, codebook_dim, semantic_depth, shared_codebook
        )
        self.pixel_quantizer = ResidualQuantizer(pixel_codebook_size, codebook_dim, pixel_depth, shared_codebook)
        self.semantic_out, self.pixel_out = behind(), behind()
        self.decoder_in = ResidualBlock(dim, decoder_channels, norm_groups, first_kernel=1)
        self.decoder = ConvDecoder(
            in_channels,
            base_channels,
            channel_multipliers,
            num_res_blocks + 1,
            decoder_channels,
            use_attention=decoder_attention,
            norm_groups=norm_groups,
        )
        self.text_tower = None if text is None else TextEncoder(**text)
        if text is not None:
            self.logit_scale = nn.Parameter(torch.zeros(()))
            self.logit_bias = nn.Parameter(torch.zeros(()))

    @property
    def codebook_size(self) -> int:
        """Of the larger codebook; `codebook_sizes` has that of each id of a patch."""
        return max(self.codebook_sizes)

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """How many values each id of a patch has."""
        semantic, pixel = self.semantic_quantizer, self.pixel_quantizer
        return (semantic.codebook_size,) * semantic.depth + (pixel.codebook_size,) * pixel.depth

    @property
    def sub_codes(self) -> int:
        return len(self.codebook_sizes)

    @property
    def bits_per_token(self) -> float:
        return sum(math.log2(size) for size in self.codebook_sizes)

    @property
    def required_size(self) -> tuple[int, int]:
        return (self.config.image_size, self.config.image_size)

    @property
    def latent_channels(self) -> int:
        return 2 * self.config.codebook_dim

    @property
    def downsample(self) -> int:
        return self.config.patch_size

    # Reading.

    def features(self, pixels: torch.Tensor) -> DualFeatures:
        """What is quantised of pixels `[B, 3, S, S]`."""
        config = self.config
        hidden, done, shortcut = self.vision.patches(pixels), 0, None
        if self.shortcut_in is not None:
            hidden, done = self.vision.blocks(hidden, 0, config.shortcut_layer), config.shortcut_layer
            shortcut = config.shortcut_weight * self.shortcut_in(hidden)
        hidden = self.vision.blocks(hidden, done, config.pixel_layer)
        pixel = self.pixel_in(hidden)
        hidden = self.vision.blocks(hidden, config.pixel_layer, config.semantic_layer)
        return DualFeatures(self.semantic_in(hidden), pixel if shortcut is None else pixel + shortcut, hidden)

    @apply_forward_hook
    def encode(self, pixels: torch.Tensor, *, generator: torch.Generator | None = None) -> Codes:
        """Ids `[B, h*w, semantic_depth + pixel_depth]` of pixels `[B, 3, S, S]` in [-1, 1]. Deterministic: `generator` is not used."""
        self.check_pixels(pixels)
        found = self.features(pixels)
        ids = torch.cat(
            [self.semantic_quantizer.encode(found.semantic), self.pixel_quantizer.encode(found.pixel)], dim=-1
        )
        return Codes(ids=ids, grid=(1, *self.vision.grid))

    # Codes.

    def split(self, codes: Codes) -> tuple[torch.Tensor, torch.Tensor]:
        """Semantic ids `[B, N, semantic_depth]` and pixel ids `[B, N, pixel_depth]`."""
        self.check_ids(codes)
        semantic, pixel = codes.ids.split([self.semantic_quantizer.depth, self.pixel_quantizer.depth], dim=-1)
        return semantic, pixel

    def depth_embeddings(self, codes: Codes) -> tuple[torch.Tensor, torch.Tensor]:
        """The code vectors of each depth, semantic and pixel, `[B, N, depth, codebook_dim]`: what a model predicts depth by depth."""
        semantic, pixel = self.split(codes)
        return self.semantic_quantizer.lookup(semantic), self.pixel_quantizer.lookup(pixel)

    def embed(self, codes: Codes) -> torch.Tensor:
        """Semantic and pixel vectors of a patch side by side, float32 `[B, N, 2 * codebook_dim]`; the decoder sees the second half."""
        semantic, pixel = self.depth_embeddings(codes)
        return torch.cat([semantic.sum(dim=-2), pixel.sum(dim=-2)], dim=-1)

    def semantic_tokens(self, codes: Codes) -> torch.Tensor:
        """What a language model reads: `[B, N, dim]`, in the place of the tower's hidden state. N must be in raster order."""
        vectors = self.embed(codes)[..., : self.config.codebook_dim]
        return self.semantic_out(vectors.to(self.semantic_out.proj.weight.dtype))

    @apply_forward_hook
    def decode(self, codes: Codes, *, generator: torch.Generator | None = None) -> torch.Tensor:
        """Pixels `[B, 3, H, W]`, nominally in [-1, 1] but not clamped; semantic codes do not matter."""
        if codes.grid is None:
            codes = replace(codes, grid=(1, *self.vision.grid)) if codes.num_tokens == self.vision.num_tokens else codes
        return self.decode_vectors(self.embed(codes)[..., self.config.codebook_dim :], codes.grid)

    def decode_vectors(self, vectors: torch.Tensor, grid: tuple[int, int, int] | None) -> torch.Tensor:
        """Pixels of pixel vectors `[B, N, codebook_dim]` laid out on `grid`."""
        if grid is None or grid[0] != 1:
            raise ValueError(f"`grid` must be (1, h, w) to decode an image, got {grid}.")
        x = self.pixel_out(vectors.to(self.pixel_out.proj.weight.dtype)).transpose(1, 2).unflatten(2, grid[1:])
        x = F.interpolate(x, size=tuple(self.config.decoder_grid), mode="bilinear", align_corners=False)
        return self.decoder(self.decoder_in(x))

    # Understanding.

    def rest_of_tower(self, tokens: torch.Tensor) -> torch.Tensor:
        """Semantic tokens `[B, N, dim]` through the layers behind `semantic_layer`: the last hidden state `[B, N, dim]`."""
        return self.vision.blocks(tokens, self.config.semantic_layer, self.config.num_layers)

    def pool(self, tokens: torch.Tensor) -> torch.Tensor:
        """Semantic tokens `[B, N, dim]` through the rest of the tower -> one feature of the image `[B, dim]`."""
        return self.vision.pool(self.vision.finish(self.rest_of_tower(tokens)))

    def image_features(self, codes: Codes) -> torch.Tensor:
        """Unit vectors `[B, dim]` of images, from their semantic codes."""
        return F.normalize(self.pool(self.semantic_tokens(codes)), dim=-1)

    def text_features(self, ids: torch.Tensor) -> torch.Tensor:
        """Unit vectors `[B, dim]` of texts, from ids `[B, T]` of SigLIP's word tokenizer, padded to its length."""
        if self.text_tower is None:
            raise ValueError(
                "this tokenizer was converted without its text tower: convert its file with config={'text': True}."
            )
        return F.normalize(self.text_tower(ids), dim=-1)

    def similarity(self, codes: Codes, ids: torch.Tensor) -> torch.Tensor:
        """Logits `[texts, images]` of a text and an image belonging together; the sigmoid is a probability."""
        texts = self.text_features(ids)
        return texts @ self.image_features(codes).transpose(0, 1) * self.logit_scale.exp() + self.logit_bias

    # Training.

    def quantize(self, pixels: torch.Tensor) -> tuple[Quantized, Quantized]:
        """Semantic and pixel quantisation of `pixels`, for training."""
        found = self.features(pixels)
        return self.semantic_quantizer(found.semantic), self.pixel_quantizer(found.pixel)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, Quantized]:
        """Reconstruction and quantisation of `pixels`, for training: vectors and ids side by side, losses added."""
        semantic, pixel = self.quantize(pixels)
        both = Quantized(
            torch.cat([semantic.vectors, pixel.vectors], dim=-1),
            torch.cat([semantic.ids, pixel.ids], dim=-1),
            semantic.codebook_loss + pixel.codebook_loss,
            semantic.commitment_loss + pixel.commitment_loss,
        )
        return self.decode_vectors(pixel.vectors, (1, *self.vision.grid)), both

    # Checks.

    def check_pixels(self, pixels: torch.Tensor) -> None:
        """Raises ValueError unless `pixels` is a batch of images of this tokenizer's size, about in [-1, 1]."""
        size = self.config.image_size
        if pixels.ndim != 4 or pixels.shape[1:] != (3, size, size) or not pixels.is_floating_point():
            raise ValueError(
                f"`pixels` must be a floating point tensor [B, 3, {size}, {size}] in [-1, 1], got {pixels.dtype} of shape "
                f"{tuple(pixels.shape)}: resize and crop the image first."
            )
        self.check_values(pixels)

    def check_ids(self, codes: Codes) -> None:
        """Raises ValueError unless `codes` hold the ids of all depths, each of its own codebook."""
        if codes.ids is None or codes.ids.ndim != 3 or codes.ids.shape[2] != self.sub_codes:
            found = "latents" if codes.ids is None else f"ids {tuple(codes.ids.shape)}"
            raise ValueError(f"`codes` must hold ids [B, N, {self.sub_codes}], semantic then pixel ids, got {found}.")
        if not codes.ids.numel():
            raise ValueError(
                f"`codes` are empty: an image has at least one code, got `ids` of shape {tuple(codes.ids.shape)}."
            )
        sizes = torch.tensor(self.codebook_sizes, device=codes.ids.device)
        if bool(((codes.ids < 0) | (codes.ids >= sizes)).any()):
            low, high = codes.ids.aminmax()
            raise ValueError(
                f"`codes.ids` must lie in [0, {self.semantic_quantizer.codebook_size - 1}] (semantic) and "
                f"[0, {self.pixel_quantizer.codebook_size - 1}] (pixel), got values from {low} to {high}: was the model trained with "
                "another tokenizer?"
            )
