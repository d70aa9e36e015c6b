"""How likely a unified model finds a text about an image: one teacher-forced call."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from armm.decoding.base import vocabulary_range, wake
from armm.nn.masks import prefix_mask

if TYPE_CHECKING:
    from armm.model import AutoregressiveModel

__all__ = ["text_log_likelihood"]


@torch.no_grad()
def text_log_likelihood(
    model: AutoregressiveModel,
    prompt: Tensor,
    image: Tensor,
    text: Tensor,
    *,
    start: int = 1,
    pad_id: int,
    vocabulary: tuple[int, int] | None = None,
) -> Tensor:
    """Log-probability of texts that follow images, in nats.

    Args:
        prompt: ids [B, T + 1] of what precedes the images, up to begin-of-image (the null prompt, for captions).
        image: ids [B, N] of whole images in the shared vocabulary.
        text: ids [B, L] of the texts, padded on the right with `pad_id`.
        start: the first token that counts; those before it are given (the mark that opens a caption).
        vocabulary: (low, high), the ids that may be said.

    Returns:
        float32 [B].
    """
    wake(model)
    low, high = vocabulary_range(model, vocabulary)
    given = model.reading_condition(prompt, image, text[:, :-1])
    length, first = given.length, given.length - text.shape[1] + start
    seen = torch.ones(given.embeds.shape[:2], dtype=torch.bool, device=given.embeds.device)
    mask = prefix_mask(seen, length, given.bidirectional)
    output = model.trunk(given.embeds, positions=model.positions_for(given.index), mask=mask)
    hidden = output[0] if isinstance(output, tuple) else output
    targets = text[:, start:]
    logits = model.logits(hidden[:, first:], low=low, high=high)
    # A pad may lie outside the vocabulary's range; what it would have scored is masked out.
    wanted = (targets - low).clamp(0, high - low - 1)
    scores = logits.log_softmax(-1).gather(-1, wanted[..., None])[..., 0]
    return scores.masked_fill(targets == pad_id, 0.0).sum(1)
