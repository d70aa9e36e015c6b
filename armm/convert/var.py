"""VAR's files (arXiv 2404.02905, FoundationVision/VAR, commit 78b9539) -> our modules.

Reads the next-scale transformers (`var_d*.pth`, plain or with one adaptive norm for all blocks), the multi-scale tokenizer
(`vae_ch160v4096z32.pth`) and the trainer's own files, which hold both (`ar-ckpt-*.pth`). Sizes are read off the tensors. A tokenizer
file does not say the sizes of its token maps; they come from `config` where they are not the published ones.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import init_empty_weights

from armm.decoding.next_scale import NextScaleDecoding
from armm.hub import resolve_file
from armm.next_scale_model import NextScaleModel
from tokenizers_visual.multi_scale import check_scales
from tokenizers_visual.multi_scale_tokenizer import MultiScaleVQTokenizer

from .containers import CheckpointKeysError, CheckpointShapeError, load_state_dict
from .facts import compare, count, dtype_of, read_options, shape
from .keymap import Rule, apply_rules, load_strict, split_qkv
from .taming import coder_rules, coder_sizes

logger = logging.getLogger(__name__)

# Sides of the token maps of 256, 512 and 1024 pixels.
PUBLISHED_SCALES: tuple[tuple[int, ...], ...] = (
    (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
)
HEAD_WIDTH = 64  # of every published size
# The notebook's settings, for good looking pictures, and those of the figures in the README.
PRESETS: dict[str, dict[str, Any]] = {
    "pictures": {"guidance_scale": 4.0, "top_k": 900, "top_p": 0.95},
    "fid": {"guidance_scale": 1.5, "top_k": 900, "top_p": 0.96},
}
TRAINER_KEYS = {"transformer": ("trainer", "var_wo_ddp"), "tokenizer": ("trainer", "vae_local")}

_TRANSFORMER_NAMES = {
    "depth": "num_layers",
    "embed_dim": "dim",
    "patch_nums": "scales",
    "Cvae": "code_dim",
    "V": "vocab_size",
}
# Options of the authors' class that change training or kernels only.
_WITHOUT_EFFECT = {
    "drop_rate", "attn_drop_rate", "drop_path_rate", "cond_drop_rate", "flash_if_available", "fused_if_available", "vae_kwargs",
}  # fmt: skip
_TRANSFORMER_OPTIONS = {
    "num_heads", "num_layers", "dim", "mlp_ratio", "norm_eps", "num_classes", "shared_aln", "attn_l2_norm", "scales", "vocab_size",
    "code_dim", *_WITHOUT_EFFECT,
}  # fmt: skip
_TOKENIZER_NAMES = {
    "vocab_size": "codebook_size",
    "z_channels": "latent_channels",
    "ch": "base_channels",
    "ch_mult": "channel_multipliers",
    "quant_conv_ks": "quant_kernel",
    "quant_resi": "residual_ratio",
    "share_quant_resi": "shared_refiners",
    "using_znorm": "cosine",
    "v_patch_nums": "scales",
    "patch_nums": "scales",
}
_TOKENIZER_OPTIONS = {*_TOKENIZER_NAMES.values(), "num_res_blocks", "beta", "dropout", "test_mode"}


def _flat(tensor: torch.Tensor, context: Mapping[str, Any]) -> torch.Tensor:
    return tensor.flatten()


def _rows(tensor: torch.Tensor, context: Mapping[str, Any]) -> torch.Tensor:
    """[1, ..., N, D] -> [N, D]."""
    return tensor.reshape(tensor.shape[-2:]) if tensor.numel() == tensor.shape[-2:].numel() else tensor


_BLOCK, _OURS = "blocks.{i}.", "trunk.blocks.{i}."
TRANSFORMER_RULES: tuple[Rule, ...] = (
    Rule("lvl_1L", None),  # the scale of each position and the mask that follows from it
    Rule("attn_bias_for_masking", None),
    Rule("pos_start", "start_position", _rows),
    Rule("pos_1LC", "trunk.position_embedding.weight", _rows),
    Rule("lvl_embed.weight", "level_embedding.weight"),
    Rule("word_embed.{leaf}", "code_projection.{leaf}"),
    Rule("class_emb.weight", "class_embedding.embedding.weight"),
    Rule(_BLOCK + "attn.scale_mul_1H11", _OURS + "attention.query_scale", _flat),
    Rule(
        _BLOCK + "attn.mat_qkv.weight",
        tuple(_OURS + f"attention.{part}.weight" for part in ("to_q", "to_k", "to_v")),
        split_qkv,
    ),
    Rule(_BLOCK + "attn.q_bias", _OURS + "attention.to_q.bias"),
    Rule(_BLOCK + "attn.zero_k_bias", _OURS + "attention.to_k.bias"),
    Rule(_BLOCK + "attn.v_bias", _OURS + "attention.to_v.bias"),
    Rule(_BLOCK + "attn.proj.{leaf}", _OURS + "attention.to_out.{leaf}"),
    Rule(_BLOCK + "ffn.fc1.{leaf}", _OURS + "mlp.fc1.{leaf}"),
    Rule(_BLOCK + "ffn.fc2.{leaf}", _OURS + "mlp.fc2.{leaf}"),
    Rule(_BLOCK + "ada_lin.1.{leaf}", _OURS + "modulation.projection.linear.{leaf}"),
    Rule(_BLOCK + "ada_gss", _OURS + "modulation.table", _rows),
    Rule("shared_ada_lin.1.{leaf}", "trunk.shared_modulation.linear.{leaf}"),
    Rule("head_nm.ada_lin.1.{leaf}", "head.modulation.linear.{leaf}"),
    Rule("head.{leaf}", "head.projection.{leaf}"),
)


def tokenizer_rules(levels: int, refiners: int) -> tuple[Rule, ...]:
    """The rules of a tokenizer with so many resolutions and convolutions behind the codebook."""
    target = "quantizer.refiners."
    shared = (Rule("quantize.quant_resi.qresi.{leaf}", target + "0.{leaf}"),) if refiners == 1 else ()
    return (
        Rule("quantize.ema_vocab_hit_SV", None),  # how often training used each code
        Rule("quantize.embedding.weight", "quantizer.codes.embedding.weight"),
        *shared,
        Rule("quantize.quant_resi.qresi_ls.{i}.{leaf}", target + "{i}.{leaf}"),
        Rule("quantize.quant_resi.{i}.{leaf}", target + "{i}.{leaf}"),
        Rule("quant_conv.{leaf}", "quant_conv.{leaf}"),
        Rule("post_quant_conv.{leaf}", "post_quant_conv.{leaf}"),
        *coder_rules("encoder", levels),
        *coder_rules("decoder", levels),
    )


def convert(
    path: Any, *, config: Any = None, dtype: torch.dtype | None = None, use_ema: bool = False
) -> NextScaleModel | MultiScaleVQTokenizer:
    """The transformer or the tokenizer in the file `path`; of a trainer's file, the transformer.

    Args:
        path: a file of the authors, or one their trainer wrote.
        config: a dict, or a JSON file, with options by our names or the authors' (`scales`/`patch_nums`, `num_heads`,
            `residual_ratio`/`quant_resi`, ...). Needed for the scales of tokenizers that were not published, and for the heads
            of transformers without `scale_mul_1H11`; values that the tensors contradict are a ValueError.
        dtype: of the weights; None keeps the file's.
        use_ema: take the moving average stored beside the weights.
    """
    state = load_state_dict(path, use_ema=use_ema, keys=TRAINER_KEYS["transformer"])
    return convert_state_dict(state, config=config, dtype=dtype)


def convert_state_dict(
    state: Mapping[str, torch.Tensor], *, config: Any = None, dtype: torch.dtype | None = None
) -> NextScaleModel | MultiScaleVQTokenizer:
    """Like `convert`, from tensors under the authors' names."""
    if "quantize.embedding.weight" in state:
        arguments = tokenizer_arguments(state, read_options(config, _TOKENIZER_NAMES, _TOKENIZER_OPTIONS))
        with init_empty_weights():
            tokenizer = MultiScaleVQTokenizer(**arguments)
        rules = tokenizer_rules(len(arguments["channel_multipliers"]), len(tokenizer.quantizer.refiners))
        return load_strict(tokenizer, apply_rules(state, rules), rules, dtype=dtype)
    if "word_embed.weight" in state or "lvl_embed.weight" in state:
        arguments = transformer_arguments(state, read_options(config, _TRANSFORMER_NAMES, _TRANSFORMER_OPTIONS))
        with init_empty_weights():
            model = NextScaleModel(**arguments)
        dim = arguments["transformer"]["dim"]
        converted = apply_rules(state, TRANSFORMER_RULES, {"qkv_rows": (dim, dim, dim)})
        return load_strict(model, converted, TRANSFORMER_RULES, dtype=dtype)
    raise CheckpointKeysError(
        "this is no VAR checkpoint: it holds neither 'word_embed.weight' (a transformer) nor 'quantize.embedding.weight' "
        f"(a tokenizer), but {', '.join(sorted(state)[:4])}, ...",
        missing=["word_embed.weight", "quantize.embedding.weight"],
    )


