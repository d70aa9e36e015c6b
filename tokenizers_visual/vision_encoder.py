"""`VisionEncoder`: a vision transformer of timm as the eye of a model that reads images (SigLIP, arXiv 2303.15343)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

__all__ = ["ConfigMixin", "ModelMixin", "VisionEncoder"]


class VisionEncoder(ModelMixin, ConfigMixin):
    """Pixels -> one feature for each patch: pre-norm blocks, learned positions, a final norm.

    Args:
        image_size: side of the square images in pixels.
        patch_size: side of a patch.
        dim, num_layers, num_heads: sizes of the transformer.
        mlp_hidden: inner width of the feed-forward networks; None is 4 * dim.
        norm_eps: of all norms.
        image_mean, image_std: of the channels; pixels in [0, 1] are normalised by them.
        min_size: shortest side that preparing an image may give it, in pixels.
        class_token: whether a learned token with a position of its own stands before the patches and has a feature too.
        final_norm: whether features are normalised behind the last block.
    """

    _supports_gradient_checkpointing = False
    _no_split_modules = ["Block"]
    _skip_layerwise_casting_patterns = ["norm", "pos_embed"]

    @register_to_config
    def __init__(
        self,
        image_size: int = 384,
        patch_size: int = 16,
        dim: int = 1024,
        num_layers: int = 24,
        num_heads: int = 16,
        mlp_hidden: int | None = None,
        norm_eps: float = 1e-6,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        min_size: int = 14,
        class_token: bool = False,
        final_norm: bool = True,
    ) -> None:
        super().__init__()
        from timm.models.vision_transformer import VisionTransformer

        if image_size < patch_size or dim % num_heads:
            raise ValueError(
                f"`image_size` must be at least one patch and `num_heads` divide `dim`, got image_size={image_size}, "
                f"patch_size={patch_size}, dim={dim}, num_heads={num_heads}."
            )
        self.vit = VisionTransformer(
            img_size=image_size,
            patch_size=patch_size,
            embed_dim=dim,
            depth=num_layers,
            num_heads=num_heads,
            # timm truncates dim * mlp_ratio: aim at the middle of the interval that gives the width
            mlp_ratio=((4 * dim if mlp_hidden is None else mlp_hidden) + 0.5) / dim,
            class_token=class_token,
            final_norm=final_norm,
            global_pool="",
            num_classes=0,
            norm_layer=partial(nn.LayerNorm, eps=norm_eps),
        )

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return self.config.image_size

    @property
    def grid(self) -> tuple[int, int]:
        """(height, width) of an image in patches."""
        return self.vit.patch_embed.grid_size

    @property
    def num_tokens(self) -> int:
        """Features of an image, that of the class token among them."""
        return self.grid[0] * self.grid[1] + int(self.config.class_token)

    @apply_forward_hook
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised pixels [B, 3, S, S] -> features [B, N, dim] of the class token, where there is one, and the patches in raster
        order."""
        size = self.image_size
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != (3, size, size):
            raise ValueError(f"`pixels` must be [B, 3, {size}, {size}], got {tuple(pixels.shape)}.")
        return self.vit.forward_features(pixels.to(self.vit.pos_embed.dtype))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.encode(pixels)
