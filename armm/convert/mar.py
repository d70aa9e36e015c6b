"""MAR's files (arXiv 2406.11838, LTH14/mar, commit fe470ac) -> our modules.

Reads `checkpoint-last.pth` of the three sizes, whose weights to be used are the moving average (`model_ema`). Sizes are read off the
tensors; the number of heads is known for the published sizes. The autoencoder, `kl16.ckpt`, is read by `armm.convert.kl`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import init_empty_weights

from armm.decoding.masked import MaskedLatentDecoding
from armm.hub import resolve_file
from armm.masked_latent_model import MaskedLatentModel

from .containers import EMA_KEYS, CheckpointKeysError, CheckpointShapeError, load_state_dict
from .facts import compare, count, dtype_of, read_options, shape
from .keymap import Rule, apply_rules, load_strict, split_thirds
from .kl import load_tokenizer

# (width, layers of the encoder) -> heads, of the published sizes.
PUBLISHED_HEADS: dict[tuple[int, int], int] = {(768, 12): 12, (1024, 16): 16, (1280, 20): 16}
# What the README's figures were made with, by width.
PRESETS: dict[int, dict[str, Any]] = {
    dim: {
        "guidance_scale": scale,
        "guidance_schedule": "linear",
        "temperature": 1.0,
        "num_inference_steps": 256,
        "head_steps": 100,
    }
    for dim, scale in ((768, 2.9), (1024, 3.0), (1280, 3.2))
}

OPTION_NAMES = {
    "encoder_embed_dim": "dim",
    "decoder_embed_dim": "decoder_dim",
    "encoder_depth": "encoder_layers",
    "decoder_depth": "decoder_layers",
    "encoder_num_heads": "num_heads",
    "decoder_num_heads": "decoder_heads",
    "vae_embed_dim": "latent_channels",
    "class_num": "num_classes",
    "buffer_size": "condition_tokens",
    "diffloss_d": "head_depth",
    "diffloss_w": "head_width",
    "num_sampling_steps": "head_steps",
}
# Options of the authors' class that change training only, or that the tensors say.
WITHOUT_EFFECT = {
    "img_size", "vae_stride", "mlp_ratio", "label_drop_prob", "attn_dropout", "proj_dropout", "mask_ratio_min", "norm_layer",
    "diffusion_batch_mul", "grad_checkpointing",
}  # fmt: skip
OPTIONS = {*OPTION_NAMES.values(), "patch_size", "norm_eps", *WITHOUT_EFFECT}


def rows(tensor: torch.Tensor, context: Mapping[str, Any]) -> torch.Tensor:
    """[1, N, D] -> [N, D]."""
    if tensor.ndim != 3 or tensor.shape[0] != 1:
        raise CheckpointShapeError(f"expected [1, rows, width], got {tuple(tensor.shape)}")
    return tensor[0]


def swap_halves(tensor: torch.Tensor, context: Mapping[str, Any]) -> torch.Tensor:
    """The authors' final layers have the shift first, our `AdaptiveHead` the scale."""
    first, second = tensor.chunk(2)
    return torch.cat([second, first])


def stack_rules(stack: str) -> tuple[Rule, ...]:
    """The rules of "encoder" or "decoder"."""
    theirs, ours = f"{stack}_blocks.{{i}}.", f"{stack}.blocks.{{i}}."
    return (
        Rule(f"{stack}_pos_embed_learned", f"{stack}.position_embedding.weight", rows),
        Rule(theirs + "norm1.{leaf}", ours + "attention_norm.{leaf}"),
        Rule(theirs + "norm2.{leaf}", ours + "mlp_norm.{leaf}"),
        Rule(
            theirs + "attn.qkv.{leaf}",
            tuple(ours + f"attention.{part}.{{leaf}}" for part in ("to_q", "to_k", "to_v")),
            split_thirds,
        ),
        Rule(theirs + "attn.proj.{leaf}", ours + "attention.to_out.{leaf}"),
        Rule(theirs + "mlp.{layer}.{leaf}", ours + "mlp.{layer}.{leaf}"),
        Rule(f"{stack}_norm.{{leaf}}", f"{stack}.norm.{{leaf}}"),
    )


