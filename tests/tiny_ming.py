"""A tiny random Ming-UniVision for tests: real components, words of a few letters."""

from __future__ import annotations

import json
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from armm.decoding.next_latent import NextLatentDecoding
from armm.multimodal_model import MultimodalModel
from pipelines.bpe import BPETokenizer
from pipelines.ming_prompts import SPECIAL_TOKENS
from pipelines.ming_univision import MingUniVisionPipeline
from tokenizers_visual import MingTokTokenizer

WORDS = [*"abcdefghij", "HUMAN", "ASSISTANT", "what", "is", "this?", "red", "bus"]


def text_tokenizer() -> BPETokenizer:
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(["<unk>", *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    words.add_special_tokens([*SPECIAL_TOKENS.values(), "<role>", "</role>"])
    return BPETokenizer.from_string(json.dumps(json.loads(words.to_str())))


def language_model(words: int, latents: bool = True) -> MultimodalModel:
    torch.manual_seed(3)
    model = MultimodalModel(
        text_vocab_size=words,
        transformer={
            "dim": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "rotary_axes": [8],
            "rotary_layout": "half_split", "experts": {"count": 3, "active": 2, "hidden": 12, "shared": 8, "routers": 2},
        },
        features={"dim": 16},
        latents={"channels": 4, "dim": 12, "head": {"width": 12, "depth": 1, "mlp": "swiglu", "mlp_hidden": 16}} if latents else None,
        image_route=1,
        grid=(2, 2),
        max_positions=256,
    ).eval()  # fmt: skip
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    return model


def image_tokenizer(**changes: Any) -> MingTokTokenizer:
    torch.manual_seed(4)
    sizes = {
        "image_size": 8, "patch_size": 4, "latent_channels": 4, "encoder_dim": 16, "encoder_layers": 1, "encoder_heads": 2,
        "encoder_mlp_hidden": 16, "semantic_dim": 16, "semantic_layers": 1, "semantic_heads": 2, "semantic_mlp_hidden": 16, "pixel_dim": 8,
        "pixel_layers": 1, "pixel_heads": 1, "pixel_mlp_hidden": 16, "pixel_patch_size": 2, "scaling_factor": 1.5, "shift": 0.3,
    }  # fmt: skip
    model = MingTokTokenizer(**{**sizes, **changes}).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def ming_pipeline(**settings: Any) -> MingUniVisionPipeline:
    """Draws 8 x 8 pixels in 4 tokens, reads 16 x 16 pixels in 16 tokens."""
    words = text_tokenizer()
    pipe = MingUniVisionPipeline(
        tokenizer=image_tokenizer(),
        transformer=language_model(len(words)),
        decoding=NextLatentDecoding(),
        text_tokenizer=words,
        generation_config={"max_new_tokens": 6, "num_inference_steps": 3},
        **settings,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
