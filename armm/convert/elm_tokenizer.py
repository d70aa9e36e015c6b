"""The flat block lists of ELM's binary autoencoder -> the levels of our coders.

The authors number all blocks of a coder in one list, so what a number means depends on the sizes. Every block is recognised by its
tensors, and the rules of a file are made from the list that is found.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .containers import CheckpointKeysError, CheckpointShapeError
from .facts import compare, count, shape
from .keymap import Rule, squeeze_convolution

# What only blocks of one kind have.
_MARKS = {"norm1.weight": "residual", "q.weight": "attention", "conv.weight": "resample"}


@dataclass
class _Level:
    """The blocks of one resolution, by their numbers in the authors' list."""

    residual: list[int] = field(default_factory=list)
    attention: list[int] = field(default_factory=list)
    resample: int | None = None


def tokenizer_layout(
    state: Mapping[str, torch.Tensor], options: Mapping[str, Any]
) -> tuple[dict[str, Any], tuple[Rule, ...]]:
    """Init arguments of `BinaryTokenizer` for the tensors of an autoencoder, and the rules that fill it."""
    if options.get("use_tanh"):
        raise ValueError("`use_tanh` autoencoders, whose bits are -1 and 1, were never published and are not supported.")
    encoder, generator = _kinds(state, "encoder.blocks"), _kinds(state, "generator.blocks")
    norm_first = generator[0] == "norm"
    found_ends = ("convolution", *encoder[-5:]), (*generator[norm_first : 4 + norm_first], *generator[-2:])
    middle, ends = ("residual", "attention", "residual"), ("norm", "convolution")
    if encoder[0] != "convolution" or found_ends != (("convolution", *middle, *ends), ("convolution", *middle, *ends)):
        raise CheckpointKeysError(f"these are no coders of ELM's autoencoder: blocks {encoder} and {generator}.")
    first, last = norm_first + 4, len(encoder)
    down = _levels(encoder, range(1, last - 5))
    up = _levels(generator, range(first, len(generator) - 2))
    if len(down) != len(up):
        raise CheckpointShapeError(f"the encoder has {len(down)} levels, the generator {len(up)}.")
    base, in_channels = shape(state, "encoder.blocks.0.weight", 4)[:2]
    multipliers = [_multiplier(state, f"encoder.blocks.{level.residual[0]}", base) for level in down]
    if multipliers != [_multiplier(state, f"generator.blocks.{level.residual[0]}", base) for level in reversed(up)]:
        raise CheckpointShapeError("the levels of the encoder and the generator differ in width.")
    bits, z_channels = shape(state, "quantize.embed.weight", 2)
    sub_codes = options.get("token_each", 1)
    found = {"codebook_size": bits, "emb_dim": z_channels, "nf": base, "ch_mult": multipliers, "n_channels": in_channels}
    compare(options, {**found, "norm_first": norm_first})
    if not isinstance(sub_codes, int) or sub_codes < 1 or bits % sub_codes:
        raise ValueError(f"`token_each` must cut the {bits} bits into equal sub-codes, got {sub_codes!r}.")
    compare(options, {"code_dim": bits // sub_codes})
    arguments = {
        "in_channels": in_channels,
        "base_channels": base,
        "channel_multipliers": multipliers,
        "encoder_blocks": [len(level.residual) for level in down],
        "decoder_blocks": [len(level.residual) for level in reversed(up)],
        "encoder_attention": [bool(level.attention) for level in down],
        "decoder_attention": [bool(level.attention) for level in reversed(up)],
        "z_channels": z_channels,
        "bits": bits,
        "sub_codes": sub_codes,
        "norm_first": norm_first,
        "norm_groups": options.get("norm_groups", 32),
    }
    rules = [
        Rule("generator.logsigma.{name}.{leaf}", None),  # of a loss that was given up
        Rule("quantize.proj.0.{leaf}", "quantizer.projection.{leaf}", squeeze_convolution),
        Rule("quantize.embed.weight", "quantizer.embedding.weight"),
        Rule("encoder.blocks.0.{leaf}", "encoder.conv_in.{leaf}"),
        *_end_rules(state, "encoder", "encoder", last - 5, last - 2),
        *_level_rules(state, "encoder", "encoder", down, "downsample"),
        Rule(f"generator.blocks.{int(norm_first)}.{{leaf}}", "decoder.conv_in.{leaf}"),
        *_end_rules(state, "generator", "decoder", norm_first + 1, len(generator) - 2),
        *_level_rules(state, "generator", "decoder", up, "upsample"),
    ]
    if norm_first:
        rules.append(Rule("generator.blocks.0.{leaf}", "decoder.norm_in.{leaf}"))
    return arguments, tuple(rules)


def _kinds(state: Mapping[str, torch.Tensor], source: str) -> list[str]:
    """What every block of a list is."""
    kinds = []
    for i in range(count(state, re.escape(source) + r"\.(\d+)\.")):
        kind = next((kind for mark, kind in _MARKS.items() if f"{source}.{i}.{mark}" in state), None)
        if kind is None:
            weight = state.get(f"{source}.{i}.weight")
            if weight is None:
                raise CheckpointKeysError(f"the checkpoint lacks {source}.{i}.weight.", missing=[f"{source}.{i}.weight"])
            kind = "convolution" if weight.ndim == 4 else "norm"
        kinds.append(kind)
    return kinds


def _levels(kinds: list[str], numbers: range) -> list[_Level]:
    """Blocks between the ends of a coder, cut where the resolution changes."""
    levels = [_Level()]
    for i in numbers:
        if kinds[i] == "residual":
            levels[-1].residual.append(i)
        elif kinds[i] == "attention":
            levels[-1].attention.append(i)
        elif kinds[i] == "resample":
            levels[-1].resample = i
            levels.append(_Level())
        else:
            raise CheckpointKeysError(f"block {i} is a {kinds[i]} in the middle of a coder: {kinds}.")
    if any(not level.residual or len(level.attention) not in (0, len(level.residual)) for level in levels):
        raise CheckpointKeysError(f"every level needs residual blocks, with attention after all or none: {kinds}.")
    return levels


def _multiplier(state: Mapping[str, torch.Tensor], block: str, base: int) -> int:
    width = shape(state, f"{block}.conv1.weight", 4)[0]
    if width % base:
        raise CheckpointShapeError(f"{block} has {width} channels, no multiple of the base width {base}.")
    return width // base


def _residual_rules(state: Mapping[str, torch.Tensor], source: str, target: str) -> tuple[Rule, ...]:
    rules = tuple(Rule(f"{source}.{part}.{{leaf}}", f"{target}.{part}.{{leaf}}") for part in ("norm1", "conv1", "norm2", "conv2"))
    # Stored in every block, used only where the width changes.
    inside, outside = shape(state, f"{source}.conv1.weight", 4)[1::-1]
    return (*rules, Rule(f"{source}.conv_out.{{leaf}}", f"{target}.shortcut.{{leaf}}" if inside != outside else None))


def _attention_rules(source: str, target: str) -> tuple[Rule, ...]:
    names = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out"}
    projections = (
        Rule(f"{source}.{a}.{{leaf}}", f"{target}.{b}.{{leaf}}", squeeze_convolution) for a, b in names.items()
    )
    return (Rule(f"{source}.norm.{{leaf}}", f"{target}.norm.{{leaf}}"), *projections)


def _end_rules(state: Mapping[str, torch.Tensor], theirs: str, ours: str, middle: int, end: int) -> tuple[Rule, ...]:
    blocks = f"{theirs}.blocks."
    return (
        *_residual_rules(state, f"{blocks}{middle}", f"{ours}.mid_block1"),
        *_attention_rules(f"{blocks}{middle + 1}", f"{ours}.mid_attention"),
        *_residual_rules(state, f"{blocks}{middle + 2}", f"{ours}.mid_block2"),
        Rule(f"{blocks}{end}.{{leaf}}", f"{ours}.norm_out.{{leaf}}"),
        Rule(f"{blocks}{end + 1}.{{leaf}}", f"{ours}.conv_out.{{leaf}}"),
    )


def _level_rules(
    state: Mapping[str, torch.Tensor], theirs: str, ours: str, levels: list[_Level], resample: str
) -> tuple[Rule, ...]:
    rules: list[Rule] = []
    for i, level in enumerate(levels):
        target = f"{ours}.levels.{i}"
        for j, number in enumerate(level.residual):
            rules += _residual_rules(state, f"{theirs}.blocks.{number}", f"{target}.blocks.{j}")
        for j, number in enumerate(level.attention):
            rules += _attention_rules(f"{theirs}.blocks.{number}", f"{target}.attentions.{j}")
        if level.resample is not None:
            rules.append(Rule(f"{theirs}.blocks.{level.resample}.conv.{{leaf}}", f"{target}.{resample}.conv.{{leaf}}"))
    return tuple(rules)
