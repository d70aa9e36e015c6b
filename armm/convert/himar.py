"""Hi-MAR's files (arXiv 2505.20288, HiDream-ai/himar, commit 1d378c1) -> our modules.

Reads `checkpoint-last.pth` of the three sizes, whose weights to be used are the moving average (`model_ema`). What is like MAR is read
by the rules of `armm.convert.mar`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import init_empty_weights

from armm.decoding.pivots import PivotLatentDecoding
from armm.hub import resolve_file
from armm.nn.modulation import WITHOUT_SHIFT
from armm.pivot_latent_model import PivotLatentModel

from . import mar
from .containers import CheckpointKeysError, CheckpointShapeError
from .facts import compare, count, dtype_of, read_options, shape
from .keymap import Rule, apply_rules, load_strict, split_thirds, squeeze_convolution
from .kl import load_tokenizer

# What the README's figures were made with, by width.
PRESETS: dict[int, dict[str, Any]] = {
    768: {"guidance_scale": 2.5, "pivot_guidance_scale": 2.7, "num_inference_steps": 4},
    1024: {"guidance_scale": 3.5, "pivot_guidance_scale": 3.5, "num_inference_steps": 4},
    1280: {"guidance_scale": 3.2, "pivot_guidance_scale": 5.5, "num_inference_steps": 12},
}
DENSE_HEAD_WIDTH = 64  # of every head of attention in the published dense heads

OPTION_NAMES = {
    **mar.OPTION_NAMES,
    "num_sampling_steps": "pivot_head_steps",
    "cond_scale": "pivot_side",
    "gdm_w": "dense_width",
    "gdm_d": "dense_depth",
    "head": "dense_heads",
    "seq_len": "num_tokens",
}
OPTIONS = {
    *OPTION_NAMES.values(),
    "norm_eps",
    "patch_size",
    "cond_dim",
    "ratio",
    "two_diffloss",
    "global_dm",
    "cos",
    *mar.WITHOUT_EFFECT,
}


def _tasks(tensor: torch.Tensor, context: Mapping[str, Any]) -> torch.Tensor:
    """[2, 1, 1, 4D] -> [2, 4D]."""
    if tensor.ndim != 4 or tensor.shape[1:3] != (1, 1):
        raise CheckpointShapeError(f"expected [phases, 1, 1, 4 * width], got {tuple(tensor.shape)}")
    return tensor.flatten(1)


def _stack_rules(stack: str) -> tuple[Rule, ...]:
    theirs, ours = f"{stack}_blocks.{{i}}.", f"{stack}.blocks.{{i}}.modulation."
    return (
        Rule(theirs + "adaLN_scale", ours + "task_scale", _tasks),
        Rule(theirs + "adaLN_shift", ours + "task_shift", _tasks),
        Rule(f"{stack}_task_emb.weight", f"{stack}.task_embedding.weight"),
        Rule(f"{stack}_blocks_ada.1.{{leaf}}", f"{stack}.shared_modulation.linear.{{leaf}}"),
    )


_DENSE, _BLOCK, _OURS = "cond_diffloss.net.", "cond_diffloss.net.blocks.{i}.", "dense_head.trunk.blocks.{i}."
RULES: tuple[Rule, ...] = (
    *mar.RULES,
    *_stack_rules("encoder"),
    *_stack_rules("decoder"),
    Rule("cond_tokens", "unknown_pivots", mar.rows),
    Rule("cond_proj.{leaf}", "pivot_projection.{leaf}"),
    Rule("cond_z_proj.{leaf}", "pivot_state_projection.{leaf}"),
    Rule(_DENSE + "c_pos_embed", None),  # never used
    Rule(_DENSE + "pos_embed", "dense_head.trunk.position_embedding.weight", mar.rows),
    Rule(_DENSE + "x_embedder.proj.{leaf}", "dense_head.input_projection.{leaf}", squeeze_convolution),
    Rule(_DENSE + "c_embedder.proj.{leaf}", "dense_head.condition_projection.{leaf}", squeeze_convolution),
    Rule(_DENSE + "t_embedder.mlp.0.{leaf}", "dense_head.time_embedding.fc1.{leaf}"),
    Rule(_DENSE + "t_embedder.mlp.2.{leaf}", "dense_head.time_embedding.fc2.{leaf}"),
    Rule(
        _BLOCK + "attn.qkv.{leaf}",
        tuple(_OURS + f"attention.{part}.{{leaf}}" for part in ("to_q", "to_k", "to_v")),
        split_thirds,
    ),
    Rule(_BLOCK + "attn.proj.{leaf}", _OURS + "attention.to_out.{leaf}"),
    Rule(_BLOCK + "mlp.{layer}.{leaf}", _OURS + "mlp.{layer}.{leaf}"),
    Rule(_BLOCK + "adaLN_modulation.1.{leaf}", _OURS + "modulation.projection.linear.{leaf}"),
    *mar.output_rules(_DENSE.rstrip("."), "dense_head"),
)


def convert(
    path: Any, *, config: Any = None, dtype: torch.dtype | None = None, use_ema: bool = True
) -> PivotLatentModel:
    """The transformer in the file `path`.

    Args:
        path: a file of the authors, or one their trainer wrote.
        config: a dict, or a JSON file, with options by our names or the authors' (`num_heads`/`encoder_num_heads`,
            `dense_heads`/`head`, ...). Needed for the heads of sizes that were not published; values that the tensors contradict are
            a ValueError.
        dtype: of the weights; None keeps the file's.
        use_ema: take the moving average, as all published figures do, where the file has one.
    """
    return convert_state_dict(mar.load_weights(path, use_ema), config=config, dtype=dtype)


def convert_state_dict(
    state: Mapping[str, torch.Tensor], *, config: Any = None, dtype: torch.dtype | None = None
) -> PivotLatentModel:
    """Like `convert`, from tensors under the authors' names."""
    needed = ("diffloss.net.input_proj.weight", "cond_tokens", _DENSE + "x_embedder.proj.weight")
    missing = [name for name in needed if name not in state]
    if missing:
        raise CheckpointKeysError(
            f"this is no Hi-MAR checkpoint: it lacks {' and '.join(missing)}, and holds {', '.join(sorted(state)[:4])}, ...",
            missing=missing,
        )
    arguments = arguments_of(state, read_options(config, OPTION_NAMES, OPTIONS))
    with init_empty_weights():
        model = PivotLatentModel(**arguments)
    return load_strict(model, apply_rules(mar.with_null_class(state), RULES), RULES, dtype=dtype)  # type: ignore[return-value]


