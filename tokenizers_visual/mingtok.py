"""`MingTokTokenizer`: continuous latents to draw and semantic tokens to read (MingTok, Huang et al., arXiv 2510.06590)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from armm.nn.cache import KVCache
from armm.nn.norms import LayerNorm
from armm.nn.positions import resize_positions

from .base import VisualTokenizer
from .codes import Codes
from .vit import ViT

__all__ = ["ConfigMixin", "MingTokTokenizer", "ModelMixin"]

# Cells beyond the asked grid by which the positions of another image size are sampled, as in DINO.
POSITION_OFFSET = 0.1


class MingTokTokenizer(VisualTokenizer):
    """Images <-> one narrow latent for each patch, and wide semantic tokens of them in between.

    Three stages: an encoder (pixels -> latents), a causal semantic decoder (latents -> semantic tokens) and a pixel decoder. A language
    model predicts latents and reads semantic tokens. Because the second stage is causal, a drawn latent can be read at once:
    `read(latent, cache)` with a cache that the call owns gives token by token what `read` of all latents gives.

    Args:
        image_size: side in pixels of the images that the encoder's positions were learned for; others are interpolated.
        patch_size: pixels of a latent, along each side.
        latent_channels: width of a latent.
        encoder_dim, encoder_layers, encoder_heads, encoder_mlp, encoder_mlp_hidden: of the encoder.
        semantic_dim, semantic_layers, semantic_heads, semantic_mlp, semantic_mlp_hidden: of the semantic decoder.
        pixel_dim, pixel_layers, pixel_heads, pixel_mlp, pixel_mlp_hidden: of the pixel decoder.
        pixel_patch_size: of the patches that the pixel decoder paints; divides `patch_size`.
        scaling_factor, shift: latents in codes are the encoder's, less `shift`, divided by `scaling_factor`.
        in_channels: channels of the pixels.

    `mlp` is a kind of `armm.nn.mlp`. Pixels are decoded in float32 whatever the dtype of the rest.
    """

    _supports_gradient_checkpointing = False
    _keep_in_fp32_modules = ["to_pixel_tokens", "pixel_decoder", "pixel_norm", "pixel_projection"]
    _skip_layerwise_casting_patterns = ["norm", "patch_embedding", "position"]
    _no_split_modules = ["Block"]

    @register_to_config
    def __init__(
        self,
        image_size: int = 512,
        patch_size: int = 32,
        latent_channels: int = 32,
        encoder_dim: int = 768,
        encoder_layers: int = 12,
        encoder_heads: int = 12,
        encoder_mlp: str = "swiglu",
        encoder_mlp_hidden: int = 2048,
        semantic_dim: int = 1024,
        semantic_layers: int = 24,
        semantic_heads: int = 16,
        semantic_mlp: str = "swiglu",
        semantic_mlp_hidden: int = 2736,
        pixel_dim: int = 1024,
        pixel_layers: int = 24,
        pixel_heads: int = 16,
        pixel_mlp: str = "gelu",
        pixel_mlp_hidden: int = 4096,
        pixel_patch_size: int = 16,
        scaling_factor: float = 8.09449291,
        shift: float = 1.46817409,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if image_size < patch_size or image_size % patch_size or pixel_patch_size < 1 or patch_size % pixel_patch_size:
            raise ValueError(
                f"`pixel_patch_size` must divide `patch_size` and that `image_size`, got {pixel_patch_size}, {patch_size}, {image_size}."
            )
        for name, dim in (("encoder_dim", encoder_dim), ("semantic_dim", semantic_dim)):
            if dim % latent_channels:
                raise ValueError(f"`{name}` must be a multiple of `latent_channels` {latent_channels}, got {dim}.")
        if not scaling_factor > 0:
            raise ValueError(f"`scaling_factor` must be a positive number, got {scaling_factor!r}.")
        self._side = image_size // patch_size
        self._cells = patch_size // pixel_patch_size
        self.patch_embedding = nn.Conv2d(in_channels, encoder_dim, patch_size, stride=patch_size)
        # Row by row, then the class token, which comes last so that the causal stage behind does not miss it.
        self.position_embedding = nn.Parameter(torch.randn(self._side**2 + 1, encoder_dim) * 0.02)
        self.class_token = nn.Parameter(torch.randn(encoder_dim) * 0.02)
        self.encoder = ViT(encoder_dim, encoder_layers, encoder_heads, mlp=encoder_mlp, mlp_hidden=encoder_mlp_hidden)
        self.latent_norm = LayerNorm(encoder_dim)
        self.latent_projection = nn.Linear(encoder_dim, latent_channels)
        self.semantic_projection = nn.Linear(latent_channels, semantic_dim)
        self.semantic_decoder = ViT(
            semantic_dim, semantic_layers, semantic_heads, mlp=semantic_mlp, mlp_hidden=semantic_mlp_hidden
        )
        self.semantic_norm = LayerNorm(semantic_dim)
        self.to_pixel_tokens = nn.Linear(semantic_dim, pixel_dim * self._cells**2)
        self.pixel_decoder = ViT(pixel_dim, pixel_layers, pixel_heads, mlp=pixel_mlp, mlp_hidden=pixel_mlp_hidden)
        self.pixel_norm = LayerNorm(pixel_dim)
        self.pixel_projection = nn.Linear(pixel_dim, in_channels * pixel_patch_size**2)

    @property
    def codebook_size(self) -> int:
        return 0

    @property
    def latent_channels(self) -> int:
        return self.config.latent_channels

    @property
    def downsample(self) -> int:
        return self.config.patch_size

    @property
    def feature_dim(self) -> int:
        """Width of a semantic token, what a language model reads."""
        return self.config.semantic_dim

    # ------------------------------------------------------------------ pixels -> latents

    def latents(self, pixels: torch.Tensor) -> torch.Tensor:
        """Unscaled latents `[B, h * w + 1, C]` of pixels `[B, 3, H, W]`: the patches row by row, then the class token's."""
        patches = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype))
        height, width = patches.shape[-2:]
        places = self.position_embedding[:-1].unflatten(0, (self._side, self._side))
        places = resize_positions(places, height, width, offset=POSITION_OFFSET)
        tokens = patches.flatten(2).transpose(1, 2) + places
        last = (self.class_token + self.position_embedding[-1]).expand(len(tokens), 1, -1)
        hidden = self.encoder(torch.cat([tokens, last], dim=1))
        groups = hidden.unflatten(-1, (self.latent_channels, -1)).mean(-1)
        return groups + self.latent_projection(F.gelu(self.latent_norm(hidden)))

    def scale(self, latents: torch.Tensor) -> torch.Tensor:
        """Unscaled latents as those of codes, which have about unit variance."""
        return (latents - self.config.shift) / self.config.scaling_factor

    def unscale(self, latents: torch.Tensor) -> torch.Tensor:
        """Undoes `scale`."""
        return latents * self.config.scaling_factor + self.config.shift

    @apply_forward_hook
    def encode(self, pixels: torch.Tensor, *, generator: torch.Generator | None = None) -> Codes:
        """Scaled latents `[B, h * w, C]` of pixels `[B, 3, H, W]` in [-1, 1]; both sides are multiples of `downsample`."""
        self.check_pixels(pixels)
        step = self.downsample
        grid = (1, pixels.shape[-2] // step, pixels.shape[-1] // step)
        return Codes(latents=self.scale(self.latents(pixels)[:, :-1]), grid=grid)

    # ------------------------------------------------------------------ latents -> what a language model reads

    def allocate_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache for `read`, for `batch` images of up to `length` latents."""
        return self.semantic_decoder.allocate_cache(batch, length)

    @apply_forward_hook
    def read(self, latents: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """Semantic tokens `[B, n, feature_dim]` of scaled latents `[B, n, C]`, each of which sees those before it.

        Args:
            cache: from `allocate_cache`; the latents follow those it has seen.
        """
        if latents.ndim != 3 or latents.shape[2] != self.latent_channels:
            raise ValueError(f"`latents` must be [B, n, {self.latent_channels}], got {tuple(latents.shape)}.")
        return self._semantic(self.unscale(latents), cache)

    def _semantic(self, latents: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        latents = latents.to(self.semantic_projection.weight.dtype)
        copies = self.config.semantic_dim // self.latent_channels
        tokens = self.semantic_projection(latents) + latents.repeat_interleave(copies, dim=-1)
        return self.semantic_norm(self.semantic_decoder(tokens, causal=True, cache=cache))

    @apply_forward_hook
    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Semantic tokens `[B, h * w, feature_dim]` of pixels: what a language model reads of an image it is shown."""
        self.check_pixels(pixels)
        return self._semantic(self.latents(pixels)[:, :-1])

    def embed(self, codes: Codes) -> torch.Tensor:
        """Semantic tokens `[B, N, feature_dim]`: what the pixel decoder sees."""
        self.check_latents(codes)
        return self.read(codes.tensor)

    # ------------------------------------------------------------------ pixels of it

    @apply_forward_hook
    def decode(self, codes: Codes, *, generator: torch.Generator | None = None) -> torch.Tensor:
        """Pixels `[B, 3, H, W]`, nominally in [-1, 1] but not clamped, of codes with a `(1, h, w)` grid."""
        vectors = self.embed(codes)
        if codes.grid is None or codes.grid[0] != 1:
            raise ValueError(f"`grid` must be (1, h, w) to decode an image, got {codes.grid}.")
        return self.decode_features(vectors, codes.grid[1:])

    @apply_forward_hook
    def decode_features(self, features: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
        """Pixels of semantic tokens `[B, h * w, feature_dim]` of a grid `(h, w)`, in float32."""
        side = self.config.pixel_patch_size
        with torch.autocast(features.device.type, enabled=False):
            tokens = self.to_pixel_tokens(features.float()).unflatten(1, grid)
            tokens = tokens.unflatten(-1, (self._cells, self._cells, -1)).transpose(2, 3)  # rows and columns of a cell
            height, width = grid[0] * self._cells, grid[1] * self._cells
            hidden = self.pixel_decoder(tokens.flatten(1, 4))
            patches = self.pixel_projection(self.pixel_norm(hidden))
            patches = patches.unflatten(2, (side, side, -1)).unflatten(1, (height, width))
            return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Reconstruction and scaled latents of `pixels`, for training."""
        codes = self.encode(pixels)
        return self.decode(codes), codes.tensor

    def fuse_projections(self) -> None:
        """Prepare the semantic decoder, which runs once for each drawn latent, for fast inference."""
        self.semantic_decoder.fuse_projections()

    def unfuse_projections(self) -> None:
        self.semantic_decoder.unfuse_projections()
