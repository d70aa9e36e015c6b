"""Building blocks: plain modules and functions over torch, known to everything else and knowing nothing of it."""

from __future__ import annotations

from armm.nn.attention import (
    BACKENDS,
    attention,
    attention_backend,
    attention_weights,
    check_backend,
    current_backend,
    record_attention,
    smoothed_weights,
)
from armm.nn.block import Attention, Block, BlockConfig
from armm.nn.bridge import Bridge
from armm.nn.cache import KVCache
from armm.nn.embedders import CaptionEmbedding, LabelEmbedding, Projector, TimeEmbedding
from armm.nn.experts import MixtureOfExperts
from armm.nn.hooks import LayerHook
from armm.nn.linear import FusedLinear
from armm.nn.masks import (
    additive_mask,
    block_causal_mask,
    causal_key_mask,
    causal_mask,
    key_mask,
    merge_causal,
    prefix_mask,
)
from armm.nn.mlp import MLP, GatedMLP, build_mlp, gated_hidden
from armm.nn.modulation import BlockModulation, Modulation, modulate
from armm.nn.norms import LayerNorm, RMSNorm, build_norm, rms_norm
from armm.nn.positions import (
    PositionLayout,
    PositionTable,
    image_layout,
    raster_coordinates,
    resize_positions,
    unified_layout,
)
from armm.nn.rotary import apply_rotary, apply_rotary_half_split, apply_rotary_interleaved, rotary_table
from armm.nn.sincos import sincos_table, video_sincos_table

__all__ = [
    "BACKENDS",
    "MLP",
    "Attention",
    "Block",
    "BlockConfig",
    "BlockModulation",
    "Bridge",
    "CaptionEmbedding",
    "FusedLinear",
    "GatedMLP",
    "KVCache",
    "LabelEmbedding",
    "LayerHook",
    "LayerNorm",
    "MixtureOfExperts",
    "Modulation",
    "PositionLayout",
    "PositionTable",
    "Projector",
    "RMSNorm",
    "TimeEmbedding",
    "additive_mask",
    "apply_rotary",
    "apply_rotary_half_split",
    "apply_rotary_interleaved",
    "attention",
    "attention_backend",
    "attention_weights",
    "block_causal_mask",
    "build_mlp",
    "build_norm",
    "causal_key_mask",
    "causal_mask",
    "check_backend",
    "current_backend",
    "gated_hidden",
    "image_layout",
    "key_mask",
    "merge_causal",
    "modulate",
    "prefix_mask",
    "raster_coordinates",
    "record_attention",
    "resize_positions",
    "rms_norm",
    "rotary_table",
    "sincos_table",
    "smoothed_weights",
    "unified_layout",
    "video_sincos_table",
]
