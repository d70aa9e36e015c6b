"""`SEEDTokenizer`: images as a causal sequence of semantic codes (SEED, Ge et al., arXiv 2307.08041, 2310.01218)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from armm.nn.norms import LayerNorm

from .codes import Codes
from .quantizers import Quantized, VectorQuantizer
from .query_transformer import QueryTransformer
from .semantic import CLIP_MEAN, CLIP_STD, ImageCondition, SemanticTokenizer
from .vision_encoder import VisionEncoder
from .vit import ViT

__all__ = ["ConfigMixin", "ModelMixin", "SEEDTokenizer"]

HEADS = ("flatten", "query")


class SEEDTokenizer(SemanticTokenizer):
    """Images of one size -> `num_tokens` ids each -> one embedding of the image.

    Learned queries, of which each sees those before it, read the features of a vision transformer; what they found is quantised. So
    codes have an order and no place: `encode` gives `grid=None`. A language model reads and predicts the ids. From the codes, a
    bidirectional transformer and a head make the image's embedding in CLIP's space, from which an unCLIP model paints.

    Args:
        image_size, patch_size: of the vision transformer, in pixels.
        vision_dim, vision_layers, vision_heads, vision_mlp_hidden: its sizes. It has a class token and no final norm.
        dim, num_layers, num_heads, mlp_hidden: of the queries' transformer.
        cross_layers: which of its blocks look at the image; None is every second one, from the first.
        num_tokens: queries, and so codes of an image.
        causal: whether a query sees only those before it. The authors' code does so exactly when there are 32 of them.
        codebook_size, codebook_dim: see `VectorQuantizer`; vectors are compared as they are.
        decoder_layers, decoder_heads, decoder_mlp_hidden: of the transformer behind the codes.
        head: "flatten" narrows each of its outputs through `reduction`, strings them together and projects them (the published
            checkpoints); "query" asks them with one learned query (the "reverse Q-Former" of the papers).
        reduction: inner widths of the former; each layer but the last is followed by a ReLU.
        reverse_layers, reverse_heads, reverse_mlp_hidden, reverse_cross_layers: sizes of the latter.
        embedding_dim: width of the image's embedding.
        image_mean, image_std: of the channels of pixels in [0, 1].
    """

    _supports_gradient_checkpointing = False
    _keep_in_fp32_modules = ["quantizer"]
    _skip_layerwise_casting_patterns = ["quantizer", "norm", "pos_embed"]
    _no_split_modules = ["Block"]

    @register_to_config
    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 14,
        vision_dim: int = 1408,
        vision_layers: int = 39,
        vision_heads: int = 16,
        vision_mlp_hidden: int = 6144,
        dim: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        mlp_hidden: int | None = None,
        cross_layers: Sequence[int] | None = None,
        num_tokens: int = 32,
        causal: bool = True,
        codebook_size: int = 8192,
        codebook_dim: int = 32,
        decoder_layers: int = 4,
        decoder_heads: int = 12,
        decoder_mlp_hidden: int | None = None,
        head: str = "flatten",
        reduction: Sequence[int] = (256, 128, 32),
        reverse_layers: int = 12,
        reverse_heads: int = 12,
        reverse_mlp_hidden: int | None = None,
        reverse_cross_layers: Sequence[int] | None = None,
        embedding_dim: int = 1024,
        image_mean: Sequence[float] = CLIP_MEAN,
        image_std: Sequence[float] = CLIP_STD,
    ) -> None:
        super().__init__()
        if head not in HEADS:
            raise ValueError(f"`head` must be one of {', '.join(map(repr, HEADS))}, got {head!r}.")
        if min(num_tokens, codebook_size, codebook_dim, embedding_dim) < 1:
            raise ValueError(
                f"`num_tokens`, `codebook_size`, `codebook_dim` and `embedding_dim` must be positive, got {num_tokens}, "
                f"{codebook_size}, {codebook_dim} and {embedding_dim}."
            )
        if head == "flatten" and not reduction:
            raise ValueError("`reduction` is empty: the head 'flatten' needs at least one width.")
        self.vision = VisionEncoder(
            image_size=image_size,
            patch_size=patch_size,
            dim=vision_dim,
            num_layers=vision_layers,
            num_heads=vision_heads,
            mlp_hidden=vision_mlp_hidden,
            class_token=True,
            final_norm=False,
        )
        self.vision_norm = LayerNorm(vision_dim, eps=1e-5)
        self.query_transformer = _q_former(
            dim, num_layers, num_heads, mlp_hidden, cross_layers, vision_dim, num_tokens, causal
        )
        self.quant_proj = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, codebook_dim))
        self.quantizer = VectorQuantizer(codebook_size, codebook_dim, l2_normalize=False)
        self.post_quant_proj = nn.Sequential(
            nn.Linear(codebook_dim, codebook_dim), nn.Tanh(), nn.Linear(codebook_dim, dim)
        )
        self.decoder_positions = nn.Parameter(torch.zeros(num_tokens, dim))
        self.decoder = ViT(dim, decoder_layers, decoder_heads, mlp_hidden=decoder_mlp_hidden)
        self.narrowing = self.reverse_transformer = None
        if head == "flatten":
            layers: list[nn.Module] = []
            for wide, narrow in zip((dim, *reduction), reduction, strict=False):
                layers += [nn.Linear(wide, narrow, bias=False), nn.ReLU()]
            self.narrowing = nn.Sequential(*layers[:-1])
        else:
            self.reverse_transformer = _q_former(
                dim, reverse_layers, reverse_heads, reverse_mlp_hidden, reverse_cross_layers, dim, 1, False
            )
        self.embedding_proj = nn.Linear(num_tokens * reduction[-1] if head == "flatten" else dim, embedding_dim)

    @property
    def codebook_size(self) -> int:
        return self.quantizer.codebook_size

    @property
    def latent_channels(self) -> int:
        return self.quantizer.dim

    # ------------------------------------------------------------------ pixels -> ids

    def image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised features `[B, 1 + patches, vision_dim]` of the vision transformer, the class token first."""
        pixels = self.normalize_pixels(pixels).to(self.vision_norm.weight.dtype)
        return self.vision_norm(self.vision.encode(pixels))

    def query_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """What the queries found in `pixels`: `[B, num_tokens, dim]`."""
        return self.query_transformer(self.image_features(pixels))

    def reading_features(self, pixels: torch.Tensor) -> tuple[torch.Tensor, None]:
        """`query_features`, before anything is quantised. Published language models read the ids instead."""
        self.check_pixels(pixels)
        return self.query_features(pixels), None

    @apply_forward_hook
    def encode(self, pixels: torch.Tensor, *, generator: torch.Generator | None = None) -> Codes:
        """Ids `[B, num_tokens]`, with `grid=None`, of images in [-1, 1]. Deterministic: `generator` is not used."""
        self.check_pixels(pixels)
        vectors = self.quantizer.normalize(self.quant_proj(self.query_features(pixels)))
        return Codes(ids=self.quantizer.nearest(vectors, self.quantizer.codebook()))

    # ------------------------------------------------------------------ ids -> embedding

    def embed(self, codes: Codes) -> torch.Tensor:
        """Code vectors float32 `[B, num_tokens, codebook_dim]`, which the decoder sees. (Language models read the ids, in rows of
        their own embedding.)"""
        self.check_ids(codes)
        return self.quantizer.lookup(codes.ids)

    def decoded_features(self, vectors: torch.Tensor) -> torch.Tensor:
        """Code vectors in the width of the queries, `[B, num_tokens, dim]`; training draws them to `query_features`."""
        return self.post_quant_proj(vectors.to(self.post_quant_proj[0].weight.dtype))

    def embed_image(self, vectors: torch.Tensor) -> torch.Tensor:
        """The image's embedding `[B, embedding_dim]` from its code vectors `[B, num_tokens, codebook_dim]`."""
        features = self.decoder(self.decoded_features(vectors) + self.decoder_positions)
        if self.narrowing is not None:
            return self.embedding_proj(self.narrowing(features).flatten(1))
        return self.embedding_proj(self.reverse_transformer(features).squeeze(1))

    @apply_forward_hook
    def condition(self, codes: Codes) -> ImageCondition:
        """What an unCLIP model paints the image from: `pooled` `[B, embedding_dim]`."""
        return ImageCondition(pooled=self.embed_image(self.embed(codes)))

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Quantized]:
        """For training: the image's embedding, the decoded and the original features of the queries, and the quantisation."""
        features = self.query_features(pixels)
        quantized = self.quantizer(self.quant_proj(features))
        return self.embed_image(quantized.vectors), self.decoded_features(quantized.vectors), features, quantized

    def check_ids(self, codes: Codes) -> None:
        """Raises ValueError unless `codes` hold all ids of an image."""
        super().check_ids(codes)
        if codes.num_tokens != self.config.num_tokens or (codes.mask is not None and not bool(codes.mask.all())):
            raise ValueError(
                f"`codes` must have exactly {self.config.num_tokens} ids for each image, got {codes.num_tokens}"
                f"{'' if codes.mask is None else ', some of them masked'}."
            )


def _q_former(
    dim: int,
    num_layers: int,
    num_heads: int,
    mlp_hidden: int | None,
    cross_layers: Sequence[int] | None,
    context_dim: int,
    num_queries: int,
    causal: bool,
) -> QueryTransformer:
    """The query side of a Q-Former, which has the shape of BERT."""
    return QueryTransformer(
        dim,
        num_layers,
        num_heads,
        context_dim=context_dim,
        num_queries=num_queries,
        causal=causal,
        cross_layers=range(0, num_layers, 2) if cross_layers is None else cross_layers,
        mlp_hidden=mlp_hidden,
        norm_eps=1e-12,
        norm_placement="residual",
        norm_in=True,
    )
