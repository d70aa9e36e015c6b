"""MingTok-Vision and the flow head of Ming-UniVision (arXiv 2510.06590; inclusionAI/Ming-UniVision, commit 3bbdd2f).

`convert` reads the folder of the tokenizer on the hub (`config.json` and safetensors), or a file of its weights (a training pickle too),
`convert_head` a file with the flow head. Sizes are read off the tensors; attention heads are 64 wide. The whole model is read by
`armm.convert.ming_univision`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import init_empty_weights

from armm.heads.diffusion import DiffusionHead
from armm.hub import resolve_file
from tokenizers_visual.mingtok import MingTokTokenizer

from .containers import CheckpointKeysError, CheckpointShapeError, load_state_dict
from .facts import compare, count, read_mapping, shape
from .folders import load_folder, read_beside, resolve_folder_or_file
from .keymap import Rule, apply_rules, load_strict, split_thirds
from .mar import head_rules, rows

HEAD_DIM = 64
# The published scale of latents, for files without a config.json.
SCALE = {"scaling_factor": 8.09449291, "shift": 1.46817409}
# Authors' names of the three stages -> ours.
_STAGES = {"low_level_encoder": "encoder", "semantic_decoder": "semantic_decoder", "pixel_decoder": "pixel_decoder"}
# A frozen network that the training checkpoint carries to compare features with.
TEACHER = "target_backbone"
HEAD_PREFIXES = ("model.diffloss.", "diffloss.", "")


def halves(tensor: torch.Tensor, context: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
    """Rows of the two layers of a gated network: the gate's, then the other's."""
    if tensor.shape[0] % 2:
        raise CheckpointShapeError(f"expected two layers of equal size, got {tensor.shape[0]} rows")
    return tensor.chunk(2)


def flat(tensor: torch.Tensor, context: Mapping[str, Any]) -> torch.Tensor:
    return tensor.flatten()


def negated(tensor: torch.Tensor, context: Mapping[str, Any]) -> torch.Tensor:
    """The authors' velocities point from noise to data, those of `FlowSolver` from data to noise."""
    return -tensor


def _gated(theirs: str, ours: str) -> tuple[Rule, ...]:
    return (
        Rule(theirs + "mlp.w12.{leaf}", (ours + "mlp.gate.{leaf}", ours + "mlp.up.{leaf}"), halves),
        Rule(theirs + "mlp.w3.{leaf}", ours + "mlp.down.{leaf}"),
    )


def _stage_rules(stage: str) -> tuple[Rule, ...]:
    theirs, ours = f"{stage}.blocks.0.{{i}}.", f"{_STAGES[stage]}.blocks.{{i}}."
    qkv = tuple(ours + f"attention.{part}.{{leaf}}" for part in ("to_q", "to_k", "to_v"))
    return (
        Rule(theirs + "norm1.{leaf}", ours + "attention_norm.{leaf}"),
        Rule(theirs + "norm2.{leaf}", ours + "mlp_norm.{leaf}"),
        Rule(theirs + "attn.qkv.{leaf}", qkv, split_thirds),
        Rule(theirs + "attn.proj.{leaf}", ours + "attention.to_out.{leaf}"),
        *_gated(theirs, ours),
        Rule(theirs + "mlp.fc1.{leaf}", ours + "mlp.fc1.{leaf}"),
        Rule(theirs + "mlp.fc2.{leaf}", ours + "mlp.fc2.{leaf}"),
    )


