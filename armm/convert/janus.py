"""Janus and Janus-Pro (arXiv 2410.13848, 2501.17811; deepseek-ai/Janus, commit 1daa72f) -> our modules.

Reads the folder that the authors published on the hub: `config.json`, `pytorch_model.bin` (in one file or in shards), and the
tokenizer's and processors' JSON files where they are there. Sizes are read off the tensors; heads, and what else tensors do not
say, come from `config.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights

from armm.decoding.next_token import NextTokenDecoding
from armm.model import AutoregressiveModel
from armm.multimodal_model import MultimodalModel
from tokenizers_visual.vision_encoder import VisionEncoder
from tokenizers_visual.vq_tokenizer import VQTokenizer

from . import llama, llamagen
from .containers import CheckpointKeysError, CheckpointShapeError
from .facts import compare, count, dtype_of, read_mapping, read_options, shape, split_prefix
from .folders import load_folder, read_beside, resolve_folder_or_file
from .keymap import Rule, apply_rules, load_strict

# Attention heads of the vision transformers by width; config.json names them only ("siglip_large_patch16_384").
VISION_HEADS = {1024: 16, 1152: 16}
OPTIONS = {"grid", "vision", "language", "tokenizer", "special_ids"}

VISION = "vision_model."
_TOWER, _BLOCK = "vision_model.vision_tower.", "vision_model.vision_tower.blocks.{i}."
VISION_RULES: tuple[Rule, ...] = (
    Rule(_TOWER + "pos_embed", "vit.pos_embed"),
    Rule(_TOWER + "patch_embed.proj.{leaf}", "vit.patch_embed.proj.{leaf}"),
    *(
        Rule(f"{_BLOCK}{part}.{{leaf}}", f"vit.blocks.{{i}}.{part}.{{leaf}}")
        for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    ),
    Rule(_TOWER + "norm.{leaf}", "vit.norm.{leaf}"),
)
# Trained with the tower, but its features are taken before this.
UNUSED_VISION = _TOWER + "attn_pool."
TOKENIZER = "gen_vision_model."
MODEL_RULES: tuple[Rule, ...] = (
    *llama.rules("language_model."),
    Rule("aligner.layers.0.{leaf}", "feature_projection.layers.0.{leaf}"),
    Rule("aligner.layers.2.{leaf}", "feature_projection.layers.1.{leaf}"),
    Rule("gen_aligner.layers.0.{leaf}", "code_projection.layers.0.{leaf}"),
    Rule("gen_aligner.layers.2.{leaf}", "code_projection.layers.1.{leaf}"),
    Rule("gen_embed.weight", "code_embedding.weight"),
    Rule("gen_head.output_mlp_projector.{leaf}", "code_head.transform.{leaf}"),
    Rule("gen_head.vision_head.{leaf}", "code_head.projection.{leaf}"),
)


def convert(path: Any, *, config: Any = None, dtype: Any = None, use_ema: bool = False, **options: Any) -> Any:
    """The `JanusPipeline` in the authors' folder `path`; see `load_single_file`."""
    from pipelines.janus import JanusPipeline

    if use_ema:
        raise CheckpointKeysError("Janus's files hold no moving average: leave `use_ema` off.")
    return JanusPipeline(**load_single_file(path, config=config, dtype=dtype, **options))


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
    """The components of a `JanusPipeline`.

    Args:
        path: the authors' folder, its hub id, or the `pytorch_model.bin` (or its `.index.json`) in it.
        config: a dict, or a JSON file, with what the files do not say: `grid` (height, width in codes of the images that are drawn),
            and `vision`, `language`, `tokenizer` with options of these parts (`num_heads`, ...), `special_ids` (name -> id) for a
            folder without a tokenizer.
        dtype: of the weights; a dict names components and `"default"`.
        generation_config: settings that replace the authors' preset.
        text_tokenizer: tokenizer of transformers, instead of the folder's.
        tokenizer: not used; images are coded by the tokenizer inside the checkpoint.
        hub_options: `revision`, `cache_dir`, `local_files_only`, `token` for files on the hub.
    """
    found = resolve_folder_or_file(path, **hub_options)
    published = _published_config(found)
    options = read_options(config, {}, OPTIONS)
    coder, others = split_prefix(load_folder(found), TOKENIZER)
    tower = {name: tensor for name, tensor in others.items() if name.startswith(VISION)}
    rest = {name: tensor for name, tensor in others.items() if name not in tower}
    if text_tokenizer is None:
        text_tokenizer = _load_text_tokenizer(found if found.is_dir() else found.parent)
    return {
        "tokenizer": _tokenizer(coder, options.get("tokenizer"), dtype_of(dtype, "tokenizer")),
        "transformer": _model(rest, published, options, dtype_of(dtype, "transformer")),
        "image_encoder": _vision(
            tower,
            published,
            read_beside(found, "preprocessor_config.json"),
            options.get("vision"),
            dtype_of(dtype, "image_encoder"),
        ),
        "decoding": NextTokenDecoding(),
        "text_tokenizer": text_tokenizer,
        "special_ids": options.get("special_ids"),
        "template": read_beside(found, "processor_config.json").get("sft_format", "deepseek"),
        "generation_config": dict(generation_config or {}),
    }


# ---------------------------------------------------------------------- files


def _published_config(found: Path) -> dict[str, Any]:
    """The authors' config.json, whose blocks are `{"cls", "params"}` and `language_config`."""
    config = read_beside(found)
    kind = config.get("model_type", "multi_modality")
    if kind != "multi_modality":
        raise ValueError(f"the config.json of {found} is of a {kind!r} model, not of Janus in its authors' layout.")
    return config


