"""AToken (arXiv 2509.14476; apple/ml-atoken, commit 3f5afdc) -> `ATokenTokenizer`.

Reads the authors' `atoken-*.pt`, plain files of tensors. Sizes are read off them; attention heads of the encoder, the shape of patches
and whether there is a quantizer (which has no tensors of its own) are not in the file: the published ones are known, others come from
`config`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights

from armm.hub import resolve_file
from tokenizers_visual.atoken import ATokenTokenizer
from tokenizers_visual.quantizers import FSQ_LEVELS

from .containers import CheckpointShapeError, UnreadableCheckpointError, load_state_dict
from .facts import compare, count, read_mapping, shape
from .keymap import Rule, apply_rules, load_strict, split_thirds
from .mingtok import halves

# The published sizes: width -> attention heads; width of the features -> patch.
PUBLISHED_HEADS = {1152: 16}
PUBLISHED_PATCHES = {3072: (4, 16, 16)}
DISCRETE_FILE = "atoken-sod"  # the discrete one differs from atoken-soc in its use only
GAUSSIANS_FILE = "3d_decode_gs"

# Authors' constructor arguments -> ours.
_OPTION_NAMES = {
    "encoder_model_channels": "encoder_dim",
    "encoder_num_blocks": "encoder_layers",
    "encoder_num_heads": "encoder_heads",
    "encoder_mlp_channels": "encoder_mlp_hidden",
    "decoder_model_channels": "decoder_dim",
    "decoder_num_blocks": "decoder_layers",
    "decoder_num_heads": "decoder_heads",
    "decoder_mlp_channels": "decoder_mlp_hidden",
    "quantizer_codebook_size": "codebook_size",
    "quantizer_num_codebooks": "num_codebooks",
    "quantizer_chunk_size": "chunk_size",
    "temporal_window_size": "window_frames",
}
_OPTIONS = {
    "patch_size", "in_channels", "out_channels", "latent_channels", "use_quantizer", "codebook_size", "num_codebooks", "chunk_size",
    "window_frames", "quantizer_feature_dim",
    *(f"{coder}_{part}" for coder in ("encoder", "decoder") for part in ("dim", "layers", "heads", "mlp_hidden")),
}  # fmt: skip
# Constructor arguments that would make another architecture, with the values of the published ones.
_FIXED: dict[str, tuple[Any, ...]] = {
    "encoder_attn_mode": ("full",), "decoder_attn_mode": ("full",), "encoder_pe_mode": ("joint",), "decoder_pe_mode": ("joint",),
    "encoder_qk_rms_norm": (False,), "decoder_qk_rms_norm": (True,), "encoder_use_bias": (True,), "decoder_use_bias": (False,),
    "encoder_use_rms_norm": (False,), "decoder_use_rms_norm": (True,), "use_decoder": (True,), "quantizer_type": ("fsq",),
}  # fmt: skip


def _coder_rules(coder: str) -> tuple[Rule, ...]:
    theirs, ours = f"{coder}.blocks.{{i}}.", f"{coder}.vit.blocks.{{i}}."
    qkv = tuple(ours + f"attention.{part}.{{leaf}}" for part in ("to_q", "to_k", "to_v"))
    return (
        Rule(f"{coder}.input_layer.{{leaf}}", f"{coder}.input_projection.{{leaf}}"),
        Rule(f"{coder}.pos_embedder.position_embedding.weight", f"{coder}.position_embedding.weight"),
        Rule(theirs + "norm1.{leaf}", ours + "attention_norm.{leaf}"),
        Rule(theirs + "norm2.{leaf}", ours + "mlp_norm.{leaf}"),
        Rule(theirs + "attn.to_qkv.{leaf}", qkv, split_thirds),
        Rule(theirs + "attn.q_rms_norm.gamma", ours + "attention.query_norm.weight"),
        Rule(theirs + "attn.k_rms_norm.gamma", ours + "attention.key_norm.weight"),
        Rule(theirs + "attn.to_out.{leaf}", ours + "attention.to_out.{leaf}"),
        Rule(theirs + "mlp.mlp.0.{leaf}", ours + "mlp.fc1.{leaf}"),
        Rule(theirs + "mlp.mlp.2.{leaf}", ours + "mlp.fc2.{leaf}"),
    )


RULES: tuple[Rule, ...] = (
    *_coder_rules("encoder"),
    Rule("encoder.post_layernorm.{leaf}", "encoder.norm.{leaf}"),
    Rule("encoder.head.probe", "pooling.probe"),
    Rule("encoder.head.attention.to_q.{leaf}", "pooling.attention.to_q.{leaf}"),
    Rule(
        "encoder.head.attention.to_kv.{leaf}",
        ("pooling.attention.to_k.{leaf}", "pooling.attention.to_v.{leaf}"),
        halves,
    ),
    Rule("encoder.head.attention.to_out.{leaf}", "pooling.attention.to_out.{leaf}"),
    Rule("encoder.head.layernorm.{leaf}", "pooling.norm.{leaf}"),
    Rule("encoder.head.mlp.mlp.0.{leaf}", "pooling.mlp.fc1.{leaf}"),
    Rule("encoder.head.mlp.mlp.2.{leaf}", "pooling.mlp.fc2.{leaf}"),
    Rule("proj.weight", "moments_projection.weight"),
    Rule("quantizer.project_in.{leaf}", "quantizer.project_in.{leaf}"),
    Rule("quantizer.project_out.{leaf}", "quantizer.project_out.{leaf}"),
    *_coder_rules("decoder"),
    Rule("decoder.out_norm.weight", "decoder.norm.weight"),
    Rule("decoder.out_layer.weight", "pixel_projection.weight"),
)


def convert(
    path: Any, *, config: Any = None, dtype: torch.dtype | None = None, use_ema: bool = False, **hub_options: Any
) -> ATokenTokenizer:
    """The tokenizer in the authors' file `path`.

    Args:
        path: one of `atoken-soc.pt`, `atoken-sod.pt`, `atoken-soc-s1.pt`, `atoken-soc-s2.pt`, or a file of that layout.
        config: a dict, or a JSON file, with constructor arguments by our names or the authors' (`encoder_num_heads`, `patch_size`,
            `use_quantizer`, `quantizer_codebook_size`, `quantizer_num_codebooks`, ...). A file called `atoken-sod*` has the quantizer of
            the published one unless it says otherwise. Values that the tensors contradict are an error.
        dtype: of the weights; None keeps the file's.
        use_ema: take the moving average stored beside the weights.
        hub_options: of the hub.
    """
    file = resolve_file(path, **hub_options)
    if Path(file).name.startswith(GAUSSIANS_FILE):
        raise UnreadableCheckpointError(
            f"{Path(file).name} is the authors' Gaussian decoder, the layout of whose tensors is not known here: convert an atoken-*.pt, "
            "and train a `GaussianDecoder` of your own."
        )
    options = read_mapping(config)
    if Path(file).name.startswith(DISCRETE_FILE):
        options = {"use_quantizer": True, **options}
    return convert_state_dict(load_state_dict(file, use_ema=use_ema), config=options, dtype=dtype)


def convert_state_dict(
    state: Mapping[str, torch.Tensor], *, config: Any = None, dtype: torch.dtype | None = None
) -> ATokenTokenizer:
    """Like `convert`, from tensors under the authors' names."""
    arguments = tokenizer_arguments(state, _read(config))
    with init_empty_weights():
        model = ATokenTokenizer(**arguments)
    return load_strict(model, apply_rules(state, RULES), RULES, dtype=dtype)  # type: ignore[return-value]


