"""Files of the Chameleon family -> our modules: Meta's shards (arXiv 2405.09818, facebookresearch/chameleon, commit dbbe47fd) and
Anole's in the same layout, the layout of transformers, the layout of Lumina-mGPT (arXiv 2408.02657, commit 104abe45), and the VQGAN.

Sizes are read off the tensors, the heads too: query and key norms have the width of one. What tensors cannot say (where the norms
stand, the base of the rotary frequencies) comes from `params.json` or `config.json` beside them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights

from armm.decoding.interleaved import InterleavedDecoding
from armm.model import AutoregressiveModel
from pipelines.bpe import BPETokenizer
from tokenizers_visual.vq_tokenizer import VQTokenizer

from .chameleon_tokenizer import VQ_PREFIX, convert_tokenizer
from .chameleon_vocabulary import image_block, read_vocabulary
from .containers import CheckpointError, CheckpointKeysError, CheckpointShapeError, load_state_dict
from .facts import compare, count, dtype_of, read_options, shape
from .folders import load_folder, read_json, resolve_folder_or_file
from .keymap import Rule, apply_rules, load_strict

OPTION_NAMES = {
    "num_attention_heads": "num_heads",
    "n_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "n_kv_heads": "num_kv_heads",
    "num_hidden_layers": "num_layers",
    "n_layers": "num_layers",
    "hidden_size": "dim",
    "rms_norm_eps": "norm_eps",
    "rope_theta": "rotary_theta",
    "max_position_embeddings": "max_positions",
}
OPTIONS = {
    "num_heads", "num_kv_heads", "num_layers", "dim", "vocab_size", "norm_eps", "rotary_theta", "max_positions", "swin_norm",
}  # fmt: skip
# The rotary table costs little: longer sequences than a model was trained with are its user's choice.
MIN_POSITIONS = 16384


def _for_heads(which: str):
    """Norm weights [r, head_dim], one row for each tensor-parallel part or head, as a row for each head."""

    def spread(tensor: torch.Tensor, context: Mapping[str, Any]) -> torch.Tensor:
        heads = context[which]
        if tensor.ndim != 2 or heads % tensor.shape[0]:
            raise CheckpointShapeError(f"expected rows for {heads} heads, got shape {tuple(tensor.shape)}")
        return tensor.repeat_interleave(heads // tensor.shape[0], dim=0)

    return spread


_OURS = "trunk.blocks.{i}."
_HF = "model.layers.{i}."
HF_RULES: tuple[Rule, ...] = (
    Rule("model.embed_tokens.weight", "token_embedding.weight"),
    *(
        Rule(f"{_HF}self_attn.{a}_proj.weight", f"{_OURS}attention.to_{b}.weight")
        for a, b in zip("qkvo", ("q", "k", "v", "out"), strict=True)
    ),
    Rule(_HF + "self_attn.q_norm.{leaf}", _OURS + "attention.query_norm.{leaf}", _for_heads("num_heads")),
    Rule(_HF + "self_attn.k_norm.{leaf}", _OURS + "attention.key_norm.{leaf}", _for_heads("num_kv_heads")),
    *(Rule(f"{_HF}mlp.{part}_proj.weight", f"{_OURS}mlp.{part}.weight") for part in ("gate", "up", "down")),
    Rule(_HF + "input_layernorm.weight", _OURS + "attention_norm.weight"),
    Rule(_HF + "post_attention_layernorm.weight", _OURS + "mlp_norm.weight"),
    Rule("model.norm.weight", "trunk.norm.weight"),
    Rule("lm_head.weight", "head.projection.weight"),
)
_META = "layers.{i}."
META_RULES: tuple[Rule, ...] = (
    Rule("rope.freqs", None),  # the rotary frequencies, recomputed
    Rule("tok_embeddings.weight", "token_embedding.weight"),
    *(
        Rule(f"{_META}attention.w{a}.weight", f"{_OURS}attention.to_{b}.weight")
        for a, b in zip("qkvo", ("q", "k", "v", "out"), strict=True)
    ),
    Rule(_META + "attention.q_normalization.{leaf}", _OURS + "attention.query_norm.{leaf}", _for_heads("num_heads")),
    Rule(_META + "attention.k_normalization.{leaf}", _OURS + "attention.key_norm.{leaf}", _for_heads("num_kv_heads")),
    *(
        Rule(f"{_META}feed_forward.w{n}.weight", f"{_OURS}mlp.{b}.weight")
        for n, b in ((1, "gate"), (3, "up"), (2, "down"))
    ),
    Rule(_META + "attention_norm.weight", _OURS + "attention_norm.weight"),
    Rule(_META + "ffn_norm.weight", _OURS + "mlp_norm.weight"),
    Rule("norm.weight", "trunk.norm.weight"),
    Rule("output.weight", "head.projection.weight"),
)
# How Meta's tensor-parallel parts of a tensor belong together.
_ROWS = re.compile(r"(layers\.\d+\.(attention\.w[qkv]|feed_forward\.w[13])|output)\.weight")
_COLUMNS = re.compile(r"(layers\.\d+\.(attention\.wo|feed_forward\.w2)|tok_embeddings)\.weight")
_STACKED = re.compile(r"layers\.\d+\.attention\.[qk]_normalization\.(weight|bias)")


def convert(
    path: Any, *, config: Any = None, dtype: torch.dtype | None = None, use_ema: bool = False
) -> AutoregressiveModel | VQTokenizer:
    """The transformer or the tokenizer in `path`.

    Args:
        path: a folder with `config.json` (layout of transformers, or Lumina-mGPT's) or `params.json` (Meta's); one of Meta's
            `consolidated*.pth`, whose other parts lie beside it; or `vqgan.ckpt`.
        config: a dict, or a JSON file, with options by our names or the authors', for what the files beside it do not say
            (`swin_norm`, `rope_theta`, `norm_eps`, `max_positions`).
        dtype: of the weights; None keeps the file's.
        use_ema: take the moving average stored beside the weights.
    """
    path = Path(path)
    if path.is_dir() and (path / "config.json").is_file() and not meta_shards(path):
        return convert_state_dict(load_folder(path, use_ema=use_ema), config=published_config(path) | _given(config), dtype=dtype)
    shards = meta_shards(path)
    if shards:
        config = published_config(shards[0].parent, len(shards)) | _given(config)
        states = [load_state_dict(shard, use_ema=use_ema) for shard in shards]
        return convert_state_dict(merge_shards(states), config=config, dtype=dtype)
    if path.is_dir():
        raise CheckpointError(f"{path} holds neither config.json (transformers) nor consolidated*.pth (Meta).")
    state = load_state_dict(path, use_ema=use_ema)
    if "quantize.embedding.weight" not in state:
        config = published_config(path.parent) | _given(config)
    return convert_state_dict(state, config=config, dtype=dtype)


def convert_state_dict(
    state: Mapping[str, torch.Tensor], *, config: Any = None, dtype: torch.dtype | None = None
) -> AutoregressiveModel | VQTokenizer:
    """Like `convert`, from tensors under the authors' names; of Meta's, what `merge_shards` gave."""
    if "quantize.embedding.weight" in state:
        return convert_tokenizer(state, dtype=dtype)
    options = _given(config)
    if "model.embed_tokens.weight" in state:
        state = {name: tensor for name, tensor in state.items() if not name.startswith(VQ_PREFIX)}
        rules = HF_RULES
        arguments = transformer_arguments(
            state, options, "model.", "self_attn.{}_proj", "self_attn.{}_norm", "half_split"
        )
    elif "tok_embeddings.weight" in state:
        rules = META_RULES
        arguments = transformer_arguments(
            state, options, "", "attention.w{}", "attention.{}_normalization", "interleaved"
        )
    else:
        names = ["model.embed_tokens.weight", "tok_embeddings.weight", "quantize.embedding.weight"]
        raise CheckpointKeysError(
            f"this is no checkpoint of the Chameleon family: it holds none of {', '.join(names)}.", missing=names
        )
    with init_empty_weights():
        model = AutoregressiveModel(**arguments)
    return load_strict(model, apply_rules(state, rules, head_counts(arguments)), rules, dtype=dtype)


def head_counts(arguments: Mapping[str, Any]) -> dict[str, int]:
    """What the rules for query and key norms need to know, from arguments of `AutoregressiveModel`."""
    return {name: arguments["transformer"][name] for name in ("num_heads", "num_kv_heads")}


def transformer_arguments(
    state: Mapping[str, torch.Tensor], options: Mapping[str, Any], prefix: str, projection: str, norm: str, layout: str
) -> dict[str, Any]:
    """Init arguments of `AutoregressiveModel` for the tensors of a transformer, whose names are made of `prefix`, `projection` and
    `norm`; layout: of the rotary pairs."""
    meta = not prefix
    layer = f"{prefix}layers.0."
    vocab_size, dim = shape(state, "tok_embeddings.weight" if meta else "model.embed_tokens.weight", 2)
    rows = {part: shape(state, f"{layer}{projection.format(part)}.weight", 2)[0] for part in "qk"}
    width = f"{layer}{norm.format('q')}.weight"
    head_dim = shape(state, width, 2)[1] if width in state else None
    if head_dim is None and "num_heads" not in options:
        raise ValueError(
            "without query norms the file does not say how many heads there are: pass config={'num_heads': ...}."
        )
    head_dim = head_dim or dim // options["num_heads"]
    if any(size % head_dim for size in rows.values()) or head_dim % 2:
        raise CheckpointShapeError(f"projections of {rows} rows cannot be made of heads of {head_dim}.")
    found = {
        "dim": dim,
        "num_layers": count(state, re.escape(prefix) + r"layers\.(\d+)\."),
        "num_heads": rows["q"] // head_dim,
        "num_kv_heads": rows["k"] // head_dim,
        "vocab_size": vocab_size,
    }
    compare(options, found)
    return {
        "vocab_size": vocab_size,
        "max_positions": max(int(options.get("max_positions", 4096)), MIN_POSITIONS),
        "transformer": {
            **{name: found[name] for name in ("dim", "num_layers", "num_heads", "num_kv_heads")},
            "head_dim": head_dim,
            "mlp": "swiglu",
            "mlp_hidden": shape(state, f"{layer}{'feed_forward.w1' if meta else 'mlp.gate_proj'}.weight", 2)[0],
            "norm": "rms",
            "norm_eps": float(options.get("norm_eps", 1e-5)),
            "norm_placement": "output" if options.get("swin_norm") else "input",
            "qk_norm": "head_layer" if width in state else None,
            "qk_norm_eps": 1e-5,
            "rotary_axes": [head_dim],
            "rotary_theta": float(options.get("rotary_theta", 10000.0)),
            "rotary_layout": layout,
        },
    }


def _given(config: Any) -> dict[str, Any]:
    return read_options(config, OPTION_NAMES, OPTIONS)


def published_config(folder: Path, shards: int = 1) -> dict[str, Any]:
    """What `config.json` or `params.json` in `folder` says that we need, by our names."""
    if (folder / "params.json").is_file():
        values = read_json(folder / "params.json")
        values = dict(values.get("model", values))
    elif (folder / "config.json").is_file():
        values = read_json(folder / "config.json")
        rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise CheckpointError(
                f"{folder / 'config.json'} asks for scaled rotary positions ({rope}), which Chameleon has not."
            )
        values.setdefault("rope_theta", rope.get("rope_theta"))
    elif shards > 1:
        raise CheckpointError(
            f"{folder} lacks params.json, which says where the norms of a model of {shards} parts stand."
        )
    else:
        return {}
    named = {OPTION_NAMES.get(name, name): value for name, value in values.items() if value is not None}
    return {name: value for name, value in named.items() if name in OPTIONS}


# ---------------------------------------------------------------------- Meta's parts


def meta_shards(path: Path) -> list[Path]:
    """Meta's `consolidated*.pth` at or beside `path`, in order; empty where `path` is something else."""
    if path.is_file() and not path.name.startswith("consolidated"):
        return []
    folder = path if path.is_dir() else path.parent
    if (folder / "consolidated.pth").is_file():
        return [folder / "consolidated.pth"]
    shards = sorted(folder.glob("consolidated.[0-9][0-9].pth"))
    expected = [f"consolidated.{number:02d}.pth" for number in range(len(shards))]
    if [shard.name for shard in shards] != expected:
        raise CheckpointError(f"{folder} lacks parts: expected {expected}, got {[shard.name for shard in shards]}.")
    parallel = folder / "consolidate_params.json"
    if shards and parallel.is_file() and read_json(parallel).get("model_parallel_size", len(shards)) != len(shards):
        raise CheckpointError(f"{parallel} speaks of another number of parts than the {len(shards)} files beside it.")
    return shards


