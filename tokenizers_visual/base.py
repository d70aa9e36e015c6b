"""The contract of every visual tokenizer."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from diffusers import ConfigMixin, ModelMixin

from armm.nn.int8_weights import Int8Weights

from .codes import Codes

# Pixels are in [-1, 1]; resizing overshoots, noise is larger, but what is beyond this is in another range.
PIXEL_LIMIT = 8.0


class VisualTokenizer(Int8Weights, ModelMixin, ConfigMixin):
    """Pixels <-> codes.

    Pixels are float `[B, 3, H, W]` in [-1, 1] (videos `[B, 3, T, H, W]`) whatever range a family used inside.
    """

    @abstractmethod
    def encode(self, pixels: torch.Tensor, *, generator: torch.Generator | None = None) -> Codes:
        """Codes of `pixels`; `generator` matters to tokenizers that sample."""

    @abstractmethod
    def decode(self, codes: Codes, *, generator: torch.Generator | None = None) -> torch.Tensor:
        """Pixels of `codes`, not clamped."""

    @abstractmethod
    def embed(self, codes: Codes) -> torch.Tensor:
        """The code vectors `[B, N, C]` that the decoder sees."""

    @property
    @abstractmethod
    def codebook_size(self) -> int:
        """Number of different ids; 0 for continuous tokenizers."""

    @property
    @abstractmethod
    def downsample(self) -> int:
        """Pixels per token along each side."""

    @property
    @abstractmethod
    def latent_channels(self) -> int:
        """Width of a code vector."""

    @property
    def sub_codes(self) -> int:
        """Ids per position."""
        return 1

    @property
    def is_discrete(self) -> bool:
        return self.codebook_size > 0

    @property
    def bits_per_token(self) -> float | None:
        """Bits that the ids of a position hold; None for continuous tokenizers."""
        return self.sub_codes * math.log2(self.codebook_size) if self.is_discrete else None

    @property
    def required_size(self) -> tuple[int, int] | None:
        """(height, width) of every image; None where all sides that are multiples of `downsample` will do."""
        return None

    @property
    def smallest_size(self) -> int:
        """The least side of an image, where sizes are free."""
        return self.downsample

    @property
    def is_video(self) -> bool:
        """Whether pixels are videos `[B, 3, T, H, W]`."""
        return False

    def check_pixels(self, pixels: torch.Tensor) -> None:
        """Raises ValueError unless `pixels` is float `[B, 3, H, W]`, about in [-1, 1], with sides that the tokenizer can tile."""
        channels = self.config.in_channels
        if pixels.ndim != 4 or pixels.shape[1] != channels or not pixels.is_floating_point():
            raise ValueError(
                f"`pixels` must be a floating point tensor [B, {channels}, H, W] in [-1, 1], got {pixels.dtype} of shape "
                f"{tuple(pixels.shape)}."
            )
        height, width = pixels.shape[-2:]
        if height % self.downsample or width % self.downsample or not height or not width:
            raise ValueError(
                f"`pixels` of {height}x{width} cannot be tiled: both sides must be multiples of {self.downsample}; resize or crop "
                "the image first."
            )
        self.check_values(pixels)

    @staticmethod
    def check_values(pixels: torch.Tensor) -> None:
        """Raises ValueError for a batch without pixels, and for values that are far from [-1, 1], or not numbers."""
        if not pixels.numel():
            raise ValueError(f"`pixels` must be at least one image, got shape {tuple(pixels.shape)}.")
        low, high = (float(value) for value in pixels.aminmax())
        if not (low >= -PIXEL_LIMIT and high <= PIXEL_LIMIT):  # also catches NaN
            raise ValueError(
                f"`pixels` must lie in [-1, 1], got values from {low:g} to {high:g}: rescale them, from 0 to 255 with pixels / 127.5 - 1."
            )

    def check_ids(self, codes: Codes) -> None:
        """Raises ValueError unless `codes` hold one id of this tokenizer's codebook for each position."""
        if codes.ids is None or codes.ids.ndim != 2:
            raise ValueError(
                "`codes` must hold discrete `ids` of shape [B, N]: this tokenizer has one id per position."
            )
        self.check_id_values(codes.ids)

    def check_id_values(self, ids: torch.Tensor) -> None:
        """Raises ValueError unless there are `ids` of any shape, and all are of this tokenizer's codebook."""
        if not ids.numel():
            raise ValueError(
                f"`codes` are empty: an image has at least one code, got `ids` of shape {tuple(ids.shape)}."
            )
        low, high = ids.aminmax()
        if low < 0 or high >= self.codebook_size:
            raise ValueError(
                f"`codes.ids` must lie in [0, {self.codebook_size - 1}], the codebook of this tokenizer, got values from {low} to "
                f"{high}: was the model trained with another tokenizer?"
            )

    def check_latents(self, codes: Codes) -> None:
        """Raises ValueError unless `codes` hold latents of this tokenizer's width."""
        if codes.latents is None or codes.latents.shape[2] != self.latent_channels:
            found = "discrete ids" if codes.latents is None else f"latents of width {codes.latents.shape[2]}"
            raise ValueError(
                f"`codes` must hold latents [B, N, {self.latent_channels}] of this tokenizer, got {found}: was the model trained "
                "with another tokenizer?"
            )
        if not codes.latents.numel():
            raise ValueError(
                f"`codes` are empty: an image has at least one latent, got `latents` of shape {tuple(codes.latents.shape)}."
            )
