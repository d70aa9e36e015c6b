"""A tiny random model that draws and reads, for tests: real components, a fraction of a second a picture."""

from __future__ import annotations

from typing import Any

import torch

from armm.data.scenes import VOCABULARY
from armm.decoding.next_token import NextTokenDecoding
from armm.model import AutoregressiveModel
from pipelines.text import SPECIAL_TOKENS
from pipelines.unified_text_to_image import UnifiedTextToImagePipeline
from tokenizers_visual import VQTokenizer

CODES, SLOTS, ANSWERS, GRID = 32, 28, 32, (4, 4)


def unified_pipeline(**settings: Any) -> UnifiedTextToImagePipeline:
    """Pictures of 32 x 32 pixels in 16 tokens, over the words of the scenes."""
    words = [*SPECIAL_TOKENS, *(word for word in VOCABULARY if word not in SPECIAL_TOKENS)]
    torch.manual_seed(5)
    tokenizer = VQTokenizer(
        base_channels=8,
        encoder_multipliers=[1, 1, 2],
        decoder_multipliers=[1, 1, 2],
        num_res_blocks=1,
        z_channels=8,
        codebook_size=CODES,
        codebook_dim=4,
        encoder_attention=False,
        decoder_attention=False,
        mid_attention=False,
        norm_groups=4,
        patch_size=2,
    ).eval()
    model = AutoregressiveModel(
        vocab_size=len(words) + CODES,
        transformer={
            "dim": 32,
            "num_layers": 2,
            "num_heads": 2,
            "mlp_hidden": 48,
            "qk_norm": "rms",
            "rotary_axes": [4, 6, 6],
            "learned_positions": SLOTS + 1 + GRID[0] * GRID[1] + ANSWERS,
        },
        grid=GRID,
        text_slots=SLOTS,
        answer_slots=ANSWERS,
        bidirectional_prompt=True,
        bidirectional_image=True,
    ).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    pipe = UnifiedTextToImagePipeline(
        tokenizer=tokenizer,
        transformer=model,
        decoding=NextTokenDecoding(),
        vocabulary=words,
        generation_config={"guidance_scale": 2.0, **settings},
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
