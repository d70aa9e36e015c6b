"""Tiny random LlamaGen pipelines for tests: real components, a fraction of a second a picture."""

from __future__ import annotations

from typing import Any

import torch

from armm.decoding.next_token import NextTokenDecoding
from armm.model import AutoregressiveModel
from pipelines.llamagen import LlamaGenPipeline
from tokenizers_visual import VQTokenizer

WORDS = "a red green blue sphere cube on the left of large small".split()


def tiny_tokenizer(codebook_size: int = 48) -> VQTokenizer:
    """Four pixels a token."""
    torch.manual_seed(1)
    return VQTokenizer(
        base_channels=8,
        encoder_multipliers=[1, 1, 1],
        decoder_multipliers=[1, 1, 1],
        num_res_blocks=1,
        z_channels=8,
        codebook_size=codebook_size,
        codebook_dim=4,
        norm_groups=4,
    ).eval()


def tiny_transformer(condition: dict[str, Any]) -> AutoregressiveModel:
    """Two layers on a grid of 4 x 4, with weights large enough that the tokens depend on everything."""
    torch.manual_seed(2)
    trunk = {"dim": 32, "num_layers": 2, "num_heads": 2, "mlp_hidden": 48, "rotary_axes": [8, 8]}
    model = AutoregressiveModel(vocab_size=48, transformer=trunk, condition=condition, grid=(4, 4)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def class_pipeline(**settings: Any) -> LlamaGenPipeline:
    """Ten classes."""
    pipe = LlamaGenPipeline(
        tokenizer=tiny_tokenizer(),
        transformer=tiny_transformer({"type": "class", "num_classes": 10}),
        decoding=NextTokenDecoding(),
        generation_config={"guidance_scale": 2.0, **settings},
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def text_encoder() -> dict[str, Any]:
    """A random T5 encoder of width 24 with a word tokenizer, as components."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    torch.manual_seed(3)
    config = T5Config(
        vocab_size=len(vocabulary),
        d_model=24,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return {
        "text_encoder": T5EncoderModel(config).eval(),
        "text_tokenizer": PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=8
        ),
    }


def text_pipeline(**components: Any) -> LlamaGenPipeline:
    """Eight caption slots of width 24; with `text_encoder(...)` as components it takes prompts."""
    pipe = LlamaGenPipeline(
        tokenizer=tiny_tokenizer(),
        transformer=tiny_transformer({"type": "caption", "in_dim": 24, "num_tokens": 8}),
        decoding=NextTokenDecoding(),
        generation_config={"guidance_scale": 3.0},
        **components,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
