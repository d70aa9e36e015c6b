"""A tiny random D-AR pipeline for tests: real components, a fraction of a second a picture."""

from __future__ import annotations

from typing import Any

import torch

from armm.decoding.next_token import NextTokenDecoding
from armm.model import AutoregressiveModel
from pipelines.dar import DARPipeline
from tokenizers_visual import DARTokenizer

TOKENIZER: dict[str, Any] = {
    "image_size": 8, "patch_size": 4, "pixel_patch_size": 4, "num_tokens": 8, "num_groups": 4, "window": 2, "num_steps": 4,
    "codebook_size": 24, "codebook_dim": 4, "query_dim": 4, "encoder_dim": 64, "encoder_layers": 1, "decoder_dim": 64,
    "decoder_layers": 2, "pixel_dim": 64, "pixel_layers": 1,
}  # fmt: skip


def randomised(model: torch.nn.Module, std: float = 0.15) -> Any:
    """`model` with weights that make everything depend on everything, for inference."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * std)
    return model.eval()


def tiny_dar_tokenizer(**options: Any) -> DARTokenizer:
    """Eight ids in four groups, images of 8 x 8 and more."""
    torch.manual_seed(0)
    return randomised(DARTokenizer(**{**TOKENIZER, **options}))


def tiny_dar_pipeline(**settings: Any) -> DARPipeline:
    """Ten classes."""
    tokenizer = tiny_dar_tokenizer()
    torch.manual_seed(1)
    transformer = AutoregressiveModel(
        vocab_size=24,
        transformer={"dim": 32, "num_layers": 2, "num_heads": 2, "mlp_hidden": 48, "rotary_axes": [16]},
        condition={"type": "class", "num_classes": 10},
        grid=(1, 8),
        rotary_condition=True,
    )
    pipe = DARPipeline(
        tokenizer, randomised(transformer, 0.3), NextTokenDecoding(), {"guidance_scale": 2.0, **settings}
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
