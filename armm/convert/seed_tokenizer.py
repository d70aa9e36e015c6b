"""`seed_quantizer.pt` of SEED (AILab-CVC/SEED, commit 93b3cf40; arXiv 2307.08041, 2310.01218) -> `SEEDTokenizer`.

The vision transformer may be missing from the file, as in the published one, and is then read from BLIP-2's `eva_vit_g.pth`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import init_empty_weights

from tokenizers_visual.seed import SEEDTokenizer

from . import eva
from .containers import CheckpointKeysError
from .facts import compare, count, read_options, shape
from .keymap import Rule, apply_rules, first_row, load_strict, split_thirds

VISION = "visual_encoder."
# Beside these, `vision_layers` says how many blocks of the vision transformer are used: all, or all but the last one where they
# come from a file of their own.
OPTIONS = {
    "vision_heads", "vision_layers", "num_heads", "decoder_heads", "reverse_heads", "causal", "image_size", "patch_size", "vision_dim",
    "vision_mlp_hidden", "dim", "num_layers", "mlp_hidden", "num_tokens", "codebook_size", "codebook_dim", "decoder_layers",
    "embedding_dim", "head",
}  # fmt: skip
OPTION_NAMES = {"num_query_token": "num_tokens", "n_embed": "codebook_size", "codebook_embed_dim": "codebook_dim"}
QUERY_HEAD_DIM = 64  # of BERT
DECODER_HEADS = 12  # fixed in the authors' code
CAUSAL_TOKENS = 32  # the authors' code hides later queries for exactly this number


def q_former_rules(source: str, target: str) -> tuple[Rule, ...]:
    """The query side of a Q-Former in transformers' names for BERT; what reads texts is dropped."""
    layer, block = f"{source}.bert.encoder.layer.{{i}}.", f"{target}.blocks.{{i}}."
    branches = (("attention", "attention", "attention_norm"), ("crossattention", "cross_attention", "cross_norm"))
    rules = [
        Rule(f"{source}.bert.embeddings.LayerNorm.{{leaf}}", f"{target}.norm_in.{{leaf}}"),
        Rule(f"{source}.bert.embeddings.position_ids", None),
        Rule(f"{source}.bert.embeddings.{{table}}.weight", None),
        Rule(f"{layer}intermediate_query.dense.{{leaf}}", f"{block}mlp.fc1.{{leaf}}"),
        Rule(f"{layer}output_query.dense.{{leaf}}", f"{block}mlp.fc2.{{leaf}}"),
        Rule(f"{layer}output_query.LayerNorm.{{leaf}}", f"{block}mlp_norm.{{leaf}}"),
        Rule(f"{layer}intermediate.dense.{{leaf}}", None),
        Rule(f"{layer}output.dense.{{leaf}}", None),
        Rule(f"{layer}output.LayerNorm.{{leaf}}", None),
        Rule(f"{source}.cls.predictions.bias", None),
        Rule(f"{source}.cls.predictions.decoder.{{leaf}}", None),
        Rule(f"{source}.cls.predictions.transform.{{part}}.{{leaf}}", None),
    ]
    for theirs, ours, norm in branches:
        rules += [
            *(
                Rule(f"{layer}{theirs}.self.{a}.{{leaf}}", f"{block}{ours}.{b}.{{leaf}}")
                for a, b in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"))
            ),
            Rule(f"{layer}{theirs}.output.dense.{{leaf}}", f"{block}{ours}.to_out.{{leaf}}"),
            Rule(f"{layer}{theirs}.output.LayerNorm.{{leaf}}", f"{block}{norm}.{{leaf}}"),
        ]
    return tuple(rules)


_QKV = tuple(f"decoder.blocks.{{i}}.attention.{part}.{{leaf}}" for part in ("to_q", "to_k", "to_v"))
RULES: tuple[Rule, ...] = (
    *eva.rules(VISION),
    Rule("ln_vision.{leaf}", "vision_norm.{leaf}"),
    Rule("query_tokens", "query_transformer.queries", first_row),
    *q_former_rules("Qformer", "query_transformer"),
    Rule("encode_task_layer.{i}.{leaf}", "quant_proj.{i}.{leaf}"),
    Rule("quantize.embedding.weight", "quantizer.embedding.weight"),
    Rule("decode_task_layer.{i}.{leaf}", "post_quant_proj.{i}.{leaf}"),
    Rule("pos_embed_image", "decoder_positions", first_row),
    Rule("blocks_image.{i}.attn.qkv.{leaf}", _QKV, split_thirds),
    Rule("blocks_image.{i}.attn.proj.{leaf}", "decoder.blocks.{i}.attention.to_out.{leaf}"),
    Rule("blocks_image.{i}.norm1.{leaf}", "decoder.blocks.{i}.attention_norm.{leaf}"),
    Rule("blocks_image.{i}.norm2.{leaf}", "decoder.blocks.{i}.mlp_norm.{leaf}"),
    Rule("blocks_image.{i}.mlp.{part}.{leaf}", "decoder.blocks.{i}.mlp.{part}.{leaf}"),
    Rule("image_down.{i}.weight", "narrowing.{i}.weight"),
    Rule("reverse_tokens", "reverse_transformer.queries", first_row),
    *q_former_rules("Reverse_Qformer", "reverse_transformer"),
    Rule("distill_image_proj.{leaf}", "embedding_proj.{leaf}"),
    # of a loss of training
    Rule("pos_embed", None),
    Rule("blocks.{i}.{part}.{leaf}", None),
    Rule("blocks.{i}.{part}.{layer}.{leaf}", None),
)