def transformer_arguments(state: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> dict[str, Any]:
    """Init arguments of `NextScaleModel` for the tensors of a transformer."""
    dim, code_dim = shape(state, "word_embed.weight", 2)
    num_layers = count(state, r"blocks\.(\d+)\.")
    hidden = shape(state, "blocks.0.ffn.fc1.weight", 2)[0]
    scales = scales_of(state, options)
    normalized = "blocks.0.attn.scale_mul_1H11" in state
    if normalized:
        num_heads = shape(state, "blocks.0.attn.scale_mul_1H11", 4)[1]
    else:
        num_heads = options.get("num_heads", dim // HEAD_WIDTH if dim == HEAD_WIDTH * num_layers else None)
        if num_heads is None:
            raise ValueError(
                f"a transformer {dim} wide with {num_layers} layers is none of the published sizes, and the file does not say how "
                "many attention heads it has: pass config={'num_heads': ...}."
            )
    if not isinstance(num_heads, int) or num_heads < 1 or dim % num_heads:
        raise ValueError(f"`num_heads` must divide the width {dim}, got {num_heads!r}.")
    found = {
        "num_layers": num_layers,
        "dim": dim,
        "num_heads": num_heads,
        "num_classes": shape(state, "class_emb.weight", 2)[0] - 1,
        "vocab_size": shape(state, "head.weight", 2)[0],
        "code_dim": code_dim,
        "shared_aln": "shared_ada_lin.1.weight" in state,
        "attn_l2_norm": normalized,
        "mlp_ratio": hidden / dim,
        "scales": list(scales),
    }
    compare(options, found)
    norm_eps = float(options.get("norm_eps", 1e-6))
    return {
        **{name: found[name] for name in ("vocab_size", "num_classes", "code_dim", "scales")},
        "head_norm_eps": norm_eps,
        "transformer": {
            "dim": dim,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "mlp": "gelu_tanh",
            "mlp_hidden": hidden,
            "mlp_bias": True,
            "norm": "layer",
            "norm_affine": False,
            "norm_eps": norm_eps,
            "final_norm": False,
            "qkv_bias": True,
            "out_bias": True,
            "qk_norm": "l2" if normalized else None,
            # Without normalised queries and keys the authors scale by a further quarter.
            "attention_scale": None if normalized else 0.25 / math.sqrt(dim // num_heads),
            "learned_positions": sum(side * side for side in scales),
            "modulation": "shared" if found["shared_aln"] else "block",
            "modulation_order": ["gate1", "gate2", "scale1", "scale2", "shift1", "shift2"],
        },
    }


def scales_of(state: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> tuple[int, ...]:
    """Sides of a transformer's token maps: from the scale of each position (`lvl_1L`), else from `config`, else the published list
    with as many scales and tokens."""
    levels = shape(state, "lvl_embed.weight", 2)[0]
    tokens = shape(state, "pos_1LC", 3)[1]
    if "lvl_1L" in state:
        sizes = torch.bincount(state["lvl_1L"].flatten().long(), minlength=levels).tolist()
        sides = [math.isqrt(size) for size in sizes]
        if (
            len(sizes) != levels
            or sum(sizes) != tokens
            or any(side * side != n for side, n in zip(sides, sizes, strict=True))
        ):
            raise CheckpointShapeError(
                f"lvl_1L counts {sizes} tokens on its scales: expected {levels} square numbers that add up to {tokens}."
            )
        return tuple(sides)
    if "scales" in options:
        return check_scales(options["scales"])
    for scales in PUBLISHED_SCALES:
        if (len(scales), sum(side * side for side in scales)) == (levels, tokens):
            return scales
    raise ValueError(
        f"the file does not say the sizes of its {levels} token maps with {tokens} tokens: pass config={{'patch_nums': [...]}}."
    )


def tokenizer_arguments(state: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> dict[str, Any]:
    """Init arguments of `MultiScaleVQTokenizer` for the tensors of a tokenizer."""
    codebook_size, latent_channels = shape(state, "quantize.embedding.weight", 2)
    prefix = "quantize.quant_resi."
    names = {name.removeprefix(prefix) for name in state if name.startswith(prefix)}
    refined = bool(names)
    if any(name.startswith("qresi_ls.") for name in names):
        shared = count(state, r"quantize\.quant_resi\.qresi_ls\.(\d+)\.")
    elif any(name.startswith("qresi.") for name in names):
        shared = 1
    else:
        shared = 0
    own = count(state, r"quantize\.quant_resi\.(\d+)\.") if refined and not shared else None
    steps = own or (state["quantize.ema_vocab_hit_SV"].shape[0] if "quantize.ema_vocab_hit_SV" in state else None)
    published = next((known for known in PUBLISHED_SCALES if steps in (None, len(known))), None)
    if "scales" not in options and published is None:
        raise ValueError(
            f"the file does not say the sizes of its {steps} token maps: pass config={{'v_patch_nums': [...]}}."
        )
    scales = check_scales(options.get("scales", published))
    if own and own != len(scales):
        raise CheckpointShapeError(f"`config` says scales = {list(scales)}, but the file has {own} of them.")
    found = {
        **coder_sizes(state),
        "latent_channels": latent_channels,
        "codebook_size": codebook_size,
        "quant_kernel": shape(state, "quant_conv.weight", 4)[2],
    }
    if refined:
        found["shared_refiners"] = shared
    compare(options, found)
    ratio = abs(float(options.get("residual_ratio", 0.5))) if refined else 0.0
    if refined and not ratio:
        raise CheckpointShapeError(
            "`config` says residual_ratio = 0, but the file has the convolutions of another ratio."
        )
    found.setdefault("shared_refiners", 0)
    return {**found, "scales": list(scales), "residual_ratio": ratio, "cosine": bool(options.get("cosine", False))}


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
    """The components of a `VARPipeline` from the authors' files.

    Args:
        path: the transformer's file, or a link to it.
        tokenizer: the tokenizer's file or link, or a `MultiScaleVQTokenizer`; None takes the one inside a trainer's file.
        config: options for the transformer's file, see `convert`.
        tokenizer_config: options for the tokenizer's file; the scales are the transformer's unless it says otherwise.
        dtype: of the weights; a dict names `"transformer"`, `"tokenizer"` and `"default"`.
        generation_config: settings that replace the notebook's.
        hub_options: `revision`, `cache_dir`, `local_files_only`, `token` for files on the hub.
    """
    local = resolve_file(path, **hub_options)
    state = load_state_dict(local, use_ema=use_ema, keys=TRAINER_KEYS["transformer"])
    if "quantize.embedding.weight" in state:
        raise ValueError(f"{path} holds a tokenizer, not a transformer: pass it as `tokenizer=`.")
    transformer = convert_state_dict(state, config=config, dtype=dtype_of(dtype, "transformer"))
    if not isinstance(tokenizer, MultiScaleVQTokenizer):
        source = path if tokenizer is None else tokenizer
        file = local if tokenizer is None else resolve_file(tokenizer, **hub_options)
        state = load_state_dict(file, keys=TRAINER_KEYS["tokenizer"])
        if "quantize.embedding.weight" not in state:
            way = "pass the tokenizer's file as `tokenizer=`" if tokenizer is None else "give the tokenizer's own file"
            raise ValueError(f"{source} holds no tokenizer: {way} (published as vae_ch160v4096z32.pth).")
        options = read_options(tokenizer_config, _TOKENIZER_NAMES, _TOKENIZER_OPTIONS)
        options.setdefault("scales", list(transformer.scales))
        tokenizer = convert_state_dict(state, config=options, dtype=dtype_of(dtype, "tokenizer"))
    return {
        "tokenizer": tokenizer,
        "transformer": transformer,
        "decoding": NextScaleDecoding(),
        "generation_config": {**PRESETS["pictures"], **(generation_config or {})},
    }
