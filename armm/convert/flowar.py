"""FlowAR's files (arXiv 2412.15205, in the copy of Qinyu-Allen-Zhao/DiSA, commit 283fa59) -> our modules.

Reads `FlowAR-S.pth`, `FlowAR-L.pth` and `FlowAR-H.pth`, which are flat, and a trainer's own files. Sizes are read off the tensors and
the buffers beside them. The transformer's names are those of xAR, by the same authors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import init_empty_weights

from armm.decoding.next_scale_flow import NextScaleFlowDecoding
from armm.hub import resolve_file
from armm.next_scale_flow_model import NextScaleFlowModel
from tokenizers_visual.multi_scale import check_scales

from .containers import CheckpointKeysError, CheckpointShapeError, load_state_dict
from .facts import compare, count, dtype_of, read_options, shape
from .keymap import Rule, apply_rules, load_strict
from .kl import load_tokenizer
from .xar import ADA_ORDER, block_rules, block_sizes, stack_arguments, two_stack_rules

# Settings of the README, by the depth of each of the two stacks.
PRESETS: dict[int, dict[str, Any]] = {
    6: {"guidance_scale": 4.3, "guidance_high": 0.9, "num_flow_steps": 25},
    8: {"guidance_scale": 2.4, "guidance_high": 0.9, "num_flow_steps": 25},
    15: {"guidance_scale": 2.4, "guidance_high": 0.7, "num_flow_steps": 50},
}

_NAMES = {
    "encoder_embed_dim": "dim",
    "decoder_embed_dim": "decoder_dim",
    "encoder_depth": "encoder_layers",
    "decoder_depth": "decoder_layers",
    "encoder_num_heads": "num_heads",
    "decoder_num_heads": "decoder_heads",
    "vae_embed_dim": "latent_channels",
    "diffloss_d": "head_layers",
    "diffloss_w": "head_dim",
    "scale": "scales",
}
# Options of the authors' class that change training or the sampler only, or that the tensors say.
_WITHOUT_EFFECT = {
    "img_size", "vae_stride", "patch_size", "mlp_ratio", "label_drop_prob", "attn_dropout", "proj_dropout", "norm_layer",
    "grad_checkpointing", "class_num", "guidance", "flow_upper_steps", "flow_lower_steps", "num_sampling_steps",
}  # fmt: skip
_OPTIONS = {*_NAMES.values(), "cross", "head_heads", *_WITHOUT_EFFECT}


def _split_half(tensor: torch.Tensor, context: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
    """Rows of a fused projection of keys and values."""
    if tensor.shape[0] % 2:
        raise CheckpointShapeError(f"expected keys and values of equal size, got {tensor.shape[0]} rows")
    return tensor.chunk(2, dim=0)


def _rows(tensor: torch.Tensor, context: Mapping[str, Any]) -> torch.Tensor:
    """[1, N, D] -> [N, D]."""
    if tensor.ndim != 3 or tensor.shape[0] != 1:
        raise CheckpointShapeError(f"expected [1, tokens, width], got {tuple(tensor.shape)}")
    return tensor[0]


def rules(encoder_layers: int, decoder_layers: int) -> tuple[Rule, ...]:
    """The rules of a FlowAR with so many blocks in its two stacks."""
    theirs, ours = "flownet.res_blocks.{i}.", "head.trunk.blocks.{i}."
    cross = ours + "cross_attention."
    return (
        *two_stack_rules(encoder_layers, decoder_layers),
        Rule("diffusion_pos_embed_learned", "feature_position.weight", _rows),
        Rule("flownet.time_embed.mlp.0.{leaf}", "head.time_embedding.fc1.{leaf}"),
        Rule("flownet.time_embed.mlp.2.{leaf}", "head.time_embedding.fc2.{leaf}"),
        Rule("flownet.cond_embed.{leaf}", "head.feature_projection.{leaf}"),
        Rule("flownet.input_proj.{leaf}", "head.input_projection.{leaf}"),
        Rule("flownet.final_layer.linear.{leaf}", "head.projection.{leaf}"),
        Rule("flownet.final_layer.adaLN_modulation.1.{leaf}", "head.modulation.linear.{leaf}"),
        *block_rules(theirs, ours),
        Rule(theirs + "ada_lin.{leaf}", ours + "modulation.projection.linear.{leaf}"),
        Rule(theirs + "ada_lin_attn.{leaf}", ours + "modulation.projections.0.linear.{leaf}"),
        Rule(theirs + "ada_lin_mlp.{leaf}", ours + "modulation.projections.1.linear.{leaf}"),
        Rule(theirs + "crossattn.rope.freqs", None),
        Rule(theirs + "crossattn.q.{leaf}", cross + "to_q.{leaf}"),
        Rule(theirs + "crossattn.kv.{leaf}", (cross + "to_k.{leaf}", cross + "to_v.{leaf}"), _split_half),
        Rule(theirs + "crossattn.proj.{leaf}", cross + "to_out.{leaf}"),
        Rule(theirs + "norm2_1.weight", ours + "cross_norm.weight"),
        Rule(theirs + "norm2_2.weight", ours + "context_norm.weight"),
    )


def model_arguments(state: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> dict[str, Any]:
    """Init arguments of `NextScaleFlowModel` for the tensors of a FlowAR."""
    transformer = stack_arguments(state, options)
    prefix = "flownet.res_blocks.0."
    width = shape(state, "flownet.input_proj.weight", 2)[0]
    cross = prefix + "crossattn.q.weight" in state
    name = prefix + "attn.rope.freqs"
    heads = width // (4 * shape(state, name, 1)[0]) if name in state else options.get("head_heads", width // 64)
    if not isinstance(heads, int) or heads < 1 or width % (4 * heads):
        raise CheckpointShapeError(f"the flow head cannot have {heads!r} heads: its width is {width}.")
    found = {
        "head_layers": count(state, r"flownet\.res_blocks\.(\d+)\."),
        "head_dim": width,
        "cross": cross,
        "head_heads": heads,
    }
    scales = scales_of(state, transformer["learned_positions"], options)
    compare(options, {**found, "scales": list(scales)})
    axis = width // heads // 2
    head = {
        "dim": width,
        "num_layers": found["head_layers"],
        "num_heads": heads,
        "mlp": "geglu",
        "mlp_hidden": shape(state, prefix + "mlp.fc2.weight", 2)[1],
        "mlp_bias": True,
        "norm": "rms",
        "norm_affine": False,
        "norm_eps": 1e-6,
        "out_bias": True,
        "rotary_axes": [axis, axis],
        "modulation_order": ADA_ORDER,
    }
    return {
        "latent_channels": shape(state, "z_proj.weight", 2)[1],
        "num_classes": shape(state, "class_emb.weight", 2)[0] - 1,
        "scales": list(scales),
        "transformer": transformer,
        "head": {"transformer": head, "cross": cross},
    }


def scales_of(state: Mapping[str, torch.Tensor], tokens: int, options: Mapping[str, Any]) -> tuple[int, ...]:
    """Sides of the token maps: from the buffer `mask`, else from `config`, else doubling ones with as many tokens."""
    sizes = block_sizes(state)
    if sizes is not None:
        scales = tuple(math.isqrt(size) for size in sizes)
        if any(side * side != size for side, size in zip(scales, sizes, strict=True)) or sum(sizes) != tokens:
            raise CheckpointShapeError(
                f"the blocks {sizes} of the buffer `mask` are no square maps of {tokens} tokens."
            )
        return scales
    if "scales" in options:
        return check_scales(options["scales"])
    scales = (1,)
    while sum(side * side for side in scales) < tokens:
        scales = (*scales, 2 * scales[-1])
    if sum(side * side for side in scales) != tokens:
        raise ValueError(
            f"the file does not say the sizes of its maps of {tokens} tokens: pass config={{'scale': [...]}}."
        )
    return scales


def convert(
    path: Any, *, config: Any = None, dtype: torch.dtype | None = None, use_ema: bool = False
) -> NextScaleFlowModel:
    """The transformer with its flow head in the file `path`.

    Args:
        path: a file of the authors, or one their trainer wrote.
        config: a dict, or a JSON file, with options by our names or the authors' (`num_heads`/`encoder_num_heads`, `scale`, ...).
            Needed for files without the buffers `rope.freqs` and `mask`; values that the tensors contradict are a ValueError.
        dtype: of the weights; None keeps the file's.
        use_ema: take the moving average stored beside the weights.
    """
    return convert_state_dict(load_state_dict(path, use_ema=use_ema), config=config, dtype=dtype)


def convert_state_dict(
    state: Mapping[str, torch.Tensor], *, config: Any = None, dtype: torch.dtype | None = None
) -> NextScaleFlowModel:
    """Like `convert`, from tensors under the authors' names."""
    needed = ["flownet.input_proj.weight", "diffusion_pos_embed_learned"]
    missing = [name for name in needed if name not in state]
    if missing:
        raise CheckpointKeysError(
            f"this is no FlowAR checkpoint: it lacks {', '.join(missing)}, and holds {', '.join(sorted(state)[:4])}, ...",
            missing=missing,
        )
    arguments = model_arguments(state, read_options(config, _NAMES, _OPTIONS))
    with init_empty_weights():
        model = NextScaleFlowModel(**arguments)
    layers = [count(state, rf"{name}\.(\d+)\.") for name in ("encoder_blocks", "decoder_blocks")]
    table = rules(*layers)
    return load_strict(model, apply_rules(state, table), table, dtype=dtype)  # type: ignore[return-value]