def convert_state_dict(
    state: Mapping[str, torch.Tensor],
    *,
    config: Any = None,
    vision: Mapping[str, torch.Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> SEEDTokenizer:
    """The tokenizer in `state`; arguments as of `armm.convert.seed.convert`, `vision` being tensors too."""
    options = read_options(config, OPTION_NAMES, OPTIONS)
    state = dict(state)
    if not any(name.startswith(VISION) for name in state):
        if vision is None:
            raise CheckpointKeysError(
                f"the checkpoint lacks {VISION}*: give the file of the vision transformer (eva_vit_g.pth) as `vision`.",
                missing=[f"{VISION}*"],
            )
        state |= {VISION + name: tensor for name, tensor in vision.items()}
        layers = count(state, r"visual_encoder\.blocks\.(\d+)\.")
        # all but the last block: the features are those before it
        state = eva.without_blocks(state, VISION, int(options.get("vision_layers", max(layers - 1, 1))))
    state = eva.joined_biases(state, VISION)
    arguments = model_arguments(state, options)
    with init_empty_weights():
        model = SEEDTokenizer(**arguments)
    converted = apply_rules(state, RULES)
    return load_strict(model, converted, RULES, dtype=dtype)


def model_arguments(state: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> dict[str, Any]:
    """Init arguments of `SEEDTokenizer` for the tensors of `state`."""
    vision = eva.sizes(state, VISION)
    vision["vision_dim"] = vision.pop("dim")
    num_tokens, dim = shape(state, "query_tokens", 3)[1:]
    layers, mlp_hidden, crossing = _q_former_sizes(state, "Qformer")
    codebook_size, codebook_dim = shape(state, "quantize.embedding.weight", 2)
    head = "query" if "reverse_tokens" in state else "flatten"
    found: dict[str, Any] = {
        **vision,
        "dim": dim,
        "num_layers": layers,
        "mlp_hidden": mlp_hidden,
        "num_tokens": num_tokens,
        "codebook_size": codebook_size,
        "codebook_dim": codebook_dim,
        "decoder_layers": count(state, r"blocks_image\.(\d+)\."),
        "embedding_dim": shape(state, "distill_image_proj.weight", 2)[0],
        "head": head,
    }
    compare(options, found)
    arguments: dict[str, Any] = {
        **found,
        "cross_layers": crossing,
        "causal": options.get("causal", num_tokens == CAUSAL_TOKENS),
        "vision_heads": eva.num_heads(found["vision_dim"], options.get("vision_heads"), "vision_heads"),
        "num_heads": eva.num_heads(dim, options.get("num_heads"), "num_heads", QUERY_HEAD_DIM),
        "decoder_heads": eva.num_heads(dim, options.get("decoder_heads", DECODER_HEADS), "decoder_heads"),
        "decoder_mlp_hidden": shape(state, "blocks_image.0.mlp.fc1.weight", 2)[0],
    }
    if head == "flatten":
        numbers = sorted(int(m[1]) for name in state if (m := re.fullmatch(r"image_down\.(\d+)\.weight", name)))
        if numbers != list(range(0, 2 * len(numbers), 2)) or not numbers:
            raise CheckpointKeysError(
                f"the checkpoint must have image_down.N.weight for N = 0, 2, ..., it has N = {numbers}."
            )
        arguments["reduction"] = [shape(state, f"image_down.{number}.weight", 2)[0] for number in numbers]
    else:
        layers, mlp_hidden, crossing = _q_former_sizes(state, "Reverse_Qformer")
        arguments |= {
            "reverse_layers": layers,
            "reverse_mlp_hidden": mlp_hidden,
            "reverse_cross_layers": crossing,
            "reverse_heads": eva.num_heads(
                dim, options.get("reverse_heads", arguments["num_heads"]), "reverse_heads", QUERY_HEAD_DIM
            ),
        }
    return arguments


def _q_former_sizes(state: Mapping[str, torch.Tensor], name: str) -> tuple[int, int, list[int]]:
    """Layers, inner width of the feed-forward networks, and the layers that look at the context."""
    prefix = f"{name}.bert.encoder.layer."
    layers = count(state, re.escape(prefix) + r"(\d+)\.")
    hidden = shape(state, f"{prefix}0.intermediate_query.dense.weight", 2)[0]
    crossing = [i for i in range(layers) if f"{prefix}{i}.crossattention.self.query.weight" in state]
    return layers, hidden, crossing
