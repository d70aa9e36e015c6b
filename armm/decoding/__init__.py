"""Decoding strategies, samplers and guidance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from armm.decoding.base import DecodingOutput, TokenStream
from armm.decoding.beam import BeamSearch
from armm.decoding.guidance import ContextGuidance, Guidance
from armm.decoding.interleaved import InterleavedDecoding, SequenceOutput
from armm.decoding.likelihood import text_log_likelihood
from armm.decoding.masked import MaskedLatentDecoding
from armm.decoding.masked_tokens import MaskedTokenDecoding
from armm.decoding.neighboring import NeighboringDecoding
from armm.decoding.next_latent import NextLatentDecoding, NextLatentOutput
from armm.decoding.next_scale import NextScaleDecoding, NextScaleOutput, scale_masks
from armm.decoding.next_scale_flow import NextScaleFlowDecoding, NextScaleFlowOutput
from armm.decoding.next_token import NextTokenDecoding
from armm.decoding.next_x import NextXDecoding, NextXOutput
from armm.decoding.opera import OPERA
from armm.decoding.parallel_groups import ParallelGroupsDecoding
from armm.decoding.pivots import PivotLatentDecoding
from armm.decoding.sampling import NoiseSource, Sampler, top_k_filter, top_p_filter
from armm.decoding.text import TextOutput, decode_text, stream_text
from armm.decoding.token_shuffle import TokenShuffleDecoding
from armm.decoding.vocabulary import Grammar, ImageBlock

# name -> strategy class; each is a component that a pipeline saves and swaps like a scheduler
DECODING_STRATEGIES: dict[str, Any] = {
    "next_latent": NextLatentDecoding,
    "next_token": NextTokenDecoding,
    "interleaved": InterleavedDecoding,
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
    "OPERA",
    "BeamSearch",
    "ContextGuidance",
    "DecodingOutput",
    "Grammar",
    "Guidance",
    "ImageBlock",
    "InterleavedDecoding",
    "MaskedLatentDecoding",
    "MaskedTokenDecoding",
    "NeighboringDecoding",
    "NextLatentDecoding",
    "NextLatentOutput",
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
    "SequenceOutput",
    "TextOutput",
    "TokenShuffleDecoding",
    "TokenStream",
    "build_strategy",
    "decode_text",
    "scale_masks",
    "stream_text",
    "text_log_likelihood",
    "top_k_filter",
    "top_p_filter",
]
