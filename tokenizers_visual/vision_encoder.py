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
        activation: "gelu" (exact) or "gelu_tanh".
        pooling: an attention pooling head over the features, see `pool`.
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
        activation: str = "gelu",
        pooling: bool = False,
    ) -> None:
        super().__init__()
        from timm.models.vision_transformer import VisionTransformer

        if image_size < patch_size or dim % num_heads:
            raise ValueError(
                f"`image_size` must be at least one patch and `num_heads` divide `dim`, got image_size={image_size}, "
                f"patch_size={patch_size}, dim={dim}, num_heads={num_heads}."
            )
        if activation not in ("gelu", "gelu_tanh"):
            raise ValueError(f"`activation` must be 'gelu' or 'gelu_tanh', got {activation!r}.")
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
            global_pool="map" if pooling else "",
            num_classes=0,
            norm_layer=partial(nn.LayerNorm, eps=norm_eps),
            act_layer=partial(nn.GELU, approximate="tanh") if activation == "gelu_tanh" else nn.GELU,
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
        self.check_size(pixels)
        return self.vit.forward_features(pixels.to(self.vit.pos_embed.dtype))

    def check_size(self, pixels: torch.Tensor) -> None:
        """Raises ValueError unless `pixels` are of this encoder's size."""
        size = self.image_size
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != (3, size, size):
            raise ValueError(f"`pixels` must be [B, 3, {size}, {size}], got {tuple(pixels.shape)}.")

    # In parts: finish(blocks(patches(pixels), 0, num_layers)) is what `encode` does.

    def patches(self, pixels: torch.Tensor) -> torch.Tensor:
        """What the first block is given: [B, N, dim]."""
        self.check_size(pixels)
        return self.vit.norm_pre(self.vit._pos_embed(self.vit.patch_embed(pixels.to(self.vit.pos_embed.dtype))))

    def blocks(self, x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Through the blocks `start` .. `stop` - 1."""
        for block in self.vit.blocks[start:stop]:
            x = block(x)
        return x

    def finish(self, x: torch.Tensor) -> torch.Tensor:
        """The final norm."""
        return self.vit.norm(x)

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        """Features [B, N, dim] -> one of the whole image [B, dim]: what a learned query sees in them."""
        if self.vit.attn_pool is None:
            raise ValueError("this encoder was made without `pooling`.")
        return self.vit.attn_pool(x)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.encode(pixels)
