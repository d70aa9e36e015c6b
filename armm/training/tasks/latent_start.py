"""Models of latents that go on from the weights of a unified model: it knows the words, and what they do to a picture."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from armm.masked_latent_model import MaskedLatentModel
from armm.model import AutoregressiveModel
from armm.next_x_model import NextXModel

logger = logging.getLogger(__name__)

_POSITIONS = "trunk.position_embedding.weight"
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
    _check(model, other, words)
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
    own = model.state_dict()
    places = own[_POSITIONS].clone()
    places[len(places) - model.text_length :], places[:tokens] = _places(other)
    stored[_POSITIONS] = places
    if model.trunk.input_norm is not None:
        stored["trunk.input_norm.weight"] = _size(embedding)
    for layer, block in enumerate(model.trunk.blocks):
        table = getattr(block.modulation, "table", None)
        if table is not None:
            gates = [block.modulation.indices[place] for place in (2, 5)]
            stored[f"trunk.blocks.{layer}.modulation.table"] = table.index_fill(0, torch.tensor(gates), 1.0)
    return _copy(model, stored)


@torch.no_grad()
def start_from_next_x(model: NextXModel, other: NextXModel, words: int) -> list[str]:
    """Copies into `model` what `other` has, the learned positions of words and cells too where one of them has coarser scales besides.

    Args, returns: see `start_from_unified`.
    """
    _check(model, other, words)
    stored = dict(other.state_dict())
    places, theirs = model.state_dict()[_POSITIONS].clone(), stored[_POSITIONS]
    both = min(len(places), len(theirs)) - model.text_length
    places[:both] = theirs[:both]
    places[len(places) - model.text_length :] = theirs[len(theirs) - model.text_length :]
    stored[_POSITIONS] = places
    return _copy(model, stored)


@torch.no_grad()
def start_masked_latents_from_unified(model: MaskedLatentModel, other: AutoregressiveModel, words: int) -> list[str]:
    """Copies into `model` the blocks of `other`, the first of them into the encoder, the rest into the decoder, its words and its
    learned positions. Without a last norm of the encoder the two stacks begin as the one of `other`; new are what goes in and
    out of them as latents, and the head.

    Args, returns: see `start_from_unified`.
    """
    _check(model, other, words)
    if sum(stack.num_layers for stack in model.stacks) != other.trunk.num_layers or model.patch_size != 1:
        raise ValueError(
            f"`model.start` has {other.trunk.num_layers} blocks: encoder and decoder must have as many together, got "
            f"{[stack.num_layers for stack in model.stacks]}, and patch_size must be 1, got {model.patch_size}."
        )
    theirs = other.state_dict()
    stored: dict[str, Tensor] = {}
    first = 0
    for stack, layers in (("encoder", model.encoder.num_layers), ("decoder", model.decoder.num_layers)):
        for layer in range(layers):
            prefix = f"trunk.blocks.{first + layer}."
            names = (name for name in theirs if name.startswith(prefix))
            stored |= {f"{stack}.blocks.{layer}.{name.removeprefix(prefix)}": theirs[name] for name in names}
        stored[f"{stack}.position_embedding.weight"] = torch.cat(_places(other))
        first += layers
    stored["decoder.norm.weight"] = theirs["trunk.norm.weight"]
    stored["decoder_projection.weight"] = torch.eye(other.trunk.dim)
    embedding = theirs["token_embedding.weight"]
    stored["text_embedding.weight"] = embedding[:words]
    stored["encoder.input_norm.weight"] = _size(embedding[:words])
    stored["mask_token"] = embedding[words:].mean(0, keepdim=True)
    return _copy(model, stored)


def _check(model: MaskedLatentModel | NextXModel, other: AutoregressiveModel | NextXModel, words: int) -> None:
    slots = other.text_length if isinstance(other, NextXModel) else other.text_slots
    if model.vocab_size != words or model.text_length != slots or model.grid != tuple(other.grid):
        raise ValueError(
            f"`model.start` is of {words} words, {slots} text slots and a grid of {tuple(other.grid)}, the model of "
            f"{model.vocab_size}, {model.text_length} and {model.grid}: they must be the same."
        )


def _places(other: AutoregressiveModel) -> tuple[Tensor, Tensor]:
    """Learned positions of the words and of the picture's tokens."""
    sizes = [other.prefix_slots, other.grid[0] * other.grid[1], other.answer_slots]
    before, picture, _ = other.trunk.get_parameter("position_embedding.weight").split(sizes)
    return before[: other.text_slots], picture


def _size(embedding: Tensor) -> Tensor:
    """The weight [D] of an RMS norm that leaves rows of `embedding` about as large as they are."""
    return embedding.square().mean(1).sqrt().mean().expand(embedding.shape[1])


def _copy(model: torch.nn.Module, stored: dict[str, Tensor]) -> list[str]:
    own, fresh = model.state_dict(), []
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
