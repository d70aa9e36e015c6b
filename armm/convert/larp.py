"""LARP's video tokenizers (arXiv 2410.21264; also the first stage of NAR's videos, arXiv 2503.10696) -> `LARPTokenizer`.

Reads a folder with one file of weights and one `.json` of constructor arguments (the authors' loader and the hub's mixin both write
such folders), or a file of weights alone. Sizes are read off the tensors: widths and depths off the weights, frames and pixels off
the stored position tables, which are then compared with ours and dropped. The one thing tensors never say is the number of
attention heads: it is known for the published width and comes from the arguments otherwise.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights

from armm.nn.sincos import sincos_table, video_sincos_table
from tokenizers_visual.larp import LARPTokenizer

from .containers import CheckpointError, CheckpointKeysError, CheckpointShapeError, load_state_dict
from .facts import compare, count, read_mapping, shape
from .keymap import Rule, apply_rules, load_strict, split_thirds

logger = logging.getLogger(__name__)

# (width, layers) -> heads of the size the authors published, in both coders.
PUBLISHED_HEADS: dict[tuple[int, int], int] = {(768, 12): 12}
WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")

# Authors' constructor arguments -> ours.
_OPTION_NAMES = {
    "frame_num": "num_frames",
    "input_size": "sample_size",
    "bottleneck_token_num": "num_tokens",
    "block_layernorm_eps": "norm_eps",
    "stochastic_temperature": "sampling_temperature",
    "bottleneck_dim": "codebook_dim",
    **{f"{coder}_{a}": f"{coder}_{b}" for coder in ("encoder", "decoder") for a, b in
       (("hidden_size", "dim"), ("depth", "layers"), ("num_heads", "heads"))},
}  # fmt: skip
_OPTIONS = {
    "num_frames", "sample_size", "num_tokens", "codebook_size", "codebook_dim", "temporal_patch_size", "patch_size",
    "decoder_temporal_patch_size", "decoder_patch_size", "norm_eps", "sampling_temperature",
    *(f"{coder}_{part}" for coder in ("encoder", "decoder") for part in ("dim", "layers", "heads", "mlp_hidden")),
}  # fmt: skip
# Constructor arguments that would make another architecture, with the values of the one that was published.
_FIXED: dict[str, tuple[Any, ...]] = {
    "transformer_name": ("transformer_encoder_parallel",),
    "learned_encoder_patch_pe": (False,),
    "learned_encoder_latent_query_embed": (True,),
    "learned_decoder_latent_pe": (False,),
    "learned_decoder_patch_query_embed": (False,),
    "use_encoder_patch_token_type_embed": (False,),
    "use_encoder_latent_query_token_type_embed": (False,),
    "use_decoder_latent_token_type_embed": (False,),
    "use_decoder_patch_query_token_type_embed": (True,),
    "norm": ("none", None),  # of the bottleneck
    "regularizer": ("vq",),
    "l2_normalized": (True,),
}
# Training and initialisation only.
_IGNORED = {
    "prior_model", "encoder_query_gaussian_init", "name", "commitment_loss_weight", "codebook_loss_weight", "entropy_loss_weight",
    "entropy_loss_temperature", "stochastic",
}  # fmt: skip


def _flatten(tensor: torch.Tensor, context: Mapping[str, Any]) -> torch.Tensor:
    return tensor.flatten()


def _coder_rules(coder: str) -> tuple[Rule, ...]:
    theirs, ours = f"{coder}.blocks.{{i}}.", f"{coder}.blocks.{{i}}."
    qkv = tuple(ours + f"attention.{part}.{{leaf}}" for part in ("to_q", "to_k", "to_v"))
    return (
        Rule(theirs + "norm1.{leaf}", ours + "attention_norm.{leaf}"),
        Rule(theirs + "attn.qkv.{leaf}", qkv, split_thirds),
        Rule(theirs + "attn.proj.{leaf}", ours + "attention.to_out.{leaf}"),
        Rule(theirs + "norm2.{leaf}", ours + "mlp_norm.{leaf}"),
        Rule(theirs + "mlp.{layer}.{leaf}", ours + "mlp.{layer}.{leaf}"),
    )


RULES: tuple[Rule, ...] = (
    Rule("encoder_patch_pe", None),  # fixed tables, recomputed
    Rule("decoder_latent_pe", None),
    Rule("decoder_patch_query_embed", None),
    Rule("x_embedder.proj.{leaf}", "patch_embedding.{leaf}"),
    Rule("encoder_latent_query_embed", "encoder_queries"),
    *_coder_rules("encoder"),
    Rule("bottleneck.in_linear.{leaf}", "quant_proj.{leaf}"),
    Rule("bottleneck.regularizer.embedding.weight", "quantizer.embedding.weight"),
    Rule("bottleneck.out_linear.{leaf}", "post_quant_proj.{leaf}"),
    Rule("decoder_patch_query_token_type_embed", "decoder_query_type", _flatten),
    *_coder_rules("decoder"),
    Rule("final_layer.norm_final.{leaf}", "norm_out.{leaf}"),
    Rule("final_layer.linear.{leaf}", "proj_out.{leaf}"),
)


def convert(
    path: Any,
    *,
    config: Any = None,
    dtype: torch.dtype | None = None,
    use_ema: bool = False,
) -> LARPTokenizer:
    """The tokenizer in `path`.

    Args:
        path: a folder with one file of weights and one `.json` of constructor arguments, or a file of weights.
        config: a dict, or a JSON file, with constructor arguments by our names or the authors'; beside a folder they go
            before the folder's own. Needed for the heads of widths that were not published, and for frames and pixels where
            a file has no position tables; values that the tensors contradict are a ValueError.
        dtype: of the weights; None keeps the file's.
        use_ema: take the moving average stored beside the weights.
    """
    options = read_arguments(read_mapping(config), "`config`")
    path = Path(path)
    if path.is_dir():
        path, arguments = find_files(path)
        found = {} if arguments is None else read_arguments(read_mapping(arguments), str(arguments), strict=False)
        options = {**found, **options}
    return _build(load_state_dict(path, use_ema=use_ema), options, dtype)


def convert_state_dict(
    state: Mapping[str, torch.Tensor], *, config: Any = None, dtype: torch.dtype | None = None
) -> LARPTokenizer:
    """Like `convert`, from tensors under the authors' names."""
    return _build(state, read_arguments(read_mapping(config), "`config`"), dtype)


