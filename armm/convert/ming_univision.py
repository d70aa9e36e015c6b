"""Ming-UniVision (arXiv 2510.06590; inclusionAI/Ming-UniVision, commit 3bbdd2f) -> our modules.

Reads the folder that the authors published on the hub: `config.json`, safetensors in one file or in shards, and `tokenizer.json` where it
is there. The semantic decoder of MingTok was trained on with the language model, so its tokenizer is the one in this file
(`vision.*`), not the one published alone. Sizes are read off the tensors; what they do not say comes from `config.json`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import init_empty_weights

from armm.decoding.next_latent import NextLatentDecoding
from armm.multimodal_model import MultimodalModel

from . import mingtok
from .containers import CheckpointKeysError, CheckpointShapeError
from .facts import compare, count, dtype_of, read_options, shape, split_prefix
from .folders import load_folder, read_beside, resolve_folder_or_file
from .keymap import Rule, apply_rules, load_strict, split_qkv

logger = logging.getLogger(__name__)

TOKENIZER = "vision."
# What the repository's config.json says where a folder's is silent.
DEFAULTS: dict[str, Any] = {
    "head_dim": 128,
    "num_experts_per_tok": 6,
    "rms_norm_eps": 1e-5,
    "rope_theta": 600000.0,
    "max_position_embeddings": 32768,
    "num_image_tokens_for_gen": 256,
    "image_start_token": 126347,
    "image_patch_token": 126346,
    "image_end_token": 126348,
}
# Options that would make another architecture, with the values of the published one.
_FIXED: dict[str, tuple[Any, ...]] = {
    "norm_topk_prob": (True,),
    "use_qkv_bias": (False,),
    "use_bias": (False,),
    "hidden_act": ("silu",),
    "tie_word_embeddings": (False,),
}
OPTIONS = {"llm_config", "mingtok_config", "vishead_diffloss_config", "special_ids", "grid"}

_LAYER, _BLOCK = "model.model.layers.{i}.", "trunk.blocks.{i}."
_NETWORK = ("gate_proj", "gate"), ("up_proj", "up"), ("down_proj", "down")
RULES: tuple[Rule, ...] = (
    Rule("model.model.word_embeddings.weight", "token_embedding.weight"),
    Rule(_LAYER + "input_layernorm.weight", _BLOCK + "attention_norm.weight"),
    Rule(_LAYER + "post_attention_layernorm.weight", _BLOCK + "mlp_norm.weight"),
    Rule(
        _LAYER + "attention.query_key_value.weight",
        tuple(f"{_BLOCK}attention.{part}.weight" for part in ("to_q", "to_k", "to_v")),
        split_qkv,
    ),
    Rule(_LAYER + "attention.dense.weight", _BLOCK + "attention.to_out.weight"),
    Rule(_LAYER + "attention.rotary_emb.inv_freq", None),  # the rotary table, recomputed
    Rule(_LAYER + "mlp.gate.weight", _BLOCK + "mlp.routers.0.weight"),
    Rule(_LAYER + "mlp.image_gate.weight", _BLOCK + "mlp.routers.1.weight"),
    Rule(_LAYER + "mlp.audio_gate.weight", None),  # of speech, which is not read here
    *(Rule(f"{_LAYER}mlp.experts.{{e}}.{a}.weight", f"{_BLOCK}mlp.experts.{{e}}.{b}.weight") for a, b in _NETWORK),
    *(Rule(f"{_LAYER}mlp.shared_experts.{a}.weight", f"{_BLOCK}mlp.shared.{b}.weight") for a, b in _NETWORK),
    Rule("model.model.norm.weight", "trunk.norm.weight"),
    Rule("model.lm_head.weight", "head.projection.weight"),
    Rule("linear_proj.0.{leaf}", "feature_projection.layers.0.{leaf}"),
    Rule("linear_proj.2.{leaf}", "feature_projection.layers.1.{leaf}"),
    Rule("model.vis_head.0.{leaf}", "latent_projection.{leaf}"),
    Rule("model.vis_head.1.{leaf}", "latent_norm.{leaf}"),
    *mingtok.flow_rules("model.diffloss.net", "latent_head"),
)


def convert(path: Any, *, config: Any = None, dtype: Any = None, use_ema: bool = False, **options: Any) -> Any:
    """The `MingUniVisionPipeline` in the authors' folder `path`; see `load_single_file`."""
    from pipelines.ming_univision import MingUniVisionPipeline

    if use_ema:
        raise CheckpointKeysError("Ming-UniVision's files hold no moving average: leave `use_ema` off.")
    return MingUniVisionPipeline(**load_single_file(path, config=config, dtype=dtype, **options))


