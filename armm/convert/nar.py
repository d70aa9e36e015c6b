"""NAR's files (arXiv 2503.10696, ThisisBillhe/NAR, commit 225c1fb) -> our modules.

Images: LlamaGen's transformer with extra blocks behind its trunk; the head for the width reads the hidden state before them, the
head for the height the one behind them. Videos: one extra block for the height and one for the time, and learned positions
instead of rotary ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import init_empty_weights

from armm.decoding.neighboring import NeighboringDecoding
from armm.hub import resolve_file
from armm.model import AutoregressiveModel

from . import llamagen
from .containers import CheckpointKeysError, load_arguments, load_state_dict
from .facts import compare, count, dtype_of, read_options, shape
from .keymap import Rule, apply_rules, load_strict

# (width, layers without the extra blocks) -> heads.
PUBLISHED_HEADS: dict[tuple[int, int], int] = {
    **llamagen.PUBLISHED_HEADS,
    (384, 12): 6,
    (1024, 18): 16,
    (1280, 30): 20,
}
_OPTION_NAMES = {
    **llamagen.OPTION_NAMES,
    "latent_shape": "grid",
    "max_seq_len": "tokens",
    "medusa_attention_num": "extra_layers",
}
_OPTIONS = {*llamagen.TRANSFORMER_OPTIONS, "tokens", "extra_layers"}
VIDEO_GRID = (4, 16, 16)  # of the released models
_VIDEO_HEADS = ("R", "D", "B")  # right, down, back: along the width, the height, the time


def convert(
    path: Any, *, config: Any = None, dtype: torch.dtype | None = None, use_ema: bool = False
) -> AutoregressiveModel:
    """The transformer in the file `path`.

    Args:
        path: a file of the authors, or one their trainers wrote.
        config: a dict, or a JSON file, with options by our names or the authors' (`num_heads`/`n_head`,
            `grid`/`latent_shape`, `block_size`, `extra_layers`/`medusa_attention_num`, ...). Needed for the heads of sizes
            the authors did not publish, and for the size of images or videos that the file does not say.
        dtype: of the weights; None keeps the file's.
        use_ema: take the moving average stored beside the weights.
    """
    stored = {name: value for name, value in load_arguments(path).items() if _OPTION_NAMES.get(name, name) in _OPTIONS}
    config = {**read_options(stored, _OPTION_NAMES, _OPTIONS), **read_options(config, _OPTION_NAMES, _OPTIONS)}
    return convert_state_dict(load_state_dict(path, use_ema=use_ema), config=config, dtype=dtype, name=path)


def convert_state_dict(
    state: Mapping[str, torch.Tensor],
    *,
    config: Any = None,
    dtype: torch.dtype | None = None,
    name: Any = "the checkpoint",
) -> AutoregressiveModel:
    """Like `convert`, from tensors under the authors' names. `name` is the file's, which may say the size of the images."""
    options = read_options(config, _OPTION_NAMES, _OPTIONS)
    if "output_R.weight" in state:
        arguments, rules = video_arguments(state, options), video_rules(state)
    elif "medusa_output.weight" in state:
        arguments, rules = image_arguments(state, options, name), image_rules(state, options)
    else:
        raise CheckpointKeysError(
            "this is no NAR checkpoint: it holds neither 'medusa_output.weight' (images) nor 'output_R.weight' (videos).",
            missing=["medusa_output.weight", "output_R.weight"],
        )
    with init_empty_weights():
        model = AutoregressiveModel(**arguments)
    context = {"qkv_rows": llamagen.qkv_rows(arguments["transformer"])}
    return load_strict(model, apply_rules(state, rules, context), rules, dtype=dtype)


def image_arguments(state: Mapping[str, torch.Tensor], options: Mapping[str, Any], path: Any = "") -> dict[str, Any]:
    """Init arguments of `AutoregressiveModel` for the tensors of an image transformer."""
    extra = _extra_layers(state, options)
    shared = {name: value for name, value in options.items() if name in llamagen.TRANSFORMER_OPTIONS}
    arguments = llamagen.transformer_arguments(state, shared, PUBLISHED_HEADS, extra)
    trunk = arguments["transformer"]
    trunk["taps"] = [trunk["num_layers"] - extra]
    return {
        **arguments,
        "head": {"type": "neighboring", "axes": 2},
        "grid": llamagen.grid_of(path, shared),
    }


def video_arguments(state: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> dict[str, Any]:
    """Init arguments of `AutoregressiveModel` for the tensors of a video transformer."""
    extra = len(_VIDEO_HEADS) - 1
    shared = {name: value for name, value in options.items() if name in llamagen.TRANSFORMER_OPTIONS}
    arguments = llamagen.transformer_arguments(state, shared, PUBLISHED_HEADS, extra)
    trunk = arguments["transformer"]
    last = trunk["num_layers"]
    rows = shape(state, "abs_pe", 3)[1]
    grid = _video_grid(options, rows - 1)
    compare(options, {"tokens": rows - 1})
    trunk |= {"taps": [last - 2, last - 1], "rotary_axes": [], "learned_positions": rows}
    return {**arguments, "head": {"type": "neighboring", "axes": 3}, "grid": grid}


def image_rules(state: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> tuple[Rule, ...]:
    """Rules for an image transformer, whose tap is behind its last regular block."""
    tap = count(state, r"layers\.(\d+)\.") - _extra_layers(state, options)
    own = (
        Rule("norm.weight", f"trunk.tap_norms.{tap}.weight"),
        Rule("output.weight", "head.axes.0.projection.weight"),
        Rule("medusa_norm.weight", "trunk.norm.weight"),
        Rule("medusa_output.weight", "head.axes.1.projection.weight"),
    )
    return (*own, *_shared_rules())


def video_rules(state: Mapping[str, torch.Tensor]) -> tuple[Rule, ...]:
    """Rules for a video transformer, whose taps are before its last two blocks."""
    layers = count(state, r"layers\.(\d+)\.")
    norms = (f"tap_norms.{layers - 2}", f"tap_norms.{layers - 1}", "norm")
    own = [Rule("abs_pe", "trunk.position_embedding.weight", _drop_batch)]
    for axis, (letter, norm) in enumerate(zip(_VIDEO_HEADS, norms, strict=True)):
        own.append(Rule(f"norm_{letter}.weight", f"trunk.{norm}.weight"))
        own.append(Rule(f"output_{letter}.weight", f"head.axes.{axis}.projection.weight"))
    return (*own, *_shared_rules())


def _shared_rules() -> tuple[Rule, ...]:
    return tuple(rule for rule in llamagen.TRANSFORMER_RULES if rule.source not in ("norm.weight", "output.weight"))


def _drop_batch(tensor: torch.Tensor, context: Mapping[str, Any]) -> torch.Tensor:
    return tensor[0]


def _extra_layers(state: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> int:
    extra, layers = options.get("extra_layers", 1), count(state, r"layers\.(\d+)\.")
    if not isinstance(extra, int) or not 1 <= extra < layers:
        raise ValueError(
            f"`extra_layers` must lie between 1 and {layers - 1} for a file of {layers} blocks, got {extra!r}."
        )
    return extra


def _video_grid(options: Mapping[str, Any], tokens: int) -> tuple[int, ...]:
    """(time, height, width) in tokens: given, or the published one where it fits."""
    grid = AutoregressiveModel.check_grid(options.get("grid", VIDEO_GRID))
    if len(grid) != 3 or grid[0] * grid[1] * grid[2] != tokens:
        raise ValueError(
            f"the file has positions for {tokens} tokens, which a grid of {list(grid)} does not have: pass config={{'grid': [time, "
            "height, width]}."
        )
    return grid


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
    """The components of a `NARPipeline` from the authors' files; arguments as in `armm.convert.llamagen.load_single_file`.

    The tokenizer of an image model is LlamaGen's, that of a video model LARP's.
    """
    transformer = convert(
        resolve_file(path, **hub_options), config=config, dtype=dtype_of(dtype, "transformer"), use_ema=use_ema
    )
    return {
        "tokenizer": _tokenizer(transformer, tokenizer, tokenizer_config, dtype_of(dtype, "tokenizer"), hub_options),
        "transformer": transformer,
        "decoding": NeighboringDecoding(),
        "text_encoder": text_encoder,
        "text_tokenizer": text_tokenizer,
        "generation_config": {**preset_of(transformer), **(generation_config or {})},
    }


def _tokenizer(
    model: AutoregressiveModel, source: Any, config: Any, dtype: torch.dtype | None, hub_options: dict
) -> Any:
    if isinstance(source, torch.nn.Module):
        return source
    if len(model.grid) == 2:
        return llamagen.load_tokenizer(source, config=config, dtype=dtype, **hub_options)
    from . import larp

    return larp.convert(resolve_file(source, **hub_options), config=config, dtype=dtype)


def preset_of(transformer: AutoregressiveModel) -> dict[str, Any]:
    """The sampling settings of the authors' demos."""
    if len(transformer.grid) == 3:
        return {"guidance_scale": 1.25, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    if transformer.condition_type == "class":
        return {"guidance_scale": 4.0, "temperature": 1.0, "top_k": 2000, "top_p": 1.0}
    return {"guidance_scale": 7.5, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
