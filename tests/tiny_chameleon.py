"""A tiny model of the Chameleon family for tests: sixteen codes, a few words, 2 x 2 pixels a code; its files in the authors' layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel

from armm.convert.keymap import Rule
from armm.decoding.interleaved import InterleavedDecoding
from armm.decoding.vocabulary import ImageBlock
from armm.model import AutoregressiveModel
from pipelines.bpe import BPETokenizer
from tokenizers_visual import VQTokenizer

NUM_CODES = 16
WORDS = "a red green fox what is this image of 8x8 8x16 an generate describe the in detail".split()


def names() -> dict[str, int]:
    """The vocabulary: the special names in the order of the released one."""
    letters = ["".join("ABCDEFGHIJ"[int(digit)] for digit in str(code)) for code in range(NUM_CODES)]
    listed = ["<s>", "<pad>", "</s>", "<unk>", *(f"IMGIMG{name}Z" for name in letters), "<eoss>", "<racm3:break>"]
    listed += ["<reserved08706>", "<image>", *(f"<reserved{8799 + number:05d}>" for number in range(10)), ".", *WORDS]
    return {name: index for index, name in enumerate(listed)}


VOCABULARY = names()


def words() -> BPETokenizer:
    tokenizer = Tokenizer(WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return BPETokenizer.from_string(tokenizer.to_str())


def sized_block(cells: int = 2) -> ImageBlock:
    line = VOCABULARY["<reserved08799>"]
    return ImageBlock(
        begin=VOCABULARY["<racm3:break>"], end=VOCABULARY["<eoss>"], codes=((4, NUM_CODES),), end_of_line=line, size=line + 1,
        max_size=8, cells=cells,
    )  # fmt: skip


def fixed_block(grid: tuple[int, int] = (3, 3)) -> ImageBlock:
    return ImageBlock(begin=VOCABULARY["<racm3:break>"], end=VOCABULARY["<eoss>"], codes=((4, NUM_CODES),), grid=grid)


def model(**transformer: Any) -> AutoregressiveModel:
    """Two layers, with weights large enough that the tokens depend on everything."""
    torch.manual_seed(3)
    trunk = {
        "dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "mlp_hidden": 40, "qk_norm": "head_layer",
        "qk_norm_eps": 1e-5, "rotary_axes": [8],
    }  # fmt: skip
    made = AutoregressiveModel(
        vocab_size=len(VOCABULARY), transformer={**trunk, **transformer}, max_positions=400
    ).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def tokenizer(**options: Any) -> VQTokenizer:
    torch.manual_seed(4)
    arguments = {
        "base_channels": 8, "encoder_multipliers": [1, 1], "decoder_multipliers": [1, 1], "num_res_blocks": 1, "z_channels": 8,
        "codebook_size": NUM_CODES, "codebook_dim": 4, "l2_normalize": False, "encoder_attention": False,
        "decoder_attention": False, "norm_groups": 4,
    }  # fmt: skip
    return VQTokenizer(**{**arguments, **options}).eval()


def pipeline(cls: type, block: ImageBlock, **generation_config: Any) -> Any:
    pipe = cls(
        tokenizer=tokenizer(),
        transformer=model(),
        decoding=InterleavedDecoding(),
        text_tokenizer=words(),
        image_block=block.to_dict(),
        generation_config=generation_config,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ---------------------------------------------------------------------- the authors' layouts


def authors_state(module: torch.nn.Module, rules: tuple[Rule, ...]) -> dict[str, torch.Tensor]:
    """The tensors of a module under the authors' names."""
    state = {}
    for name, tensor in module.state_dict().items():
        source = next(found for rule in rules if len(rule.targets) == 1 and (found := rule.source_of(name)))
        state[source] = tensor.clone().contiguous()
    return state


def write_hf(folder: Path, made: AutoregressiveModel, shards: int = 1, **config: Any) -> None:
    """A folder of transformers, in one file or several."""
    from armm.convert.chameleon import HF_RULES

    folder.mkdir(parents=True, exist_ok=True)
    state = authors_state(made, HF_RULES)
    published = {
        "vocabulary_map": VOCABULARY,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "vocab_size": len(VOCABULARY),
    }
    (folder / "config.json").write_text(json.dumps({**published, **config}))
    (folder / "tokenizer.json").write_text(words().tokenizer.to_str())
    if shards == 1:
        save_file(state, folder / "model.safetensors")
        return
    weight_map = {
        name: f"model-{1 + number % shards:05d}-of-{shards:05d}.safetensors" for number, name in enumerate(state)
    }
    for file in set(weight_map.values()):
        save_file({name: tensor for name, tensor in state.items() if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
