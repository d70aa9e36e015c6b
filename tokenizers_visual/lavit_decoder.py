"""`LaVITDecoder`: from codes of LaVIT to what a diffusion model paints an image from (arXiv 2309.04669, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from armm.nn.attention import attention
from armm.nn.masks import key_mask

from .query_transformer import QueryTransformer
from .semantic import ImageCondition

__all__ = ["ConfigMixin", "LaVITDecoder", "ModelMixin"]


class AttentionPool(nn.Module):
    """One vector of a sequence: its mean, at a position of its own, looks at itself and at all tokens (CLIP's, arXiv 2103.00020).

    Args:
        dim: width of the tokens.
        out_dim: of the vector.
        num_tokens: length of the sequence.
        num_heads: attention heads.
    """

    def __init__(self, dim: int, out_dim: int, num_tokens: int, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"`num_heads` must divide the width {dim}, got {num_heads}.")
        self.num_heads = num_heads
        self.positions = nn.Parameter(torch.randn(num_tokens + 1, dim) * dim**-0.5)
        self.to_q, self.to_k, self.to_v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.to_out = nn.Linear(dim, out_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, num_tokens, dim]` -> `[B, out_dim]`."""
        x = torch.cat([x.mean(1, keepdim=True), x], dim=1) + self.positions
        query, key, value = (
            layer(tokens).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer, tokens in ((self.to_q, x[:, :1]), (self.to_k, x), (self.to_v, x))
        )
        return self.to_out(attention(query, key, value).transpose(1, 2).flatten(1))


class LaVITDecoder(ModelMixin, ConfigMixin):
    """Code vectors `[B, N, code_dim]` of any number -> an `ImageCondition`: `embeds` `[B, num_queries, sum(embed_dims)]` in the place
    of a text's features, and for models that take one a `pooled` vector.

    Args:
        code_dim: width of the code vectors.
        dim, num_layers, num_heads, mlp_hidden: of the transformer in which learned queries read the codes.
        num_queries: of them, and the most codes that an image has.
        feature_dim: width of the features that the queries become.
        embed_dims: widths of the projections that are strung together: (768,) for Stable Diffusion 1.5, (768, 1280) for SDXL.
        pooled_dim, pool_heads: width of the pooled vector and attention heads of the pooling; None makes none.
    """

    _supports_gradient_checkpointing = False
    _skip_layerwise_casting_patterns = ["norm", "positions", "queries"]
    _no_split_modules = ["Block"]

    @register_to_config
    def __init__(
        self,
        code_dim: int = 32,
        dim: int = 1408,
        num_layers: int = 12,
        num_heads: int = 16,
        mlp_hidden: int = 6144,
        num_queries: int = 256,
        feature_dim: int = 1408,
        embed_dims: Sequence[int] = (768,),
        pooled_dim: int | None = None,
        pool_heads: int | None = None,
    ) -> None:
        super().__init__()
        if not embed_dims or min(code_dim, num_queries, feature_dim, *embed_dims) < 1:
            raise ValueError(
                f"`code_dim`, `num_queries`, `feature_dim` and `embed_dims` must be positive, got {code_dim}, {num_queries}, "
                f"{feature_dim} and {list(embed_dims)}."
            )
        if (pooled_dim is None) != (pool_heads is None):
            raise ValueError("`pooled_dim` and `pool_heads` belong together: give both or neither.")
        self.proj_in = nn.Linear(code_dim, dim)
        self.positions = nn.Parameter(torch.zeros(num_queries, dim))
        self.transformer = QueryTransformer(
            dim,
            num_layers,
            num_heads,
            num_queries=num_queries,
            mlp_hidden=mlp_hidden,
            norm_eps=1e-5,
            norm_out=True,
        )
        self.feature_proj = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, feature_dim))
        self.embed_proj = nn.ModuleList(nn.Linear(feature_dim, width) for width in embed_dims)
        self.pool = None
        if pooled_dim is not None and pool_heads is not None:
            self.pool = AttentionPool(feature_dim, pooled_dim, num_queries, pool_heads)

    def features(self, vectors: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """What the queries become, `[B, num_queries, feature_dim]`: training draws them to the features that codes were made of.
        Arguments as of `forward`."""
        most, width = len(self.positions), self.config.code_dim
        if vectors.ndim != 3 or vectors.shape[-1] != width or not 1 <= vectors.shape[1] <= most:
            raise ValueError(f"`vectors` must be [B, 1 to {most}, {width}], got {tuple(vectors.shape)}.")
        if mask is not None and mask.shape != vectors.shape[:2]:
            raise ValueError(f"`mask` must be {tuple(vectors.shape[:2])}, got {tuple(mask.shape)}.")
        if mask is not None and not bool(mask.any(1).all()):
            raise ValueError("`mask` hides all codes of an image: an image has at least one code.")
        tokens = self.proj_in(vectors.to(self.proj_in.weight.dtype)) + self.positions[: vectors.shape[1]]
        features = self.transformer(tokens, context_mask=None if mask is None else key_mask(mask.bool()))
        return self.feature_proj(features)

    def forward(self, vectors: torch.Tensor, mask: torch.Tensor | None = None) -> ImageCondition:
        """The condition of code vectors `vectors` `[B, N, code_dim]`; `mask` `[B, N]` is True where a code is real."""
        features = self.features(vectors, mask)
        embeds = torch.cat([project(features) for project in self.embed_proj], dim=-1)
        return ImageCondition(embeds, None if self.pool is None else self.pool(features))