def find_files(folder: Path) -> tuple[Path, Path | None]:
    """The file of weights in `folder` and the `.json` beside it; several files of either kind are a ValueError."""
    weights = sorted(path for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES)
    safe = [path for path in weights if path.suffix == ".safetensors"]
    weights = safe if len(safe) == 1 else weights
    if len(weights) != 1:
        names = ", ".join(path.name for path in weights) or "none"
        raise CheckpointError(
            f"{folder} must hold one file of weights ({', '.join(WEIGHT_SUFFIXES)}), found {names}; give the file itself."
        )
    described = sorted(folder.glob("*.json"))
    named = [path for path in described if path.name == "config.json"]
    described = named or described
    if len(described) > 1:
        names = ", ".join(path.name for path in described)
        raise CheckpointError(f"{folder} must hold one .json of constructor arguments, found {names}.")
    return weights[0], described[0] if described else None


def read_arguments(config: Mapping[str, Any], source: str, *, strict: bool = True) -> dict[str, Any]:
    """Constructor arguments, nested as the authors have them or flat, under our names.

    An argument of an architecture that was not published is a ValueError, and so is an unknown one if `strict`.
    """
    if config.get("_class_name") == LARPTokenizer.__name__:
        raise ValueError(
            f"{source} describes converted weights: load their folder with `LARPTokenizer.from_pretrained`."
        )
    flat = {key: value for key, value in config.items() if key != "bottleneck"}
    for coder in ("encoder", "decoder"):
        if flat.pop(f"{coder}_name", None) not in (None, "none"):
            flat.pop(f"{coder}_num_heads", None)  # a named transformer brings its own
    bottleneck = config.get("bottleneck") or {}
    _check_fixed("bottleneck", bottleneck.get("name", "bottleneck"), ("bottleneck",), source)
    arguments = dict(bottleneck.get("args") or {})
    regularizer = arguments.pop("regularizer", None) or {}
    flat.update(arguments, regularizer=regularizer.get("name", "vq"), **(regularizer.get("args") or {}))

    options, unknown = {}, []
    for key, value in flat.items():
        name = _OPTION_NAMES.get(key, key)
        if key in _FIXED:
            _check_fixed(key, value, _FIXED[key], source)
        elif name in _OPTIONS:
            options.update({} if value is None else {name: value})
        elif key not in _IGNORED and not key.startswith("_"):
            unknown.append(key)
    if unknown and strict:
        raise ValueError(
            f"unknown {source} options {', '.join(sorted(unknown))}: choose from {', '.join(sorted(_OPTIONS))}."
        )
    if unknown:
        logger.warning("%s: arguments %s are not known and left out", source, ", ".join(sorted(unknown)))
    return options


def _check_fixed(name: str, value: Any, allowed: tuple[Any, ...], source: str) -> None:
    if value not in allowed:
        raise ValueError(
            f"{source} says {name} = {value!r}: only {' or '.join(map(repr, allowed))} is supported, the published architecture."
        )


def _build(state: Mapping[str, torch.Tensor], options: Mapping[str, Any], dtype: torch.dtype | None) -> LARPTokenizer:
    state = {name: tensor for name, tensor in state.items() if not name.startswith("prior_model.")}
    if "bottleneck.regularizer.embedding.weight" not in state:
        raise CheckpointKeysError(
            "this is no LARP tokenizer: it lacks 'bottleneck.regularizer.embedding.weight'; it holds "
            f"{', '.join(sorted(state)[:4])}, ...",
            missing=["bottleneck.regularizer.embedding.weight"],
        )
    arguments = tokenizer_arguments(state, options)
    with init_empty_weights():
        model = LARPTokenizer(**arguments)
    model = load_strict(model, apply_rules(state, RULES), RULES, dtype=dtype)
    if "decoder_latent_pe" in state:
        expected = sincos_table(torch.arange(arguments["num_tokens"], device="cpu"), arguments["decoder_dim"])
        if not _same(state["decoder_latent_pe"], expected):
            raise _other_table("decoder_latent_pe")
    return model


