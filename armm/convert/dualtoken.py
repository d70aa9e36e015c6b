"""DualToken's files (arXiv 2503.14324, songweii/DualToken, commit 29e7c84) -> `DualTokenTokenizer`.

Reads what the training script writes; no checkpoint was published at that commit. Widths and depths are read off the tensors. Heads,
the layers at which features are taken and the decoder's grid are those of the authors' configurations unless `config` says.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import init_empty_weights

from tokenizers_visual.dualtoken import DualTokenTokenizer

from .containers import CheckpointKeysError, CheckpointShapeError, load_state_dict
from .facts import compare, count, read_mapping, shape
from .keymap import Rule, apply_rules, load_strict, split_thirds
from .taming import coder_rules, residual_rules

VISION, TEXT = "siglip_model.vision_model.", "siglip_model.text_model."
PUBLISHED_HEADS = {1152: 16}  # width -> heads, of both towers
PUBLISHED_DECODER_GRIDS = {27: 24}  # side of the patches -> of the decoder's input; others keep theirs
# Our options; where the authors nest them: "rqvaesiglip.", "siglip_vision_config.", "siglip_text_config.".
_NAMES = {
    "rqvaesiglip.layer_recon": "pixel_layer",
    "rqvaesiglip.layer_sem": "semantic_layer",
    "rqvaesiglip.layer_shortcut": "shortcut_layer",
    "rqvaesiglip.weight_shortcut": "shortcut_weight",
    "rqvaesiglip.decoder_latent_shape": "decoder_grid",
    "rqvaesiglip.hidden_size": "dim",
    "siglip_vision_config.hidden_size": "dim",
    "siglip_vision_config.intermediate_size": "mlp_hidden",
    "siglip_vision_config.num_hidden_layers": "num_layers",
    "siglip_vision_config.num_attention_heads": "num_heads",
    "siglip_vision_config.image_size": "image_size",
    "siglip_vision_config.patch_size": "patch_size",
    "siglip_text_config.num_attention_heads": "text_heads",
}
_TOLD = {
    "pixel_layer", "semantic_layer", "shortcut_layer", "shortcut_weight", "decoder_grid", "num_heads", "text_heads", "text",
    "shared_codebook", "norm_groups",
}  # fmt: skip
_READ = {"dim", "mlp_hidden", "num_layers", "image_size", "patch_size"}


def _positions(tensor: torch.Tensor, context: Mapping[str, Any]) -> torch.Tensor:
    return tensor.unsqueeze(0)


def _scalar(tensor: torch.Tensor, context: Mapping[str, Any]) -> torch.Tensor:
    return tensor.reshape(())


def _without_padding(tensor: torch.Tensor, context: Mapping[str, Any]) -> torch.Tensor:
    return tensor[:-1]


def _query_and_rest(tensor: torch.Tensor, context: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
    rows = len(tensor) // 3
    return tensor[:rows], tensor[rows:]


def _must_be_zero(tensor: torch.Tensor, context: Mapping[str, Any]) -> torch.Tensor:
    if bool(tensor.count_nonzero()):
        raise CheckpointShapeError("keys have no bias in the authors' model, so this must be zeros")
    return tensor


def _vision_rules() -> tuple[Rule, ...]:
    block, ours, pool = VISION + "encoder.layers.{i}.", "vision.vit.blocks.{i}.", "vision.vit.attn_pool."
    return (
        Rule(VISION + "embeddings.position_ids", None),
        Rule(VISION + "embeddings.patch_embedding.{leaf}", "vision.vit.patch_embed.proj.{leaf}"),
        Rule(VISION + "embeddings.position_embedding.weight", "vision.vit.pos_embed", _positions),
        Rule(block + "layer_norm1.{leaf}", ours + "norm1.{leaf}"),
        Rule(block + "self_attn.qkv.{leaf}", ours + "attn.qkv.{leaf}"),
        Rule(block + "self_attn.out_proj.{leaf}", ours + "attn.proj.{leaf}"),
        Rule(block + "layer_norm2.{leaf}", ours + "norm2.{leaf}"),
        Rule(block + "mlp.{layer}.{leaf}", ours + "mlp.{layer}.{leaf}"),
        Rule(VISION + "post_layernorm.{leaf}", "vision.vit.norm.{leaf}"),
        Rule(VISION + "head.probe", pool + "latent"),
        Rule(VISION + "head.attention.in_proj_{leaf}", (pool + "q.{leaf}", pool + "kv.{leaf}"), _query_and_rest),
        Rule(VISION + "head.attention.out_proj.{leaf}", pool + "proj.{leaf}"),
        Rule(VISION + "head.layernorm.{leaf}", pool + "norm.{leaf}"),
        Rule(VISION + "head.mlp.{layer}.{leaf}", pool + "mlp.{layer}.{leaf}"),
    )


def _text_rules() -> tuple[Rule, ...]:
    block, ours = TEXT + "encoder.layers.{i}.", "text_tower.encoder.blocks.{i}."
    names = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
    return (
        Rule(TEXT + "embeddings.position_ids", None),
        Rule(TEXT + "embeddings.{table}.weight", "text_tower.{table}.weight"),
        Rule(block + "layer_norm1.{leaf}", ours + "attention_norm.{leaf}"),
        *(Rule(block + f"self_attn.{a}.{{leaf}}", ours + f"attention.{b}.{{leaf}}") for a, b in names.items()),
        Rule(block + "layer_norm2.{leaf}", ours + "mlp_norm.{leaf}"),
        Rule(block + "mlp.{layer}.{leaf}", ours + "mlp.{layer}.{leaf}"),
        Rule(TEXT + "final_layer_norm.{leaf}", "text_tower.norm.{leaf}"),
        Rule(TEXT + "head.{leaf}", "text_tower.head.{leaf}"),
        Rule("siglip_model.logit_scale", "logit_scale", _scalar),
        Rule("siglip_model.logit_bias", "logit_bias", _scalar),
    )


_PROJECTIONS = {
    "prequant_sem": "semantic_in",
    "prequant_pix": "pixel_in",
    "prequant_shortcut": "shortcut_in",
    "postquant_sem": "semantic_out",
    "postquant_pix": "pixel_out",
}


def _projection_rules(source: str, target: str) -> tuple[Rule, ...]:
    parts = tuple(f"{target}.{part}.weight" for part in ("to_q", "to_k", "to_v"))
    names = {
        "norm1": "attention_norm",
        "norm2": "mlp_norm",
        "norm3": "proj_norm",
        "attn.proj": "to_out",
        "proj": "proj",
    }
    names |= {"mlp.norm": "inner_norm", "mlp.w0": "mlp.gate", "mlp.w1": "mlp.up", "mlp.w2": "mlp.down"}
    return (
        Rule(f"{source}.attn.qkv.weight", parts, split_thirds),
        Rule(f"{source}.attn.q_bias", f"{target}.to_q.bias"),
        Rule(f"{source}.attn.v_bias", f"{target}.to_v.bias"),
        *(Rule(f"{source}.{a}.{{leaf}}", f"{target}.{b}.{{leaf}}") for a, b in names.items()),
    )


def rules_of(levels: int) -> tuple[Rule, ...]:
    """The key rules of a tokenizer whose decoder has so many resolutions."""
    quantizers = {"quantizer_sem": "semantic_quantizer", "quantizer_pix": "pixel_quantizer"}
    return (
        *_vision_rules(),
        *_text_rules(),
        *(rule for source, target in _PROJECTIONS.items() for rule in _projection_rules(source, target)),
        *(
            Rule(f"{source}.codebooks.{{d}}.weight", f"{target}.codebooks.{{d}}.embedding.weight", _without_padding)
            for source, target in quantizers.items()
        ),
        *residual_rules("post_quant_conv", "decoder_in"),
        *coder_rules("decoder", levels),
    )


def convert(
    path: Any, *, config: Any = None, dtype: torch.dtype | None = None, use_ema: bool = False
) -> DualTokenTokenizer:
    """The tokenizer in the file `path`.

    Args:
        path: a file of the training script.
        config: a dict, or a JSON file, by our names or the authors' (`rqvaesiglip`, `siglip_vision_config` and `siglip_text_config`
            nested as theirs). `text` (default False) says whether the text tower is converted too; `shared_codebook` is
            what the codebooks say unless given. Values that the tensors contradict are a ValueError.
        dtype: of the weights; None keeps the file's.
        use_ema: take the moving average stored beside the weights.
    """
    return convert_state_dict(load_state_dict(path, use_ema=use_ema), config=config, dtype=dtype)


def convert_state_dict(
    state: Mapping[str, torch.Tensor], *, config: Any = None, dtype: torch.dtype | None = None
) -> DualTokenTokenizer:
    """Like `convert`, from tensors under the authors' names."""
    if "prequant_sem.proj.weight" not in state:
        raise CheckpointKeysError(
            f"this is no DualToken tokenizer: it lacks 'prequant_sem.proj.weight'; it holds {', '.join(sorted(state)[:4])}, ...",
            missing=["prequant_sem.proj.weight"],
        )
    options = read_configuration(config)
    arguments = arguments_of(state, options)
    with init_empty_weights():
        model = DualTokenTokenizer(**arguments)
    rules = rules_of(len(arguments["channel_multipliers"]))
    used = prepare(state, text=arguments["text"] is not None, shared=arguments["shared_codebook"])
    return load_strict(model, apply_rules(used, rules), rules, dtype=dtype)  # type: ignore[return-value]