def load_single_file(
    path: Any,
    *,
    config: Any = None,
    dtype: torch.dtype | dict[str, torch.dtype] | None = None,
    generation_config: dict[str, Any] | None = None,
    text_tokenizer: Any = None,
    tokenizer: Any = None,
    **hub_options: Any,
) -> dict[str, Any]:
    """The components of a `MingUniVisionPipeline`.

    Args:
        path: the authors' folder, its hub id, or a file with all tensors.
        config: a dict, or a JSON file, that goes before the folder's `config.json`: `llm_config`, `mingtok_config` and
            `vishead_diffloss_config` in the authors' layout, `grid` (height, width in tokens of the images that are drawn) and
            `special_ids` (see `MingUniVisionPipeline`).
        dtype: of the weights; a dict names components and `"default"`.
        generation_config: settings that replace the authors' preset.
        text_tokenizer: a `BPETokenizer`, instead of the folder's `tokenizer.json`.
        tokenizer: not used; images are coded by the tokenizer inside the checkpoint.
        hub_options: `revision`, `cache_dir`, `local_files_only`, `token` for files on the hub.
    """
    from pipelines.bpe import BPETokenizer

    found = resolve_folder_or_file(path, **hub_options)
    published = {**read_beside(found), **read_options(config, {}, OPTIONS)}
    # The language model's part stands in a block of its own, or the whole file is about it.
    language = {**DEFAULTS, **(published.get("llm_config") or published)}
    coder, rest = split_prefix(load_folder(found), TOKENIZER)
    folder = found if found.is_dir() else found.parent
    if text_tokenizer is None and (folder / "tokenizer.json").is_file():
        text_tokenizer = BPETokenizer.from_file(folder / "tokenizer.json")
    head = dict(published.get("vishead_diffloss_config") or {})
    preset = {"num_inference_steps": int(head["num_sampling_steps"])} if "num_sampling_steps" in head else {}
    ids = {name: language[f"image_{part}_token"] for name, part in _IMAGE_IDS.items()}
    words = shape(rest, "model.model.word_embeddings.weight", 2)[0]
    ids = {name: value for name, value in ids.items() if value < words}
    return {
        "tokenizer": mingtok.convert_state_dict(
            coder, config=published.get("mingtok_config"), dtype=dtype_of(dtype, "tokenizer")
        ),
        "transformer": _model(rest, language, head, published.get("grid"), dtype_of(dtype, "transformer")),
        "decoding": NextLatentDecoding(),
        "text_tokenizer": text_tokenizer,
        "special_ids": {**ids, **(published.get("special_ids") or {})},
        "generation_config": {**preset, **(generation_config or {})},
    }


_IMAGE_IDS = {"begin_image": "start", "image": "patch", "end_image": "end"}