def merge_shards(states: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The tensors of Meta's tensor-parallel parts put together; query and key norms become [parts, head_dim]."""
    names = set(states[0])
    different = sorted(names.symmetric_difference(*states[1:])) if len(states) > 1 else []
    if different:
        raise CheckpointKeysError(
            f"the parts do not hold the same tensors: {', '.join(different[:8])}.", missing=different
        )
    merged = {}
    for name in states[0]:
        parts = [state[name] for state in states]
        if _STACKED.fullmatch(name):
            merged[name] = torch.stack(parts)
        elif len(parts) == 1 or name == "rope.freqs":
            merged[name] = parts[0]
        elif _ROWS.fullmatch(name):
            merged[name] = torch.cat(parts, dim=0)
        elif _COLUMNS.fullmatch(name):
            merged[name] = torch.cat(parts, dim=1)
        else:
            merged[name] = torch.stack([part.float() for part in parts]).mean(0).to(parts[0].dtype)
    return merged


# ---------------------------------------------------------------------- pipelines


def load_components(
    path: Any,
    *,
    tokenizer: Any = None,
    text_tokenizer: Any = None,
    config: Any = None,
    dtype: torch.dtype | dict[str, torch.dtype] | None = None,
    layout: Mapping[str, Any],
    use_ema: bool = False,
    **hub_options: Any,
) -> dict[str, Any]:
    """Transformer, tokenizer, text tokenizer and image block of a pipeline of this family.

    Args:
        path: folder, file or hub id of the transformer, see `convert`.
        tokenizer: `vqgan.ckpt`, a folder of transformers that holds it, or a `VQTokenizer`; None looks into `path`.
        text_tokenizer: the authors' `text_tokenizer.json`, or a folder with it or with `tokenizer.json`; None looks into `path`.
        layout: how images are written, see `image_block`.
    """
    local = resolve_folder_or_file(path, **hub_options)
    transformer = convert(local, config=config, dtype=dtype_of(dtype, "transformer"), use_ema=use_ema)
    if not isinstance(transformer, AutoregressiveModel):
        raise ValueError(f"{path} holds a tokenizer, not a transformer: pass it as `tokenizer=`.")
    if not isinstance(tokenizer, VQTokenizer):
        tokenizer = load_tokenizer(
            local if tokenizer is None else tokenizer, dtype=dtype_of(dtype, "tokenizer"), **hub_options
        )
    words, vocabulary = load_words(local, text_tokenizer, **hub_options)
    block = image_block(vocabulary, vocab_size=transformer.vocab_size, num_codes=tokenizer.codebook_size, **layout)
    return {
        "tokenizer": tokenizer,
        "transformer": transformer,
        "decoding": InterleavedDecoding(),
        "text_tokenizer": words,
        "image_block": block.to_dict(),
    }


def load_tokenizer(source: Any, *, dtype: torch.dtype | None = None, **hub_options: Any) -> VQTokenizer:
    """The VQGAN in `vqgan.ckpt`, or in a folder of transformers."""
    local = resolve_folder_or_file(source, **hub_options)
    if not local.is_dir():
        return convert_tokenizer(load_state_dict(local), dtype=dtype)
    for file in (local / "vqgan.ckpt", local / "tokenizer" / "vqgan.ckpt", local.parent / "tokenizer" / "vqgan.ckpt"):
        if file.is_file():
            return convert_tokenizer(load_state_dict(file), dtype=dtype)
    state = (
        {} if meta_shards(local) else {name: t for name, t in load_folder(local).items() if name.startswith(VQ_PREFIX)}
    )
    return convert_tokenizer(state, dtype=dtype)


def load_words(local: Path, given: Any = None, **hub_options: Any) -> tuple[BPETokenizer | None, dict[str, int]]:
    """The text tokenizer and the vocabulary of a checkpoint: from the file or folder `given`, else from beside the weights."""
    places: list[Path] = []
    if isinstance(given, BPETokenizer):
        return given, given.vocabulary
    folder = local if local.is_dir() else local.parent
    roots = [resolve_folder_or_file(given, **hub_options)] if given is not None else [folder, folder / "tokenizer"]
    if given is None and meta_shards(local):
        roots += [folder.parent / "tokenizer", folder.parent.parent / "tokenizer"]
    for root in roots:
        names = ("text_tokenizer.json", "tokenizer/text_tokenizer.json", "tokenizer.json")
        places += [root] if root.is_file() else [root / name for name in names]
    for place in places:
        if place.is_file():
            return BPETokenizer.from_file(place), read_vocabulary(place)
    if given is not None:
        raise CheckpointError(f"{given} holds no text_tokenizer.json and no tokenizer.json.")
    if (folder / "config.json").is_file():
        return None, read_vocabulary(folder / "config.json")
    raise CheckpointError(
        f"there is no text tokenizer beside {local}: pass `text_tokenizer=` (the authors' text_tokenizer.json)."
    )


def load_single_file(
    path: Any, *, generation_config: dict[str, Any] | None = None, grid: Sequence[int] | None = None, **options: Any
) -> dict[str, Any]:
    """The components of a `ChameleonPipeline` from the authors' files (Meta's, Anole's, or those of transformers).

    Args:
        path: folder, file or hub id of the transformer, see `convert`.
        generation_config: settings that replace the family's preset.
        grid: (height, width) of the images in codes; default 32 x 32.
        options: of `load_components`: `tokenizer`, `text_tokenizer`, `config`, `dtype`, `use_ema` and the hub's.
    """
    components = load_components(path, layout={"grid": tuple(grid or (32, 32))}, **options)
    return {**components, "generation_config": dict(generation_config or {})}
