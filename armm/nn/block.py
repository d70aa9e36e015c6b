"""The one transformer block: pre-norm attention and feed-forward; what varies between families is data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armm.nn.attention import attention
from armm.nn.experts import MixtureOfExperts
from armm.nn.linear import FusedLinear, is_plain, separate
from armm.nn.mlp import GatedMLP, build_mlp
from armm.nn.modulation import NAMES, BlockModulation, modulate
from armm.nn.norms import FastRMSNorm, HeadLayerNorm, HeadRMSNorm, LayerNorm, RMSNorm, build_norm, rms_norm
from armm.nn.rotary import apply_rotary

if TYPE_CHECKING:
    from armm.nn.cache import KVCache

MAX_QUERY_SCALE = math.log(100.0)
# observe("attention" or "mlp", normalised input [B, N, D], output [B, N, D] before it is added)
Observer: TypeAlias = "Callable[[str, Tensor, Tensor], None]"


@dataclass(frozen=True)
class BlockConfig:
    """What a block needs to know; see `ARTransformer` for the meaning of each entry.

    normalize_context: whether each block has a norm of its own for the context. mask_smoothing: see `attention`.
    context_rotary: whether keys of a context are turned like the queries. branch_scale: both branches have a learned factor for
    each channel, which starts at this value; None = no factors (Touvron et al., arXiv 2103.17239).
    """

    dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp: str
    mlp_hidden: int
    mlp_bias: bool = False
    norm: str = "rms"
    norm_affine: bool = True
    norm_eps: float = 1e-5
    norm_placement: str = "input"
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: str | None = None
    qk_norm_eps: float = 1e-6
    attention_scale: float | None = None
    modulation: str | None = None
    modulation_dim: int = 0
    modulation_order: tuple[str, ...] = NAMES
    modulation_tasks: int = 0
    dropout: float = 0.0
    context_dim: int | None = None
    experts: dict[str, int] | None = None  # arguments of `MixtureOfExperts`: count, active, hidden, shared, routers
    normalize_context: bool = True
    mask_smoothing: float = 0.0
    context_rotary: bool = True
    branch_scale: float | None = None


class Attention(nn.Module):
    """Attention: separate plain projections, grouped key heads, optional query/key norm, rotary positions.

    key_dim: width of the context that keys and values come from; None attends to the tokens themselves.
    """

    def __init__(self, config: BlockConfig, key_dim: int | None = None) -> None:
        super().__init__()
        dim, head_dim = config.dim, config.head_dim
        key_dim = key_dim or dim
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, head_dim
        self.to_q = nn.Linear(dim, self.heads * head_dim, bias=config.qkv_bias)
        self.to_k = nn.Linear(key_dim, self.kv_heads * head_dim, bias=config.qkv_bias)
        self.to_v = nn.Linear(key_dim, self.kv_heads * head_dim, bias=config.qkv_bias)
        self.to_out = nn.Linear(self.heads * head_dim, dim, bias=config.out_bias)
        self.qk_norm = config.qk_norm
        self.scale = config.attention_scale
        self.smoothing = config.mask_smoothing
        self.turns_keys = config.context_rotary
        if config.qk_norm == "rms":
            self.query_norm = RMSNorm(head_dim, config.qk_norm_eps)
            self.key_norm = RMSNorm(head_dim, config.qk_norm_eps)
        elif config.qk_norm == "layer":
            self.query_norm = LayerNorm(head_dim, config.qk_norm_eps)
            self.key_norm = LayerNorm(head_dim, config.qk_norm_eps)
        elif config.qk_norm == "head_layer":
            self.query_norm = HeadLayerNorm(self.heads, head_dim, config.qk_norm_eps)
            self.key_norm = HeadLayerNorm(self.kv_heads, head_dim, config.qk_norm_eps)
        elif config.qk_norm == "head_rms":
            self.query_norm = HeadRMSNorm(self.heads, head_dim)
            self.key_norm = HeadRMSNorm(self.kv_heads, head_dim)
        elif config.qk_norm == "l2":
            # cosine attention: logits = <q/|q|, k/|k|> * exp(min(query_scale, ln 100)), one learned scale a head
            self.query_scale = nn.Parameter(torch.full((self.heads,), math.log(4.0)))
            self.scale = 1.0 if config.attention_scale is None else config.attention_scale

    def normalize(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Query/key norm per head on [B, N, H, d]."""
        if self.qk_norm in ("rms", "layer", "head_layer", "head_rms"):
            return self.query_norm(query), self.key_norm(key)
        if self.qk_norm == "l2":
            scale = self.query_scale.float().clamp(max=MAX_QUERY_SCALE).exp()[:, None]
            return (F.normalize(query.float(), dim=-1) * scale).to(query.dtype), F.normalize(key, dim=-1)
        return query, key

    def project(
        self, x: Tensor, rotary: Tensor | None, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H, N, d] of `x` [B, N, D], keys and values [B, Hkv, N, d] of it or of a `context`, at their positions."""
        batch, length = x.shape[:2]
        source = x if context is None else context
        query = self.to_q(x).view(batch, length, self.heads, self.head_dim)
        key = self.to_k(source).view(batch, source.shape[1], self.kv_heads, self.head_dim)
        value = self.to_v(source).view(batch, source.shape[1], self.kv_heads, self.head_dim)
        query, key = self.normalize(query, key)
        if rotary is not None:
            query = apply_rotary(query, rotary)
            key = apply_rotary(key, rotary) if context is None or self.turns_keys else key
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def forward(
        self,
        x: Tensor,
        rotary: Tensor | None,
        mask: Tensor | None,
        causal: bool,
        cache: KVCache | None,
        layer: int,
        discard: int,
        backend: str | None,
        context: Tensor | None = None,
    ) -> Tensor:
        query, key, value = self.project(x, rotary, context)
        if cache is not None:
            key, value = cache.append(layer, key, value, discard)
        number = layer if context is None else None  # what is recorded is attention of a sequence on itself
        options: dict[str, Any] = {"scale": self.scale, "backend": backend, "layer": number, "smoothing": self.smoothing}
        out = attention(query, key, value, mask=mask, causal=causal, **options)
        return self.to_out(out.transpose(1, 2).reshape(*x.shape[:2], -1))


class MergedQKNorm:
    """The RMS norms of queries and keys as one, in place on float32 [B, N, H + Hkv, d]."""

    def __init__(self, att: Attention) -> None:
        parts = ((att.query_norm, att.heads), (att.key_norm, att.kv_heads))
        self.weight = torch.cat([norm.weight.detach().expand(heads, -1) for norm, heads in parts])
        self.eps = torch.tensor(att.query_norm.eps, dtype=torch.float32)
        self.inverse = 1.0 / att.head_dim

    @staticmethod
    def fits(att: Attention) -> bool:
        if att.qk_norm != "rms":
            return False
        weight = att.query_norm.weight
        return weight.device.type == "cpu" and weight.dtype == torch.float32

    def __call__(self, x: Tensor) -> None:
        length = torch.linalg.vector_norm(x, 2, -1, True)
        x.mul_(torch.addcmul(self.eps, length, length, value=self.inverse).rsqrt_()).mul_(self.weight)


class FusedBlock:
    """The merged weights of a block and its forward pass in as few calls as possible (inference without modulation)."""

    def __init__(self, block: Block) -> None:
        att, mlp = block.attention, block.mlp
        self.attention = att
        self.heads, self.kv_heads, self.head_dim = att.heads, att.kv_heads, att.head_dim
        self.qk_norm = MergedQKNorm(att) if MergedQKNorm.fits(att) else None
        self.plain = att.qk_norm is None or self.qk_norm is not None
        self.grouped = att.heads != att.kv_heads
        self.scale = att.scale
        self.qkv = FusedLinear.merge([att.to_q, att.to_k, att.to_v])
        self.out = FusedLinear.merge([att.to_out])
        self.experts = mlp if isinstance(mlp, MixtureOfExperts) else None
        self.attention_norm, self.mlp_norm = _fast_norm(block.attention_norm), _fast_norm(block.mlp_norm)
        self.norms_output = block.norms_output
        if self.experts is not None:
            self.experts.fuse()
            return
        self.gated = isinstance(mlp, GatedMLP)
        self.up = FusedLinear.merge([mlp.gate, mlp.up] if self.gated else [mlp.fc1])
        self.down = FusedLinear.merge([mlp.down if self.gated else mlp.fc2])
        self.activation = mlp.activation
        self.silu = self.gated and mlp.activation is F.silu

    def split(self, qkv: Tensor, batch: int, length: int, rotary: Tensor | None) -> tuple[Tensor, Tensor]:
        """Merged projections [B * N, (H + 2 Hkv) d] -> queries [B, H, N, d], keys and values [2, B, Hkv, N, d]."""
        heads, kv_heads, size = self.heads, self.kv_heads, self.head_dim
        width = (heads + 2 * kv_heads) * size
        if self.plain and (rotary is None or (rotary.is_complex() and qkv.dtype == torch.float32)):
            # All are views of the one tensor; queries and keys are neighbours, so one product in place turns both.
            row = length * width
            if self.qk_norm is not None:
                self.qk_norm(qkv.as_strided((batch, length, heads + kv_heads, size), (row, width, size, 1)))
            if rotary is not None:
                pairs = qkv.as_strided((batch, length, heads + kv_heads, size // 2, 2), (row, width, size, 2, 1))
                torch.view_as_complex(pairs).mul_(rotary)
            query = qkv.as_strided((batch, heads, length, size), (row, size, width, 1))
            shape, strides = (2, batch, kv_heads, length, size), (kv_heads * size, row, size, width, 1)
            return query, qkv.as_strided(shape, strides, qkv.storage_offset() + heads * size)
        query, key, value = qkv.view(batch, length, -1, size).split([heads, kv_heads, kv_heads], dim=2)
        query, key = self.attention.normalize(query, key)
        if rotary is not None:
            query, key = apply_rotary(query, rotary), apply_rotary(key, rotary)
        return query.transpose(1, 2), torch.stack([key, value]).transpose(2, 3)

    def __call__(
        self,
        x: Tensor,
        rotary: Tensor | None,
        mask: Tensor | None,
        causal: bool,
        cache: KVCache | None,
        layer: int,
        discard: int,
        backend: str | None,
        repeated: bool = False,
        routes: Tensor | None = None,
    ) -> Tensor:
        batch, length, dim = x.shape
        x = x.reshape(batch * length, dim)
        step = length == 1
        pack = step or repeated
        normed = x if self.norms_output else self.attention_norm(x)
        query, keys_values = self.split(self.qkv.rows(normed, pack), batch, length, rotary)
        if cache is None:
            key, value = keys_values.unbind(0)
        else:
            key, value = cache.append_packed(layer, keys_values, discard)
        if backend == "sdpa" and not causal and not self.grouped:
            out = F.scaled_dot_product_attention(query, key, value, mask, scale=self.scale)
        else:
            out = attention(query, key, value, mask=mask, causal=causal, scale=self.scale, backend=backend, layer=layer)
        out = (out if step else out.transpose(1, 2)).reshape(batch * length, -1)
        if self.norms_output:
            x = x + self.attention_norm(self.out.rows(out, pack))
        else:
            x = self.out.add_rows(x, out, pack)

        if self.experts is not None:
            routes = None if routes is None else routes.reshape(-1)
            if self.norms_output:
                return (x + self.mlp_norm(self.experts(x, routes))).view(batch, length, dim)
            return (x + self.experts(self.mlp_norm(x), routes)).view(batch, length, dim)
        hidden = self.up.rows(x if self.norms_output else self.mlp_norm(x), pack)
        if self.gated:
            gate, hidden = hidden.chunk(2, dim=-1)
            hidden = (F.silu(gate) if self.silu else self.activation(gate)).mul_(hidden)
        else:
            hidden = self.activation(hidden)
        if self.norms_output:
            return (x + self.mlp_norm(self.down.rows(hidden, pack))).view(batch, length, dim)
        return self.down.add_rows(x, hidden, pack, inplace=True).view(batch, length, dim)


def _fast_norm(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    if isinstance(norm, RMSNorm):
        weight = norm.weight
        if weight is not None and weight.device.type == "cpu" and weight.dtype == torch.float32:
            return FastRMSNorm(norm)
        return lambda x: rms_norm(x, norm.weight, norm.eps)
    return norm


class Block(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x)); with modulation, the norms are shifted and scaled, the branches
    gated. With a context, x += cross_attention(norm(x), norm(context)) between the two, never modulated.
    With norm_placement "output" it is x += norm(attention(x)); x += norm(mlp(x)), with "residual" it is x = norm(x + attention(x)) and
    so on for each branch. With branch_scale, branches are multiplied by `attention_gate` and `mlp_gate` before they are added.
    """

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.attention_norm = build_norm(config.norm, config.dim, config.norm_eps, config.norm_affine)
        self.attention = Attention(config)
        self.cross_attention = None
        if config.context_dim is not None:
            self.cross_norm = build_norm(config.norm, config.dim, config.norm_eps)
            self.context_norm = (
                build_norm(config.norm, config.context_dim, config.norm_eps) if config.normalize_context else nn.Identity()
            )
            self.cross_attention = Attention(config, config.context_dim)
        self.mlp_norm = build_norm(config.norm, config.dim, config.norm_eps, config.norm_affine)
        self.mlp: nn.Module
        if config.experts is None:
            self.mlp = build_mlp(config.mlp, config.dim, config.mlp_hidden, config.mlp_bias)
        else:
            self.mlp = MixtureOfExperts(config.dim, kind=config.mlp, bias=config.mlp_bias, **config.experts)
        self.modulation = None
        if config.modulation is not None:
            self.modulation = BlockModulation(
                config.modulation,
                config.modulation_dim or config.dim,
                config.dim,
                config.modulation_order,
                config.modulation_tasks,
            )
        if config.norm_placement not in ("input", "output", "residual"):
            raise ValueError(f"norm_placement must be 'input', 'output' or 'residual', got {config.norm_placement!r}")
        if config.norm_placement == "output" and (config.modulation is not None or config.context_dim is not None):
            raise ValueError("norm_placement='output' has no modulation and no context: leave them out, or use 'input'")
        if config.norm_placement == "residual" and config.modulation is not None:
            raise ValueError("norm_placement='residual' has no modulation: leave it out, or use 'input'")
        self.attention_gate = self.mlp_gate = None
        if config.branch_scale is not None:
            if config.modulation is not None or config.norm_placement != "input":
                raise ValueError("branch_scale is for blocks without modulation whose norms are at the input")
            self.attention_gate = nn.Parameter(torch.full((config.dim,), float(config.branch_scale)))
            self.mlp_gate = nn.Parameter(torch.full((config.dim,), float(config.branch_scale)))
        self.norms_output = config.norm_placement == "output"
        self.norms_residual = config.norm_placement == "residual"
        self.dropout = config.dropout
        self._fused: FusedBlock | None = None

    def forward(
        self,
        x: Tensor,
        rotary: Tensor | None = None,
        mask: Tensor | None = None,
        causal: bool = False,
        cache: KVCache | None = None,
        layer: int = 0,
        discard: int = 0,
        backend: str | None = None,
        condition: Tensor | tuple[Tensor, Tensor] | None = None,
        segments: Tensor | None = None,
        context: Tensor | None = None,
        observe: Observer | None = None,
        repeated: bool = False,
        routes: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """`x` [B, N, D] -> [B, N, D]; `condition` feeds the modulation, `context_mask` says which tokens of the context may be looked
        at, `observe` is shown what goes into and comes out of both branches, the rest is as in `ARTransformer.forward`."""
        if observe is not None:
            return self._observed(x, rotary, mask, causal, cache, layer, discard, backend, observe, routes)
        if self._fused is not None and not torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type):
            return self._fused(x, rotary, mask, causal, cache, layer, discard, backend, repeated, routes)
        if self.norms_output:
            branch = self.attention(x, rotary, mask, causal, cache, layer, discard, backend)
            x = x + F.dropout(self.attention_norm(branch), self.dropout, self.training)
            return x + F.dropout(self.mlp_norm(self.feed_forward(x, routes)), self.dropout, self.training)
        if self.norms_residual:
            branch = self.attention(x, rotary, mask, causal, cache, layer, discard, backend)
            x = self.attention_norm(x + F.dropout(branch, self.dropout, self.training))
            x = self.cross(x, context, rotary, layer, backend, context_mask)
            return self.mlp_norm(x + F.dropout(self.feed_forward(x, routes), self.dropout, self.training))
        if self.modulation is None:
            branch = self.attention(self.attention_norm(x), rotary, mask, causal, cache, layer, discard, backend)
            branch = branch if self.attention_gate is None else branch * self.attention_gate
            x = x + F.dropout(branch, self.dropout, self.training)
            x = self.cross(x, context, rotary, layer, backend, context_mask)
            branch = self.feed_forward(self.mlp_norm(x), routes)
            branch = branch if self.mlp_gate is None else branch * self.mlp_gate
            return x + F.dropout(branch, self.dropout, self.training)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition, segments)
        h = modulate(self.attention_norm(x), shift1, scale1)
        branch = self.attention(h, rotary, mask, causal, cache, layer, discard, backend)
        x = x + gate1 * F.dropout(branch, self.dropout, self.training)
        x = self.cross(x, context, rotary, layer, backend, context_mask)
        h = modulate(self.mlp_norm(x), shift2, scale2)
        return x + gate2 * F.dropout(self.feed_forward(h, routes), self.dropout, self.training)

    def feed_forward(self, x: Tensor, routes: Tensor | None = None) -> Tensor:
        """The feed-forward branch; `routes` matter to experts only."""
        return self.mlp(x) if routes is None else self.mlp(x, routes)

    def _observed(self, x: Tensor, *arguments: Any) -> Tensor:
        plain = self.modulation is None and self.cross_attention is None and self.attention_gate is None
        if not plain or self.norms_output or self.norms_residual:
            raise ValueError("blocks with modulation, cross-attention, scaled branches or norms behind them cannot be observed")
        *rest, observe, routes = arguments
        h = self.attention_norm(x)
        branch = self.attention(h, *rest)
        observe("attention", h, branch)
        x = x + branch
        h = self.mlp_norm(x)
        branch = self.feed_forward(h, routes)
        observe("mlp", h, branch)
        return x + branch

    def cross(
        self,
        x: Tensor,
        context: Tensor | None,
        rotary: Tensor | None,
        layer: int,
        backend: str | None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """x plus what it sees of the context [B, N, C], whose tokens stand at the positions of those of x."""
        if self.cross_attention is None:
            return x
        h, context = x if self.norms_residual else self.cross_norm(x), self.context_norm(context)
        branch = self.cross_attention(h, rotary, mask, False, None, layer, 0, backend, context)
        x = x + F.dropout(branch, self.dropout, self.training)
        return self.cross_norm(x) if self.norms_residual else x

    # Fusing. The merged weights are dropped whenever the parameters may change under them.

    def _merged_groups(self) -> list[list[nn.Module]]:
        att, mlp = self.attention, self.mlp
        groups = [[att.to_q, att.to_k, att.to_v], [att.to_out]]
        if isinstance(mlp, MixtureOfExperts):
            return groups + mlp.merged_groups()
        return groups + ([[mlp.gate, mlp.up], [mlp.down]] if isinstance(mlp, GatedMLP) else [[mlp.fc1], [mlp.fc2]])

    def fuse(self) -> bool:
        """Merge the projections for inference; False when training or where a layer is wrapped, hooked or quantised."""
        if self._fused is not None:
            return True
        groups = self._merged_groups()
        plain = self.modulation is None and self.cross_attention is None and self.attention_gate is None
        if not plain or self.norms_residual or self.attention.smoothing:
            return False
        if self.training or not all(is_plain(m) for group in groups for m in group):
            return False
        self._fused = FusedBlock(self)
        return True

    def unfuse(self) -> None:
        if self._fused is not None:
            self._fused = None
            if isinstance(self.mlp, MixtureOfExperts):
                self.mlp.unfuse()
            for group in self._merged_groups():
                if len(group) > 1 and all(is_plain(layer) for layer in group):
                    separate(group)

    def train(self, mode: bool = True) -> Block:
        if mode:
            self.unfuse()
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True):
        fused = self._fused is not None
        self.unfuse()
        super()._apply(fn, recurse)
        if fused:
            self.fuse()
        return self

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self.unfuse()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_fused": None}
