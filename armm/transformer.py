"""ARTransformer: the one trunk. What varies between families is its config, not a subclass."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from armm.nn.attention import check_backend, current_backend
from armm.nn.block import Block, BlockConfig
from armm.nn.bridge import Bridge
from armm.nn.cache import KVCache
from armm.nn.experts import MixtureOfExperts
from armm.nn.hooks import LayerHook
from armm.nn.masks import additive_mask, merge_causal
from armm.nn.mlp import GATED, gated_hidden
from armm.nn.modulation import NAMES, Modulation
from armm.nn.norms import build_norm, low_precision_dtype
from armm.nn.positions import PositionTable
from armm.nn.rotary import LAYOUTS, rotary_table

__all__ = ["ARTransformer", "PositionTable"]


class ARTransformer(ModelMixin, ConfigMixin):
    """Pre-norm transformer blocks over embeddings.

    Args:
        dim, num_layers, num_heads, num_kv_heads, head_dim: sizes; key heads default to all heads, head_dim to dim /
        heads.
        mlp: "swiglu", "geglu", "gelu" (exact) or "gelu_tanh". mlp_hidden: its width; the default is 4 * dim, for gated
            kinds two thirds of that rounded up to a multiple of 256.
        experts: {"count", "active", "hidden", "shared", "routers"}: a `MixtureOfExperts` in place of the feed-forward network of each
            block, of the gated kind `mlp`; `mlp_hidden` is then not used.
        mlp_bias, qkv_bias, out_bias: which linear layers have biases.
        norm: "rms" or "layer", with norm_eps; norm_affine=False has no weights in the blocks (the final norm has).
        norm_placement: "input" of the two branches of a block, their "output" before it is added (Swin v2, arXiv 2111.09883), or
            the "residual" sum behind it (the first transformers, arXiv 1706.03762).
        first_norm: False leaves out the norm before the first block's attention (EAGLE's drafters).
        final_norm: normalise the output. Taps have a final norm each as well. input_norm: normalise the input, positions
            included.
        qk_norm: None, "rms" (weights over head_dim), "layer" (layer norm over head_dim), "head_layer" (the same with weights and
            biases for each head), "head_rms" (unit root mean square, weights for each head) or "l2" (unit vectors and a learned
            scale a head).
        attention_scale: of the logits, default head_dim ** -0.5 (1 with "l2").
        rotary_axes: how many of the head's dimensions each position axis turns; they add up to head_dim. () = none.
        rotary_theta, rotary_layout: base of the frequencies; "interleaved" or "half_split" pairs.
        learned_positions: rows of a learned position embedding added to the input, 0 = none.
        modulation: None, "block" (each block projects the condition), "shared" (one projection, rows added by each
            block), "branches" (two conditions, a projection for each branch of a block) or "tasks" (the condition is the
            number of one of `modulation_tasks` tasks, each with an embedding that is projected once for all blocks, and with
            rows in each block that scale and shift it); modulation_dim: width of the condition, default dim;
            modulation_order: order of the six chunks, or of the four that are left without shifts.
        context_dim: width of a context that the tokens look at between attention and feed-forward, None = none.
        taps: after these numbers of blocks the hidden state is handed out too.
        bridges: after these numbers of blocks the hidden state is normalised, projected and gets learned positions of its
            own, as between an encoder and a decoder that follow each other.
        dropout, token_dropout: training only; on both branches of a block, and on the input.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _repeated_blocks = ["Block"]
    _skip_keys = ["cache"]
    _skip_layerwise_casting_patterns = ["norm", "position_embedding"]

    @register_to_config
    def __init__(
        self,
        dim: int = 256,
        num_layers: int = 6,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        mlp: str = "swiglu",
        mlp_hidden: int | None = None,
        experts: dict[str, int] | None = None,
        mlp_bias: bool = False,
        norm: str = "rms",
        norm_affine: bool = True,
        norm_eps: float = 1e-5,
        norm_placement: str = "input",
        final_norm: bool = True,
        input_norm: bool = False,
        first_norm: bool = True,
        qkv_bias: bool = False,
        out_bias: bool = False,
        qk_norm: str | None = None,
        qk_norm_eps: float = 1e-6,
        attention_scale: float | None = None,
        rotary_axes: Sequence[int] = (),
        rotary_theta: float = 10000.0,
        rotary_layout: str = "interleaved",
        learned_positions: int = 0,
        modulation: str | None = None,
        modulation_dim: int | None = None,
        modulation_order: Sequence[str] = NAMES,
        modulation_tasks: int = 0,
        context_dim: int | None = None,
        taps: Sequence[int] = (),
        bridges: Sequence[int] = (),
        dropout: float = 0.0,
        token_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("num_layers", num_layers), ("num_heads", num_heads)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if head_dim is None and dim % num_heads:
            raise ValueError(f"dim={dim} is not divisible by num_heads={num_heads}; give head_dim explicitly")
        head_dim = head_dim or dim // num_heads
        num_kv_heads = num_kv_heads or num_heads
        if num_heads % num_kv_heads:
            raise ValueError(f"num_heads={num_heads} must be a multiple of num_kv_heads={num_kv_heads}")
        if rotary_axes and sum(rotary_axes) != head_dim:
            raise ValueError(f"rotary_axes must add up to head_dim={head_dim}, got {list(rotary_axes)}")
        if any(size % 2 for size in rotary_axes):
            raise ValueError(f"rotary_axes must be even numbers, got {list(rotary_axes)}")
        if rotary_layout not in LAYOUTS:
            raise ValueError(f"rotary_layout must be one of {LAYOUTS}, got {rotary_layout!r}")
        if qk_norm not in (None, "rms", "layer", "head_layer", "head_rms", "l2"):
            raise ValueError(f"qk_norm must be None, 'rms', 'layer', 'head_layer', 'head_rms' or 'l2', got {qk_norm!r}")
        if experts is not None and mlp not in GATED:
            raise ValueError(f"experts are gated networks: mlp must be one of {sorted(GATED)}, got {mlp!r}")
        if (modulation == "tasks") != (modulation_tasks > 0):
            raise ValueError(
                f"modulation={modulation!r} and modulation_tasks={modulation_tasks}: tasks need a number, others 0"
            )
        for name, places in (("taps", taps), ("bridges", bridges)):
            if any(not 0 < place < num_layers for place in places):
                raise ValueError(f"{name} must lie between 1 and num_layers - 1 = {num_layers - 1}, got {list(places)}")

        self.dim, self.num_layers = dim, num_layers
        self.num_kv_heads, self.head_dim = num_kv_heads, head_dim
        self.rotary_axes, self.rotary_theta = tuple(rotary_axes), float(rotary_theta)
        self.rotary_layout = rotary_layout
        self.taps = frozenset(taps)
        self.token_dropout, self.context_dim = token_dropout, context_dim
        config = BlockConfig(
            dim=dim,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            mlp=mlp,
            mlp_hidden=mlp_hidden or (gated_hidden(dim) if mlp in GATED else 4 * dim),
            mlp_bias=mlp_bias,
            norm=norm,
            norm_affine=norm_affine,
            norm_eps=norm_eps,
            norm_placement=norm_placement,
            qkv_bias=qkv_bias,
            out_bias=out_bias,
            qk_norm=qk_norm,
            qk_norm_eps=qk_norm_eps,
            attention_scale=attention_scale,
            modulation=modulation,
            modulation_dim=modulation_dim or dim,
            modulation_order=tuple(modulation_order),
            modulation_tasks=modulation_tasks,
            dropout=dropout,
            context_dim=context_dim,
            experts=None if experts is None else dict(experts),
        )
        self.position_embedding = nn.Embedding(learned_positions, dim) if learned_positions else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(num_layers))
        if not first_norm:
            self.blocks[0].attention_norm = nn.Identity()
        self.input_norm = build_norm(norm, dim, norm_eps) if input_norm else None
        self.bridges = nn.ModuleDict(
            {str(place): Bridge(norm, dim, norm_eps, learned_positions) for place in sorted(set(bridges))}
        )
        self.shared_modulation = (
            Modulation(modulation_dim or dim, dim, len(modulation_order)) if modulation in ("shared", "tasks") else None
        )
        self.task_embedding = nn.Embedding(modulation_tasks, modulation_dim or dim) if modulation_tasks else None
        self.norm = build_norm(norm, dim, norm_eps) if final_norm else None
        self.tap_norms = nn.ModuleDict(
            {str(tap): build_norm(norm, dim, norm_eps) for tap in sorted(self.taps)} if final_norm else {}
        )
        self.gradient_checkpointing = False
        self._attention_backend: str | None = None
        self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for block in self.blocks:
            mlp = block.mlp
            networks = [*mlp.experts, *filter(None, [mlp.shared])] if isinstance(mlp, MixtureOfExperts) else [mlp]
            ends = [getattr(network, "down", None) or network.fc2 for network in networks]
            for layer in (block.attention.to_out, *ends):
                nn.init.normal_(layer.weight, std=0.02 / math.sqrt(2 * self.num_layers))

    @classmethod
    def from_dict(cls, config: dict) -> ARTransformer:
        """Build from keyword arguments kept as a dict; unknown names are an error."""
        known = set(inspect.signature(cls.__init__).parameters) - {"self"}
        # A config stored by diffusers carries bookkeeping entries with a leading underscore.
        config = {name: value for name, value in config.items() if not name.startswith("_")}
        unknown = sorted(set(config) - known)
        if unknown:
            raise ValueError(f"transformer has unknown entries {unknown}; allowed are {sorted(known)}")
        return cls(**config)

    def __getattr__(self, name: str):
        # Submodules only: diffusers would also look in the config, where an entry may have a submodule's name.
        return nn.Module.__getattr__(self, name)

    # Positions and cache: values the caller owns.

    def position_table(
        self, coordinates: Tensor | None, *, zero: Tensor | None = None, index: Tensor | None = None
    ) -> PositionTable:
        """What the trunk needs for positions with `coordinates` [N, A] or [B, N, A].

        `zero` flags positions whose queries and keys vanish, `index` [N] or [B, N] picks rows of the learned embedding.
        Compute it once for a generation and slice it.
        """
        rotary = learned = None
        bridges: tuple[Tensor, ...] = ()
        if self.rotary_axes:
            if coordinates is None:
                raise ValueError("this transformer has rotary axes: coordinates must be given")
            rotary = rotary_table(coordinates, self.rotary_axes, self.rotary_theta, zero, self.rotary_layout)
        if self.position_embedding is not None:
            if index is None:
                raise ValueError("this transformer has learned positions: index must be given")
            learned = self.position_embedding(index)
            bridges = tuple(bridge.position_embedding(index) for bridge in self.bridges.values())
        return PositionTable(rotary, learned, bridges)

    def allocate_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache for `batch` rows of up to `length` positions, in the trunk's dtype and on its device."""
        weight = self.blocks[0].attention.to_out.weight
        device = weight.device if not weight.is_meta else self.device
        dtype = low_precision_dtype(torch.empty(0, dtype=self.dtype, device=device))
        return KVCache.allocate(self.num_layers, batch, self.num_kv_heads, length, self.head_dim, dtype, device)

    # Inference options.

    def fuse_projections(self) -> None:
        """Merge query/key/value and gate/up of every block for faster inference; parameters keep their names.

        Has no effect on blocks with adapters, hooks, quantised layers or modulation. Training, loading weights and
        adding adapters undo it.
        """
        for block in self.blocks:
            block.fuse()

    def unfuse_projections(self) -> None:
        for block in self.blocks:
            block.unfuse()

    def set_attention_backend(self, backend: str) -> None:
        """Use "sdpa", "xformers" or "reference" attention in this model (not in others, unlike diffusers' function)."""
        self._attention_backend = check_backend(backend)

    def reset_attention_backend(self) -> None:
        self._attention_backend = None

    def set_use_memory_efficient_attention_xformers(self, valid: bool, attention_op: object = None) -> None:
        self._attention_backend = check_backend("xformers") if valid else None

    # The pass.

    def forward(
        self,
        embeds: Tensor,
        *,
        positions: PositionTable | None = None,
        mask: Tensor | None = None,
        causal: bool = False,
        cache: KVCache | None = None,
        modulation: Tensor | tuple[Tensor, Tensor] | None = None,
        segments: Tensor | None = None,
        context: Tensor | None = None,
        discard: int = 0,
        hook: LayerHook | None = None,
        repeated: bool = False,
        routes: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, dict[int, Tensor]]:
        """`embeds` [B, N, D] -> hidden [B, N, D], normalised; with taps (hidden, {tap: hidden}).

        positions: of these N tokens. mask: bool (True = may look) or additive, broadcastable to [B, H, N, keys], where
        the keys are everything visible in the cache followed by the N tokens. causal: each token sees itself and what
        came before; combined with `mask` if both are given. cache: appended to. discard: so many of the last tokens
        are seen by this call but not kept in the cache. modulation: condition [B, C] or [B, N, C], or [B, S, C] with
        segments [N], which says for each token the row that it follows; with "branches" a pair of conditions, with "tasks" the
        task of each row, int64 [B] or [1]. context: [B, N, context_dim], standing at the positions of the tokens. hook: looks in between
        the blocks, and may shorten the sequence there. repeated: calls of this very shape come again and again, so fused weights
        may be packed for it (single tokens always count as such). routes: int64 [B, N], the router that chooses each token's
        experts (default: the first).
        """
        length = embeds.shape[1]
        x, rotary = embeds, None
        if positions is not None:
            if positions.length != length:
                raise ValueError(f"positions describe {positions.length} tokens, but embeds has {length}")
            rotary = positions.rotary
            if positions.learned is not None:
                x = x + positions.learned
        if self.input_norm is not None:
            x = self.input_norm(x)
        if self.training and self.token_dropout:
            x = F.dropout(x, self.token_dropout)
        if causal:
            keys = length if cache is None else length + cache.lengths[0]
            mask, causal = merge_causal(mask, length, keys, x.device)
        if mask is not None:
            mask = additive_mask(mask, low_precision_dtype(x))
        if (modulation is None) != (self.blocks[0].modulation is None):
            raise ValueError("modulation of a call and of the transformer's config belong together: give both or neither")
        condition = modulation
        if self.task_embedding is not None:
            condition = (self.shared_modulation(self.task_embedding(modulation)), modulation)
        elif self.shared_modulation is not None:
            condition = self.shared_modulation(modulation)
        backend = current_backend(self._attention_backend)
        checkpointing = self.gradient_checkpointing and torch.is_grad_enabled() and cache is None

        if routes is not None and not isinstance(self.blocks[0].mlp, MixtureOfExperts):
            raise ValueError("routes choose among experts, and this transformer has none")
        if (context is None) != (self.context_dim is None):
            raise ValueError("context and the transformer's context_dim belong together: give both or neither")
        bridged = dict(zip(self.bridges, positions.bridges, strict=True)) if positions and positions.bridges else {}
        if hook is not None:
            hook.start(length)
        tapped: dict[int, Tensor] = {}
        for layer, block in enumerate(self.blocks):
            if layer in self.taps:
                tapped[layer] = self._tap(layer, x)
            if str(layer) in self.bridges:
                x = self.bridges[str(layer)](x, bridged.get(str(layer)))
            arguments = (x, rotary, mask, causal, cache, layer, discard, backend, condition, segments, context)
            if hook is not None:
                x = block(*arguments, hook.observer(layer), routes=routes)
                x, rotary, mask, causal = hook.after(layer, x, rotary, mask, causal)
            else:
                call = (*arguments, None, repeated, routes)
                x = self._gradient_checkpointing_func(block, *call) if checkpointing else block(*call)
        if self.norm is not None:
            x = self.norm(x)
        return (x, tapped) if self.taps else x

    def _tap(self, layer: int, x: Tensor) -> Tensor:
        return self.tap_norms[str(layer)](x) if str(layer) in self.tap_norms else x
