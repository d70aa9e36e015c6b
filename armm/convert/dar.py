"""D-AR's files (arXiv 2505.23660, showlab/D-AR, commit 3fb0f2d) -> our modules.

Reads the tokenizer (`D-AR-tokenizer_v1.pt`) and the class-conditional transformers (`D-AR-L-360K.pt`, ...), which are LlamaGen's with
another numbering of positions. Sizes are read off the tensors; what they do not say of the tokenizer (how many of the stored queries
are used, how they make steps) is in its file, or comes from `config`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import init_empty_weights

from armm.decoding.next_token import NextTokenDecoding
from armm.hub import resolve_file
from armm.model import AutoregressiveModel
from tokenizers_visual.dar import DARTokenizer

from . import llamagen
from .containers import CheckpointKeysError, CheckpointShapeError, load_options, load_state_dict
from .facts import compare, count, dtype_of, read_mapping, read_options, shape
from .keymap import Rule, apply_rules, load_strict, squeeze_convolution

PRESET = {"guidance_scale": 4.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}  # the authors' demo
# Options of the tokenizer that no tensor tells: the authors' names -> ours.
_TOLD = {
    "num_all_queries": "num_tokens",
    "num_query_groups": "num_groups",
    "queries_per_step": "window",
    "num_denoising_steps": "num_steps",
    "sampling_resolution": "image_size",
    "rope_base_len": "rotary_theta",
    "diff_decoder.rope_base_len": "pixel_rotary_theta",
    "diff_decoder.data_std": "data_std",
    "diff_decoder.time_shift": "time_shift",
}
_READ = {
    "encoder_patch_size": "patch_size",
    "num_encoder_layers": "encoder_layers",
    "num_decoder_layers": "decoder_layers",
    "encoder_dim": "encoder_dim",
    "decoder_dim": "decoder_dim",
    "vq_dim": "codebook_dim",
    "vq_codebook_size": "codebook_size",
    "diff_decoder.in_dim": "in_channels",
    "diff_decoder.out_dim": "in_channels",
    "diff_decoder.dim": "pixel_dim",
    "diff_decoder.cond_dim": "decoder_dim",
    "diff_decoder.patch_size": "pixel_patch_size",
    "diff_decoder.depth": "pixel_layers",
}
# Options of an architecture that was not published, and those without a meaning here.
_FIXED = {"vq_enable": True, "diff_decoder.mlp_head": False, "diff_decoder.share_time_encoding": False}
_IGNORED = {"output_resolution", "query_low_rank", "diff_decoder.repa_layer"}


def _used_rows(tensor: torch.Tensor, context: Mapping[str, Any]) -> torch.Tensor:
    return tensor[: context["num_tokens"]]


def _attention_rules(source: str, target: str) -> tuple[Rule, ...]:
    names = {"q": "to_q", "k": "to_k", "v": "to_v", "proj": "to_out", "q_norm": "query_norm", "k_norm": "key_norm"}
    return tuple(Rule(f"{source}.{a}.{{leaf}}", f"{target}.{b}.{{leaf}}") for a, b in names.items())


def _coder_rules(source: str, target: str) -> tuple[Rule, ...]:
    theirs, ours = f"{source}.{{i}}", f"{target}.blocks.{{i}}"
    return (
        Rule(f"{theirs}.gate1", f"{ours}.attention_gate"),
        Rule(f"{theirs}.gate2", f"{ours}.mlp_gate"),
        Rule(f"{theirs}.norm1.{{leaf}}", f"{ours}.attention_norm.{{leaf}}"),
        Rule(f"{theirs}.norm2.{{leaf}}", f"{ours}.mlp_norm.{{leaf}}"),
        *_attention_rules(f"{theirs}.attention", f"{ours}.attention"),
        Rule(f"{theirs}.mlp.{{layer}}.{{leaf}}", f"{ours}.mlp.{{layer}}.{{leaf}}"),
    )


_NET, _FLOW = "diff_decoder.net.blocks.{i}", "flow.blocks.{i}"
TOKENIZER_RULES: tuple[Rule, ...] = (
    Rule("quantize.codebook_used", None),  # which codes training used lately
    Rule("diff_decoder.net.repa_out.{layer}.{leaf}", None),  # of a loss of the training
    Rule("patchify.{leaf}", "patch_embedding.{leaf}"),
    Rule("query_embedding.weight", "queries", _used_rows),
    Rule("query_linear.{leaf}", "query_proj.{leaf}"),
    *_coder_rules("encoder_layers", "encoder"),
    Rule("quant_in_conv.weight", "quant_proj.weight", squeeze_convolution),
    Rule("quantize.embedding.weight", "quantizer.embedding.weight"),
    Rule("quant_out_conv.weight", "post_quant_proj.weight", squeeze_convolution),
    Rule("decoder_embedding.weight", "decoder_positions", _used_rows),
    *_coder_rules("decoder_layers", "decoder"),
    Rule("diff_decoder.net.cond_mlp.{leaf}", "flow.condition_proj.{leaf}"),
    Rule("diff_decoder.net.conv_in.{leaf}", "flow.proj_in.{leaf}", squeeze_convolution),
    Rule("diff_decoder.net.conv_out.{leaf}", "flow.proj_out.{leaf}", squeeze_convolution),
    *_attention_rules(f"{_NET}.attention", f"{_FLOW}.block.attention"),
    *_attention_rules(f"{_NET}.cross_attn", f"{_FLOW}.cross_attention"),
    Rule(f"{_NET}.mlp.{{layer}}.{{leaf}}", f"{_FLOW}.block.mlp.{{layer}}.{{leaf}}"),
    Rule(f"{_NET}.adaLN_modulation.1.{{leaf}}", f"{_FLOW}.block.modulation.projection.linear.{{leaf}}"),
    *(Rule(f"{_NET}.time_embed.mlp.{a}.{{leaf}}", f"{_FLOW}.time_embedding.{b}.{{leaf}}") for a, b in ((0, "fc1"), (2, "fc2"))),
    *(Rule(f"{_NET}.cond_embed.{a}.{{leaf}}", f"{_FLOW}.condition_{b}.{{leaf}}") for a, b in ((0, "fc1"), (2, "fc2"))),
)  # fmt: skip


def convert(
    path: Any,
    *,
    config: Any = None,
    dtype: torch.dtype | None = None,
    use_ema: bool = False,
) -> AutoregressiveModel | DARTokenizer:
    """The transformer or the tokenizer in the file `path`.

    Args:
        path: a file of the authors, or one their trainers wrote.
        config: a dict, or a JSON file. For a transformer, options as of `armm.convert.llamagen.convert`; `block_size` is the number of
            ids of an image (default 256). For a tokenizer, options by our names or the authors', nested as theirs or not;
            those in the file go before the defaults, and values that the tensors contradict are a ValueError.
        dtype: of the weights; None keeps the file's.
        use_ema: insist on the moving average, which a tokenizer's file that holds one gives anyway.
    """
    state = load_state_dict(path, use_ema=use_ema, keys=("ema",))
    if "patchify.weight" in state:
        return convert_state_dict(
            state, config={**_flat(load_options(path, "config")), **_flat(read_mapping(config))}, dtype=dtype
        )
    return convert_state_dict(state, config=config, dtype=dtype)


def convert_state_dict(
    state: Mapping[str, torch.Tensor], *, config: Any = None, dtype: torch.dtype | None = None
) -> AutoregressiveModel | DARTokenizer:
    """Like `convert`, from tensors under the authors' names."""
    if "patchify.weight" in state:
        arguments = tokenizer_arguments(state, read_mapping(config))
        with init_empty_weights():
            tokenizer = DARTokenizer(**arguments)
        converted = apply_rules(state, TOKENIZER_RULES, {"num_tokens": arguments["num_tokens"]})
        return load_strict(tokenizer, converted, TOKENIZER_RULES, dtype=dtype)  # type: ignore[return-value]
    if "tok_embeddings.weight" in state:
        arguments = transformer_arguments(
            state, read_options(config, llamagen.OPTION_NAMES, llamagen.TRANSFORMER_OPTIONS)
        )
        with init_empty_weights():
            model = AutoregressiveModel(**arguments)
        rows = {"qkv_rows": llamagen.qkv_rows(arguments["transformer"])}
        converted = apply_rules(state, llamagen.TRANSFORMER_RULES, rows)
        return load_strict(model, converted, llamagen.TRANSFORMER_RULES, dtype=dtype)  # type: ignore[return-value]
    raise CheckpointKeysError(
        "this is no D-AR checkpoint: it holds neither 'tok_embeddings.weight' (a transformer) nor 'patchify.weight' (a tokenizer), "
        f"but {', '.join(sorted(state)[:4])}, ...",
        missing=["tok_embeddings.weight", "patchify.weight"],
    )


