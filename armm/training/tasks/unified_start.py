"""Going on from the weights of another unified model: the same one, or one that decodes its pictures in another way."""

from __future__ import annotations

import logging
import re

import torch
from torch import Tensor

from armm.model import AutoregressiveModel

logger = logging.getLogger(__name__)

_AXIS = re.compile(r"^head\.axes\.\d+\.")
_TAP = re.compile(r"^trunk\.tap_norms\.\d+\.")
_POSITIONS = "trunk.position_embedding.weight"


@torch.no_grad()
def start_from(model: AutoregressiveModel, other: AutoregressiveModel) -> list[str]:
    """Copies into `model` what `other` has of the same name and shape.

    Besides: the head of `other` becomes the head of every axis, its last norm the norm of every tap, and the learned positions of
    a window of image tokens start as the mean of its tokens'. Blocks that only `model` has start as the identity.

    Returns:
        The names of the tensors that were not copied.
    """
    stored, own = other.state_dict(), model.state_dict()
    fresh = []
    for name, tensor in own.items():
        source = stored.get(name, stored.get(_AXIS.sub("head.", _TAP.sub("trunk.norm.", name))))
        if name == _POSITIONS and source is not None and source.shape != tensor.shape:
            source = _window_positions(source, model, other)
        if source is not None and source.shape == tensor.shape:
            tensor.copy_(source)
        else:
            fresh.append(name)
    for block in model.trunk.blocks[len(other.trunk.blocks) :]:
        for projection in (block.attention.to_out, block.mlp.down):
            torch.nn.init.zeros_(projection.weight)
    logger.info("starting from trained weights: %d of %d tensors, new %s", len(own) - len(fresh), len(own), fresh or "none")
    return fresh


def _window_positions(table: Tensor, model: AutoregressiveModel, other: AutoregressiveModel) -> Tensor | None:
    if other.window != 1 or (model.grid, model.text_slots, model.answer_slots) != (other.grid, other.text_slots, other.answer_slots):
        return None
    (height, width), window = other.grid, model.window
    before, image, after = table.split([other.prefix_slots, height * width, other.answer_slots])
    cells = image.view(height // window, window, width // window, window, -1).mean((1, 3))
    return torch.cat([before, cells.flatten(0, 1), after])
