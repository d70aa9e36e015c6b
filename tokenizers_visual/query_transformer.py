"""`QueryTransformer`: queries that read a context, the one module behind Q-Formers (BLIP-2, Li et al., arXiv 2301.12597), perceivers
and decoders from learned queries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from armm.nn.block import Block, BlockConfig
from armm.nn.norms import build_norm

PLACEMENTS = ("input", "residual")


class QueryTransformer(nn.Module):
    """Queries `[B, Q, dim]` see each other, then the tokens of a context `[B, N, context_dim]`, block after block.

    A block is self-attention, cross-attention and a feed-forward network; all projections have biases.

    Args:
        dim: width of a query; a multiple of `num_heads`.
        num_layers: blocks.
        num_heads: attention heads of each block.
        context_dim: width of the context; None is `dim`.
        num_queries: learned queries; 0 has none, each call then brings its own.
        causal: whether a query sees those before it only.
        cross_layers: which blocks look at the context, counted from 0; None is all of them.
        mlp: kind of the feed-forward network, see `armm.nn.build_mlp`.
        mlp_hidden: its inner width; None is 4 * dim.
        norm: "layer" or "rms".
        norm_eps: of all norms.
        norm_placement: "input" of each branch, or the "residual" sum behind it (BERT's).
        normalize_context: whether each block has a norm of its own for the context.
        norm_in, norm_out: a norm before the first block, and behind the last one.
        mask_smoothing: weight of what masks hide, see `armm.nn.attention`; 0 hides it wholly.
    """

    def __init__(
        self,
        dim: int,
        num_layers: int,
        num_heads: int,
        *,
        context_dim: int | None = None,
        num_queries: int = 0,
        causal: bool = False,
        cross_layers: Sequence[int] | None = None,
        mlp: str = "gelu",
        mlp_hidden: int | None = None,
        norm: str = "layer",
        norm_eps: float = 1e-6,
        norm_placement: str = "input",
        normalize_context: bool = False,
        norm_in: bool = False,
        norm_out: bool = False,
        mask_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if min(dim, num_layers, num_heads) < 1 or dim % num_heads:
            raise ValueError(
                f"a transformer needs at least one layer and a width that its heads divide, got width {dim}, {num_layers} "
                f"layers and {num_heads} heads."
            )
        if num_queries < 0:
            raise ValueError(f"`num_queries` must not be negative (0 = calls bring queries), got {num_queries}.")
        if norm_placement not in PLACEMENTS:
            raise ValueError(f"`norm_placement` must be one of {', '.join(PLACEMENTS)}, got {norm_placement!r}.")
        crossing = set(range(num_layers)) if cross_layers is None else set(cross_layers)
        if not crossing <= set(range(num_layers)):
            raise ValueError(f"`cross_layers` must lie between 0 and {num_layers - 1}, got {sorted(crossing)}.")
        self.dim, self.causal = dim, causal
        self.context_dim = dim if context_dim is None else context_dim

        def block(layer: int) -> Block:
            return Block(
                BlockConfig(
                    dim=dim,
                    num_heads=num_heads,
                    num_kv_heads=num_heads,
                    head_dim=dim // num_heads,
                    mlp=mlp,
                    mlp_hidden=4 * dim if mlp_hidden is None else mlp_hidden,
                    mlp_bias=True,
                    norm=norm,
                    norm_eps=norm_eps,
                    norm_placement=norm_placement,
                    qkv_bias=True,
                    out_bias=True,
                    context_dim=self.context_dim if layer in crossing else None,
                    normalize_context=normalize_context,
                    mask_smoothing=mask_smoothing,
                )
            )

        self.queries = nn.Parameter(torch.randn(num_queries, dim) * 0.02) if num_queries else None
        self.norm_in = build_norm(norm, dim, norm_eps) if norm_in else None
        self.blocks = nn.ModuleList(block(layer) for layer in range(num_layers))
        self.norm_out = build_norm(norm, dim, norm_eps) if norm_out else None

    def forward(
        self,
        context: torch.Tensor,
        queries: torch.Tensor | None = None,
        *,
        mask: torch.Tensor | None = None,
        context_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What the queries found: `[B, Q, dim]`.

        Args:
            context: `[B, N, context_dim]`.
            queries: `[B, Q, dim]`; None takes the learned ones.
            mask: which queries see which, besides `causal`; bool (True = may look), broadcasts to `[B, heads, Q, Q]`.
            context_mask: which queries see which tokens; broadcasts to `[B, heads, Q, N]`.
        """
        if context.ndim != 3 or context.shape[-1] != self.context_dim:
            raise ValueError(f"`context` must be [B, N, {self.context_dim}], got {tuple(context.shape)}.")
        if queries is None:
            if self.queries is None:
                raise ValueError("this module has no learned queries: give `queries`.")
            queries = self.queries.to(context.dtype).expand(len(context), -1, -1)
        elif queries.ndim != 3 or queries.shape[0] != len(context) or queries.shape[-1] != self.dim:
            raise ValueError(f"`queries` must be [{len(context)}, Q, {self.dim}], got {tuple(queries.shape)}.")
        x = queries if self.norm_in is None else self.norm_in(queries)
        for block in self.blocks:
            x = block(x, mask=mask, causal=self.causal, context=context, context_mask=context_mask)
        return x if self.norm_out is None else self.norm_out(x)
