"""The depth tokenizer of AURORA (arXiv 2412.03548, mahtabbigverdi/Aurora-perception, commit a3da45f): `vae-final.pt` of the AiT VQ-VAE
-> `DepthVQTokenizer`. Sizes are read off the tensors; the size of the maps comes from `config`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import init_empty_weights

from tokenizers_visual.depth import DepthVQTokenizer

from .containers import CheckpointKeysError, CheckpointShapeError, load_state_dict
from .facts import compare, read_options, shape
from .keymap import Rule, apply_rules, load_strict

OPTION_NAMES = {
    "channels": "in_channels",
    "hidden_dim": "base_channels",
    "num_resnet_blocks": "num_res_blocks",
    "num_tokens": "codebook_size",
}
OPTIONS = {
    "in_channels", "base_channels", "num_levels", "num_res_blocks", "codebook_size", "codebook_dim", "image_size", "first_word",
    "downsample_ratio", "use_norm", "residul_type", "train_objective", "max_value", "loss_type",
}  # fmt: skip
# What the authors use; the rest of their options is about training.
_FIXED = {"use_norm": False, "residul_type": "v1"}
_STATISTICS = (Rule("_vq_vae._ema_cluster_size", None), Rule("_vq_vae._ema_w", None))  # of training
_BLOCK = {"0": "conv1", "2": "conv2", "4": "conv3"}


def rules_of(levels: int, blocks: int) -> tuple[Rule, ...]:
    """The key rules of coders with so many halvings and residual blocks; the authors' names count layers, ReLUs included."""
    rules = [*_STATISTICS, Rule("_vq_vae._embedding", "quantizer.embedding.weight")]
    first = {"encoder": 2 * levels, "decoder": 2}  # number of the first residual block
    for coder, start in first.items():
        for block in range(blocks):
            ours = f"{coder}.blocks.{block}"
            rules += [
                Rule(f"{coder}.{start + block}.net.{a}.{{leaf}}", f"{ours}.{b}.{{leaf}}") for a, b in _BLOCK.items()
            ]
    for level in range(levels):
        rules.append(Rule(f"encoder.{2 * level}.{{leaf}}", f"encoder.downsamples.{level}.{{leaf}}"))
        rules.append(Rule(f"decoder.{2 + blocks + 2 * level}.{{leaf}}", f"decoder.upsamples.{level}.{{leaf}}"))
    rules.append(Rule(f"encoder.{2 * levels + blocks}.{{leaf}}", "encoder.conv_out.{leaf}"))
    rules.append(Rule("decoder.0.{leaf}", "decoder.conv_in.{leaf}"))
    rules.append(Rule(f"decoder.{2 + blocks + 2 * levels}.{{leaf}}", "decoder.conv_out.{leaf}"))
    return tuple(rules)


def convert(
    path: Any, *, config: Any = None, dtype: torch.dtype | None = None, use_ema: bool = False
) -> DepthVQTokenizer:
    """The depth tokenizer in the file `path`.

    Args:
        path: the authors' file.
        config: a dict, or a JSON file, by our names or the authors': `image_size` (default 320) is what the file does not say, and
            `first_word` (32000), where its words stand in a language model's vocabulary. Values that the tensors contradict are a
            ValueError.
        dtype: of the weights; None keeps the file's.
        use_ema: take a moving average stored beside the weights; the authors' file has none.
    """
    return convert_state_dict(load_state_dict(path, use_ema=use_ema, keys=("weights",)), config=config, dtype=dtype)


def convert_state_dict(
    state: Mapping[str, torch.Tensor], *, config: Any = None, dtype: torch.dtype | None = None
) -> DepthVQTokenizer:
    """Like `convert`, from tensors under the authors' names."""
    if "_vq_vae._embedding" not in state:
        raise CheckpointKeysError(
            f"this is no depth tokenizer: it lacks '_vq_vae._embedding'; it holds {', '.join(sorted(state)[:4])}, ...",
            missing=["_vq_vae._embedding"],
        )
    arguments = arguments_of(state, read_options(config, OPTION_NAMES, OPTIONS))
    with init_empty_weights():
        model = DepthVQTokenizer(**arguments)
    rules = rules_of(arguments["num_levels"], arguments["num_res_blocks"])
    return load_strict(model, apply_rules(state, rules), rules, dtype=dtype)  # type: ignore[return-value]


def arguments_of(state: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> dict[str, Any]:
    """Init arguments of `DepthVQTokenizer` for the tensors of a file."""
    for name, value in _FIXED.items():
        if options.get(name, value) != value:
            raise ValueError(
                f"`config` says {name} = {options[name]!r}: only {value!r}, the authors' own, is supported."
            )
    codebook_size, codebook_dim = shape(state, "_vq_vae._embedding", 2)
    base_channels, in_channels = shape(state, "encoder.0.weight", 4)[:2]
    convolutions = [name for name in state if re.fullmatch(r"encoder\.\d+\.weight", name)]
    blocks = {match[1] for name in state if (match := re.match(r"encoder\.(\d+)\.net\.", name))}
    levels = len(convolutions) - 1
    if levels < 1:
        raise CheckpointShapeError("the encoder has no convolution that halves the resolution.")
    found = {
        "in_channels": in_channels,
        "base_channels": base_channels,
        "num_levels": levels,
        "num_res_blocks": len(blocks),
        "codebook_size": codebook_size,
        "codebook_dim": codebook_dim,
    }
    compare(options, {**found, "downsample_ratio": 2**levels})
    return {**found, **{name: options[name] for name in ("image_size", "first_word") if name in options}}
