"""`LaVITTokenizer`: images as a varying number of semantic codes (LaVIT, Jin et al., arXiv 2309.04669)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from .codes import Codes
from .quantizers import Generators, Quantized, VectorQuantizer, exponential_noise
from .semantic import CLIP_MEAN, CLIP_STD, SemanticTokenizer
from .token_selection import TokenMerger, TokenSelector, gather_kept
from .vision_encoder import VisionEncoder

__all__ = ["ConfigMixin", "LaVITTokenizer", "ModelMixin", "SelectedCodes"]


class SelectedCodes(NamedTuple):
    """What `LaVITTokenizer.forward` makes of images, for training.

    `quantized`: `vectors` `[B, N, codebook_dim]` (zeros behind the codes of an image), `ids` `[B, N]` and the losses of the codes that
    are real. `mask`: bool `[B, N]`, which are. `vectors`: float32 `[M, codebook_dim]`, what became the M real codes.
    `keep`: float32 `[B, patches]`, 1 for kept patches and 0 for others, with gradients. `features`: `[B, patches, dim]` of the vision
    transformer, what a decoder is to restore.
    """

    quantized: Quantized
    mask: torch.Tensor
    vectors: torch.Tensor
    keep: torch.Tensor
    features: torch.Tensor


class LaVITTokenizer(SemanticTokenizer):
    """Images of one size -> ids of the patches that matter, in raster order and as many as the image needs.

    A selector keeps some of the patches, a merger moves what the others knew into them, and what is kept is quantised. A language model
    predicts the ids, and reads the features before quantisation (`reading_features`). What ids look like is painted by a diffusion
    model from the condition that a `LaVITDecoder` makes of `embed(codes)`.

    The authors' code draws what is kept anew at each call, so that an image has other codes each time. Here the likelier decisions are
    taken unless a call says `sample=True`, or brings the noise.

    Calling it trains: see `forward`, and `lavit_losses` for the whole objective.

    Args:
        image_size, patch_size: of the vision transformer, in pixels.
        dim, vision_layers, vision_heads, vision_mlp_hidden: its sizes. It has a class token, which is not coded, and no final norm.
        num_layers, num_heads, mlp_hidden: of the merger.
        codebook_size, codebook_dim: see `VectorQuantizer`; unit vectors are compared with the codes as they are.
        reading_dim: width of `reading_features`, that of the language model; None has none.
        separate_reading: whether images are read through a merger of their own (the published weights), or through that of the codes.
        image_mean, image_std: of the channels of pixels in [0, 1].
    """

    reads = "features"
    _supports_gradient_checkpointing = False
    _keep_in_fp32_modules = ["quantizer", "selector"]
    _skip_layerwise_casting_patterns = ["quantizer", "selector", "norm", "pos_embed"]
    _no_split_modules = ["Block"]

    @register_to_config
    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 14,
        dim: int = 1408,
        vision_layers: int = 40,
        vision_heads: int = 16,
        vision_mlp_hidden: int = 6144,
        num_layers: int = 12,
        num_heads: int = 16,
        mlp_hidden: int = 6144,
        codebook_size: int = 16384,
        codebook_dim: int = 32,
        reading_dim: int | None = None,
        separate_reading: bool = False,
        image_mean: Sequence[float] = CLIP_MEAN,
        image_std: Sequence[float] = CLIP_STD,
    ) -> None:
        super().__init__()
        if min(codebook_size, codebook_dim) < 1:
            raise ValueError(
                f"`codebook_size` and `codebook_dim` must be positive, got {codebook_size} and {codebook_dim}."
            )
        if dim < 4:
            raise ValueError(f"`dim` must be at least 4 for the selector, got {dim}.")
        if separate_reading and reading_dim is None:
            raise ValueError("`separate_reading` needs a `reading_dim`: without it images are not read as features.")
        self.vision = VisionEncoder(
            image_size=image_size,
            patch_size=patch_size,
            dim=dim,
            num_layers=vision_layers,
            num_heads=vision_heads,
            mlp_hidden=vision_mlp_hidden,
            class_token=True,
            final_norm=False,
        )
        self.selector = TokenSelector(dim)
        self.merger = TokenMerger(dim, num_layers, num_heads, mlp_hidden)
        self.quant_proj = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, codebook_dim))
        self.quantizer = VectorQuantizer(codebook_size, codebook_dim, l2_normalize=False)
        with torch.no_grad():
            self.quantizer.embedding.weight.copy_(F.normalize(torch.randn(codebook_size, codebook_dim), dim=-1))
        self.reading_merger = TokenMerger(dim, num_layers, num_heads, mlp_hidden) if separate_reading else None
        self.reading_proj = None if reading_dim is None else nn.Linear(dim, reading_dim)

    @property
    def codebook_size(self) -> int:
        return self.quantizer.codebook_size

    @property
    def latent_channels(self) -> int:
        return self.quantizer.dim

    @property
    def max_tokens(self) -> int:
        """Codes of an image at most."""
        return self.vision.num_tokens - 1

    def image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Features `[B, patches, dim]` of the vision transformer, without those of the class token."""
        self.check_pixels(pixels)
        return self.vision.encode(self.normalize_pixels(pixels))[:, 1:]

    def select(
        self,
        features: torch.Tensor,
        *,
        generator: Generators = None,
        sample: bool = False,
        noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Which patches are kept, bool `[B, patches]`, for `image_features`; arguments as of `encode`."""
        log_probs = self.selector(features)
        return self.selector.decide(log_probs, _gumbel_noise(log_probs, generator, sample, noise))

    @apply_forward_hook
    def encode(
        self,
        pixels: torch.Tensor,
        *,
        generator: Generators = None,
        sample: bool = False,
        noise: torch.Tensor | None = None,
    ) -> Codes:
        """Ids `[B, N]`, with their `mask` and `grid=None`, of images in [-1, 1]; N is the number of the image with most, rows with
        fewer are filled up with 0.

        Args:
            generator: randomness of `sample`; a list has one generator for each image.
            sample: draw which patches are kept, as the authors do, instead of taking the likelier decisions.
            noise: the draw's standard Gumbel noise `[B, patches, 2]` (keep, drop).
        """
        features = self.image_features(pixels)
        keep = self.select(features, generator=generator, sample=sample, noise=noise)
        kept, mask = gather_kept(self.merger(features, keep), keep)
        vectors = F.normalize(self.quant_proj(kept).float(), dim=-1)
        ids = self.quantizer.nearest(vectors, self.quantizer.codebook())
        return Codes(ids=ids.masked_fill(~mask, 0), mask=mask)

    @apply_forward_hook
    def reading_features(
        self,
        pixels: torch.Tensor,
        *,
        generator: Generators = None,
        sample: bool = False,
        noise: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What a language model reads of images: features `[B, N, reading_dim]` of the kept patches and their mask `[B, N]`.

        Arguments as of `encode`.
        """
        if self.reading_proj is None:
            raise ValueError("this tokenizer has no `reading_dim`: its checkpoint holds nothing for reading images.")
        features = self.image_features(pixels)
        keep = self.select(features, generator=generator, sample=sample, noise=noise)
        merger = self.merger if self.reading_merger is None else self.reading_merger
        kept, mask = gather_kept(merger(features, keep), keep)
        return self.reading_proj(kept).masked_fill(~mask.unsqueeze(-1), 0), mask

    @apply_forward_hook
    def embed(self, codes: Codes) -> torch.Tensor:
        """Code vectors float32 `[B, N, codebook_dim]`, which a `LaVITDecoder` sees. (Language models draw ids in rows of their own
        embedding and read `reading_features`.)"""
        self.check_ids(codes)
        return self.quantizer.lookup(codes.ids)

    def forward(
        self,
        pixels: torch.Tensor,
        *,
        generator: Generators = None,
        noise: torch.Tensor | None = None,
        temperature: float = 1.0,
    ) -> SelectedCodes:
        """Selection and quantisation of `pixels`, for training: what is kept is drawn, and gradients pass the decisions and the codes
        straight through.

        Decisions get theirs from the merger, where they are weights of the attention, and from the code vectors, which are multiplied
        by them (by 1).

        Args:
            generator, noise: as of `encode`.
            temperature: of the softmax that the gradients of the decisions are those of.
        """
        features = self.image_features(pixels)
        log_probs = self.selector(features)
        keep = self.selector.relax(log_probs, _gumbel_noise(log_probs, generator, True, noise), temperature)
        kept, mask = gather_kept(self.merger(features, keep), keep.bool())
        weights, _ = gather_kept(keep.unsqueeze(-1), keep.bool())
        vectors = F.normalize(self.quant_proj(kept[mask]).float(), dim=-1)
        found = self.quantizer(vectors)
        codes = found.vectors.new_zeros(*mask.shape, self.latent_channels)
        codes[mask] = found.vectors
        ids = found.ids.new_zeros(mask.shape)
        ids[mask] = found.ids
        return SelectedCodes(found._replace(vectors=codes * weights, ids=ids), mask, vectors, keep, features)


def _gumbel_noise(
    log_probs: torch.Tensor, generator: Generators, sample: bool, noise: torch.Tensor | None
) -> torch.Tensor | None:
    """Standard Gumbel noise in the shape of `log_probs`: the caller's own `noise`, drawn noise, or without `sample` none."""
    if noise is not None:
        if noise.shape != log_probs.shape:
            raise ValueError(f"`noise` must be Gumbel noise {tuple(log_probs.shape)}, got {tuple(noise.shape)}.")
        return noise.to(log_probs)
    if not sample:
        return None
    return -exponential_noise(log_probs.shape, generator, log_probs.device).log()