RULES: tuple[Rule, ...] = (
    Rule("low_level_encoder.cls_token", "class_token", flat),
    Rule("low_level_encoder.pos_embed", "position_embedding", rows),
    Rule("low_level_encoder.patch_embed.proj.{leaf}", "patch_embedding.{leaf}"),
    *_stage_rules("low_level_encoder"),
    Rule("low_level_encoder.out_norm.{leaf}", "latent_norm.{leaf}"),
    Rule("low_level_encoder.out_proj.{leaf}", "latent_projection.{leaf}"),
    Rule("semantic_decoder.in_proj.{leaf}", "semantic_projection.{leaf}"),
    *_stage_rules("semantic_decoder"),
    Rule("semantic_decoder.norm.{leaf}", "semantic_norm.{leaf}"),
    Rule("sem_to_pix.{leaf}", "to_pixel_tokens.{leaf}"),
    *_stage_rules("pixel_decoder"),
    Rule("pixel_decoder.norm.{leaf}", "pixel_norm.{leaf}"),
    Rule("pixel_decoder.head.{leaf}", "pixel_projection.{leaf}"),
)


def flow_rules(source: str, target: str) -> tuple[Rule, ...]:
    """The rules of the flow head."""
    return (
        Rule(f"{source}.final_layer.linear.{{leaf}}", f"{target}.output.projection.{{leaf}}", negated),
        *head_rules(source, target),
        *_gated(f"{source}.res_blocks.{{i}}.", f"{target}.blocks.{{i}}."),
    )


HEAD_RULES: tuple[Rule, ...] = flow_rules("net", "head")


def convert(
    path: Any, *, config: Any = None, dtype: torch.dtype | None = None, use_ema: bool = False, **hub_options: Any
) -> MingTokTokenizer:
    """The tokenizer in `path`.

    Args:
        path: the authors' folder, its hub id, or a file of weights.
        config: a dict, or a JSON file, in the layout of the authors' `config.json`, which it goes before. What the tensors contradict is an
            error. Without one, latents have the published scale.
        dtype: of the weights; None keeps the file's.
        use_ema: take the moving average stored beside the weights.
        hub_options: of the hub.
    """
    found = resolve_folder_or_file(path, **hub_options)
    # Beside a training pickle lies the config.json of something else.
    published = read_beside(found) if found.is_dir() or found.suffix == ".safetensors" else {}
    state = load_folder(found, use_ema=use_ema)
    if "net.input_proj.weight" in state:
        raise CheckpointKeysError(
            f"{found} holds a flow head, not a tokenizer: read it with `armm.convert.mingtok.convert_head`."
        )
    return convert_state_dict(state, config={**published, **read_mapping(config)}, dtype=dtype)


def convert_state_dict(
    state: Mapping[str, torch.Tensor], *, config: Any = None, dtype: torch.dtype | None = None
) -> MingTokTokenizer:
    """Like `convert`, from the tokenizer's tensors under the authors' names."""
    state = {name: tensor for name, tensor in state.items() if not name.startswith(TEACHER)}
    arguments = tokenizer_arguments(state, read_mapping(config))
    with init_empty_weights():
        model = MingTokTokenizer(**arguments)
    return load_strict(model, apply_rules(state, RULES), RULES, dtype=dtype)  # type: ignore[return-value]