def head_rules(source: str, target: str) -> tuple[Rule, ...]:
    """The rules of the network that denoises token by token."""
    theirs, ours = f"{source}.res_blocks.{{i}}.", f"{target}.blocks.{{i}}."
    return (
        Rule(f"{source}.time_embed.mlp.0.{{leaf}}", f"{target}.time_embedding.fc1.{{leaf}}"),
        Rule(f"{source}.time_embed.mlp.2.{{leaf}}", f"{target}.time_embedding.fc2.{{leaf}}"),
        Rule(f"{source}.cond_embed.{{leaf}}", f"{target}.condition_projection.{{leaf}}"),
        Rule(f"{source}.input_proj.{{leaf}}", f"{target}.input_projection.{{leaf}}"),
        Rule(theirs + "in_ln.{leaf}", ours + "norm.{leaf}"),
        Rule(theirs + "mlp.0.{leaf}", ours + "mlp.fc1.{leaf}"),
        Rule(theirs + "mlp.2.{leaf}", ours + "mlp.fc2.{leaf}"),
        Rule(theirs + "adaLN_modulation.1.{leaf}", ours + "modulation.linear.{leaf}"),
        *output_rules(source, target),
    )


def output_rules(source: str, target: str) -> tuple[Rule, ...]:
    """The rules of a final layer."""
    return (
        Rule(f"{source}.final_layer.linear.{{leaf}}", f"{target}.output.projection.{{leaf}}"),
        Rule(
            f"{source}.final_layer.adaLN_modulation.1.{{leaf}}",
            f"{target}.output.modulation.linear.{{leaf}}",
            swap_halves,
        ),
    )


RULES: tuple[Rule, ...] = (
    Rule("class_emb.weight", "class_embedding.embedding.weight"),
    Rule("mask_token", "mask_token", rows),
    Rule("diffusion_pos_embed_learned", "output_position", rows),
    Rule("z_proj.{leaf}", "token_projection.{leaf}"),
    Rule("z_proj_ln.{leaf}", "encoder.input_norm.{leaf}"),
    Rule("decoder_embed.{leaf}", "decoder_projection.{leaf}"),
    *stack_rules("encoder"),
    *stack_rules("decoder"),
    *head_rules("diffloss.net", "head"),
)


def convert(
    path: Any, *, config: Any = None, dtype: torch.dtype | None = None, use_ema: bool = True
) -> MaskedLatentModel:
    """The transformer in the file `path`.

    Args:
        path: a file of the authors, or one their trainer wrote.
        config: a dict, or a JSON file, with options by our names or the authors' (`num_heads`/`encoder_num_heads`, `patch_size`,
            `norm_eps`, ...). Needed for the heads of sizes that were not published and for the patches; values that the tensors
            contradict are a ValueError.
        dtype: of the weights; None keeps the file's.
        use_ema: take the moving average, as all published figures do, where the file has one; False takes the raw weights.
    """
    return convert_state_dict(load_weights(path, use_ema), config=config, dtype=dtype)


def load_weights(path: Any, use_ema: bool = True) -> dict[str, torch.Tensor]:
    """The tensors in `path`: of its moving average where it has one and it is wanted."""
    return load_state_dict(path, keys=EMA_KEYS if use_ema else ())


def convert_state_dict(
    state: Mapping[str, torch.Tensor], *, config: Any = None, dtype: torch.dtype | None = None
) -> MaskedLatentModel:
    """Like `convert`, from tensors under the authors' names."""
    if "diffloss.net.input_proj.weight" not in state or "z_proj.weight" not in state:
        missing = [name for name in ("z_proj.weight", "diffloss.net.input_proj.weight") if name not in state]
        raise CheckpointKeysError(
            f"this is no MAR checkpoint: it lacks {' and '.join(missing)}, and holds {', '.join(sorted(state)[:4])}, ...",
            missing=missing,
        )
    arguments = arguments_of(state, read_options(config, OPTION_NAMES, OPTIONS))
    with init_empty_weights():
        model = MaskedLatentModel(**arguments)
    return load_strict(model, apply_rules(with_null_class(state), RULES), RULES, dtype=dtype)  # type: ignore[return-value]


