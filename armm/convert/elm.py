"""ELM's files (arXiv 2410.16257, Pepper-lll/LMforImageGeneration, commit c2f29f0) -> our modules.

Reads the autoregressive transformers (`gpt/L-2-10.pth`, ...), the masked ones (`gpt/mlmL-1-16.pth`, ...) and the binary
autoencoders (`bae/*/binaryae_ema.th`, the state of the whole training module) in any container their trainers wrote. Sizes are
read off the tensors. What a file does not say, the number of attention heads, is known for the published sizes and comes from
`config` otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import init_empty_weights

from armm.decoding.masked_tokens import MaskedTokenDecoding
from armm.decoding.next_token import NextTokenDecoding
from armm.hub import resolve_file
from armm.model import AutoregressiveModel
from tokenizers_visual.binary_tokenizer import BinaryTokenizer

from . import llamagen
from .containers import CheckpointKeysError, CheckpointShapeError, load_state_dict
from .elm_tokenizer import tokenizer_layout
from .facts import compare, count, dtype_of, read_options, shape
from .keymap import Rule, apply_rules, load_strict

# (width, layers) -> heads of the sizes the authors defined: L, XL, XXL, 2B.
PUBLISHED_HEADS: dict[tuple[int, int], int] = {(1024, 24): 16, (1280, 36): 20, (1536, 48): 24, (1792, 48): 28}
_TRANSFORMER_OPTIONS = {
    "num_heads", "norm_eps", "rotary_theta", "block_size", "grid", "dim", "num_layers", "num_classes", "token_each", "code_dim",
    "pos_type",
}  # fmt: skip
_TOKENIZER_OPTIONS = {
    "token_each", "code_dim", "codebook_size", "emb_dim", "nf", "ch_mult", "n_channels", "norm_first", "use_tanh", "norm_groups",
}  # fmt: skip

# The blocks are LlamaGen's.
_SHARED_RULES: tuple[Rule, ...] = (
    Rule("tok_embedder.weight", "token_embedding.weight"),
    *(rule for rule in llamagen.TRANSFORMER_RULES if rule.source not in ("tok_embeddings.weight", "output.weight")),
)
AUTOREGRESSIVE_RULES: tuple[Rule, ...] = (
    *_SHARED_RULES,
    Rule("proj.weight", "sub_code_projection.weight"),
    Rule("output.weight", "head.projection.weight"),
)


def _without_mask(tensor: torch.Tensor, context: Mapping[str, Any]) -> torch.Tensor:
    """The bias [1, 1, V + 1] of the head without that of the mask, which is never predicted."""
    return tensor.flatten()[:-1]


MASKED_RULES: tuple[Rule, ...] = (
    *_SHARED_RULES,
    Rule("mlm_layer.fc.{leaf}", "head.transform.{leaf}"),
    Rule("mlm_layer.ln.{leaf}", "head.norm.{leaf}"),
    Rule("mlm_layer.bias", "head.bias", _without_mask),
    # stored by the authors and not used by the model
    Rule("output.weight", None),
    Rule("output.{i}.weight", None),
    Rule("proj.weight", None),
    Rule("pos_embed.weight", None),
)


def convert(
    path: Any, *, config: Any = None, dtype: torch.dtype | None = None, use_ema: bool = False
) -> AutoregressiveModel | BinaryTokenizer:
    """The transformer or the tokenizer in the file `path`.

    Args:
        path: a file of the authors, or one their trainers wrote.
        config: a dict, or a JSON file, with options by our names or the authors': `num_heads`/`n_head` for sizes the authors did not
            publish; `block_size` or `grid` for images of other than 16 x 16 tokens; `token_each`, into how many sub-codes a
            tokenizer's bits are cut. Values that the tensors contradict are a ValueError.
        dtype: of the weights; None keeps the file's.
        use_ema: take the moving average stored beside the weights.
    """
    return convert_state_dict(load_state_dict(path, use_ema=use_ema), config=config, dtype=dtype)


def convert_state_dict(
    state: Mapping[str, torch.Tensor], *, config: Any = None, dtype: torch.dtype | None = None
) -> AutoregressiveModel | BinaryTokenizer:
    """Like `convert`, from tensors under the authors' names."""
    if any(name.startswith(("ae.quantize.", "quantize.")) for name in state):
        options = read_options(config, llamagen.OPTION_NAMES, _TOKENIZER_OPTIONS)
        state = autoencoder_only(state)
        arguments, rules = tokenizer_layout(state, options)
        with init_empty_weights():
            tokenizer = BinaryTokenizer(**arguments)
        return load_strict(tokenizer, apply_rules(state, rules), rules, dtype=dtype)
    if "tok_embedder.weight" in state or "tok_embedder.0.weight" in state:
        options = read_options(config, llamagen.OPTION_NAMES, _TRANSFORMER_OPTIONS)
        masked = any(name.startswith("mlm_layer.") for name in state)
        rules = MASKED_RULES if masked else AUTOREGRESSIVE_RULES
        arguments = masked_arguments(state, options) if masked else autoregressive_arguments(state, options)
        state = state if masked else join_sub_codes(state)
        with init_empty_weights():
            model = AutoregressiveModel(**arguments)
        context = {"qkv_rows": llamagen.qkv_rows(arguments["transformer"])}
        return load_strict(model, apply_rules(state, rules, context), rules, dtype=dtype)
    missing = ["tok_embedder.weight", "tok_embedder.0.weight", "ae.quantize.embed.weight"]
    raise CheckpointKeysError(
        "this is no ELM checkpoint: it holds neither 'tok_embedder' (a transformer) nor 'quantize' (a tokenizer), but "
        f"{', '.join(sorted(state)[:4])}, ...",
        missing=missing,
    )


