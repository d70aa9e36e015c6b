"""Chameleon's blocks, converters of its layouts, and its pipelines on tiny random models."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import PIL.Image
import pytest
import tiny_chameleon as tiny
import torch
import torch.nn.functional as F

import armm
from armm.convert import CheckpointError, CheckpointKeysError, convert
from armm.convert.chameleon import META_RULES
from armm.convert.chameleon_tokenizer import convert_tokenizer, tokenizer_rules
from armm.convert.chameleon_vocabulary import code_of, code_runs, image_block
from armm.decoding.next_token import NextTokenDecoding
from armm.model import AutoregressiveModel
from armm.nn.block import Block, BlockConfig
from armm.nn.norms import HeadLayerNorm
from pipelines.chameleon import ChameleonPipeline
from pipelines.conversation import conversation, encode_text
from pipelines.crops import best_crop, crop_sizes, crop_to, on_white
from pipelines.interleaved import IMAGE
from pipelines.lumina_mgpt import LuminaMGPTPipeline
from pipelines.pure import PUREPipeline

FOX = tiny.VOCABULARY["fox"]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def picture(width: int = 12, height: int = 10) -> PIL.Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(values)


# ---------------------------------------------------------------------- blocks


def test_head_layer_norm_is_a_layer_norm_for_each_head():
    norm = HeadLayerNorm(3, 8)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(2, 5, 3, 8)
    expected = torch.stack(
        [F.layer_norm(x[:, :, h], (8,), norm.weight[h], norm.bias[h], 1e-5) for h in range(3)], dim=2
    )
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("placement", ["input", "output"])
@pytest.mark.parametrize("layout", ["interleaved", "half_split"])
def test_blocks_cached_and_fused_equal_the_plain_ones(placement, layout):
    made = tiny.model(norm_placement=placement, rotary_layout=layout)
    ids = torch.randint(0, made.vocab_size, (2, 9))
    plain = made(ids)
    cache = made.trunk.allocate_cache(2, 9)
    states = [
        made.trunk(made.embed(ids[:, i : i + 1]), positions=made.positions_for(torch.tensor([i])), cache=cache)
        for i in range(9)
    ]
    torch.testing.assert_close(made.logits(torch.cat(states, dim=1)), plain, atol=1e-4, rtol=0)
    made.fuse_projections()
    torch.testing.assert_close(made(ids), plain, atol=1e-4, rtol=0)
    block = made.trunk.blocks[0]
    if placement == "output":
        block.unfuse()
        x = torch.randn(1, 4, 32)
        h = x + block.attention_norm(block.attention(x, None, None, True, None, 0, 0, None))
        torch.testing.assert_close(block(x, causal=True), h + block.mlp_norm(block.mlp(h)))


def test_bad_blocks_are_refused():
    sizes = {"dim": 8, "num_heads": 1, "num_kv_heads": 1, "head_dim": 8, "mlp": "swiglu", "mlp_hidden": 8}
    with pytest.raises(ValueError, match="norm_placement must be"):
        Block(BlockConfig(**sizes, norm_placement="post"))
    with pytest.raises(ValueError, match="has no modulation"):
        Block(BlockConfig(**sizes, norm_placement="output", modulation="block"))
    with pytest.raises(ValueError, match="max_positions is for models without"):
        AutoregressiveModel(max_positions=8, condition={"type": "class", "num_classes": 3})


# ---------------------------------------------------------------------- converters


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("swin", [True, False])
def test_metas_parts_are_put_together(tmp_path, shards, swin):
    made = tiny.model(norm_placement="output" if swin else "input")
    for block in made.trunk.blocks:  # one norm for each part, shared by its heads
        for norm in (block.attention.query_norm, block.attention.key_norm):
            rows = len(norm.weight) // shards
            for tensor in (norm.weight, norm.bias):
                tensor.copy_(tensor[::rows].repeat_interleave(rows, 0))
    state = tiny.authors_state(made, META_RULES)
    for part in range(shards):
        own: dict[str, torch.Tensor] = {"rope.freqs": torch.zeros(4)}
        for name, tensor in state.items():
            if "_normalization" in name:
                own[name] = tensor[part * (len(tensor) // shards)].clone()
            elif name.endswith(("attention_norm.weight", "ffn_norm.weight")) or name == "norm.weight":
                own[name] = tensor + (part - (shards - 1) / 2)  # their mean counts
            else:
                columns = name.endswith(("wo.weight", "w2.weight")) or name == "tok_embeddings.weight"
                own[name] = tensor.chunk(shards, dim=int(columns))[part].clone()
        torch.save(own, tmp_path / ("consolidated.pth" if shards == 1 else f"consolidated.{part:02d}.pth"))
    params = {"model": {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "swin_norm": swin, "norm_eps": 1e-5}}
    (tmp_path / "params.json").write_text(json.dumps(params))
    ids = torch.randint(0, made.vocab_size, (2, 7))
    path = tmp_path if shards == 1 else tmp_path / "consolidated.01.pth"
    torch.testing.assert_close(convert("chameleon", path)(ids), made(ids), atol=1e-5, rtol=0)
    if shards == 2:
        (tmp_path / "consolidate_params.json").write_text('{"model_parallel_size": 4}')
        with pytest.raises(CheckpointError, match="another number of parts"):
            convert("chameleon", tmp_path)
        (tmp_path / "consolidate_params.json").unlink()
        (tmp_path / "params.json").unlink()
        with pytest.raises(CheckpointError, match=r"lacks params\.json"):
            convert("chameleon", tmp_path)


def test_folders_of_transformers(tmp_path):
    made = tiny.model(rotary_layout="half_split")
    tiny.write_hf(tmp_path / "whole", made)
    tiny.write_hf(tmp_path / "parts", made, shards=3)
    ids = torch.randint(0, made.vocab_size, (1, 7))
    for folder in ("whole", "parts"):
        assert torch.equal(convert("chameleon", tmp_path / folder)(ids), made(ids))
    (tmp_path / "parts" / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="lacks the shards"):
        convert("chameleon", tmp_path / "parts")
    (tmp_path / "whole" / "config.json").write_text(json.dumps({"num_attention_heads": 8}))
    with pytest.raises(CheckpointError, match="num_heads"):
        convert("chameleon", tmp_path / "whole")
    (tmp_path / "whole" / "config.json").write_text(json.dumps({"rope_scaling": {"type": "linear", "factor": 2}}))
    with pytest.raises(CheckpointError, match="scaled rotary"):
        convert("chameleon", tmp_path / "whole")
    (tmp_path / "none").mkdir()
    with pytest.raises(CheckpointError, match=r"neither config\.json"):
        convert("chameleon", tmp_path / "none")


def test_a_missing_tokenizer_is_said(tmp_path):
    tiny.write_hf(tmp_path, tiny.model(rotary_layout="half_split"))
    with pytest.raises(CheckpointKeysError, match=r"give Meta's vqgan\.ckpt"):
        LuminaMGPTPipeline.from_single_file(tmp_path)


def test_a_tokenizer_beside_its_trainers_loss():
    made = tiny.tokenizer(base_channels=32, norm_groups=32)  # the family's groups
    state = tiny.authors_state(made, tokenizer_rules(2))
    read = convert_tokenizer({**state, "loss.discriminator.main.0.weight": torch.zeros(1)})
    pixels = torch.randn(1, 3, 4, 4)
    assert torch.equal(read(pixels)[0], made(pixels)[0])
    encoder = {f"model.vqmodel.{name}": tensor for name, tensor in state.items() if not name.startswith("decoder.")}
    assert convert_tokenizer(encoder).decoder is None
    with pytest.raises(CheckpointKeysError, match="unknown"):
        convert_tokenizer({**state, "head.weight": torch.zeros(1)})


def test_a_pipeline_from_the_authors_files(tmp_path):
    made = tiny.model(rotary_layout="half_split")
    tiny.write_hf(tmp_path, made)
    pipe = LuminaMGPTPipeline.from_single_file(
        tmp_path, tokenizer=tiny.tokenizer(), generation_config={"image_size": 8}
    )
    assert pipe.block == tiny.sized_block() or pipe.block.max_size == 8
    assert pipe.text_tokenizer.vocabulary == tiny.VOCABULARY
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red fox", height=8, width=4, output_type="latent").images.shape == (1, 8)


def test_names_of_codes():
    assert code_of("IMGIMGBAZ") == 10 and code_of("IMGIMGKZ") is None and code_of("fox") is None
    assert code_runs({"IMGIMGAZ": 7, "IMGIMGBZ": 8, "IMGIMGCZ": 30}) == [(7, 2), (30, 1)]
    with pytest.raises(CheckpointError, match=r"lacks the image codes \[1\]"):
        code_runs({"IMGIMGAZ": 7, "IMGIMGCZ": 30})
    with pytest.raises(CheckpointError, match="do not belong together"):
        image_block(tiny.VOCABULARY, vocab_size=100, num_codes=8192)
    with pytest.raises(CheckpointError, match="frame an image"):
        image_block({"fox": 3}, vocab_size=100)


# ---------------------------------------------------------------------- pictures and conversations


def test_crops():
    sizes = crop_sizes(16, 4)
    assert all(width * height <= 16 * 16 and max(width, height) <= 4 * min(width, height) for width, height in sizes)
    assert best_crop((100, 100), sizes) == (16, 16) and best_crop((400, 100), sizes) == (32, 8)
    assert crop_to(picture(50, 13), (32, 8)).size == (32, 8)
    drawn = [crop_to(picture(50, 17), (32, 8), torch.Generator().manual_seed(seed)).tobytes() for seed in range(6)]
    assert len(set(drawn)) > 1
    clear = PIL.Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    assert on_white(clear).getpixel((0, 0)) == (255, 255, 255)


def test_texts_with_images_in_them():
    words = tiny.words()
    fox, red = FOX, tiny.VOCABULARY["red"]
    assert encode_text(words, f"red {IMAGE} fox", [[1, 2]]) == [red, 1, 2, fox]
    assert encode_text(words, "red fox", [[1, 2]]) == [1, 2, red, fox]
    with pytest.raises(ValueError, match="mentions 1 images"):
        encode_text(words, IMAGE)
    image = picture()
    assert conversation(["hi", [image, "what"], {"content": [{"type": "text", "text": f"a {IMAGE}"}, image]}]) == [
        ("hi", []), (f"{IMAGE}what", [image]), (f"a {IMAGE}", [image])
    ]  # fmt: skip
    for bad in ("hi", [], image):
        with pytest.raises(TypeError, match="conversation"):
            conversation(bad)
    with pytest.raises(ValueError, match="part of a turn"):
        conversation([[{"type": "video"}]])


# ---------------------------------------------------------------------- pipelines


def chameleon() -> ChameleonPipeline:
    return tiny.pipeline(ChameleonPipeline, tiny.fixed_block(), max_new_tokens=40)


def lumina(**settings: Any) -> LuminaMGPTPipeline:
    return tiny.pipeline(LuminaMGPTPipeline, tiny.sized_block(), image_size=8, max_new_tokens=40, **settings)


def seeds(count: int, first: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + number) for number in range(count)]


def test_lumina_draws_images_of_any_shape():
    pipe = lumina()
    output = pipe(["a red fox", "a fox"], height=16, width=8, generator=seeds(2), output_type="pt", output_codes=True)
    assert output.images.shape == (2, 3, 16, 8) and output.codes.grid == (1, 8, 4)
    alone = pipe("a fox", height=16, width=8, generator=seeds(1, 1), output_type="latent").images
    assert torch.equal(alone[0], output.codes.ids[1])
    assert pipe("a fox", num_images_per_prompt=2, generator=torch.Generator().manual_seed(0)).images[1].size == (8, 8)
    ids = pipe.encode_prompt("a fox", 16, 8)
    by_ids = pipe(prompt_ids=[ids], height=16, width=8, generator=seeds(1, 1), output_type="latent").images
    assert torch.equal(by_ids, alone)
    greedy = [pipe("a fox", temperature=0, output_type="latent").images for _ in range(2)]
    assert torch.equal(*greedy)


def test_a_saved_pipeline_gives_the_same(tmp_path):
    pipe = lumina()
    pipe.save_pretrained(tmp_path / "pipe")
    again = armm.ARPipeline.from_pretrained(tmp_path / "pipe")
    assert type(again) is LuminaMGPTPipeline and again.block == pipe.block
    again.set_progress_bar_config(disable=True)
    assert again.generation_config["image_size"] == 8
    arguments = {"generator": torch.Generator().manual_seed(3), "output_type": "latent"}
    first = pipe("a red fox", **arguments).images
    arguments["generator"].manual_seed(3)
    assert torch.equal(again("a red fox", **arguments).images, first)


def test_chameleon_draws_with_three_way_guidance():
    pipe = chameleon()
    codes = pipe("a red fox", generator=seeds(1), output_type="latent").images
    assert codes.shape == (1, 9) and int(codes.max()) < tiny.NUM_CODES
    off = pipe(
        "a red fox", guidance_scale=1.0, image_guidance_scale=1.0, generator=seeds(1), output_type="latent"
    ).images
    assert not torch.equal(off, codes)
    assert pipe("a red fox", height=6, width=6).images[0].size == (6, 6)


@pytest.mark.parametrize("make", [chameleon, lumina])
def test_images_are_described(make):
    pipe = make()
    image = picture()
    texts = pipe.describe([image, image], ["what is this", "describe"], max_new_tokens=6, generator=seeds(2)).texts
    assert len(texts) == 2 and all(isinstance(text, str) for text in texts)
    assert pipe.describe(image, "describe", max_new_tokens=6, generator=seeds(1, 1)).texts == texts[1:]
    cautious = pipe.describe(image, max_new_tokens=6, cautious=True, generator=torch.Generator().manual_seed(1)).texts
    assert len(cautious) == 1
    array, tensor = np.array(image), torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert pipe.encode_image(array) == pipe.encode_image(tensor) == pipe.encode_image(image)


def say(pipe: Any, tokens: list[int]) -> Any:
    """A callback that puts these tokens in place of the first ones drawn."""

    def replace(pipe, step, timestep, tensors):
        ids = tensors["latents"].clone()
        if step < len(tokens):
            ids[:, step] = tokens[step]
        return {"latents": ids}

    return replace


def test_conversations_hold_text_and_images():
    pipe = lumina()
    answer = [FOX, *pipe.block.opening((4, 4)), *[0] * 21]
    answer[4:] = []
    turns = [["what is this", picture()], "a fox", ["generate an image of this"]]
    output = pipe.converse(turns, generator=seeds(1), callback_on_step_end=say(pipe, answer))
    assert output.contents[0][0] == "fox" and output.contents[0][1].size == (8, 8)
    assert output.images[0][0].size == (8, 8) and output.texts[0].startswith("fox")
    assert len(pipe.converse(["a fox"], num_answers=2, max_new_tokens=5).contents) == 2


def test_pure_says_and_restores():
    pipe = tiny.pipeline(PUREPipeline, tiny.sized_block(4), image_size=16, max_new_tokens=90)
    answer = [FOX, *pipe.block.opening((8, 8))]
    callback = say(pipe, answer)
    output = pipe(picture(7, 9), generator=seeds(1), callback_on_step_end=callback)
    assert output.texts[0].startswith("fox") and output.images[0].size == (16, 16)
    codes = pipe(picture(7, 9), generator=seeds(1), callback_on_step_end=callback, output_type="latent").images
    assert codes.shape == (1, 64)
    plain = pipe(
        picture(7, 9), generator=seeds(1), callback_on_step_end=callback, output_type="pt", color_fix="none"
    ).images
    fixed = pipe(
        picture(7, 9), generator=seeds(1), callback_on_step_end=callback, output_type="pt", color_fix="adain"
    ).images
    assert plain.shape == fixed.shape == (1, 3, 16, 16) and not torch.equal(plain, fixed)
    with pytest.raises(RuntimeError, match="without a whole picture"):
        pipe(picture(), max_new_tokens=3)
    with pytest.raises(ValueError, match="`color_fix` must be one of"):
        pipe(picture(), color_fix="sepia")


def test_a_callback_can_end_a_call():
    pipe = lumina()

    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = step == 2
        return {}

    codes = pipe("a fox", callback_on_step_end=stop, output_type="latent").images
    assert codes.shape == (1, 16) and codes[0, 4:].eq(0).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "either `prompt` or `prompt_ids`"),
        ({"prompt": ["a", 3]}, TypeError, "non-empty list of strings"),
        ({"prompt_ids": [[]]}, TypeError, "prompt_ids"),
        ({"prompt": "a fox", "height": 10}, ValueError, "multiple of 4"),
        ({"prompt": "a fox", "width": 64}, ValueError, "between 4 and 32"),
        ({"prompt": "a fox", "image_top_k": -1}, ValueError, "image_top_k"),
        ({"prompt": "a fox", "temperature": "hot"}, TypeError, "temperature"),
        ({"prompt": "a fox", "output_type": "jpg"}, ValueError, "output_type"),
        ({"prompt": "a fox", "num_images_per_prompt": 0}, ValueError, "num_images_per_prompt"),
        ({"prompt": "a fox", "generator": [torch.Generator()] * 2}, ValueError, "2 generators"),
        ({"prompt_ids": [[0] * 400]}, ValueError, "too long"),
    ],
)
def test_bad_requests_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        lumina()(**arguments)


def test_components_must_belong_together():
    parts = {"tokenizer": tiny.tokenizer(), "transformer": tiny.model(), "decoding": armm.InterleavedDecoding()}
    with pytest.raises(ValueError, match="`image_block` must say"):
        LuminaMGPTPipeline(**parts)
    wrong = {**tiny.sized_block().to_dict(), "codes": [[4, 8]]}
    with pytest.raises(ValueError, match="ids for 8 codes"):
        LuminaMGPTPipeline(**parts, image_block=wrong)
    flat = AutoregressiveModel(vocab_size=100, transformer={"dim": 8, "num_heads": 1, "num_layers": 1})
    with pytest.raises(ValueError, match="max_positions"):
        LuminaMGPTPipeline(tiny.tokenizer(), flat, NextTokenDecoding(), image_block=tiny.sized_block().to_dict())
    pipe = LuminaMGPTPipeline(**parts, image_block=tiny.sized_block().to_dict())
    with pytest.raises(ValueError, match="no text tokenizer"):
        pipe("a fox", height=8, width=8)
    with pytest.raises(ValueError, match="must be 6"):
        chameleon()("a fox", height=8)
    with pytest.raises(ValueError, match="no settings"):
        lumina().describe(picture(), text_top_p=0.5)
    with pytest.raises(TypeError, match="an image must be"):
        lumina().describe("fox.png")
    with pytest.raises(ValueError, match="does not go with `cautious`"):
        lumina().describe(picture(), cautious=True, callback_on_step_end=lambda *_: {})


def test_a_tokenizer_without_decoder_reads_only():
    reader = tiny.tokenizer(with_decoder=False)
    codes = reader.encode(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="no decoder"):
        reader.decode(codes)


def test_the_zoo_has_the_family():
    assert armm.zoo.get("lumina-mgpt-7b-768").repo == "Alpha-VLLM/Lumina-mGPT-7B-768"
    for name in armm.list_models(task="text-and-image"):
        entry = armm.zoo.get(name)
        assert entry.family in ("janus", "lavit", "ming_univision", "seed") or "Chameleon Research License" in entry.licence
    assert armm.zoo.get("pure").tokenizer == "llamagen-vq-ds8-c2i"
