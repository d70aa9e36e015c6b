"""The visual tokenizer of LaVIT (jy0205/LaVIT, commit 8cde9b4f; arXiv 2309.04669) -> `LaVITTokenizer` and `LaVITDecoder`.

`tokenizer_encoder.bin` holds the selector, the merger and the codes, `eva_vitg_psz14.bin` the vision transformer, `visual_weight.bin`
what images are read with, `tokenizer_decoder.bin` and `highres_tokenizer_decoder.bin` the decoders for Stable Diffusion 1.5 and SDXL.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import init_empty_weights

from tokenizers_visual.lavit import LaVITTokenizer
from tokenizers_visual.lavit_decoder import LaVITDecoder

from . import eva
from .containers import CheckpointKeysError, CheckpointShapeError
from .facts import compare, count, read_options, shape
from .keymap import Rule, apply_rules, first_row, load_strict, split_thirds

VISION, READING = "encoder.", "reading."
TOKENIZER_OPTIONS = {
    "vision_heads", "num_heads", "image_size", "patch_size", "dim", "vision_layers", "vision_mlp_hidden", "num_layers", "mlp_hidden",
    "codebook_size", "codebook_dim", "reading_dim",
}  # fmt: skip
DECODER_OPTIONS = {
    "num_heads", "pool_heads", "code_dim", "dim", "num_layers", "mlp_hidden", "num_queries", "feature_dim", "pooled_dim",
}  # fmt: skip


def block_rules(source: str, target: str, own: str, cross: str) -> tuple[Rule, ...]:
    """Blocks with self-attention `own` (fused projections) and cross-attention `cross` (separate ones)."""
    source, target = source + "blocks.{i}.", target + "blocks.{i}."
    fused = tuple(f"{target}attention.{part}.{{leaf}}" for part in ("to_q", "to_k", "to_v"))
    crossing = (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj", "to_out"))
    return (
        Rule(f"{source}norm0.{{leaf}}", f"{target}attention_norm.{{leaf}}"),
        Rule(f"{source}{own}.qkv.{{leaf}}", fused, split_thirds),
        Rule(f"{source}{own}.proj.{{leaf}}", f"{target}attention.to_out.{{leaf}}"),
        Rule(f"{source}norm1.{{leaf}}", f"{target}cross_norm.{{leaf}}"),
        *(Rule(f"{source}{cross}.{a}.{{leaf}}", f"{target}cross_attention.{b}.{{leaf}}") for a, b in crossing),
        Rule(f"{source}norm2.{{leaf}}", f"{target}mlp_norm.{{leaf}}"),
        Rule(f"{source}mlp.{{part}}.{{leaf}}", f"{target}mlp.{{part}}.{{leaf}}"),
    )


def merger_rules(source: str, target: str) -> tuple[Rule, ...]:
    """A merger of tokens."""
    return (
        Rule(f"{source}.ln_vision.{{leaf}}", f"{target}.context_norm.{{leaf}}"),
        *block_rules(f"{source}.", f"{target}.transformer.", "token_causal_attn", "token_cross_attn"),
        Rule(f"{source}.norm.{{leaf}}", f"{target}.transformer.norm_out.{{leaf}}"),
    )


TOKENIZER_RULES: tuple[Rule, ...] = (
    *eva.rules(VISION),
    Rule("token_predictor.in_conv.0.{leaf}", "selector.norm.{leaf}"),
    Rule("token_predictor.in_conv.1.{leaf}", "selector.proj_in.{leaf}"),
    *(Rule(f"token_predictor.out_conv.{2 * k}.{{leaf}}", f"selector.layers.{k}.{{leaf}}") for k in range(3)),
    *merger_rules("causal_encoder", "merger"),
    *merger_rules(f"{READING}causal_encoder", "reading_merger"),
    Rule("encode_task_layer.{i}.{leaf}", "quant_proj.{i}.{leaf}"),
    Rule("quantize.embedding.weight", "quantizer.embedding.weight"),
    Rule("vit_proj.{leaf}", "reading_proj.{leaf}"),
)
DECODER_RULES: tuple[Rule, ...] = (
    Rule("in_proj.{leaf}", "proj_in.{leaf}"),
    Rule("pos_embed", "positions", first_row),
    Rule("query_embed", "transformer.queries", first_row),
    *block_rules("", "transformer.", "self_attn", "cross_attn"),
    Rule("norm.{leaf}", "transformer.norm_out.{leaf}"),
    Rule("decode_task_layer.{i}.{leaf}", "feature_proj.{i}.{leaf}"),
    Rule("unet_proj.{leaf}", "embed_proj.0.{leaf}"),
    Rule("unet_proj_1.{leaf}", "embed_proj.0.{leaf}"),
    Rule("unet_proj_2.{leaf}", "embed_proj.1.{leaf}"),
    Rule("unet_attnpool.positional_embedding", "pool.positions"),
    *(Rule(f"unet_attnpool.{part}_proj.{{leaf}}", f"pool.to_{part}.{{leaf}}") for part in "qkv"),
    Rule("unet_attnpool.c_proj.{leaf}", "pool.to_out.{leaf}"),
)


def is_decoder(state: Mapping[str, torch.Tensor]) -> bool:
    """Whether `state` is that of a decoder."""
    return "query_embed" in state


def convert_tokenizer(
    state: Mapping[str, torch.Tensor],
    *,
    vision: Mapping[str, torch.Tensor] | None = None,
    reading: Mapping[str, torch.Tensor] | None = None,
    config: Any = None,
    dtype: torch.dtype | None = None,
) -> LaVITTokenizer:
    """The tokenizer in the tensors `state` of `tokenizer_encoder.bin`.

    Args:
        vision: tensors of `eva_vitg_psz14.bin`; not needed where `state` has `encoder.*`.
        reading: tensors of `visual_weight.bin`; without them images are read with what `state` has.
        config: a dict, or a JSON file: heads where widths are not the published ones (`vision_heads`, `num_heads`).
        dtype: of the weights; None keeps the files'.
    """
    options = read_options(config, {}, TOKENIZER_OPTIONS)
    state = dict(state)
    if vision is not None:
        state |= {VISION + name: tensor for name, tensor in vision.items()}
    if not any(name.startswith(VISION) for name in state):
        raise CheckpointKeysError(
            f"the checkpoint lacks {VISION}*: give the file of the vision transformer (eva_vitg_psz14.bin) as `vision`.",
            missing=[f"{VISION}*"],
        )
    for name, tensor in (reading or {}).items():
        if name.startswith("causal_encoder."):
            state[READING + name] = tensor
        elif name not in state or name.startswith("vit_proj."):
            state[name] = tensor
        elif not torch.equal(state[name], tensor):
            raise CheckpointShapeError(
                f"{name} differs between the tokenizer's file and `reading`: it must be the same."
            )
    state = eva.joined_biases(state, VISION)
    with init_empty_weights():
        model = LaVITTokenizer(**_tokenizer_arguments(state, options))
    return load_strict(model, apply_rules(state, TOKENIZER_RULES), TOKENIZER_RULES, dtype=dtype)


def _tokenizer_arguments(state: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> dict[str, Any]:
    codebook_size, codebook_dim = shape(state, "quantize.embedding.weight", 2)
    found: dict[str, Any] = {
        **eva.sizes(state, VISION),
        "num_layers": count(state, r"causal_encoder\.blocks\.(\d+)\."),
        "mlp_hidden": shape(state, "causal_encoder.blocks.0.mlp.fc1.weight", 2)[0],
        "codebook_size": codebook_size,
        "codebook_dim": codebook_dim,
        "reading_dim": shape(state, "vit_proj.weight", 2)[0] if "vit_proj.weight" in state else None,
    }
    compare(options, found)
    return {
        **found,
        "vision_heads": eva.num_heads(found["dim"], options.get("vision_heads"), "vision_heads"),
        "num_heads": eva.num_heads(found["dim"], options.get("num_heads"), "num_heads"),
        "separate_reading": any(name.startswith(READING) for name in state),
    }


def convert_decoder(
    state: Mapping[str, torch.Tensor], *, config: Any = None, dtype: torch.dtype | None = None
) -> LaVITDecoder:
    """The decoder in the tensors `state` of `tokenizer_decoder.bin` or `highres_tokenizer_decoder.bin`.

    Args:
        config: a dict, or a JSON file: heads where widths are not the published ones (`num_heads`, `pool_heads`).
        dtype: of the weights; None keeps the file's.
    """
    options = read_options(config, {}, DECODER_OPTIONS)
    dim, code_dim = shape(state, "in_proj.weight", 2)
    pooled = "unet_attnpool.c_proj.weight" in state
    projections = ("unet_proj_1", "unet_proj_2") if "unet_proj_1.weight" in state else ("unet_proj",)
    found: dict[str, Any] = {
        "code_dim": code_dim,
        "dim": dim,
        "num_layers": count(state, r"blocks\.(\d+)\."),
        "mlp_hidden": shape(state, "blocks.0.mlp.fc1.weight", 2)[0],
        "num_queries": shape(state, "query_embed", 3)[1],
        "feature_dim": shape(state, "decode_task_layer.2.weight", 2)[0],
        "pooled_dim": shape(state, "unet_attnpool.c_proj.weight", 2)[0] if pooled else None,
    }
    compare(options, found)
    arguments: dict[str, Any] = {
        **found,
        "num_heads": eva.num_heads(dim, options.get("num_heads"), "num_heads"),
        "embed_dims": [shape(state, f"{name}.weight", 2)[0] for name in projections],
    }
    if pooled:
        given = options.get("pool_heads", arguments["num_heads"])
        arguments["pool_heads"] = eva.num_heads(found["feature_dim"], given, "pool_heads")
    with init_empty_weights():
        model = LaVITDecoder(**arguments)
    return load_strict(model, apply_rules(state, DECODER_RULES), DECODER_RULES, dtype=dtype)
