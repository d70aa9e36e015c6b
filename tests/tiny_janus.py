"""A tiny random Janus for tests: real components, words of a few letters."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from armm.decoding.next_token import NextTokenDecoding
from armm.multimodal_model import MultimodalModel
from pipelines.janus import JanusPipeline
from pipelines.janus_reading import SPECIAL_TOKENS
from tokenizers_visual import VisionEncoder, VQTokenizer

WORDS = [*"abcdefghij", "User:", "Assistant:", "what", "is", "this?", "red", "bus", "a:"]
CODES = 24


def text_tokenizer() -> Any:
    names = [*SPECIAL_TOKENS.values(), "<unk>", *WORDS]
    ids = {word: number for number, word in enumerate(names)}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    bos = SPECIAL_TOKENS["bos"]
    tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, ids[bos])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=SPECIAL_TOKENS["eos"],
        pad_token=SPECIAL_TOKENS["pad"],
        unk_token="<unk>",
        additional_special_tokens=[SPECIAL_TOKENS[name] for name in ("image", "begin_image", "end_image")],
    )


def language_model(words: int = 30, layers: int = 3, seed: int = 3, codes: bool = True) -> MultimodalModel:
    torch.manual_seed(seed)
    model = MultimodalModel(
        text_vocab_size=words,
        transformer={
            "dim": 24, "num_layers": layers, "num_heads": 4, "num_kv_heads": 2, "mlp_hidden": 40, "rotary_axes": [6],
            "rotary_layout": "half_split", "norm_eps": 1e-6,
        },
        codes={"size": CODES, "dim": 6} if codes else None,
        features={"dim": 16},
        grid=(3, 4),
        max_positions=256,
    ).eval()  # fmt: skip
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    return model


def janus_pipeline(**settings: Any) -> JanusPipeline:
    """Draws 12 x 16 pixels in 12 codes, reads 16 x 16 pixels in 16 tokens."""
    tokenizer = text_tokenizer()
    model = language_model(len(tokenizer.get_vocab()))
    pipe = JanusPipeline(
        tokenizer=VQTokenizer(
            base_channels=8, encoder_multipliers=[1, 1, 1], decoder_multipliers=[1, 1, 1], num_res_blocks=1, z_channels=8,
            codebook_size=CODES, codebook_dim=4, norm_groups=4,
        ).eval(),
        transformer=model,
        image_encoder=VisionEncoder(image_size=16, patch_size=4, dim=16, num_layers=2, num_heads=2, min_size=2).eval(),
        decoding=NextTokenDecoding(),
        text_tokenizer=tokenizer,
        generation_config={"max_new_tokens": 8},
        **settings,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe
