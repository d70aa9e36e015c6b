"""xAR's files (arXiv 2502.20388, OliverRensu/xAR, commit 121e9c9) -> our modules.

Reads `xAR-B.pth`, `xAR-L.pth` and `xAR-H.pth`, which are flat, and the trainer's own files. Sizes are read off the tensors and the
buffers beside them. Positions are kept in the raster order of the grid, the authors' are in the order of the cells.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import init_empty_weights

from armm.decoding.entities import EntityPlan
from armm.decoding.next_x import NextXDecoding
from armm.hub import resolve_file
from armm.next_x_model import NextXModel

from .containers import CheckpointKeysError, CheckpointShapeError, load_state_dict
from .facts import compare, count, dtype_of, read_options, shape
from .keymap import Rule, apply_rules, load_strict, split_thirds
from .kl import load_tokenizer

# Settings of the README, by the depth of each of the two stacks.
PRESETS: dict[int, dict[str, Any]] = {
    8: {"guidance_scale": 2.7, "num_flow_steps": 40},
    16: {"guidance_scale": 2.3, "num_flow_steps": 50},
    20: {"guidance_scale": 2.2, "num_flow_steps": 50},
}
ADA_ORDER = ["gate1", "gate2", "scale1", "scale2", "shift1", "shift2"]

_NAMES = {
    "encoder_embed_dim": "dim",
    "decoder_embed_dim": "decoder_dim",
    "encoder_depth": "encoder_layers",
    "decoder_depth": "decoder_layers",
    "encoder_num_heads": "num_heads",
    "decoder_num_heads": "decoder_heads",
    "vae_embed_dim": "latent_channels",
}
# Options of the authors' class that change training only, or that the tensors say.
_WITHOUT_EFFECT = {
    "img_size", "vae_stride", "patch_size", "mlp_ratio", "label_drop_prob", "attn_dropout", "proj_dropout", "norm_layer",
    "grad_checkpointing", "class_num",
}  # fmt: skip
_OPTIONS = {*_NAMES.values(), "cell_size", *_WITHOUT_EFFECT}


def _rows(tensor: torch.Tensor, context: Mapping[str, Any]) -> torch.Tensor:
    """[1, N, D] -> [N, D], from the order of the authors to ours where `context["order"]` says one."""
    if tensor.ndim != 3 or tensor.shape[0] != 1:
        raise CheckpointShapeError(f"expected [1, tokens, width], got {tuple(tensor.shape)}")
    order = context.get("order")
    if order is None:
        return tensor[0]
    rows = torch.empty_like(tensor[0])
    rows[order] = tensor[0]
    return rows


def stack_rules(source: str, first_layer: int, layers: int) -> tuple[Rule, ...]:
    """The rules of the authors' blocks `source`, which are ours from `first_layer` on."""
    rules: list[Rule] = []
    for i in range(layers):
        theirs, ours = f"{source}.{i}.", f"trunk.blocks.{first_layer + i}."
        rules += block_rules(theirs, ours)
        rules.append(Rule(theirs + "ada_lin.1.{leaf}", ours + "modulation.projection.linear.{leaf}"))
    return tuple(rules)


def block_rules(theirs: str, ours: str) -> list[Rule]:
    """The rules of attention and feed-forward of one block."""
    return [
        Rule(theirs + "attn.rope.{leaf}", None),  # follows from the width of the heads and the grid
        Rule(
            theirs + "attn.qkv.{leaf}",
            tuple(ours + f"attention.{part}.{{leaf}}" for part in ("to_q", "to_k", "to_v")),
            split_thirds,
        ),
        Rule(theirs + "attn.proj.{leaf}", ours + "attention.to_out.{leaf}"),
        Rule(theirs + "mlp.fc1_g.{leaf}", ours + "mlp.gate.{leaf}"),
        Rule(theirs + "mlp.fc1_x.{leaf}", ours + "mlp.up.{leaf}"),
        Rule(theirs + "mlp.fc2.{leaf}", ours + "mlp.down.{leaf}"),
    ]


def two_stack_rules(encoder_layers: int, decoder_layers: int) -> tuple[Rule, ...]:
    """The rules of the transformer that xAR and FlowAR share: two stacks of blocks one after the other."""
    bridge = f"trunk.bridges.{encoder_layers}."
    return (
        Rule("mask", None),  # follows from the sizes of the entities
        Rule("class_emb.weight", "class_embedding.embedding.weight"),
        Rule("z_proj.{leaf}", "latent_projection.{leaf}"),
        Rule("encoder_pos_embed_learned", "trunk.position_embedding.weight", _rows),
        Rule("z_proj_ln.weight", "trunk.input_norm.weight"),
        *stack_rules("encoder_blocks", 0, encoder_layers),
        Rule("encoder_norm.weight", bridge + "norm.weight"),
        Rule("decoder_embed.{leaf}", bridge + "projection.{leaf}"),
        Rule("decoder_pos_embed_learned", bridge + "position_embedding.weight", _rows),
        *stack_rules("decoder_blocks", encoder_layers, decoder_layers),
        Rule("decoder_norm.weight", "trunk.norm.weight"),
    )


def rules(encoder_layers: int, decoder_layers: int) -> tuple[Rule, ...]:
    """The rules of an xAR with so many blocks in its two stacks."""
    return (
        *two_stack_rules(encoder_layers, decoder_layers),
        Rule("time_embed.mlp.0.{leaf}", "time_embedding.fc1.{leaf}"),
        Rule("time_embed.mlp.2.{leaf}", "time_embedding.fc2.{leaf}"),
        Rule("pred.{leaf}", "head.projection.{leaf}"),
    )


def block_sizes(state: Mapping[str, torch.Tensor]) -> list[int] | None:
    """Sizes of the blocks of the block-causal buffer `mask`; None where the file has no such buffer."""
    if "mask" not in state:
        return None
    visible = (state["mask"][0, 0] == 0).sum(1).tolist()
    ends = sorted(set(visible))
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    if visible != [end for end, size in zip(ends, sizes, strict=True) for _ in range(size)]:
        raise CheckpointShapeError("the buffer `mask` is not block-causal.")
    return sizes


