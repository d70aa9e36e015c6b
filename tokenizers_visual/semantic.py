"""Tokenizers of meaning: what their codes say is enough for a language model, and pixels come back through a diffusion model only."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import ModelMixin

from .base import VisualTokenizer
from .codes import Codes

__all__ = ["CLIP_MEAN", "CLIP_STD", "ImageCondition", "ModelMixin", "SemanticTokenizer"]

# Mean and standard deviation of CLIP's training images, of pixels in [0, 1] (Radford et al., arXiv 2103.00020).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ImageCondition:
    """What a diffusion model paints an image from.

    Args:
        embeds: `[B, N, C]`, in the place of a text's features; None where the image is described as a whole only.
        pooled: `[B, C]`, of the whole image; None where the model takes none.
    """

    embeds: torch.Tensor | None = None
    pooled: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.embeds is None and self.pooled is None:
            raise ValueError("an image condition holds `embeds`, `pooled` or both: give at least one.")


class SemanticTokenizer(VisualTokenizer):
    """Base of tokenizers without a decoder to pixels: what codes become is an `ImageCondition` for a diffusion model.

    What a language model **predicts** is `codes.ids`; what it **reads** of an image is said by `reads`: "ids", in rows of its own
    embedding, or "features", which `reading_features` gives.
    """

    reads = "ids"

    def normalize_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels in [-1, 1] as the vision encoder wants them."""
        shape = (1, -1, 1, 1)
        mean, std = (pixels.new_tensor(values).view(shape) for values in self.pixel_statistics)
        return ((pixels + 1) / 2 - mean) / std

    @property
    def pixel_statistics(self) -> tuple[Sequence[float], Sequence[float]]:
        """Mean and standard deviation of the channels, of pixels in [0, 1]."""
        return self.config.image_mean, self.config.image_std

    @property
    def image_size(self) -> int:
        """Side of the images that can be read, in pixels."""
        return self.config.image_size

    @property
    def downsample(self) -> int:
        """Pixels of a patch along each side; codes have no place of their own."""
        return self.config.patch_size

    def check_pixels(self, pixels: torch.Tensor) -> None:
        """Raises ValueError unless `pixels` is a batch of images of this tokenizer's size, about in [-1, 1]."""
        size = self.image_size
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != (3, size, size) or not pixels.is_floating_point():
            raise ValueError(
                f"`pixels` must be a floating point tensor [B, 3, {size}, {size}] in [-1, 1], got {pixels.dtype} of shape "
                f"{tuple(pixels.shape)}: resize the images to {size}x{size} first (their proportions are not kept)."
            )
        self.check_values(pixels)

    def check_ids(self, codes: Codes) -> None:
        """Raises ValueError unless `codes` hold one id for each position, and at least one for each image."""
        super().check_ids(codes)
        if codes.mask is not None and not bool(codes.mask.any(1).all()):
            raise ValueError("`codes.mask` hides all codes of an image: an image has at least one code.")

    def decode(self, codes: Codes, *, generator: torch.Generator | None = None) -> torch.Tensor:
        raise ValueError(
            f"{type(self).__name__} has no decoder to pixels: its codes are the condition of a diffusion model. Give a pipeline such a "
            "model (`load_image_decoder`), or use the condition itself."
        )

    @abstractmethod
    def reading_features(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Features `[B, N, C]` of images, and their mask `[B, N]` where lengths vary: what a model that `reads` "features" is fed."""