def _load_text_tokenizer(folder: Path) -> Any:
    if not (folder / "tokenizer.json").is_file():
        return None
    import importlib.util

    if importlib.util.find_spec("transformers") is None:
        llamagen.logger.warning(
            "transformers is not installed: texts cannot be read; give `prompt_ids`, or `pip install armm[transformers]`"
        )
        return None
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


# ---------------------------------------------------------------------- parts


def _tokenizer(coder: Mapping[str, torch.Tensor], options: Any, dtype: torch.dtype | None) -> VQTokenizer:
    model = llamagen.convert_state_dict(coder, config=options, dtype=dtype)
    assert isinstance(model, VQTokenizer)
    return model


def _params(published: Mapping[str, Any], block: str) -> dict[str, Any]:
    return dict((published.get(block) or {}).get("params") or {})


def _vision(
    tower: Mapping[str, torch.Tensor],
    published: Mapping[str, Any],
    preprocessing: Mapping[str, Any],
    options: Any,
    dtype: torch.dtype | None,
) -> VisionEncoder:
    params, given = _params(published, "vision_config"), read_mapping(options)
    dim, _, patch, _ = shape(tower, _TOWER + "patch_embed.proj.weight", 4)
    tokens = shape(tower, _TOWER + "pos_embed", 3)[1]
    side = round(tokens**0.5)
    layers = count(tower, r"vision_model\.vision_tower\.blocks\.(\d+)\.")
    if side * side != tokens:
        raise CheckpointShapeError(f"{_TOWER}pos_embed has {tokens} positions, which are no square image.")
    image_size = int(params.get("image_size", side * patch))
    if image_size // patch != side:
        raise CheckpointShapeError(
            f"config.json says image_size {image_size}, but {_TOWER}pos_embed has {side} x {side} patches."
        )
    if params.get("pixel_mean") is not None or params.get("select_feature", "same") != "same":
        raise ValueError("vision_config with `pixel_mean` or another `select_feature` than 'same' is not supported.")
    select = int(params.get("select_layer", -1))
    kept = min(layers, layers + select + 1) if select <= 0 else min(layers, select)
    if kept < 1:
        raise ValueError(f"vision_config keeps no layer: select_layer {select} of {layers} layers.")
    heads = given.get("num_heads", VISION_HEADS.get(dim))
    if not isinstance(heads, int) or heads < 1 or dim % heads:
        raise ValueError(
            f"a vision transformer {dim} wide is none of the published ones: pass config={{'vision': {{'num_heads': ...}}}}."
        )
    found = {
        "dim": dim,
        "patch_size": patch,
        "mlp_hidden": shape(tower, _TOWER + "blocks.0.mlp.fc1.weight", 2)[0],
        "num_layers": kept,
    }
    compare(given, found)
    arguments: dict[str, Any] = {"image_size": image_size, "num_heads": heads, **found}
    for name in ("image_mean", "image_std", "min_size"):
        if name in preprocessing or name in given:
            arguments[name] = given.get(name, preprocessing.get(name))
    dropped = {name for name in tower if name.startswith(UNUSED_VISION)}
    dropped |= {
        name for name in tower if name.startswith(_TOWER + "blocks.") and int(name[len(_TOWER) :].split(".")[1]) >= kept
    }
    with init_empty_weights():
        model = VisionEncoder(**arguments)
    used = {name: tensor for name, tensor in tower.items() if name not in dropped}
    return load_strict(model, apply_rules(used, VISION_RULES), VISION_RULES, dtype=dtype)


def _model(
    state: Mapping[str, torch.Tensor],
    published: Mapping[str, Any],
    options: Mapping[str, Any],
    dtype: torch.dtype | None,
) -> MultimodalModel:
    language = dict(published.get("language_config") or {})
    if language.get("rope_scaling"):
        raise ValueError(f"language_config with rope_scaling {language['rope_scaling']!r} is not supported.")
    known = {**llama.OPTION_NAMES, "vocab_size": "vocab_size"}
    facts = {name: value for name, value in language.items() if name in known}
    facts |= read_mapping(options.get("language"))
    arguments = llama.model_arguments(state, facts, "language_model.")
    codes, code_dim = shape(state, "gen_embed.weight", 2)
    for block, depth in (("aligner_config", "aligner"), ("gen_aligner_config", "gen_aligner")):
        kind = _params(published, block).get("projector_type", "mlp_gelu")
        if kind != "mlp_gelu" or _projector_depth(state, depth) != 2:
            raise ValueError(f"{block}: only two layers with GELU (projector_type 'mlp_gelu', depth 2) are supported.")
    hidden = shape(state, "gen_head.output_mlp_projector.weight", 2)[0]
    dim = arguments["transformer"]["dim"]
    head = {"type": "mlp"} if hidden == dim else {"type": "mlp", "hidden": hidden}
    grid = options.get("grid") or _default_grid(published)
    with init_empty_weights():
        model = MultimodalModel(
            **arguments,
            codes={"size": codes, "dim": code_dim, "depth": 2, "head": head},
            features={"dim": shape(state, "aligner.layers.0.weight", 2)[1], "depth": 2},
            grid=AutoregressiveModel.check_grid(grid),
        )
    return load_strict(model, apply_rules(state, MODEL_RULES), MODEL_RULES, dtype=dtype)


def _projector_depth(state: Mapping[str, torch.Tensor], name: str) -> int:
    return sum(1 for key in state if key.startswith(f"{name}.layers.") and key.endswith(".weight"))


def _default_grid(published: Mapping[str, Any]) -> tuple[int, int]:
    """Images are drawn at the size at which they are read, 16 pixels a code."""
    side = int(_params(published, "vision_config").get("image_size", 384)) // 16
    return (side, side)