def tokenizer_arguments(state: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
    """Init arguments of `MingTokTokenizer` for tensors under the authors' names and a config in their layout."""
    dim, in_channels, patch, _ = shape(state, "low_level_encoder.patch_embed.proj.weight", 4)
    tokens = shape(state, "low_level_encoder.pos_embed", 3)[1] - 1
    side = round(tokens**0.5)
    if side * side != tokens:
        raise CheckpointShapeError(f"low_level_encoder.pos_embed has {tokens} positions, which are no square image.")
    semantic_dim, latent_channels = shape(state, "semantic_decoder.in_proj.weight", 2)
    pixel_dim = shape(state, "pixel_decoder.head.weight", 2)[1]
    pixel_patch = round((shape(state, "pixel_decoder.head.weight", 2)[0] / in_channels) ** 0.5)
    found: dict[str, Any] = {
        "image_size": side * patch,
        "patch_size": patch,
        "latent_channels": latent_channels,
        "pixel_patch_size": pixel_patch,
        "in_channels": in_channels,
    }
    widths = {"low_level_encoder": ("encoder", dim), "semantic_decoder": ("semantic", semantic_dim)}
    widths["pixel_decoder"] = ("pixel", pixel_dim)
    for stage, (name, width) in widths.items():
        if width % HEAD_DIM:
            raise CheckpointShapeError(f"{stage} is {width} wide: expected heads of {HEAD_DIM}.")
        gated = f"{stage}.blocks.0.0.mlp.w3.weight" in state
        hidden = shape(state, f"{stage}.blocks.0.0.mlp.{'w3' if gated else 'fc2'}.weight", 2)[1]
        found |= {
            f"{name}_dim": width,
            f"{name}_layers": count(state, rf"{stage}\.blocks\.0\.(\d+)\."),
            f"{name}_heads": width // HEAD_DIM,
            f"{name}_mlp": "swiglu" if gated else "gelu",
            f"{name}_mlp_hidden": hidden,
        }
    encoder, decoder, pixel = (dict(config.get(stage) or {}) for stage in _STAGES)
    said = {
        "image_size": encoder.get("img_size"),
        "patch_size": encoder.get("patch_size"),
        "encoder_dim": encoder.get("embed_dim"),
        "encoder_layers": encoder.get("depth"),
        "latent_channels": encoder.get("out_dim", decoder.get("in_dim")),
        "semantic_dim": decoder.get("embed_dim"),
        "semantic_layers": decoder.get("decoder_depth"),
        "pixel_dim": pixel.get("embed_dim"),
        "pixel_layers": pixel.get("decoder_depth"),
        "pixel_patch_size": pixel.get("patch_size"),
    }
    compare({name: value for name, value in said.items() if value is not None}, found)
    scale = {"scaling_factor": config.get("scaling_factor"), "shift": config.get("mean")}
    return {**found, **{name: SCALE[name] if value is None else float(value) for name, value in scale.items()}}


# ---------------------------------------------------------------------- the flow head


def convert_head(path: Any, *, dtype: torch.dtype | None = None, use_ema: bool = False) -> DiffusionHead:
    """The flow head in the file `path`, whose names may have the prefix of the whole model.

    Args:
        dtype, use_ema: as of `convert`.
    """
    state = load_state_dict(resolve_file(path), use_ema=use_ema)
    prefix = next((part for part in HEAD_PREFIXES if f"{part}net.input_proj.weight" in state), "")
    own = {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}
    sizes = head_arguments(own)
    with init_empty_weights():
        model = torch.nn.ModuleDict({"head": DiffusionHead(**sizes)})
    return load_strict(model, apply_rules(own, HEAD_RULES), HEAD_RULES, dtype=dtype)["head"]  # type: ignore[index]


def head_arguments(state: Mapping[str, torch.Tensor], prefix: str = "") -> dict[str, Any]:
    """Init arguments of the `DiffusionHead` of tensors `net.*` behind `prefix`."""
    net = prefix + "net."
    width, channels = shape(state, net + "input_proj.weight", 2)
    frequencies = shape(state, net + "time_embed.mlp.0.weight", 2)[1]
    if frequencies != 256:
        raise CheckpointShapeError(f"{net}time_embed.mlp.0.weight takes {frequencies} frequencies, expected 256.")
    if shape(state, net + "final_layer.linear.weight", 2)[0] != channels:
        raise CheckpointKeysError(
            f"{net}final_layer.linear.weight must give {channels} channels, as {net}input_proj takes."
        )
    return {
        "dim": shape(state, net + "cond_embed.weight", 2)[1],
        "channels": channels,
        "width": width,
        "depth": count(state, re.escape(net) + r"res_blocks\.(\d+)\."),
        "learned_variance": False,
        "mlp": "swiglu",
        "mlp_hidden": shape(state, net + "res_blocks.0.mlp.w3.weight", 2)[1],
    }
