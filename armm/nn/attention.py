"""One attention function, several backends, chosen per call or by a context manager and never process-wide."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

from armm.nn.masks import additive_mask, causal_mask

_backend: ContextVar[str] = ContextVar("armm_attention_backend", default="sdpa")


class AttentionRecord:
    """What `record_attention` keeps: `record[layer]` lists the probabilities float32 [B, H, Nq, Nk] of each call of that layer."""

    def __init__(self, layers: Collection[int] | None = None) -> None:
        self.layers = None if layers is None else frozenset(layers)
        self.calls: dict[int, list[Tensor]] = defaultdict(list)

    def wants(self, layer: int | None) -> bool:
        return layer is not None and (self.layers is None or layer in self.layers)

    def __getitem__(self, layer: int) -> list[Tensor]:
        return self.calls[layer]


_record: ContextVar[AttentionRecord | None] = ContextVar("armm_attention_record", default=None)


@contextmanager
def record_attention(layers: Collection[int] | None = None) -> Iterator[AttentionRecord]:
    """Keep the attention probabilities of every call of the trunk inside the `with` block, of some `layers` (counted from 0) or of
    all. Attention is then computed by the reference backend, whatever a model was set to."""
    record = AttentionRecord(layers)
    token = _record.set(record)
    try:
        yield record
    finally:
        _record.reset(token)


def _repeat_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    groups = query.shape[1] // key.shape[1]
    if groups == 1:
        return key, value
    return key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    heads, kv_heads = query.shape[1], key.shape[1]
    if query.requires_grad and query.device.type == "cpu":
        return _composed(query, *_repeat_heads(query, key, value), mask, causal, scale)
    if heads == kv_heads:
        return F.scaled_dot_product_attention(query, key, value, mask, 0.0, causal, scale=scale)
    if query.shape[2] == 1 and (mask is None or mask.dim() < 3 or mask.shape[-3] == 1):
        # One query per head: the heads that share a key head become its queries; nothing is copied.
        grouped = query.reshape(query.shape[0], kv_heads, heads // kv_heads, query.shape[3])
        return F.scaled_dot_product_attention(grouped, key, value, mask, scale=scale).reshape(query.shape)
    key, value = _repeat_heads(query, key, value)
    return F.scaled_dot_product_attention(query, key, value, mask, 0.0, causal, scale=scale)


def _composed(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> Tensor:
    """Training on a CPU: the backward pass of the fused kernel takes several times as long as three plain products."""
    if causal:
        mask = causal_mask(query.shape[2], key.shape[2], query.device)
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores.add_(additive_mask(mask, scores.dtype))
    return scores.softmax(-1).to(value.dtype) @ value


def attention_weights(
    query: Tensor, key: Tensor, mask: Tensor | None = None, causal: bool = False, scale: float | None = None
) -> Tensor:
    """Attention probabilities float32 [B, H, Nq, Nk]; arguments as of `attention`."""
    key, _ = _repeat_heads(query, key, key)
    scores = query.float() @ key.float().transpose(-1, -2)
    scores = scores * (1.0 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if mask is not None:
        scores = scores + additive_mask(mask, scores.dtype)
    if causal:
        scores = scores.masked_fill(~causal_mask(scores.shape[-2], scores.shape[-1], scores.device), float("-inf"))
    return scores.softmax(-1)


def smoothed_weights(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    smoothing: float,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Probabilities float32 [B, H, Nq, Nk] of a softmax behind which the mask comes: with e = exp(logit - largest logit of all keys),
    (mask * e + smoothing / Nk) / (sum of mask * e + smoothing). A query that sees nothing looks everywhere alike. This is attention
    under a token selection (DynamicViT, Rao et al., arXiv 2106.02034, equation 11). Arguments as of `attention`, but the mask is
    boolean, or floating point weights of the keys in [0, 1] with gradients (for a selection that is learned), never additive.
    """
    if mask is not None and mask.dtype != torch.bool and not (mask.is_floating_point() and mask.requires_grad):
        raise ValueError(
            f"attention with smoothing needs a boolean mask, or weights in [0, 1] that require gradients, got {mask.dtype} without"
        )
    key, _ = _repeat_heads(query, key, key)
    scores = query.float() @ key.float().transpose(-1, -2)
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = (scores - scores.amax(-1, keepdim=True)).exp()
    if mask is not None:
        scores = scores * mask
    if causal:
        scores = scores * causal_mask(scores.shape[-2], scores.shape[-1], scores.device)
    return (scores + smoothing / scores.shape[-1]) / (scores.sum(-1, keepdim=True) + smoothing)


