"""The vision transformer shared by every tokenizer that codes patches instead of convolving (Dosovitskiy et al., arXiv
2010.11929): a stack of armm's transformer blocks in which all tokens see each other."""

from __future__ import annotations

import torch
from torch import nn

from armm.nn.block import Block, BlockConfig
from armm.nn.cache import KVCache
from armm.nn.norms import low_precision_dtype


class ViT(nn.Module):
    """Tokens `[B, N, dim]` -> `[B, N, dim]` through pre-norm blocks; there is no norm behind the last one.

    Patch embedding, positions, queries and final norms differ between tokenizers and belong to them.

    Args:
        dim: width of a token; a multiple of `num_heads`.
        num_layers: blocks.
        num_heads: attention heads of each block.
        mlp: kind of the feed-forward network: "gelu" (exact), "gelu_tanh", "silu", "swiglu" or "geglu".
        mlp_hidden: its inner width; None is 4 * dim.
        norm: "layer" or "rms".
        norm_eps: of the blocks' norms.
        qkv_bias: whether the projections to queries, keys and values have a bias; None: as `bias` says.
        bias: whether the other linear layers have one.
        qk_norm: None, "rms", "layer", "head_rms" or "l2", with qk_norm_eps.
        branch_scale: first value of a learned factor for each channel of both branches; None = no factors.
    """

    def __init__(
        self,
        dim: int,
        num_layers: int,
        num_heads: int,
        *,
        mlp: str = "gelu",
        mlp_hidden: int | None = None,
        norm: str = "layer",
        norm_eps: float = 1e-6,
        qkv_bias: bool | None = None,
        bias: bool = True,
        qk_norm: str | None = None,
        qk_norm_eps: float = 1e-6,
        branch_scale: float | None = None,
    ) -> None:
        super().__init__()
        if min(dim, num_layers, num_heads) < 1 or dim % num_heads:
            raise ValueError(
                f"a transformer needs at least one layer and a width that its heads divide, got width {dim}, {num_layers} "
                f"layers and {num_heads} heads."
            )
        config = BlockConfig(
            dim=dim,
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=dim // num_heads,
            mlp=mlp,
            mlp_hidden=4 * dim if mlp_hidden is None else mlp_hidden,
            mlp_bias=bias,
            norm=norm,
            norm_eps=norm_eps,
            qkv_bias=bias if qkv_bias is None else qkv_bias,
            out_bias=bias,
            qk_norm=qk_norm,
            qk_norm_eps=qk_norm_eps,
            branch_scale=branch_scale,
        )
        self.dim, self.num_heads = dim, num_heads
        self.blocks = nn.ModuleList(Block(config) for _ in range(num_layers))

    def forward(
        self,
        x: torch.Tensor,
        *,
        rotary: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        causal: bool = False,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """`rotary` as from `armm.nn.rotary.rotary_table`; `mask` (True = may look) broadcasts to `[B, heads, N, N]`; `causal`: tokens
        see themselves and those before them, those in the `cache` included."""
        for layer, block in enumerate(self.blocks):
            x = block(x, rotary=rotary, mask=mask, causal=causal, cache=cache, layer=layer)
        return x

    def allocate_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache for `batch` rows of up to `length` tokens that are coded causally."""
        weight = self.blocks[0].attention.to_out.weight
        dtype = low_precision_dtype(weight)
        return KVCache.allocate(
            len(self.blocks), batch, self.num_heads, length, self.dim // self.num_heads, dtype, weight.device
        )

    def fuse_projections(self) -> None:
        """Merge the projections of every block for inference; see `armm.nn.block.Block.fuse`."""
        for block in self.blocks:
            block.fuse()

    def unfuse_projections(self) -> None:
        for block in self.blocks:
            block.unfuse()