def load_single_file(
    path: Any,
    *,
    tokenizer: Any = None,
    config: Any = None,
    tokenizer_config: Any = None,
    dtype: torch.dtype | dict[str, torch.dtype] | None = None,
    generation_config: dict[str, Any] | None = None,
    use_ema: bool = False,
    **hub_options: Any,
) -> dict[str, Any]:
    """The components of a `FlowARPipeline` from the authors' files.

    Args:
        path: the transformer's file, or a link to it.
        tokenizer: the file or link of MAR's KL-16 autoencoder (`kl16.ckpt`), or a `KLTokenizer`.
        config, tokenizer_config: options for the transformer's and the tokenizer's file, see their `convert`.
        dtype: of the weights; a dict names `"transformer"`, `"tokenizer"` and `"default"`.
        generation_config: settings that replace the README's.
        use_ema: take the moving average of a trainer's file.
        hub_options: `revision`, `cache_dir`, `local_files_only`, `token` for files on the hub.
    """
    coder = load_tokenizer(tokenizer, config=tokenizer_config, dtype=dtype_of(dtype, "tokenizer"), **hub_options)
    state = load_state_dict(resolve_file(path, **hub_options), use_ema=use_ema)
    model = convert_state_dict(state, config=config, dtype=dtype_of(dtype, "transformer"))
    preset = PRESETS.get(model.trunk.num_layers // 2, {})
    return {
        "tokenizer": coder,
        "transformer": model,
        "decoding": NextScaleFlowDecoding(),
        "generation_config": {**preset, **(generation_config or {})},
    }