def _read(config: Any) -> dict[str, Any]:
    given = read_mapping(config)
    given = {**given, **(given.pop("arch_cfg", None) or {})}
    for name, allowed in _FIXED.items():
        value = given.pop(name, allowed[0])
        if value not in allowed:
            raise ValueError(
                f"`config` says {name} = {value!r}: only {allowed[0]!r} is supported, the published architecture."
            )
    options = {_OPTION_NAMES.get(name, name): value for name, value in given.items() if value is not None}
    unknown = sorted(set(options) - _OPTIONS)
    if unknown:
        raise ValueError(f"unknown `config` options {', '.join(unknown)}: choose from {', '.join(sorted(_OPTIONS))}.")
    return options


def tokenizer_arguments(state: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> dict[str, Any]:
    """Init arguments of `ATokenTokenizer` for the tensors of a checkpoint."""
    features = shape(state, "encoder.input_layer.weight", 2)[1]
    found: dict[str, Any] = {"latent_channels": shape(state, "proj.weight", 2)[0] // 2}
    for coder in ("encoder", "decoder"):
        table, width = shape(state, f"{coder}.pos_embedder.position_embedding.weight", 2)
        found |= {
            f"{coder}_dim": width,
            f"{coder}_layers": count(state, rf"{coder}\.blocks\.(\d+)\."),
            f"{coder}_mlp_hidden": shape(state, f"{coder}.blocks.0.mlp.mlp.0.weight", 2)[0],
        }
    side = round(table**0.5)
    if side * side != table:
        raise CheckpointShapeError(
            f"decoder.pos_embedder.position_embedding.weight has {table} rows, which are no square."
        )
    heads = shape(state, "decoder.blocks.0.attn.q_rms_norm.gamma", 2)[0]
    compare(options, {**found, "decoder_heads": heads, "out_channels": features})
    patch = options.get("patch_size", PUBLISHED_PATCHES.get(features))
    if patch is None:
        raise ValueError(
            f"patches of {features} numbers are none of the published ones: pass config={{'patch_size': [frames, side, side]}}."
        )
    channels, rest = divmod(features, patch[0] * patch[1] * patch[2])
    # The authors count all numbers of a patch as channels.
    if rest or not channels or options.get("in_channels", features) not in (features, channels):
        raise CheckpointShapeError(
            f"patches of {list(patch)} do not make up the {features} numbers that encoder.input_layer takes."
        )
    own = options.get("encoder_heads", PUBLISHED_HEADS.get(found["encoder_dim"]))
    if not isinstance(own, int) or own < 1 or found["encoder_dim"] % own:
        raise ValueError(
            f"an encoder {found['encoder_dim']} wide is none of the published ones: pass config={{'encoder_heads': ...}}, got {own!r}."
        )
    arguments = {
        **found, "encoder_heads": own, "decoder_heads": heads, "patch_size": list(patch), "in_channels": channels,
        "position_table": side,
    }  # fmt: skip
    if "window_frames" in options:
        arguments["window_frames"] = options["window_frames"]
    return arguments | _quantizer(options, found["latent_channels"])


def _quantizer(options: Mapping[str, Any], latent_channels: int) -> dict[str, Any]:
    """Codebooks of the discrete tokenizer; none where `options` do not ask for a quantizer."""
    if not options.get("use_quantizer", "codebook_size" in options):
        return {"codebook_size": 0}
    size = options.get("codebook_size", 4096)
    if size not in FSQ_LEVELS:
        raise ValueError(f"`codebook_size` must be one of {sorted(FSQ_LEVELS)}, got {size!r}.")
    if options.get("quantizer_feature_dim", latent_channels) != latent_channels:
        raise CheckpointShapeError(
            f"`config` says quantizer_feature_dim = {options['quantizer_feature_dim']}, but latents are {latent_channels} wide."
        )
    return {
        "codebook_size": size,
        "num_codebooks": options.get("num_codebooks", 8),
        "chunk_size": options.get("chunk_size", 1),
    }