def stack_arguments(state: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> dict[str, Any]:
    """What the tensors say of the transformer that xAR and FlowAR share: arguments of `ARTransformer`."""
    dim, channels = shape(state, "z_proj.weight", 2)
    stacks = ("encoder_blocks", "decoder_blocks")
    layers = [count(state, rf"{name}\.(\d+)\.") for name in stacks]
    hidden = shape(state, "encoder_blocks.0.mlp.fc2.weight", 2)[1]
    found: dict[str, Any] = {
        "dim": dim,
        "latent_channels": channels,
        "encoder_layers": layers[0],
        "decoder_layers": layers[1],
    }
    heads = [_heads(state, f"{name}.0.", dim, options) for name in stacks]
    if heads[0] != heads[1]:
        raise CheckpointShapeError(
            f"the two stacks have {heads[0]} and {heads[1]} heads: they must have the same number."
        )
    found |= {"num_heads": heads[0], "decoder_dim": dim, "decoder_heads": heads[0]}
    compare(options, found)
    head_dim = dim // heads[0]
    return {
        "dim": dim,
        "num_layers": sum(layers),
        "num_heads": heads[0],
        "mlp": "geglu",
        "mlp_hidden": hidden,
        "mlp_bias": True,
        "norm": "rms",
        "norm_affine": False,
        "norm_eps": 1e-6,
        "input_norm": True,
        "qkv_bias": True,
        "out_bias": True,
        "rotary_axes": [head_dim // 2, head_dim // 2],
        "learned_positions": shape(state, "encoder_pos_embed_learned", 3)[1],
        "modulation": "block",
        "modulation_order": ADA_ORDER,
        "bridges": [layers[0]],
    }


def _heads(state: Mapping[str, torch.Tensor], prefix: str, dim: int, options: Mapping[str, Any]) -> int:
    """Heads of a stack, from the frequencies of its rotary positions, else from `config`."""
    name = prefix + "attn.rope.freqs"
    if name in state:
        head_dim = 4 * shape(state, name, 1)[0]
        if dim % head_dim:
            raise CheckpointShapeError(f"{name} is of heads {head_dim} wide, which do not divide the width {dim}.")
        return dim // head_dim
    heads = options.get("num_heads")
    if not isinstance(heads, int) or heads < 1 or dim % (4 * heads):
        raise ValueError(
            f"the file does not say its number of heads: pass config={{'num_heads': ...}} (width {dim}), got {heads!r}."
        )
    return heads


def model_arguments(state: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """Init arguments of `NextXModel` for the tensors of an xAR, and the side of its cells."""
    transformer = stack_arguments(state, options)
    tokens = transformer["learned_positions"]
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise CheckpointShapeError(f"encoder_pos_embed_learned has {tokens} tokens: expected a square grid.")
    sizes = block_sizes(state)
    cell = math.isqrt(sizes[0]) if sizes else options.get("cell_size", 8)
    if side % cell or (sizes and sizes != [cell * cell] * (side // cell) ** 2):
        raise CheckpointShapeError(
            f"the blocks {sizes} of the buffer `mask` are no square cells of a grid of {side}x{side}."
        )
    compare(options, {"cell_size": cell})
    arguments = {
        "latent_channels": shape(state, "z_proj.weight", 2)[1],
        "grid": [side, side],
        "num_classes": shape(state, "class_emb.weight", 2)[0] - 1,
        "transformer": transformer,
    }
    return arguments, cell


def convert(path: Any, *, config: Any = None, dtype: torch.dtype | None = None, use_ema: bool = False) -> NextXModel:
    """The transformer in the file `path`.

    Args:
        path: a file of the authors, or one their trainer wrote.
        config: a dict, or a JSON file, with options by our names or the authors' (`num_heads`/`encoder_num_heads`, `cell_size`).
            Needed for files without the buffers `rope.freqs` and `mask`; values that the tensors contradict are a ValueError.
        dtype: of the weights; None keeps the file's.
        use_ema: take the moving average stored beside the weights.
    """
    return convert_state_dict(load_state_dict(path, use_ema=use_ema), config=config, dtype=dtype)[0]


def convert_state_dict(
    state: Mapping[str, torch.Tensor], *, config: Any = None, dtype: torch.dtype | None = None
) -> tuple[NextXModel, NextXDecoding]:
    """The transformer, and the decoding with its cells, from tensors under the authors' names."""
    if "pred.weight" not in state or "z_proj_ln.weight" not in state:
        raise CheckpointKeysError(
            "this is no xAR checkpoint: it lacks 'pred.weight' and 'z_proj_ln.weight', and holds "
            f"{', '.join(sorted(state)[:4])}, ...",
            missing=["pred.weight", "z_proj_ln.weight"],
        )
    options = read_options(config, _NAMES, _OPTIONS)
    arguments, cell = model_arguments(state, options)
    with init_empty_weights():
        model = NextXModel(**arguments)
    layers = [count(state, rf"{name}\.(\d+)\.") for name in ("encoder_blocks", "decoder_blocks")]
    table = rules(*layers)
    context = {"order": EntityPlan.of("cell", arguments["grid"], cell).index}
    load_strict(model, apply_rules(state, table, context), table, dtype=dtype)
    return model, NextXDecoding("cell", cell)


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
    """The components of an `XARPipeline` from the authors' files.

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
    model, decoding = convert_state_dict(state, config=config, dtype=dtype_of(dtype, "transformer"))
    preset = PRESETS.get(model.trunk.num_layers // 2, {})
    return {
        "tokenizer": coder,
        "transformer": model,
        "decoding": decoding,
        "generation_config": {**preset, **(generation_config or {})},
    }