def _model(
    state: Mapping[str, torch.Tensor],
    language: Mapping[str, Any],
    head: Mapping[str, Any],
    grid: Any,
    dtype: torch.dtype | None,
) -> MultimodalModel:
    if head.get("vis_head_arch", "linear2-norm") != "linear2-norm":
        raise ValueError(
            f"vis_head_arch {head['vis_head_arch']!r} is not supported, only the published 'linear2-norm'."
        )
    arguments = model_arguments(state, language)
    side = round(int(language["num_image_tokens_for_gen"]) ** 0.5)
    with init_empty_weights():
        model = MultimodalModel(
            **arguments,
            features={"dim": shape(state, "linear_proj.0.weight", 2)[1], "depth": 2},
            latents=_latents(state),
            grid=grid or (side, side),
        )
    sizes = arguments["transformer"]
    rows = [heads * sizes["head_dim"] for heads in (sizes["num_heads"], sizes["num_kv_heads"], sizes["num_kv_heads"])]
    return load_strict(model, apply_rules(state, RULES, {"qkv_rows": rows}), RULES, dtype=dtype)  # type: ignore[return-value]


def _latents(state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    head = mingtok.head_arguments(state, "model.diffloss.")
    return {"channels": head.pop("channels"), "dim": head.pop("dim"), "head": {"type": "mlp", **head}}


def model_arguments(state: Mapping[str, torch.Tensor], language: Mapping[str, Any]) -> dict[str, Any]:
    """Init arguments of `MultimodalModel` for the language model's tensors and its part of `config.json`."""
    for name, allowed in _FIXED.items():
        if language.get(name, allowed[0]) not in allowed:
            raise ValueError(f"llm_config says {name} = {language[name]!r}: only {allowed[0]!r} is supported.")
    scaling = language.get("rope_scaling")
    if scaling and str(scaling.get("type", scaling.get("rope_type"))).upper() == "3D" and not scaling.get("factor"):
        logger.warning(
            "config.json says rope_scaling 3D, which image positions cannot use: positions are one-dimensional"
        )
    elif scaling:
        raise ValueError(f"llm_config with rope_scaling {scaling!r} is not supported.")
    vocab_size, dim = shape(state, "model.model.word_embeddings.weight", 2)
    layer = "model.model.layers.0."
    head_dim = int(language["head_dim"] or DEFAULTS["head_dim"])
    num_heads, rest = divmod(shape(state, layer + "attention.dense.weight", 2)[1], head_dim)
    key_rows = shape(state, layer + "attention.query_key_value.weight", 2)[0] - num_heads * head_dim
    if rest or num_heads < 1 or key_rows < 2 * head_dim or key_rows % (2 * head_dim):
        raise CheckpointShapeError(f"{layer}attention.* cannot be made of heads of {head_dim}: is `head_dim` right?")
    found = {
        "vocab_size": vocab_size,
        "hidden_size": dim,
        "num_hidden_layers": count(state, r"model\.model\.layers\.(\d+)\."),
        "num_attention_heads": num_heads,
        "num_key_value_heads": key_rows // (2 * head_dim),
        "num_experts": count(state, re.escape(layer) + r"mlp\.experts\.(\d+)\."),
        "moe_intermediate_size": shape(state, layer + "mlp.experts.0.gate_proj.weight", 2)[0],
    }
    compare({name: value for name, value in language.items() if value is not None}, found)
    shared = layer + "mlp.shared_experts.gate_proj.weight"
    image_gate = layer + "mlp.image_gate.weight" in state
    return {
        "text_vocab_size": vocab_size,
        "max_positions": int(language["max_position_embeddings"]),
        "image_route": int(image_gate),
        "transformer": {
            "dim": dim,
            "num_layers": found["num_hidden_layers"],
            "num_heads": num_heads,
            "num_kv_heads": found["num_key_value_heads"],
            "head_dim": head_dim,
            "mlp": "swiglu",
            "experts": {
                "count": found["num_experts"],
                "active": int(language["num_experts_per_tok"]),
                "hidden": found["moe_intermediate_size"],
                "shared": shape(state, shared, 2)[0] if shared in state else 0,
                "routers": 1 + image_gate,
            },
            "norm": "rms",
            "norm_eps": float(language["rms_norm_eps"]),
            "rotary_axes": [head_dim],
            "rotary_theta": float(language["rope_theta"]),
            "rotary_layout": "half_split",
        },
    }
