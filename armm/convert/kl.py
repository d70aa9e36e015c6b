"""KL autoencoders in the layout of latent diffusion (arXiv 2112.10752) -> `KLTokenizer`; above all `kl16.ckpt` of MAR (LTH14/mar,
commit fe470ac), which xAR, FlowAR and Hi-MAR use too. Everything but the scale of the latents is read off the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import init_empty_weights

from armm.hub import resolve_file
from tokenizers_visual.kl_tokenizer import KLTokenizer

from .containers import CheckpointKeysError, load_state_dict
from .facts import compare, read_options, shape
from .keymap import Rule, apply_rules, load_strict
from .taming import coder_rules, coder_sizes

OPTION_NAMES = {
    "embed_dim": "latent_channels",
    "ch_mult": "channel_multipliers",
    "ch": "base_channels",
    "scale_factor": "scaling_factor",
}
OPTIONS = {
    "latent_channels",
    "channel_multipliers",
    "base_channels",
    "num_res_blocks",
    "in_channels",
    "scaling_factor",
    "norm_groups",
}


def rules_of(levels: int) -> tuple[Rule, ...]:
    """The key rules of an autoencoder with so many resolutions."""
    return (
        Rule("quant_conv.{leaf}", "quant_conv.{leaf}"),
        Rule("post_quant_conv.{leaf}", "post_quant_conv.{leaf}"),
        *coder_rules("encoder", levels),
        *coder_rules("decoder", levels),
    )


def convert(path: Any, *, config: Any = None, dtype: torch.dtype | None = None, use_ema: bool = False) -> KLTokenizer:
    """The autoencoder in the file `path`.

    Args:
        path: a file of the authors, such as `kl16.ckpt`.
        config: a dict, or a JSON file; `scaling_factor` (default 0.2325, that of MAR) is what the file does not say. Values that
            the tensors contradict are a ValueError.
        dtype: of the weights; None keeps the file's.
        use_ema: take the moving average stored beside the weights.
    """
    return convert_state_dict(load_state_dict(path, use_ema=use_ema), config=config, dtype=dtype)


def convert_state_dict(
    state: Mapping[str, torch.Tensor], *, config: Any = None, dtype: torch.dtype | None = None
) -> KLTokenizer:
    """Like `convert`, from tensors under the authors' names. Those of the training loss (`loss.*`) are left out."""
    if "post_quant_conv.weight" not in state or "encoder.conv_in.weight" not in state:
        raise CheckpointKeysError(
            "this is no KL autoencoder: it lacks 'encoder.conv_in.weight' or 'post_quant_conv.weight'; it holds "
            f"{', '.join(sorted(state)[:4])}, ...",
            missing=[name for name in ("encoder.conv_in.weight", "post_quant_conv.weight") if name not in state],
        )
    state = {name: tensor for name, tensor in state.items() if not name.startswith("loss.")}
    arguments = arguments_of(state, read_options(config, OPTION_NAMES, OPTIONS))
    with init_empty_weights():
        model = KLTokenizer(**arguments)
    rules = rules_of(len(arguments["channel_multipliers"]))
    return load_strict(model, apply_rules(state, rules), rules, dtype=dtype)  # type: ignore[return-value]


def arguments_of(state: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> dict[str, Any]:
    """Init arguments of `KLTokenizer` for the tensors of an autoencoder."""
    sizes = coder_sizes(state)
    levels = range(len(sizes["channel_multipliers"]))
    found = {**sizes, "latent_channels": shape(state, "post_quant_conv.weight", 4)[0]}
    compare(options, found)
    return {
        **found,
        "encoder_attention": [f"encoder.down.{i}.attn.0.norm.weight" in state for i in levels],
        "decoder_attention": [f"decoder.up.{i}.attn.0.norm.weight" in state for i in levels],
        **{name: options[name] for name in ("scaling_factor", "norm_groups") if name in options},
    }


def load_tokenizer(
    source: Any, *, config: Any = None, dtype: torch.dtype | None = None, **hub_options: Any
) -> KLTokenizer:
    """The autoencoder in the authors' file (or behind the link) `source`; a `KLTokenizer` is handed through.

    Raises:
        ValueError: `source` is None.
    """
    if source is None:
        raise ValueError(
            "the file holds no tokenizer: pass MAR's autoencoder as `tokenizer=` (published as kl16.ckpt), or a `KLTokenizer`."
        )
    if isinstance(source, KLTokenizer):
        return source
    return convert(resolve_file(source, **hub_options), config=config, dtype=dtype)