def read_configuration(config: Any) -> dict[str, Any]:
    """The options in `config` under our names; the authors' options that the tensors tell are left out."""
    options: dict[str, Any] = {}
    for name, value in read_mapping(config).items():
        if isinstance(value, Mapping) and any(known.startswith(name + ".") for known in _NAMES):
            options |= {_NAMES[key]: item for part, item in value.items() if (key := f"{name}.{part}") in _NAMES}
            _check_quantizers(value)
        elif name in _TOLD | _READ:
            options[name] = value
        else:
            allowed = ", ".join(sorted(_TOLD | _READ | {known.partition(".")[0] for known in _NAMES}))
            raise ValueError(f"unknown `config` option {name}: choose from {allowed}.")
    return options


def _check_quantizers(options: Mapping[str, Any]) -> None:
    for name in ("vq_sem", "vq_pix"):
        quantizer = options.get(name) or {}
        kind = quantizer.get("bottleneck_type", "rq")
        if kind not in ("rq", "rq_ema"):
            raise ValueError(f"{name} says bottleneck_type {kind!r}: only 'rq' and 'rq_ema' are supported.")
        latent, code = quantizer.get("latent_shape"), quantizer.get("code_shape")
        if latent and code and list(latent[:2]) != list(code[:2]):
            raise ValueError(
                f"{name} puts latents of {latent} into codes of {code}: only one code place a latent is supported."
            )