def arguments_of(state: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> dict[str, Any]:
    """Init arguments of `PivotLatentModel` for the tensors of a Hi-MAR."""
    channels = shape(state, "z_proj.weight", 2)[1]
    pivots, pivot_channels = shape(state, "cond_tokens", 3)[1:]
    length = shape(state, "diffusion_pos_embed_learned", 3)[1]
    side, pivot_side = mar.grid_side(length - pivots, "the picture"), mar.grid_side(pivots, "cond_tokens")
    extra = {"modulation": "tasks", "modulation_tasks": 2, "modulation_order": list(WITHOUT_SHIFT)}
    encoder, decoder = (mar.stack_arguments(state, stack, options, **extra) for stack in ("encoder", "decoder"))
    head, dense = mar.head_arguments(state), dense_head_arguments(state, options)
    arguments = {
        "latent_channels": channels,
        "grid": [side, side],
        "pivot_grid": [pivot_side, pivot_side],
        "num_classes": shape(state, "class_emb.weight", 2)[0],
        "condition_tokens": shape(state, "encoder_pos_embed_learned", 3)[1] // 2 - length,
        "encoder": encoder,
        "decoder": decoder,
        "head": head,
        "dense_head": dense,
    }
    found = {name: arguments[name] for name in ("latent_channels", "num_classes", "condition_tokens")}
    found |= {"dim": encoder["dim"], "encoder_layers": encoder["num_layers"], "num_heads": encoder["num_heads"]}
    found |= {
        "decoder_dim": decoder["dim"],
        "decoder_layers": decoder["num_layers"],
        "decoder_heads": decoder["num_heads"],
    }
    found |= {"head_width": head["width"], "head_depth": head["depth"], "cond_dim": pivot_channels, "patch_size": 1}
    found |= {"dense_width": dense["width"], "dense_depth": dense["depth"], "dense_heads": dense["num_heads"]}
    compare(options, found | {"num_tokens": length - pivots, "pivot_side": pivot_side})
    return arguments


def dense_head_arguments(state: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> dict[str, Any]:
    """What the tensors say of the network that denoises all tokens together."""
    width, channels = shape(state, _DENSE + "x_embedder.proj.weight", 4)[:2]
    heads = options.get("dense_heads", width // DENSE_HEAD_WIDTH if width % DENSE_HEAD_WIDTH == 0 else None)
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1 or width % heads:
        raise ValueError(
            f"the file does not say how many attention heads its dense head, {width} wide, has: pass config={{'dense_heads': ...}} "
            f"that divides it, got {heads!r}."
        )
    return {
        "type": "transformer",
        "width": width,
        "depth": count(state, r"cond_diffloss\.net\.blocks\.(\d+)\."),
        "num_heads": heads,
        "mlp_hidden": shape(state, _DENSE + "blocks.0.mlp.fc1.weight", 2)[0],
        "learned_variance": shape(state, _DENSE + "final_layer.linear.weight", 2)[0] == 2 * channels,
    }


def load_single_file(
    path: Any,
    *,
    tokenizer: Any = None,
    config: Any = None,
    tokenizer_config: Any = None,
    dtype: torch.dtype | dict[str, torch.dtype] | None = None,
    generation_config: dict[str, Any] | None = None,
    use_ema: bool = True,
    **hub_options: Any,
) -> dict[str, Any]:
    """The components of a `HiMARPipeline` from the authors' files.

    Args:
        path: the transformer's file, or a link to it.
        tokenizer: the file or link of MAR's autoencoder (`kl16.ckpt`), or a `KLTokenizer`.
        config, tokenizer_config: options for the two files, see `convert`.
        dtype: of the weights; a dict names `"transformer"`, `"tokenizer"` and `"default"`.
        generation_config: settings that replace those of the README.
        use_ema: take the moving average where the file has one.
        hub_options: `revision`, `cache_dir`, `local_files_only`, `token` for files on the hub.
    """
    coder = load_tokenizer(tokenizer, config=tokenizer_config, dtype=dtype_of(dtype, "tokenizer"), **hub_options)
    model = convert(
        resolve_file(path, **hub_options), config=config, dtype=dtype_of(dtype, "transformer"), use_ema=use_ema
    )
    return {
        "tokenizer": coder,
        "transformer": model,
        "decoding": PivotLatentDecoding(),
        "generation_config": {**PRESETS.get(model.encoder.dim, {}), **(generation_config or {})},
    }
