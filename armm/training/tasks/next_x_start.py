"""Next-X models that go on from the weights of a unified model: it knows the words, and what they do to a picture."""

from __future__ import annotations

import logging

import torch

from armm.model import AutoregressiveModel
from armm.next_x_model import NextXModel

logger = logging.getLogger(__name__)

_FOLDED = {"attention_norm": ("attention.to_q", "attention.to_k", "attention.to_v"), "mlp_norm": ("mlp.gate", "mlp.up")}


@torch.no_grad()
def start_from_unified(model: NextXModel, other: AutoregressiveModel, words: int) -> list[str]:
    """Copies into `model` the blocks, the words and the learned positions of `other`, both of the same widths.

    The weights of norms that `model` lacks are folded into the projections behind them, and all gates start open, so that the
    blocks begin as those of `other`. New are what goes in and out of the trunk as latents, and what depends on the time.

    Args:
        words: the first ids of `other`, those of the vocabulary that both share.

    Returns:
        The names of the parameters that were not copied.
    """
    if model.vocab_size != words or model.text_length != other.text_slots or model.grid != tuple(other.grid):
        raise ValueError(
            f"`model.start` is of {words} words, {other.text_slots} text slots and a grid of {tuple(other.grid)}, the model of "
            f"{model.vocab_size}, {model.text_length} and {model.grid}: they must be the same."
        )
    stored = other.state_dict()
    for layer, block in enumerate(other.trunk.blocks):
        for norm, projections in _FOLDED.items():
            weight = getattr(block, norm).weight
            if f"trunk.blocks.{layer}.{norm}.weight" in model.state_dict():
                continue
            for projection in projections:
                stored[f"trunk.blocks.{layer}.{projection}.weight"] = block.get_submodule(projection).weight * weight
    embedding = stored["token_embedding.weight"][:words]
    stored["text_embedding.weight"] = embedding
    tokens = model.grid[0] * model.grid[1]
    before, picture = stored["trunk.position_embedding.weight"].split([other.prefix_slots, tokens, other.answer_slots])[
        :2
    ]
    own = model.state_dict()
    places = own["trunk.position_embedding.weight"].clone()
    places[:tokens] = picture
    places[len(places) - model.text_length :] = before[: model.text_length]
    stored["trunk.position_embedding.weight"] = places
    if model.trunk.input_norm is not None:
        rms = embedding.square().mean(1).sqrt().mean()
        stored["trunk.input_norm.weight"] = rms.expand_as(own["trunk.input_norm.weight"])
    for layer, block in enumerate(model.trunk.blocks):
        table = getattr(block.modulation, "table", None)
        if table is not None:
            gates = [block.modulation.indices[place] for place in (2, 5)]
            stored[f"trunk.blocks.{layer}.modulation.table"] = table.index_fill(0, torch.tensor(gates), 1.0)
    fresh = []
    for name, tensor in own.items():
        source = stored.get(name)
        if source is not None and source.shape == tensor.shape:
            tensor.copy_(source)
        else:
            fresh.append(name)
    logger.info(
        "starting from trained weights: %d of %d tensors, new %s", len(own) - len(fresh), len(own), fresh or "none"
    )
    return fresh