def _reference(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> Tensor:
    return _weighted(attention_weights(query, key, mask, causal, scale), query, value)


def _weighted(weights: Tensor, query: Tensor, value: Tensor) -> Tensor:
    _, value = _repeat_heads(query, value, value)
    return (weights @ value.float()).to(query.dtype)


def _xformers(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> Tensor:
    ops = _import_xformers()
    key, value = _repeat_heads(query, key, value)
    if causal:
        mask, causal = causal_mask(query.shape[2], key.shape[2], query.device), False
    bias = None
    if mask is not None:
        shape = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        # The kernels want rows aligned to 8 elements: allocate wider, then slice.
        padded = torch.zeros(*shape[:3], -(-shape[3] // 8) * 8, dtype=query.dtype, device=query.device)
        bias = padded[..., : shape[3]]
        bias.copy_(additive_mask(mask, query.dtype).expand(shape))
    swap = [t.transpose(1, 2) for t in (query, key, value)]
    return ops.memory_efficient_attention(*swap, attn_bias=bias, scale=scale).transpose(1, 2)


def _import_xformers():
    try:
        import xformers.ops as ops
    except ImportError as error:
        raise ValueError(
            "attention backend 'xformers' needs the xformers package, which cannot be imported here; "
            "install it (pip install xformers) or use backend 'sdpa'"
        ) from error
    return ops


BACKENDS: dict[str, Callable[..., Tensor]] = {"sdpa": _sdpa, "xformers": _xformers, "reference": _reference}


def check_backend(name: str) -> str:
    """Return `name` if it is a backend that can be used here, else raise a ValueError that says what is possible."""
    if name not in BACKENDS:
        raise ValueError(f"attention backend must be one of {sorted(BACKENDS)}, got {name!r}")
    if name == "xformers":
        _import_xformers()
    return name


def current_backend(chosen: str | None = None) -> str:
    """The backend of a call: the reference while attention is recorded, else the `chosen` one, else the context's."""
    if _record.get() is not None:
        return "reference"
    return chosen or _backend.get()


@contextmanager
def attention_backend(name: str) -> Iterator[None]:
    """Use one backend for every attention call inside the `with` block (this thread or task only)."""
    token = _backend.set(check_backend(name))
    try:
        yield
    finally:
        _backend.reset(token)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    backend: str | None = None,
    layer: int | None = None,
    smoothing: float = 0.0,
) -> Tensor:
    """Scaled dot-product attention of `query` [B, H, Nq, d] over `key`, `value` [B, Hkv, Nk, d] -> [B, H, Nq, d].

    `mask` (bool, True = may look, or additive) broadcasts to [B, H, Nq, Nk]. `causal` means the queries are the last Nq
    of the keys' positions. Hkv divides H. `scale` defaults to d ** -0.5.
    `layer`: under which number `record_attention` keeps the probabilities.
    `smoothing`: with it, keys that the `mask` hides keep a little weight, see `smoothed_weights` for the masks it takes.
    """
    if smoothing:
        weights = smoothed_weights(query, key, mask, smoothing, causal, scale)
        record = _record.get()
        if record is not None and layer is not None and record.wants(layer):
            record[layer].append(weights)
        return _weighted(weights, query, value)
    if causal:
        if query.shape[2] == 1:
            causal = False
        elif mask is not None or query.shape[2] != key.shape[2]:
            allowed = causal_mask(query.shape[2], key.shape[2], query.device)
            mask = allowed if mask is None else additive_mask(mask, query.dtype) + additive_mask(allowed, query.dtype)
            causal = False
    if mask is not None and mask.dtype != torch.bool and mask.dtype != query.dtype:
        mask = mask.to(query.dtype)
    record = _record.get()
    if record is not None and layer is not None and record.wants(layer):
        weights = attention_weights(query, key, mask, causal, scale)
        record[layer].append(weights)
        return _weighted(weights, query, value)
    return BACKENDS[backend or _backend.get()](query, key, value, mask, causal, scale)
