"""`LARPTokenizer`: videos as a sequence of holistic codes (LARP, Wang et al., arXiv 2410.21264)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from armm.nn.norms import LayerNorm
from armm.nn.sincos import sincos_table, video_sincos_table

from .base import VisualTokenizer
from .codes import Codes
from .quantizers import Generators, Quantized, VectorQuantizer
from .vit import ViT

__all__ = ["ConfigMixin", "LARPTokenizer", "ModelMixin"]

Tables = dict[tuple[str, torch.device, torch.dtype], torch.Tensor]


class LARPTokenizer(VisualTokenizer):
    """Videos of one size <-> `num_tokens` ids each.

    Learned queries read the patches of the whole video in one transformer; what they found is quantised on the unit sphere. A
    second transformer fills queries at all places from the codes. So a code belongs to no place: `encode` gives codes with
    `grid=None`, and `decode` reads codes in their order whatever grid they carry (a model that lays the sequence out as
    frames, rows and columns keeps its own grid).

    Args:
        num_frames, sample_size: frames, and pixels of both sides, of every video.
        num_tokens: codes of a video.
        codebook_size, codebook_dim: see `VectorQuantizer`.
        temporal_patch_size, patch_size: frames and pixels of the patches that the encoder reads.
        decoder_temporal_patch_size, decoder_patch_size: of the patches that the decoder paints; None: as the encoder's.
        encoder_dim, encoder_layers, encoder_heads, encoder_mlp_hidden: of the encoder's transformer; an inner width of None
            is four times the width.
        decoder_dim, decoder_layers, decoder_heads, decoder_mlp_hidden: of the decoder's.
        norm_eps: of the norms inside the blocks. The published weights were trained with 1e-5.
        sampling_temperature: of the draw that `encode(..., sample=True)` makes, as in training.
        in_channels: channels of the pixels.

    Positions are fixed sine-cosine tables, computed when first needed and never stored.
    """

    _supports_gradient_checkpointing = False
    _keep_in_fp32_modules = ["quantizer"]
    _skip_layerwise_casting_patterns = ["quantizer", "norm", "patch_embedding"]
    _no_split_modules = ["Block"]

    @register_to_config
    def __init__(
        self,
        num_frames: int = 16,
        sample_size: int = 128,
        num_tokens: int = 1024,
        codebook_size: int = 8192,
        codebook_dim: int = 16,
        temporal_patch_size: int = 4,
        patch_size: int = 8,
        decoder_temporal_patch_size: int | None = None,
        decoder_patch_size: int | None = None,
        encoder_dim: int = 768,
        encoder_layers: int = 12,
        encoder_heads: int = 12,
        encoder_mlp_hidden: int | None = None,
        decoder_dim: int = 768,
        decoder_layers: int = 12,
        decoder_heads: int = 12,
        decoder_mlp_hidden: int | None = None,
        norm_eps: float = 1e-5,
        sampling_temperature: float = 0.03,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        patch = (temporal_patch_size, patch_size, patch_size)
        self._painted_patch = (
            temporal_patch_size if decoder_temporal_patch_size is None else decoder_temporal_patch_size,
            *(2 * (patch_size if decoder_patch_size is None else decoder_patch_size,)),
        )
        for coder, size in (("encoder", patch), ("decoder", self._painted_patch)):
            if min(size) < 1 or num_frames % size[0] or sample_size % size[1] or min(num_frames, sample_size) < 1:
                raise ValueError(
                    f"the {coder}'s patches of {size[0]} frames and {size[1]} pixels cannot tile {num_frames} frames "
                    f"(`num_frames`) of {sample_size} pixels (`sample_size`)."
                )
        for name, dim in (("encoder_dim", encoder_dim), ("decoder_dim", decoder_dim)):
            if dim % 4:
                raise ValueError(f"`{name}` must be a multiple of 4 for the position tables, got {dim}.")
        if min(num_tokens, codebook_size, codebook_dim) < 1:
            raise ValueError(
                f"`num_tokens`, `codebook_size` and `codebook_dim` must be positive, got {num_tokens}, {codebook_size} and "
                f"{codebook_dim}."
            )
        if not sampling_temperature > 0:
            raise ValueError(f"`sampling_temperature` must be positive, got {sampling_temperature}.")
        self._read_grid = _cells(num_frames, sample_size, patch)
        self._painted_grid = _cells(num_frames, sample_size, self._painted_patch)

        self.patch_embedding = nn.Conv3d(in_channels, encoder_dim, patch, stride=patch)
        self.encoder_queries = nn.Parameter(torch.randn(num_tokens, encoder_dim) * 0.02)
        self.encoder = ViT(
            encoder_dim,
            encoder_layers,
            encoder_heads,
            mlp_hidden=encoder_mlp_hidden,
            norm_eps=norm_eps,
            qkv_bias=False,
        )
        self.quant_proj = nn.Linear(encoder_dim, codebook_dim)
        self.quantizer = VectorQuantizer(codebook_size, codebook_dim, l2_normalize=True)
        self.post_quant_proj = nn.Linear(codebook_dim, decoder_dim)
        self.decoder_query_type = nn.Parameter(torch.randn(decoder_dim) * 0.02)
        self.decoder = ViT(
            decoder_dim,
            decoder_layers,
            decoder_heads,
            mlp_hidden=decoder_mlp_hidden,
            norm_eps=norm_eps,
            qkv_bias=False,
        )
        self.norm_out = LayerNorm(decoder_dim, eps=1e-6)
        self.proj_out = nn.Linear(decoder_dim, in_channels * self._painted_patch[0] * self._painted_patch[1] ** 2)
        self._tables: Tables = {}

    @property
    def codebook_size(self) -> int:
        return self.quantizer.codebook_size

    @property
    def latent_channels(self) -> int:
        return self.quantizer.dim

    @property
    def downsample(self) -> int:
        """Pixels of a patch along each side; the codes themselves have no place."""
        return self.config.patch_size

    @property
    def is_video(self) -> bool:
        return True

    @property
    def required_size(self) -> tuple[int, int]:
        return (self.config.sample_size, self.config.sample_size)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """What the queries found in `pixels`, before normalisation: `[B, num_tokens, codebook_dim]`."""
        pixels = ((pixels + 1) / 2).to(self.patch_embedding.weight.dtype)  # the family's range is [0, 1]
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        patches = patches + self._table("read", patches, lambda dim: video_sincos_table(self._read_grid, dim))
        queries = self.encoder_queries.to(patches.dtype).expand(len(patches), -1, -1)
        hidden = self.encoder(torch.cat([patches, queries], dim=1))
        return self.quant_proj(hidden[:, patches.shape[1] :])

    @apply_forward_hook
    def encode(self, pixels: torch.Tensor, *, generator: Generators = None, sample: bool = False) -> Codes:
        """Ids `[B, num_tokens]`, with `grid=None`, of videos `[B, 3, T, H, W]` in [-1, 1].

        Args:
            generator: randomness of `sample`; a list has one generator for each video, which then does not depend on the rest
                of the batch.
            sample: draw the ids from softmax(cosine / `sampling_temperature`), as in training, instead of taking the
                nearest codes.
        """
        self.check_pixels(pixels)
        vectors = self.quantizer.normalize(self.features(pixels))
        return Codes(ids=self._choose(vectors, generator, sample))

    def embed(self, codes: Codes) -> torch.Tensor:
        """Code vectors float32 `[B, num_tokens, codebook_dim]` of unit length."""
        self.check_ids(codes)
        return self.quantizer.lookup(codes.ids)

    @apply_forward_hook
    def decode(self, codes: Codes, *, generator: torch.Generator | None = None) -> torch.Tensor:
        """Videos `[B, 3, T, H, W]`, nominally in [-1, 1] but not clamped, of `num_tokens` ids each, in any grid or none."""
        return self.decode_vectors(self.embed(codes))

    def decode_vectors(self, vectors: torch.Tensor) -> torch.Tensor:
        """Videos of code vectors `[B, num_tokens, codebook_dim]`."""
        expected = (self.config.num_tokens, self.latent_channels)
        if vectors.ndim != 3 or vectors.shape[1:] != expected:
            raise ValueError(
                f"a video is exactly {expected[0]} codes of width {expected[1]} here, got {tuple(vectors.shape[1:])} for each."
            )
        latents = self.post_quant_proj(vectors.to(self.post_quant_proj.weight.dtype))
        latents = latents + self._table(
            "order", latents, lambda dim: sincos_table(torch.arange(expected[0], device="cpu"), dim)
        )
        queries = self._table("painted", latents, lambda dim: video_sincos_table(self._painted_grid, dim))
        queries = (queries + self.decoder_query_type.to(latents.dtype)).expand(len(latents), -1, -1)
        hidden = self.decoder(torch.cat([latents, queries], dim=1))[:, expected[0] :]
        patches = self.proj_out(self.norm_out(hidden))
        patches = patches.unflatten(2, (*self._painted_patch, -1)).unflatten(1, self._painted_grid)
        pixels = patches.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return pixels * 2 - 1

    def forward(
        self, pixels: torch.Tensor, *, generator: Generators = None, sample: bool = False
    ) -> tuple[torch.Tensor, Quantized]:
        """Reconstruction and quantisation of `pixels`, for training; `generator` and `sample` as in `encode`."""
        features = self.features(pixels)
        ids = self._choose(self.quantizer.normalize(features.detach()), generator, sample)
        quantized = self.quantizer(features, ids)
        return self.decode_vectors(quantized.vectors), quantized

    def check_pixels(self, pixels: torch.Tensor) -> None:
        """Raises ValueError unless `pixels` is a batch of videos of this tokenizer's size, in [-1, 1]."""
        frames, size, channels = self.config.num_frames, self.config.sample_size, self.config.in_channels
        wanted = f"[B, {channels}, {frames}, {size}, {size}]"
        if pixels.ndim != 5 or pixels.shape[1] != channels or not pixels.is_floating_point() or not len(pixels):
            raise ValueError(
                f"`pixels` must be a floating point tensor {wanted} in [-1, 1], got {pixels.dtype} of shape "
                f"{tuple(pixels.shape)}."
            )
        if pixels.shape[2] != frames:
            raise ValueError(
                f"`pixels` must have {frames} frames, got {pixels.shape[2]}: cut the video, or sample frames from it."
            )
        if tuple(pixels.shape[3:]) != (size, size):
            raise ValueError(
                f"`pixels` must have frames of {size}x{size}, got {pixels.shape[3]}x{pixels.shape[4]}: resize or crop the video "
                "first."
            )
        low, high = (float(value) for value in pixels.aminmax())
        if not (low >= -1.001 and high <= 1.001):  # also catches NaN
            raise ValueError(
                f"`pixels` must lie in [-1, 1], got values from {low:g} to {high:g}: rescale or clamp them."
            )

    def check_ids(self, codes: Codes) -> None:
        """Raises ValueError unless `codes` hold all ids of a video."""
        super().check_ids(codes)
        if codes.num_tokens != self.config.num_tokens:
            raise ValueError(
                f"`codes` must have {self.config.num_tokens} ids for each video, got {codes.num_tokens}: every code is about the whole "
                "video, so a part cannot be decoded."
            )

    def _choose(self, vectors: torch.Tensor, generator: Generators, sample: bool) -> torch.Tensor:
        if sample:
            return self.quantizer.draw(vectors, self.config.sampling_temperature, generator)
        return self.quantizer.nearest(vectors, self.quantizer.codebook())

    def _table(self, name: str, like: torch.Tensor, build: Callable[[int], torch.Tensor]) -> torch.Tensor:
        """A position table on the device, in the dtype and of the width of `like`; kept for the next call."""
        key = (name, like.device, like.dtype)
        if key not in self._tables:
            with torch.inference_mode(False):
                self._tables[key] = build(like.shape[-1]).to(like.device, like.dtype)
        return self._tables[key]


def _cells(num_frames: int, sample_size: int, patch: tuple[int, int, int]) -> tuple[int, int, int]:
    return num_frames // patch[0], sample_size // patch[1], sample_size // patch[2]
