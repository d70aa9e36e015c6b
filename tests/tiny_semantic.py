"""Tiny random SEED and LaVIT for tests: real components, images of 8 pixels, words of a few letters; their files in the authors'
layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel

from armm.convert import llama
from armm.decoding.interleaved import InterleavedDecoding
from armm.decoding.vocabulary import ImageBlock
from armm.model import AutoregressiveModel
from armm.multimodal_model import MultimodalModel
from pipelines.bpe import BPETokenizer
from pipelines.lavit import LaVITPipeline
from pipelines.seed_llama import SEEDLLaMAPipeline
from tokenizers_visual import LaVITDecoder, LaVITTokenizer, SEEDTokenizer

CODES, DIM, SIZE = 12, 24, 8
WORDS = [
    "<unk>",
    "<s>",
    "</s>",
    "USER:",
    "ASSISTANT:",
    "[INST]",
    "[/INST]",
    *"abcdefgh",
    "what",
    "is",
    "this?",
    "red",
    "bus",
]
TRUNK = {
    "dim": DIM, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4, "mlp_hidden": 40, "rotary_axes": [6],
    "rotary_layout": "half_split", "norm_eps": 1e-6,
}  # fmt: skip


def randomised(module: Any, seed: int, std: float = 0.3) -> Any:
    """`module` in evaluation mode with weights so large that outputs depend on everything."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator) * std + (1.0 if parameter.dim() == 1 else 0.0)
            )
    return module.eval()


def seed_tokenizer(seed: int = 1, **options: Any) -> SEEDTokenizer:
    arguments: dict[str, Any] = {
        "image_size": SIZE, "patch_size": 4, "vision_dim": 16, "vision_layers": 1, "vision_heads": 2, "vision_mlp_hidden": 20,
        "dim": 12, "num_layers": 2, "num_heads": 2, "mlp_hidden": 16, "num_tokens": 5, "codebook_size": CODES, "codebook_dim": 4,
        "decoder_layers": 1, "decoder_heads": 2, "reduction": (6, 3), "reverse_layers": 1, "reverse_heads": 2,
        "embedding_dim": 8,
    }  # fmt: skip
    return randomised(SEEDTokenizer(**{**arguments, **options}), seed)


def lavit_tokenizer(seed: int = 2, std: float = 0.3, **options: Any) -> LaVITTokenizer:
    arguments: dict[str, Any] = {
        "image_size": SIZE, "patch_size": 2, "dim": 16, "vision_layers": 1, "vision_heads": 2, "vision_mlp_hidden": 20,
        "num_layers": 2, "num_heads": 2, "mlp_hidden": 20, "codebook_size": CODES, "codebook_dim": 4, "reading_dim": DIM,
    }  # fmt: skip
    return randomised(LaVITTokenizer(**{**arguments, **options}), seed, std)


def lavit_decoder(seed: int = 3, std: float = 0.3, **options: Any) -> LaVITDecoder:
    arguments: dict[str, Any] = {
        "code_dim": 4, "dim": 12, "num_layers": 2, "num_heads": 2, "mlp_hidden": 16, "num_queries": 16, "feature_dim": 8,
        "embed_dims": (8,),
    }  # fmt: skip
    return randomised(LaVITDecoder(**{**arguments, **options}), seed, std)


def words(extra: list[str]) -> BPETokenizer:
    listed = [*WORDS, *extra]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(listed)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in ("<s>", "</s>", *extra)])
    return BPETokenizer.from_string(tokenizer.to_str())


def seed_words() -> BPETokenizer:
    return words([*(f"<img_{code:05d}>" for code in range(CODES)), "<img>", "</img>"])


def seed_language_model() -> AutoregressiveModel:
    return randomised(AutoregressiveModel(vocab_size=len(seed_words()), transformer=TRUNK, max_positions=200), 5)


def seed_pipeline(**options: Any) -> SEEDLLaMAPipeline:
    first = len(WORDS)
    block = ImageBlock(begin=first + CODES, end=first + CODES + 1, codes=((first, CODES),), grid=(1, 5))
    parts: dict[str, Any] = {
        "tokenizer": seed_tokenizer(), "transformer": seed_language_model(), "decoding": InterleavedDecoding(),
        "text_tokenizer": seed_words(), "image_block": block.to_dict(),
    }  # fmt: skip
    pipe = SEEDLLaMAPipeline(**{**parts, **options})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def lavit_language_model() -> MultimodalModel:
    return randomised(
        MultimodalModel(
            text_vocab_size=len(WORDS) + 2 + CODES,
            transformer=TRUNK,
            features={"dim": DIM, "depth": 0},
            max_positions=128,
        ),
        6,
    )


def lavit_pipeline(**options: Any) -> LaVITPipeline:
    parts: dict[str, Any] = {
        "tokenizer": lavit_tokenizer(), "transformer": lavit_language_model(), "decoder": lavit_decoder(),
        "text_tokenizer": words([]), "generation_config": {"min_image_tokens": 2, "max_image_tokens": 6, "max_new_tokens": 6},
    }  # fmt: skip
    pipe = LaVITPipeline(**{**parts, **options})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def write_language_model(folder: Path, model: Any, text_tokenizer: BPETokenizer) -> None:
    """A folder of transformers."""
    folder.mkdir(parents=True)
    state = {}
    for name, tensor in model.state_dict().items():
        state[next(found for rule in llama.RULES if (found := rule.source_of(name)))] = tensor.clone().contiguous()
    save_file(state, folder / "model.safetensors")
    published = {"num_attention_heads": 4, "rms_norm_eps": 1e-6, "max_position_embeddings": model.max_positions}
    (folder / "config.json").write_text(json.dumps(published))
    (folder / "tokenizer.json").write_text(text_tokenizer.tokenizer.to_str())
