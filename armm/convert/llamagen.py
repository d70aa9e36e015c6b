"""LlamaGen's files (arXiv 2406.06525, FoundationVision/LlamaGen, commit ce98ec4) -> our modules.

Reads the class- and text-conditional transformers (B to 3B, `c2i_*.pt` and `t2i_*.pt`) and the VQ tokenizers (`vq_ds*.pt`) in any
container their trainers wrote. Sizes are read off the tensors. The one thing a file does not say, the number of attention heads,
is known for the published sizes and comes from `config` otherwise.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights

from armm.decoding.next_token import NextTokenDecoding
from armm.hub import resolve_file
from armm.model import AutoregressiveModel
from tokenizers_visual.vq_tokenizer import VQTokenizer

from .containers import CheckpointKeysError, CheckpointShapeError, load_state_dict
from .facts import compare as _compare
from .facts import count as _count
from .facts import dtype_of, read_options
from .facts import shape as _shape
from .keymap import Rule, apply_rules, load_strict, split_qkv, squeeze_convolution

logger = logging.getLogger(__name__)

# (width, layers) -> heads of the sizes the authors defined: B, L, XL, XXL, XXXL, 1B, 3B, 7B.
PUBLISHED_HEADS: dict[tuple[int, int], int] = {
    (768, 12): 12,
    (1024, 24): 16,
    (1280, 36): 20,
    (1536, 48): 24,
    (2560, 48): 40,
    (2048, 22): 32,
    (3200, 24): 32,
    (4096, 32): 32,
}
# Authors' names of the options -> ours, and the names of what can be read off the tensors and is compared with them.
OPTION_NAMES = {
    "n_head": "num_heads",
    "n_kv_head": "num_kv_heads",
    "rope_base": "rotary_theta",
    "n_layer": "num_layers",
    "cls_token_num": "condition_tokens",
    "codebook_embed_dim": "codebook_dim",
    "codebook_l2_norm": "l2_normalize",
    "encoder_ch_mult": "encoder_multipliers",
    "decoder_ch_mult": "decoder_multipliers",
    "ch": "base_channels",
}
TRANSFORMER_OPTIONS = {
    "num_heads", "num_kv_heads", "norm_eps", "rotary_theta", "block_size", "dim", "num_layers", "vocab_size", "num_classes",
    "caption_dim", "condition_tokens", "model_type", "grid",
}  # fmt: skip
_TOKENIZER_OPTIONS = {
    "l2_normalize", "codebook_size", "codebook_dim", "encoder_multipliers", "decoder_multipliers", "base_channels", "z_channels",
    "num_res_blocks",
}  # fmt: skip

_BLOCK, _OURS = "layers.{i}.", "trunk.blocks.{i}."
TRANSFORMER_RULES: tuple[Rule, ...] = (
    Rule("freqs_cis", None),  # the rotary table, recomputed
    Rule("causal_mask", None),
    Rule("layers.{i}.attention.kv_cache.{name}", None),
    Rule("tok_embeddings.weight", "token_embedding.weight"),
    Rule("cls_embedding.embedding_table.weight", "condition_embedding.embedding.weight"),
    Rule("cls_embedding.cap_proj.{layer}.weight", "condition_embedding.{layer}.weight"),
    Rule("cls_embedding.uncond_embedding", "condition_embedding.null_embedding"),
    Rule(
        _BLOCK + "attention.wqkv.weight",
        tuple(_OURS + f"attention.{part}.weight" for part in ("to_q", "to_k", "to_v")),
        split_qkv,
    ),
    Rule(_BLOCK + "attention.wo.weight", _OURS + "attention.to_out.weight"),
    Rule(_BLOCK + "feed_forward.w1.weight", _OURS + "mlp.gate.weight"),
    Rule(_BLOCK + "feed_forward.w3.weight", _OURS + "mlp.up.weight"),
    Rule(_BLOCK + "feed_forward.w2.weight", _OURS + "mlp.down.weight"),
    Rule(_BLOCK + "attention_norm.weight", _OURS + "attention_norm.weight"),
    Rule(_BLOCK + "ffn_norm.weight", _OURS + "mlp_norm.weight"),
    Rule("norm.weight", "trunk.norm.weight"),
    Rule("output.weight", "head.projection.weight"),
)


def _attention_rules(source: str, target: str) -> tuple[Rule, ...]:
    names = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out"}
    projections = (
        Rule(f"{source}.{a}.{{leaf}}", f"{target}.{b}.{{leaf}}", squeeze_convolution) for a, b in names.items()
    )
    return (Rule(f"{source}.norm.{{leaf}}", f"{target}.norm.{{leaf}}"), *projections)


def _residual_rules(source: str, target: str) -> tuple[Rule, ...]:
    names = {"nin_shortcut": "shortcut", **{part: part for part in ("norm1", "conv1", "norm2", "conv2")}}
    return tuple(Rule(f"{source}.{a}.{{leaf}}", f"{target}.{b}.{{leaf}}") for a, b in names.items())


def _coder_rules(coder: str, resample: str) -> tuple[Rule, ...]:
    level, ours = f"{coder}.conv_blocks.{{i}}", f"{coder}.levels.{{i}}"
    return (
        *(Rule(f"{coder}.{part}.{{leaf}}", f"{coder}.{part}.{{leaf}}") for part in ("conv_in", "norm_out", "conv_out")),
        *_residual_rules(f"{level}.res.{{j}}", f"{ours}.blocks.{{j}}"),
        *_attention_rules(f"{level}.attn.{{j}}", f"{ours}.attentions.{{j}}"),
        Rule(f"{level}.{resample}.conv.{{leaf}}", f"{ours}.{resample}.conv.{{leaf}}"),
        *_residual_rules(f"{coder}.mid.0", f"{coder}.mid_block1"),
        *_attention_rules(f"{coder}.mid.1", f"{coder}.mid_attention"),
        *_residual_rules(f"{coder}.mid.2", f"{coder}.mid_block2"),
    )


TOKENIZER_RULES: tuple[Rule, ...] = (
    Rule("quantize.codebook_used", None),  # which codes training used lately
    Rule("quantize.embedding.weight", "quantizer.embedding.weight"),
    Rule("quant_conv.{leaf}", "quant_conv.{leaf}"),
    Rule("post_quant_conv.{leaf}", "post_quant_conv.{leaf}"),
    *_coder_rules("encoder", "downsample"),
    *_coder_rules("decoder", "upsample"),
)


def convert(
    path: Any,
    *,
    config: Any = None,
    dtype: torch.dtype | None = None,
    use_ema: bool = False,
) -> AutoregressiveModel | VQTokenizer:
    """The transformer or the tokenizer in the file `path`.

    Args:
        path: a file of the authors, or one their trainers wrote.
        config: a dict, or a JSON file, with options by our names or the authors' (`num_heads`/`n_head`, `norm_eps`,
            `rotary_theta`/`rope_base`, ...). Needed for the heads of sizes the authors did not publish, and for the size of
            the images (`grid` or `block_size`) where the file's name does not say it; values that the tensors contradict are a
            ValueError.
        dtype: of the weights; None keeps the file's.
        use_ema: take the moving average stored beside the weights.
    """
    return convert_state_dict(load_state_dict(path, use_ema=use_ema), config=config, dtype=dtype, name=path)


def convert_state_dict(
    state: Mapping[str, torch.Tensor],
    *,
    config: Any = None,
    dtype: torch.dtype | None = None,
    name: Any = "the checkpoint",
) -> AutoregressiveModel | VQTokenizer:
    """Like `convert`, from tensors under the authors' names. `name` is the file's, which may say the size of the images."""
    if "quantize.embedding.weight" in state:
        options = read_options(config, OPTION_NAMES, _TOKENIZER_OPTIONS)
        with init_empty_weights():
            model = VQTokenizer(**tokenizer_arguments(state, options))
        return load_strict(model, apply_rules(state, TOKENIZER_RULES), TOKENIZER_RULES, dtype=dtype)
    if "tok_embeddings.weight" in state:
        options = read_options(config, OPTION_NAMES, TRANSFORMER_OPTIONS)
        arguments = transformer_arguments(state, options)
        trunk = arguments["transformer"]
        with init_empty_weights():
            model = AutoregressiveModel(**arguments, grid=grid_of(name, options))
        converted = apply_rules(state, TRANSFORMER_RULES, {"qkv_rows": qkv_rows(trunk)})
        return load_strict(model, converted, TRANSFORMER_RULES, dtype=dtype)
    raise CheckpointKeysError(
        "this is no LlamaGen checkpoint: it holds neither 'tok_embeddings.weight' (a transformer) nor 'quantize.embedding.weight' "
        f"(a tokenizer), but {', '.join(sorted(state)[:4])}, ...",
        missing=["tok_embeddings.weight", "quantize.embedding.weight"],
    )


def transformer_arguments(
    state: Mapping[str, torch.Tensor],
    options: Mapping[str, Any],
    published_heads: Mapping[tuple[int, int], int] = PUBLISHED_HEADS,
    extra_layers: int = 0,
) -> dict[str, Any]:
    """Init arguments of `AutoregressiveModel` for the tensors of a transformer.

    published_heads, extra_layers: of families with the same blocks: heads by (width, layers), and layers that are not counted there.
    """
    vocab_size, dim = _shape(state, "tok_embeddings.weight", 2)
    num_layers = _count(state, r"layers\.(\d+)\.")
    hidden = _shape(state, "layers.0.feed_forward.w1.weight", 2)[0]
    num_heads = options.get("num_heads", published_heads.get((dim, num_layers - extra_layers)))
    if num_heads is None:
        raise ValueError(
            f"a transformer {dim} wide with {num_layers - extra_layers} layers is none of the published sizes, and the file does not "
            "say how many attention heads it has: pass config={'num_heads': ...}."
        )
    if not isinstance(num_heads, int) or num_heads < 1 or dim % num_heads or (dim // num_heads) % 4:
        raise ValueError(f"`num_heads` must divide the width {dim} into heads of a multiple of 4, got {num_heads!r}.")
    head_dim = dim // num_heads
    rows = _shape(state, "layers.0.attention.wqkv.weight", 2)[0]
    num_kv_heads, rest = divmod(rows - dim, 2 * head_dim)
    if rest or num_kv_heads < 1 or num_heads % num_kv_heads:
        raise CheckpointShapeError(
            f"layers.0.attention.wqkv.weight has {rows} rows, which {num_heads} heads of {head_dim} cannot produce: is `num_heads` right?"
        )
    found: dict[str, Any] = {
        "dim": dim, "num_layers": num_layers - extra_layers, "vocab_size": vocab_size, "num_kv_heads": num_kv_heads
    }  # fmt: skip
    if "cls_embedding.embedding_table.weight" in state:
        num_classes = _shape(state, "cls_embedding.embedding_table.weight", 2)[0] - 1
        condition = {"type": "class", "num_classes": num_classes}
        found |= {"num_classes": num_classes, "condition_tokens": 1, "model_type": "c2i"}
    elif "cls_embedding.uncond_embedding" in state:
        num_tokens, in_dim = _shape(state, "cls_embedding.uncond_embedding", 2)
        condition = {"type": "caption", "in_dim": in_dim, "num_tokens": num_tokens}
        found |= {"caption_dim": in_dim, "condition_tokens": num_tokens, "model_type": "t2i"}
    else:
        missing = ["cls_embedding.embedding_table.weight", "cls_embedding.uncond_embedding"]
        raise CheckpointKeysError(
            f"the checkpoint lacks a condition: neither {' nor '.join(missing)}.", missing=missing
        )
    _compare(options, found)
    return {
        "vocab_size": vocab_size,
        "condition": condition,
        "transformer": {
            "dim": dim,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "mlp": "swiglu",
            "mlp_hidden": hidden,
            "norm": "rms",
            "norm_eps": options.get("norm_eps", 1e-5),
            "rotary_axes": [head_dim // 2, head_dim // 2],
            "rotary_theta": float(options.get("rotary_theta", 10000)),
            "rotary_layout": "interleaved",
        },
    }


def qkv_rows(trunk: Mapping[str, Any]) -> tuple[int, int, int]:
    """Rows of the query, key and value parts of a merged projection, for arguments of `ARTransformer`."""
    head_dim = trunk["dim"] // trunk["num_heads"]
    return (trunk["dim"], trunk["num_kv_heads"] * head_dim, trunk["num_kv_heads"] * head_dim)


def tokenizer_arguments(state: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> dict[str, Any]:
    """Init arguments of `VQTokenizer` for the tensors of a tokenizer."""
    base_channels, in_channels = _shape(state, "encoder.conv_in.weight", 4)[:2]
    codebook_size, codebook_dim = _shape(state, "quantize.embedding.weight", 2)

    def multipliers(coder: str) -> list[int]:
        levels = _count(state, rf"{coder}\.conv_blocks\.(\d+)\.")
        widths = [_shape(state, f"{coder}.conv_blocks.{i}.res.0.conv1.weight", 4)[0] for i in range(levels)]
        if any(width % base_channels for width in widths):
            raise CheckpointShapeError(
                f"the widths {widths} of the {coder} are no multiples of its base width {base_channels}."
            )
        return [width // base_channels for width in widths]

    found = {
        "in_channels": in_channels,
        "base_channels": base_channels,
        "encoder_multipliers": multipliers("encoder"),
        "decoder_multipliers": multipliers("decoder")[::-1],
        "num_res_blocks": _count(state, r"encoder\.conv_blocks\.0\.res\.(\d+)\."),
        "decoder_res_blocks": _count(state, r"decoder\.conv_blocks\.0\.res\.(\d+)\."),
        "z_channels": _shape(state, "quant_conv.weight", 4)[1],
        "codebook_size": codebook_size,
        "codebook_dim": codebook_dim,
    }
    _compare(options, found)
    return {**found, "l2_normalize": bool(options.get("l2_normalize", True))}


def given_grid(options: Mapping[str, Any]) -> tuple[int, int] | None:
    """(height, width) in tokens of the images that `grid` or `block_size` of `config` say; None where neither is given."""
    if "grid" in options:
        return AutoregressiveModel.check_grid(options["grid"])
    if "block_size" not in options:
        return None
    tokens = options["block_size"]
    side = math.isqrt(tokens) if isinstance(tokens, int) and tokens > 0 else 0
    if side * side != tokens or not side:
        raise ValueError(
            f"`block_size` must be the number of tokens of a square image, got {tokens!r}; use `grid` for others."
        )
    return (side, side)


def grid_of(path: Any, options: Mapping[str, Any]) -> tuple[int, int]:
    """(height, width) in tokens of the images a transformer was trained on: from `config`, else from the name of its file, where
    the authors write the size in pixels (16 for each token), else 16 x 16."""
    given = given_grid(options)
    if given is not None:
        return given
    named = re.search(r"_(\d{3,4})\.\w+$", Path(str(path)).name)
    if named and int(named[1]) % 16 == 0:
        return (int(named[1]) // 16, int(named[1]) // 16)
    logger.info("%s does not say the size of its images: taking 16 x 16 tokens", path)
    return (16, 16)


def load_single_file(
    path: Any,
    *,
    tokenizer: Any,
    config: Any = None,
    tokenizer_config: Any = None,
    dtype: torch.dtype | dict[str, torch.dtype] | None = None,
    generation_config: dict[str, Any] | None = None,
    text_encoder: Any = None,
    text_tokenizer: Any = None,
    use_ema: bool = False,
    **hub_options: Any,
) -> dict[str, Any]:
    """The components of a `LlamaGenPipeline` from the authors' files.

    Args:
        path: the transformer's file, or a link to it.
        tokenizer: the tokenizer's file or link, or a `VQTokenizer`.
        config: options for the transformer's file, see `convert`.
        tokenizer_config: options for the tokenizer's file.
        dtype: of the weights; a dict names `"transformer"`, `"tokenizer"` and `"default"`.
        generation_config: settings that replace the family's preset.
        text_encoder, text_tokenizer: of a text-conditional model, for prompts; without them calls take `prompt_embeds`.
        hub_options: `revision`, `cache_dir`, `local_files_only`, `token` for files on the hub.
    """
    local = resolve_file(path, **hub_options)
    transformer = convert(local, config=config, dtype=dtype_of(dtype, "transformer"), use_ema=use_ema)
    if not isinstance(transformer, AutoregressiveModel):
        raise ValueError(f"{path} holds a tokenizer, not a transformer: pass it as `tokenizer=`.")
    return {
        "tokenizer": load_tokenizer(
            tokenizer, config=tokenizer_config, dtype=dtype_of(dtype, "tokenizer"), **hub_options
        ),
        "transformer": transformer,
        "decoding": NextTokenDecoding(),
        "text_encoder": text_encoder,
        "text_tokenizer": text_tokenizer,
        "generation_config": {**preset_of(transformer), **(generation_config or {})},
    }


def load_tokenizer(
    source: Any, *, config: Any = None, dtype: torch.dtype | None = None, **hub_options: Any
) -> VQTokenizer:
    """The tokenizer in the authors' file (or behind the link) `source`; a `VQTokenizer` is handed through."""
    if isinstance(source, VQTokenizer):
        return source
    tokenizer = convert(resolve_file(source, **hub_options), config=config, dtype=dtype)
    if not isinstance(tokenizer, VQTokenizer):
        raise ValueError(f"`tokenizer` {source} holds a transformer, not a tokenizer.")
    return tokenizer


def preset_of(transformer: AutoregressiveModel) -> dict[str, Any]:
    """The sampling settings of the authors' demos."""
    if transformer.condition_type == "class":
        return {"guidance_scale": 4.0, "temperature": 1.0, "top_k": 2000, "top_p": 1.0}
    return {"guidance_scale": 7.5, "temperature": 1.0, "top_k": 1000, "top_p": 1.0}
