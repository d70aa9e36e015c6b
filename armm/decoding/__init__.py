"""Decoding strategies, samplers and guidance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from armm.decoding.base import DecodingOutput, TokenStream
from armm.decoding.guidance import Guidance
from armm.decoding.likelihood import text_log_likelihood
from armm.decoding.masked import MaskedLatentDecoding
from armm.decoding.masked_tokens import MaskedTokenDecoding
from armm.decoding.neighboring import NeighboringDecoding
from armm.decoding.next_scale import NextScaleDecoding, NextScaleOutput, scale_masks
from armm.decoding.next_scale_flow import NextScaleFlowDecoding, NextScaleFlowOutput
from armm.decoding.next_token import NextTokenDecoding
from armm.decoding.next_x import NextXDecoding, NextXOutput
from armm.decoding.parallel_groups import ParallelGroupsDecoding
from armm.decoding.pivots import PivotLatentDecoding
from armm.decoding.sampling import NoiseSource, Sampler, top_k_filter, top_p_filter
from armm.decoding.text import TextOutput, decode_text
from armm.decoding.token_shuffle import TokenShuffleDecoding

# name -> strategy class; each is a component that a pipeline saves and swaps like a scheduler
DECODING_STRATEGIES: dict[str, Any] = {
    "next_token": NextTokenDecoding,
    "masked_latents": MaskedLatentDecoding,
    "masked_tokens": MaskedTokenDecoding,
    "neighboring": NeighboringDecoding,
    "pivot_latents": PivotLatentDecoding,
    "parallel_groups": ParallelGroupsDecoding,
    "token_shuffle": TokenShuffleDecoding,
    "next_scale": NextScaleDecoding,
    "next_scale_flow": NextScaleFlowDecoding,
    "next_x": NextXDecoding,
}


def build_strategy(config: Mapping[str, Any]) -> Any:
    """The strategy that a config names, `{"type": name, **arguments}`.

    Raises:
        ValueError: unknown name or arguments.
    """
    options = dict(config)
    kind = options.pop("type", None)
    if kind not in DECODING_STRATEGIES:
        raise ValueError(f"decoding type must be one of {sorted(DECODING_STRATEGIES)}, got {kind!r}")
    try:
        return DECODING_STRATEGIES[kind](**options)
    except TypeError as error:
        raise ValueError(f"decoding of type {kind!r}: {error}") from error


__all__ = [
    "DECODING_STRATEGIES",
    "DecodingOutput",
    "Guidance",
    "MaskedLatentDecoding",
    "MaskedTokenDecoding",
    "NeighboringDecoding",
    "NextScaleDecoding",
    "NextScaleFlowDecoding",
    "NextScaleFlowOutput",
    "NextScaleOutput",
    "NextTokenDecoding",
    "NextXDecoding",
    "NextXOutput",
    "NoiseSource",
    "ParallelGroupsDecoding",
    "PivotLatentDecoding",
    "Sampler",
    "TextOutput",
    "TokenShuffleDecoding",
    "TokenStream",
    "build_strategy",
    "decode_text",
    "scale_masks",
    "text_log_likelihood",
    "top_k_filter",
    "top_p_filter",
]