def with_null_class(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors with `fake_latent`, which stands for no class, as the last row of the classes."""
    shape(state, "fake_latent", 2), shape(state, "class_emb.weight", 2)
    merged = {name: tensor for name, tensor in state.items() if name != "fake_latent"}
    merged["class_emb.weight"] = torch.cat([state["class_emb.weight"], state["fake_latent"]])
    return merged


def stack_arguments(
    state: Mapping[str, torch.Tensor], stack: str, options: Mapping[str, Any], **extra: Any
) -> dict[str, Any]:
    """What the tensors say of one stack: arguments of `ARTransformer`."""
    dim = shape(state, f"{stack}_norm.weight", 1)[0]
    layers = count(state, rf"{stack}_blocks\.(\d+)\.")
    known = PUBLISHED_HEADS.get((dim, layers))
    heads = options.get("num_heads" if stack == "encoder" else "decoder_heads", options.get("num_heads", known))
    if heads is None:
        raise ValueError(
            f"an {stack} {dim} wide with {layers} layers is none of the published sizes, and the file does not say how many attention "
            "heads it has: pass config={'num_heads': ...}."
        )
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1 or dim % heads:
        raise ValueError(f"`num_heads` must divide the width {dim}, got {heads!r}.")
    return {
        "dim": dim,
        "num_layers": layers,
        "num_heads": heads,
        "mlp": "gelu",
        "mlp_hidden": shape(state, f"{stack}_blocks.0.mlp.fc1.weight", 2)[0],
        "mlp_bias": True,
        "norm": "layer",
        "norm_eps": float(options.get("norm_eps", 1e-6)),
        "qkv_bias": True,
        "out_bias": True,
        **extra,
    }


def head_arguments(state: Mapping[str, torch.Tensor], prefix: str = "diffloss.net") -> dict[str, Any]:
    """What the tensors say of the network that denoises token by token."""
    width, channels = shape(state, f"{prefix}.input_proj.weight", 2)
    outputs = shape(state, f"{prefix}.final_layer.linear.weight", 2)[0]
    if outputs not in (channels, 2 * channels):
        raise CheckpointShapeError(
            f"{prefix}.final_layer.linear.weight has {outputs} rows, expected {channels} or {2 * channels}."
        )
    depth = count(state, rf"{prefix.replace('.', chr(92) + '.')}\.res_blocks\.(\d+)\.")
    return {"type": "mlp", "width": width, "depth": depth, "learned_variance": outputs == 2 * channels}


def grid_side(tokens: int, name: str) -> int:
    """The side of a square of so many tokens."""
    side = math.isqrt(tokens)
    if side * side != tokens or not side:
        raise CheckpointShapeError(f"{name} is of {tokens} tokens: expected a square grid.")
    return side


def arguments_of(state: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> dict[str, Any]:
    """Init arguments of `MaskedLatentModel` for the tensors of a MAR."""
    channels = shape(state, "z_proj.weight", 2)[1]
    patch = options.get("patch_size", 1)
    if isinstance(patch, bool) or not isinstance(patch, int) or patch < 1 or channels % patch**2:
        raise CheckpointShapeError(f"`patch_size` {patch!r} does not divide tokens of {channels} channels.")
    tokens = shape(state, "diffusion_pos_embed_learned", 3)[1]
    side = grid_side(tokens, "diffusion_pos_embed_learned") * patch
    encoder, decoder = (stack_arguments(state, stack, options) for stack in ("encoder", "decoder"))
    head = head_arguments(state)
    arguments = {
        "latent_channels": channels // patch**2,
        "grid": [side, side],
        "patch_size": patch,
        "num_classes": shape(state, "class_emb.weight", 2)[0],
        "condition_tokens": shape(state, "encoder_pos_embed_learned", 3)[1] - tokens,
        "encoder": encoder,
        "decoder": decoder,
        "head": head,
    }
    found = {name: arguments[name] for name in ("latent_channels", "num_classes", "condition_tokens")}
    found |= {"dim": encoder["dim"], "encoder_layers": encoder["num_layers"], "num_heads": encoder["num_heads"]}
    found |= {
        "decoder_dim": decoder["dim"],
        "decoder_layers": decoder["num_layers"],
        "decoder_heads": decoder["num_heads"],
    }
    compare(options, found | {"head_width": head["width"], "head_depth": head["depth"]})
    return arguments


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
    """The components of a `MARPipeline` from the authors' files.

    Args:
        path: the transformer's file, or a link to it.
        tokenizer: the autoencoder's file (`kl16.ckpt`) or link, or a `KLTokenizer`.
        config: options for the transformer's file, see `convert`.
        tokenizer_config: options for the autoencoder's file.
        dtype: of the weights; a dict names `"transformer"`, `"tokenizer"` and `"default"`.
        generation_config: settings that replace those of the README.
        use_ema: take the moving average where the file has one.
        hub_options: `revision`, `cache_dir`, `local_files_only`, `token` for files on the hub.
    """
    coder = load_tokenizer(tokenizer, config=tokenizer_config, dtype=dtype_of(dtype, "tokenizer"), **hub_options)
    model = convert(
        resolve_file(path, **hub_options), config=config, dtype=dtype_of(dtype, "transformer"), use_ema=use_ema
    )
    head_steps = read_options(config, OPTION_NAMES, OPTIONS).get("head_steps", 100)
    return {
        "tokenizer": coder,
        "transformer": model,
        "decoding": MaskedLatentDecoding(head_steps=int(head_steps) if str(head_steps).isdigit() else head_steps),
        "generation_config": {**PRESETS.get(model.encoder.dim, {}), **(generation_config or {})},
    }