def tokenizer_arguments(state: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> dict[str, Any]:
    """Init arguments of `LARPTokenizer` for the tensors of a checkpoint."""
    codebook_size, codebook_dim = shape(state, "bottleneck.regularizer.embedding.weight", 2)
    in_channels, *patch = shape(state, "x_embedder.proj.weight", 5)[1:]
    if patch[1] != patch[2]:
        raise CheckpointShapeError(
            f"x_embedder.proj.weight has patches of {patch[1]}x{patch[2]} pixels: expected squares."
        )
    found: dict[str, Any] = {
        "num_tokens": shape(state, "encoder_latent_query_embed", 2)[0],
        "codebook_size": codebook_size,
        "codebook_dim": codebook_dim,
        "temporal_patch_size": patch[0],
        "patch_size": patch[1],
    }
    heads = {}
    for coder, width in (
        ("encoder", shape(state, "x_embedder.proj.weight", 5)[0]),
        ("decoder", shape(state, "final_layer.linear.weight", 2)[1]),
    ):
        layers = count(state, rf"{coder}\.blocks\.(\d+)\.")
        found[f"{coder}_dim"], found[f"{coder}_layers"] = width, layers
        found[f"{coder}_mlp_hidden"] = shape(state, f"{coder}.blocks.0.mlp.fc1.weight", 2)[0]
        heads[f"{coder}_heads"] = _heads(coder, width, layers, options)
    compare(options, found)
    sizes = _sizes(state, options, found)
    compare(options, sizes)
    options = {name: options[name] for name in ("norm_eps", "sampling_temperature") if name in options}
    return {**found, **heads, **sizes, **options, "in_channels": in_channels}


def _heads(coder: str, width: int, layers: int, options: Mapping[str, Any]) -> int:
    name = f"{coder}_heads"
    heads = options.get(name, PUBLISHED_HEADS.get((width, layers)))
    if heads is None:
        raise ValueError(
            f"the {coder} is {width} wide with {layers} layers, which is none of the published sizes, and the file does not say how "
            f"many attention heads it has: pass config={{{name!r}: ...}}."
        )
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1 or width % heads:
        raise ValueError(f"`{name}` must divide the width {width}, got {heads!r}.")
    return heads


def _sizes(state: Mapping[str, torch.Tensor], options: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, int]:
    """Frames, pixels and the decoder's patches: from the stored position tables, else from `options`."""
    time, side = found["temporal_patch_size"], found["patch_size"]
    read = _stored_grid(state, "encoder_patch_pe")
    frames = read[0] * time if read else options.get("num_frames")
    pixels = read[1] * side if read else options.get("sample_size")
    if frames is None or pixels is None:
        raise ValueError(
            "the checkpoint holds no position tables, so it does not say the size of its videos: pass "
            "config={'num_frames': ..., 'sample_size': ...}."
        )
    painted = _stored_grid(state, "decoder_patch_query_embed")
    if painted is None:
        decoder = options.get("decoder_temporal_patch_size", time), options.get("decoder_patch_size", side)
    elif frames % painted[0] or pixels % painted[1]:
        raise CheckpointShapeError(
            f"decoder_patch_query_embed is a table of {painted[0]}x{painted[1]}x{painted[1]} cells, which cannot tile {frames} frames "
            f"of {pixels} pixels."
        )
    else:
        decoder = frames // painted[0], pixels // painted[1]
    return {
        "num_frames": frames,
        "sample_size": pixels,
        "decoder_temporal_patch_size": decoder[0],
        "decoder_patch_size": decoder[1],
    }


def _stored_grid(state: Mapping[str, torch.Tensor], name: str) -> tuple[int, int] | None:
    """Frames and rows of the grid whose fixed table is stored as `name`, or None if nothing is; another table is an error."""
    if name not in state:
        return None
    table = state[name]
    cells, dim = shape(state, name, 3)[1:]
    for side in range(1, math.isqrt(cells) + 1):
        frames, rest = divmod(cells, side * side)
        if not rest and not dim % 4 and _same(table, video_sincos_table((frames, side, side), dim)):
            return frames, side
    raise _other_table(name)


def _same(stored: torch.Tensor, table: torch.Tensor) -> bool:
    tolerance = 1e-5 if stored.dtype in (torch.float32, torch.float64) else 2e-2
    return stored.shape == (1, *table.shape) and torch.allclose(stored[0].float(), table, atol=tolerance, rtol=0)


def _other_table(name: str) -> CheckpointShapeError:
    return CheckpointShapeError(
        f"{name} is not the fixed sine-cosine table of any video of square frames: a tokenizer with learned or other positions "
        "is not supported."
    )