def arguments_of(state: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> dict[str, Any]:
    """Init arguments of `DualTokenTokenizer` for the tensors of a file."""
    dim, _, patch, _ = shape(state, VISION + "embeddings.patch_embedding.weight", 4)
    tokens = shape(state, VISION + "embeddings.position_embedding.weight", 2)[0]
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise CheckpointShapeError(
            f"{VISION}embeddings.position_embedding.weight has {tokens} rows, which are no square image."
        )
    image_size = options.get("image_size", 384 if (side, patch) == (27, 14) else side * patch)
    if image_size // patch != side:
        raise CheckpointShapeError(
            f"`config` says image_size {image_size}, but the file has {side} x {side} patches of {patch}."
        )
    layers = count(state, re.escape(VISION) + r"encoder\.layers\.(\d+)\.")
    found = {
        "dim": dim,
        "patch_size": patch,
        "num_layers": layers,
        "mlp_hidden": shape(state, VISION + "encoder.layers.0.mlp.fc1.weight", 2)[0],
    }
    compare(options, found)
    shortcut = "prequant_shortcut.proj.weight" in state
    told = {
        name: options[name]
        for name in ("pixel_layer", "semantic_layer", "shortcut_weight", "norm_groups")
        if name in options
    }
    grid = options.get("decoder_grid") or [PUBLISHED_DECODER_GRIDS.get(side, side)] * 2
    return {
        **found,
        **told,
        "image_size": image_size,
        "num_heads": _heads("num_heads", dim, options),
        "shortcut_layer": options.get("shortcut_layer", 4) if shortcut else None,
        **_codebooks(state, options),
        **_decoder(state),
        "decoder_grid": list(grid),
        "text": _text(state, options) if options.get("text") else None,
    }


def _heads(name: str, width: int, options: Mapping[str, Any]) -> int:
    heads = options.get(name, PUBLISHED_HEADS.get(width))
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1 or width % heads:
        raise ValueError(
            f"a transformer {width} wide is none of the published ones, and the file does not say how many attention heads it has: pass "
            f"config={{{name!r}: ...}}, a divisor of {width} (got {heads!r})."
        )
    return heads


def _codebooks(state: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    same = []
    for source, kind in (("quantizer_sem", "semantic"), ("quantizer_pix", "pixel")):
        rows, width = shape(state, f"{source}.codebooks.0.weight", 2)
        depth = count(state, rf"{source}\.codebooks\.(\d+)\.")
        arguments |= {f"{kind}_codebook_size": rows - 1, f"{kind}_depth": depth, "codebook_dim": width}
        first = state[f"{source}.codebooks.0.weight"]
        same += [torch.equal(first, state[f"{source}.codebooks.{level}.weight"]) for level in range(1, depth)]
    shared = options.get("shared_codebook", all(same))
    if shared and not all(same):
        raise CheckpointShapeError(
            "`config` says shared_codebook, but the depths of the file have different codebooks."
        )
    return {**arguments, "shared_codebook": bool(shared)}


def _decoder(state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    levels = count(state, r"decoder\.up\.(\d+)\.")
    widths = [shape(state, f"decoder.up.{level}.block.0.conv2.weight", 4)[0] for level in range(levels)]
    base = math.gcd(*widths)
    return {
        "base_channels": base,
        "channel_multipliers": [width // base for width in widths],
        "num_res_blocks": count(state, r"decoder\.up\.0\.block\.(\d+)\.") - 1,
        "decoder_attention": [f"decoder.up.{level}.attn.0.norm.weight" in state for level in range(levels)],
        "decoder_channels": shape(state, "decoder.conv_in.weight", 4)[1],
    }


def _text(state: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> dict[str, int]:
    vocab_size, dim = shape(state, TEXT + "embeddings.token_embedding.weight", 2)
    return {
        "vocab_size": vocab_size,
        "max_tokens": shape(state, TEXT + "embeddings.position_embedding.weight", 2)[0],
        "dim": dim,
        "num_layers": count(state, re.escape(TEXT) + r"encoder\.layers\.(\d+)\."),
        "num_heads": _heads("text_heads", dim, options),
        "mlp_hidden": shape(state, TEXT + "encoder.layers.0.mlp.fc1.weight", 2)[0],
        "out_dim": shape(state, TEXT + "head.weight", 2)[0],
    }


_STATISTIC = re.compile(r"quantizer_(sem|pix)\.codebooks\.\d+\.(cluster_size_ema|embed_ema)")
_ZERO_BIAS = re.compile(r"(pre|post)quant_\w+\.attn\.zero_k_bias")
_VISION_ATTENTION = re.compile(re.escape(VISION) + r"(encoder\.layers\.\d+\.self_attn)\.([qkv])_proj\.(weight|bias)")
_DEEPER = re.compile(r"quantizer_(sem|pix)\.codebooks\.[1-9]\d*\..*")


def prepare(state: Mapping[str, torch.Tensor], *, text: bool, shared: bool) -> dict[str, torch.Tensor]:
    """`state` without what is not used, and with the towers' projections to queries, keys and values in one piece.

    text: keep the text tower. shared: keep one codebook of all depths.
    """
    kept: dict[str, torch.Tensor] = {}
    parts: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    for name, tensor in state.items():
        if _STATISTIC.fullmatch(name) or (shared and _DEEPER.fullmatch(name)):
            continue
        if _ZERO_BIAS.fullmatch(name):
            _must_be_zero(tensor, {})
        elif not text and (name.startswith(TEXT) or name.startswith("siglip_model.logit_")):
            continue
        elif match := _VISION_ATTENTION.fullmatch(name):
            parts.setdefault((match[1], match[3]), {})[match[2]] = tensor
        else:
            kept[name] = tensor
    for (place, leaf), tensors in parts.items():
        missing = [f"{VISION}{place}.{part}_proj.{leaf}" for part in "qkv" if part not in tensors]
        if missing:
            raise CheckpointKeysError(f"the checkpoint lacks {', '.join(missing)}.", missing=missing)
        kept[f"{VISION}{place}.qkv.{leaf}"] = torch.cat([tensors[part] for part in "qkv"])
    return kept
