"""The Chameleon family's VQGAN, in taming's names (`vqgan.ckpt`) or inside a checkpoint of transformers (`model.vqmodel.*`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import init_empty_weights

from tokenizers_visual.vq_tokenizer import VQTokenizer

from .containers import CheckpointKeysError
from .facts import count, shape
from .keymap import Rule, apply_rules, load_strict
from .taming import coder_rules, coder_sizes

VQ_PREFIX = "model.vqmodel."


def tokenizer_rules(levels: int) -> tuple[Rule, ...]:
    """Rules for a VQGAN in taming's names."""
    own = (
        Rule("quantize.embedding.weight", "quantizer.embedding.weight"),
        Rule("quant_conv.{leaf}", "quant_conv.{leaf}"),
        Rule("post_quant_conv.{leaf}", "post_quant_conv.{leaf}"),
    )
    return (*own, *coder_rules("encoder", levels), *coder_rules("decoder", levels))


def tokenizer_arguments(state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Init arguments of `VQTokenizer` for the tensors of a VQGAN, with or without a decoder."""
    sizes = coder_sizes(state)
    multipliers = sizes.pop("channel_multipliers")
    levels = len(multipliers)
    codebook_size, codebook_dim = shape(state, "quantize.embedding.weight", 2)
    arguments = {
        **sizes,
        "encoder_multipliers": multipliers,
        "decoder_multipliers": multipliers,
        "z_channels": shape(state, "quant_conv.weight", 4)[1],
        "codebook_size": codebook_size,
        "codebook_dim": codebook_dim,
        "l2_normalize": False,
        "encoder_attention": _attention(state, "encoder.down", levels),
        "decoder_attention": [False] * levels,
        "mid_attention": any(name.startswith("encoder.mid.attn_1.") for name in state),
        "with_decoder": any(name.startswith("decoder.") for name in state),
    }
    if arguments["with_decoder"]:
        widths = [shape(state, f"decoder.up.{level}.block.0.conv1.weight", 4)[0] for level in range(levels)]
        arguments["decoder_multipliers"] = [width // sizes["base_channels"] for width in widths]
        arguments["decoder_attention"] = _attention(state, "decoder.up", levels)
        arguments["decoder_res_blocks"] = count(state, r"decoder\.up\.0\.block\.(\d+)\.")
    return arguments


def _attention(state: Mapping[str, torch.Tensor], coder: str, levels: int) -> list[bool]:
    return [any(name.startswith(f"{coder}.{level}.attn.") for name in state) for level in range(levels)]


def convert_tokenizer(state: Mapping[str, torch.Tensor], *, dtype: torch.dtype | None = None) -> VQTokenizer:
    """The VQGAN among tensors: those of `vqgan.ckpt`, or of a folder of transformers (`model.vqmodel.*`)."""
    inside = {name.removeprefix(VQ_PREFIX): tensor for name, tensor in state.items() if name.startswith(VQ_PREFIX)}
    state = inside or {name: tensor for name, tensor in state.items() if not name.startswith("loss.")}
    if "quantize.embedding.weight" not in state:
        raise CheckpointKeysError(
            "there is no tokenizer in this checkpoint (Lumina-mGPT's leave it out): give Meta's vqgan.ckpt as `tokenizer=`.",
            missing=["quantize.embedding.weight"],
        )
    arguments = tokenizer_arguments(state)
    rules = tokenizer_rules(len(arguments["encoder_multipliers"]))
    with init_empty_weights():
        tokenizer = VQTokenizer(**arguments)
    return load_strict(tokenizer, apply_rules(state, rules), rules, dtype=dtype)