def autoencoder_only(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The autoencoder of a training module: keys under `ae.` without it; the discriminator and the like are left out."""
    inner = {name[3:]: tensor for name, tensor in state.items() if name.startswith("ae.")}
    return inner or dict(state)


def join_sub_codes(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tables and heads of the sub-codes, one below the other."""
    joined = dict(state)
    for part in ("tok_embedder", "output"):
        names = [f"{part}.{i}.weight" for i in range(len(state)) if f"{part}.{i}.weight" in state]
        if names:
            joined[f"{part}.weight"] = torch.cat([joined.pop(name) for name in names])
    return joined


def _shared_arguments(state: Mapping[str, torch.Tensor], options: Mapping[str, Any], table: str) -> dict[str, Any]:
    """What a transformer has in common with LlamaGen's: the trunk, the classes and the grid; `table` is its first embedding."""
    if options.get("pos_type", "rope2d") != "rope2d":
        raise ValueError(f"`pos_type` must be 'rope2d', the only one that was published, got {options['pos_type']!r}.")
    shape(state, "cls_embedding.embedding_table.weight", 2)
    shared = {name: value for name, value in options.items() if name in llamagen.TRANSFORMER_OPTIONS}
    renamed = {**state, "tok_embeddings.weight": state[table]}
    return {
        **llamagen.transformer_arguments(renamed, shared, PUBLISHED_HEADS),
        "grid": llamagen.given_grid(options) or (16, 16),
    }


def autoregressive_arguments(state: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> dict[str, Any]:
    """Init arguments of `AutoregressiveModel` for the tensors of an autoregressive transformer."""
    sub_codes = 1
    if "tok_embedder.weight" not in state:
        sub_codes = count(state, r"tok_embedder\.(\d+)\.weight")
        heads = count(state, r"output\.(\d+)\.weight")
        if heads != sub_codes:
            raise CheckpointShapeError(
                f"the checkpoint has {sub_codes} tables 'tok_embedder' but {heads} heads 'output'."
            )
        shapes = {
            shape(state, f"{part}.{i}.weight", 2) for part in ("tok_embedder", "output") for i in range(sub_codes)
        }
        if len(shapes) > 1:
            raise CheckpointShapeError(f"the sub-codes' tables and heads differ in shape: {sorted(shapes)}.")
    arguments = _shared_arguments(state, options, "tok_embedder.weight" if sub_codes == 1 else "tok_embedder.0.weight")
    compare(options, {"token_each": sub_codes, "code_dim": _bits_of(arguments["vocab_size"])})
    return {**arguments, "sub_codes": sub_codes}


def masked_arguments(state: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> dict[str, Any]:
    """Init arguments of `AutoregressiveModel` for the tensors of a masked transformer."""
    sub_codes = 1
    # Two tensors that the model does not use, but which tell its sizes.
    if "proj.weight" in state:
        rows, columns = shape(state, "proj.weight", 2)
        sub_codes = columns // rows
    if "pos_embed.weight" in state:
        options = {"block_size": shape(state, "pos_embed.weight", 2)[0], **options}
    arguments = _shared_arguments(state, options, "tok_embedder.weight")
    vocab_size = arguments["vocab_size"] - 1
    compare(options, {"token_each": sub_codes, "code_dim": _bits_of(vocab_size)})
    return {
        **arguments,
        "vocab_size": vocab_size,
        "sub_codes": sub_codes,
        "sub_code_layout": "sequence",
        "mask_token": True,
        "causal": False,
        "head": {"type": "tied"},
        "head_bias": True,
    }


def _bits_of(vocab_size: int) -> int:
    bits = max(vocab_size, 1).bit_length() - 1
    if vocab_size != 2**bits:
        raise CheckpointShapeError(f"the vocabulary of {vocab_size} ids is no power of two: these are no binary codes.")
    return bits


def load_single_file(
    path: Any,
    *,
    tokenizer: Any,
    config: Any = None,
    tokenizer_config: Any = None,
    dtype: torch.dtype | dict[str, torch.dtype] | None = None,
    generation_config: dict[str, Any] | None = None,
    use_ema: bool = False,
    **hub_options: Any,
) -> dict[str, Any]:
    """The components of an `ELMPipeline` from the authors' files.

    Args:
        path: the transformer's file, or a link to it.
        tokenizer: the tokenizer's file or link, or a `BinaryTokenizer`. A file's bits are cut into the transformer's sub-codes.
        config: options for the transformer's file, see `convert`.
        tokenizer_config: options for the tokenizer's file.
        dtype: of the weights; a dict names `"transformer"`, `"tokenizer"` and `"default"`.
        generation_config: settings that replace the family's preset.
        hub_options: `revision`, `cache_dir`, `local_files_only`, `token` for files on the hub.
    """
    transformer = convert(
        resolve_file(path, **hub_options), config=config, dtype=dtype_of(dtype, "transformer"), use_ema=use_ema
    )
    if not isinstance(transformer, AutoregressiveModel):
        raise ValueError(f"{path} holds a tokenizer, not a transformer: pass it as `tokenizer=`.")
    if not isinstance(tokenizer, BinaryTokenizer):
        source = tokenizer
        options = {
            "token_each": transformer.sub_codes,
            **read_options(tokenizer_config, llamagen.OPTION_NAMES, _TOKENIZER_OPTIONS),
        }
        state = load_state_dict(resolve_file(source, **hub_options))
        if any(name.startswith("tok_embedder.") for name in state):
            raise ValueError(f"`tokenizer` {source} holds a transformer, not a tokenizer.")
        tokenizer = convert_state_dict(state, config=options, dtype=dtype_of(dtype, "tokenizer"))
    masked = transformer.mask_id is not None
    return {
        "tokenizer": tokenizer,
        "transformer": transformer,
        "decoding": MaskedTokenDecoding() if masked else NextTokenDecoding(),
        "generation_config": {**preset_of(transformer), **(generation_config or {})},
    }


def preset_of(transformer: AutoregressiveModel) -> dict[str, Any]:
    """The sampling settings of the authors' FID script; of masked models they state the number of steps alone."""
    if transformer.mask_id is not None:
        return {"guidance_scale": 4.0, "guidance_schedule": "linear", "top_k": 0, "num_inference_steps": 10}
    return {"guidance_scale": 4.0, "guidance_schedule": "linear", "top_k": 1000, "temperature": 1.0}