def transformer_arguments(state: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> dict[str, Any]:
    """Init arguments of `AutoregressiveModel`: LlamaGen's, with the class and the ids numbered along one line."""
    if "grid" in options:
        raise ValueError("D-AR's ids have no grid: pass config={'block_size': ...}, how many of them make an image.")
    tokens = options.get("block_size", 256)
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise ValueError(f"`block_size` must be a positive integer, got {tokens!r}.")
    arguments = llamagen.transformer_arguments(state, options)
    if arguments["condition"]["type"] != "class":
        raise ValueError("D-AR's published transformers are conditioned on classes; this one is not.")
    trunk = arguments["transformer"]
    trunk["rotary_axes"] = [trunk["dim"] // trunk["num_heads"]]
    return {**arguments, "grid": (1, tokens), "rotary_condition": True}


def tokenizer_arguments(state: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
    """Init arguments of `DARTokenizer` for the tensors of a tokenizer and its options."""
    options = _tokenizer_options(_flat(config))
    encoder_dim, in_channels, patch_size, _ = shape(state, "patchify.weight", 4)
    codebook_size, codebook_dim = shape(state, "quantize.embedding.weight", 2)
    pixel_dim, patch_channels = shape(state, "diff_decoder.net.conv_in.weight", 4)[:2]
    pixel_patch_size = math.isqrt(patch_channels // in_channels)
    if in_channels * pixel_patch_size**2 != patch_channels:
        raise CheckpointShapeError(
            f"diff_decoder.net.conv_in.weight reads {patch_channels} channels, which are no square patches of {in_channels} channels."
        )
    rows, query_dim = shape(state, "query_embedding.weight", 2)
    found = {
        "in_channels": in_channels,
        "patch_size": patch_size,
        "pixel_patch_size": pixel_patch_size,
        "codebook_size": codebook_size,
        "codebook_dim": codebook_dim,
        "encoder_dim": encoder_dim,
        "encoder_layers": count(state, r"encoder_layers\.(\d+)\."),
        "decoder_dim": shape(state, "quant_out_conv.weight", 4)[0],
        "decoder_layers": count(state, r"decoder_layers\.(\d+)\."),
        "pixel_dim": pixel_dim,
        "pixel_layers": count(state, r"diff_decoder\.net\.blocks\.(\d+)\."),
    }
    compare(options, found)
    told = {name: options[name] for name in _TOLD.values() if name in options}
    if not 1 <= told.get("num_tokens", 256) <= rows:
        raise CheckpointShapeError(
            f"`num_tokens` must lie between 1 and the {rows} stored queries, got {told['num_tokens']}."
        )
    return {
        **found,
        "query_dim": query_dim if "query_linear.weight" in state else None,
        "encoder_mlp_hidden": shape(state, "encoder_layers.0.mlp.fc1.weight", 2)[0],
        "decoder_mlp_hidden": shape(state, "decoder_layers.0.mlp.fc1.weight", 2)[0],
        "pixel_mlp_hidden": shape(state, "diff_decoder.net.blocks.0.mlp.fc1.weight", 2)[0],
        "num_tokens": 256,
        **told,
    }


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """The tokenizer's options without nesting: those of the decoder as `diff_decoder.name`."""
    config = config.get("model", config)
    flat = {name: value for name, value in config.items() if not isinstance(value, Mapping)}
    for part, options in config.items():
        if isinstance(options, Mapping):
            flat |= {f"{part}.{name}": value for name, value in options.items()}
    return flat


def _tokenizer_options(config: Mapping[str, Any]) -> dict[str, Any]:
    names = {**_TOLD, **_READ}
    known = {*names.values(), *names, *_FIXED, *_IGNORED}
    unknown = sorted(name for name in config if name not in known)
    if unknown:
        raise ValueError(f"unknown `config` options {', '.join(unknown)}: choose from {', '.join(sorted(known))}.")
    for name, value in _FIXED.items():
        if config.get(name, value) != value:
            raise ValueError(f"`config` says {name} = {config[name]!r}: only {value!r} was published and is supported.")
    return {
        names.get(name, name): value for name, value in config.items() if name not in _FIXED and name not in _IGNORED
    }


def load_single_file(
    path: Any,
    *,
    tokenizer: Any,
    config: Any = None,
    tokenizer_config: Any = None,
    dtype: torch.dtype | dict[str, torch.dtype] | None = None,
    generation_config: dict[str, Any] | None = None,
    use_ema: bool = False,
    **hub_options: Any,
) -> dict[str, Any]:
    """The components of a `DARPipeline` from the authors' files.

    Args:
        path: the transformer's file, or a link to it.
        tokenizer: the tokenizer's file or link, or a `DARTokenizer`.
        config, tokenizer_config: options for the two files, see `convert`.
        dtype: of the weights; a dict names `"transformer"`, `"tokenizer"` and `"default"`.
        generation_config: settings that replace the family's preset.
        use_ema: take the moving average of the transformer's weights.
        hub_options: `revision`, `cache_dir`, `local_files_only`, `token` for files on the hub.
    """
    local = resolve_file(path, **hub_options)
    transformer = convert(local, config=config, dtype=dtype_of(dtype, "transformer"), use_ema=use_ema)
    if not isinstance(transformer, AutoregressiveModel):
        raise ValueError(f"{path} holds a tokenizer, not a transformer: pass it as `tokenizer=`.")
    if not isinstance(tokenizer, DARTokenizer):
        source = tokenizer
        tokenizer = convert(
            resolve_file(source, **hub_options), config=tokenizer_config, dtype=dtype_of(dtype, "tokenizer")
        )
        if not isinstance(tokenizer, DARTokenizer):
            raise ValueError(f"`tokenizer` {source} holds a transformer, not a tokenizer.")
    return {
        "tokenizer": tokenizer,
        "transformer": transformer,
        "decoding": NextTokenDecoding(),
        "generation_config": {**PRESET, **(generation_config or {})},
    }
