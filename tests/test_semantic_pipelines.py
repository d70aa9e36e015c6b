"""SEED-LLaMA's and LaVIT's pipelines on tiny random models: reading, drawing, painting, files."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import tiny_semantic as tiny
import torch

import armm
from armm.convert import CheckpointError, eva
from armm.convert import lavit_tokenizer as lavit_files
from armm.convert import seed_tokenizer as seed_files
from armm.decoding.beam import BeamSearch
from armm.decoding.guidance import Guidance
from armm.decoding.text import decode_text
from pipelines.conversation import IMAGE
from pipelines.lavit import LaVITPipeline
from pipelines.painting import StableDiffusionPainter, UnCLIPPainter, XLPainter
from pipelines.seed_llama import SEEDLLaMAPipeline
from tokenizers_visual import Codes, ImageCondition


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def seed() -> SEEDLLaMAPipeline:
    return tiny.seed_pipeline()


@pytest.fixture(scope="module")
def lavit() -> LaVITPipeline:
    return tiny.lavit_pipeline()


def picture(seed: int = 0) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (10, 14, 3), dtype=np.uint8))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------- SEED-LLaMA


def test_seed_prompts_are_written_as_in_training(seed):
    names = seed.words().vocabulary
    block = seed.encode_image(picture())
    codes = seed.tokenizer.encode(armm_pixels(seed, picture())).ids[0]
    first = names["<img_00000>"]
    assert block == [names["<img>"], *(first + codes).tolist(), names["</img>"]]
    ids = seed.describe_prompt(block, "what is this?")
    text = [names[word] for word in ("what", "is", "this?", "ASSISTANT:")]
    assert ids == [names["<s>"], names["USER:"], *block, *text]
    other = tiny.seed_pipeline(template="llama2").encode_turns(["a red bus", [picture(), "b"]])
    words = [names[word] for word in ("<s>", "[INST]", "a", "red", "bus", "[/INST]")]
    assert other == [*words, *block, names["b"]]
    with pytest.raises(ValueError, match="mentions 2 images"):
        seed.encode_text(f"{IMAGE}{IMAGE}", [block])


def armm_pixels(pipe: Any, image: PIL.Image.Image) -> torch.Tensor:
    size = pipe.tokenizer.image_size
    array = np.array(image.resize((size, size), PIL.Image.Resampling.BICUBIC), dtype=np.float64)
    return torch.from_numpy(array / 127.5 - 1).float().permute(2, 0, 1)[None]


def test_seed_draws_codes_one_image_like_in_a_batch(seed):
    options = {"output_type": "latent", "output_codes": True}
    made = seed(["a red bus", "what is this?"], generator=[generator(1), generator(2)], **options)
    assert made.codes.ids.shape == (2, 5) and made.codes.grid is None and made.codes.ids.max() < tiny.CODES
    alone = seed("what is this?", generator=[generator(2)], **options)
    assert torch.equal(alone.codes.ids, made.codes.ids[1:])
    greedy = [seed("a red bus", temperature=0.0, output_type="latent").images for _ in range(2)]
    assert torch.equal(*greedy)
    condition = seed.condition(made.codes)
    assert condition.pooled.shape == (2, 8)
    by_ids = seed(prompt_ids=[seed.encode_prompt("a red bus")], temperature=0.0, output_type="latent")
    assert torch.equal(by_ids.images, greedy[0])


def test_seed_describes_and_converses(seed):
    texts = seed.describe([picture(0), picture(1)], "what is this?", max_new_tokens=4, temperature=0.0).texts
    assert texts[1] == seed.describe(picture(1), "what is this?", max_new_tokens=4, temperature=0.0).texts[0]
    asked = seed.ask(picture(1), ["what is this?", "a"], max_new_tokens=4, temperature=0.0).texts
    assert len(asked) == 2 and asked[0] == texts[1]
    answer = seed.converse(["a", "b", [picture(), "what is this?"]], max_new_tokens=16, generator=generator(0))
    assert all(isinstance(part, (str, Codes)) for part in answer.contents[0])
    ids = seed.encode_turns(["a"]) + seed.block.write(torch.arange(5), (1, 5))
    contents = seed.decode_contents(ids)
    assert isinstance(contents[0], str) and torch.equal(contents[1].ids, torch.arange(5)[None])


def test_seed_paints_with_what_it_is_given(seed):
    seen: list[Any] = []

    def painter(condition: ImageCondition, source: Any, output_type: str) -> list[str]:
        seen.append((condition, source, output_type))
        return ["picture"] * len(condition.pooled)

    with pytest.raises(ValueError, match="load_image_decoder"):
        seed("a red bus")
    seed.image_decoder = painter
    try:
        source = generator(3)
        made = seed(["a", "b"], generator=source, output_codes=True)
        assert made.images == ["picture"] * 2 and seen[0][1] is source and seen[0][2] == "pil"
        torch.testing.assert_close(seen[0][0].pooled, seed.tokenizer.condition(made.codes).pooled)
        assert seed.decode_contents(seed.block.write(torch.arange(5), (1, 5))) == ["picture"]
    finally:
        seed.image_decoder = None


def test_seed_parts_must_belong_together():
    with pytest.raises(ValueError, match="grid"):
        tiny.seed_pipeline(tokenizer=tiny.seed_tokenizer(num_tokens=6))
    with pytest.raises(ValueError, match="`template`"):
        tiny.seed_pipeline(template="chatml")


def test_seed_round_trips(seed, tmp_path):
    seed.save_pretrained(tmp_path / "pipe")
    loaded = SEEDLLaMAPipeline.from_pretrained(tmp_path / "pipe")
    loaded.set_progress_bar_config(disable=True)
    options = {"temperature": 0.0, "output_type": "latent"}
    assert torch.equal(loaded("a red bus", **options).images, seed("a red bus", **options).images)


def test_seed_is_read_from_its_authors_files(seed, tmp_path):
    tiny.write_language_model(tmp_path / "llama", seed.transformer, seed.text_tokenizer)
    coder = tmp_path / "coder"
    coder.mkdir()
    state = authors_state(seed.tokenizer, seed_files.RULES, seed_files.VISION)
    vision = {name: state.pop(name) for name in list(state) if name.startswith(seed_files.VISION)}
    torch.save(state, coder / "seed_quantizer.pt")
    names = {name[len(seed_files.VISION) :]: tensor for name, tensor in vision.items()}
    # the file of the vision transformer holds one block more, a norm and a head
    names |= {name.replace("blocks.0.", "blocks.1."): value for name, value in names.items() if "blocks.0." in name}
    torch.save({**names, "norm.weight": torch.ones(16), "head.weight": torch.ones(2, 16)}, coder / "eva_vit_g.pth")
    heads = {"vision_heads": 2, "num_heads": 2, "decoder_heads": 2, "causal": True}
    pipe = SEEDLLaMAPipeline.from_single_file(tmp_path / "llama", tokenizer=coder, config={"tokenizer": heads})
    pipe.set_progress_bar_config(disable=True)
    assert pipe.block.to_dict() == seed.block.to_dict()
    options = {"temperature": 0.0, "output_type": "latent"}
    assert torch.equal(pipe("a red bus", **options).images, seed("a red bus", **options).images)
    assert torch.equal(
        pipe.tokenizer.encode(armm_pixels(seed, picture())).ids, seed.tokenizer.encode(armm_pixels(seed, picture())).ids
    )
    with pytest.raises(ValueError, match="file of its own"):
        SEEDLLaMAPipeline.from_single_file(tmp_path / "llama")


def authors_state(model: Any, rules: Any, vision: str) -> dict[str, torch.Tensor]:
    """The tensors of a model under the authors' names."""
    state, found = model.state_dict(), {}
    for rule in rules:
        for name in state:
            source = rule.source_of(name)
            if source is None or source in found:
                continue
            match = next(m for pattern in rule.target_patterns if (m := pattern.fullmatch(name)))
            found[source] = torch.cat([state[target.format(**match.groupdict())] for target in rule.targets])
    for name in [name for name in found if name.startswith(vision) and name.endswith("attn.qkv.bias")]:
        query, _, value = found.pop(name).chunk(3)
        found |= {name.replace("qkv.bias", "q_bias"): query, name.replace("qkv.bias", "v_bias"): value}
    rows = ("query_tokens", "reverse_tokens", "pos_embed_image", "pos_embed", "query_embed")
    return {name: (value[None] if name in rows else value).clone() for name, value in found.items()}


# ---------------------------------------------------------------------- LaVIT


def test_lavit_reads_as_many_features_as_an_image_needs(lavit):
    readings = lavit.readings([picture(0), picture(1)], ["what is this?", "a"])
    for number, reading in enumerate(readings):
        features, mask = lavit.tokenizer.reading_features(lavit.preprocess(picture(number)))
        (first, last) = reading.images[0]
        assert bool(mask.all()) and last - first == features.shape[1]
        torch.testing.assert_close(reading.condition.embeds[:, first:last], features)
        outside = reading.ids[:first] + reading.ids[last:]
        embeds = torch.cat([reading.condition.embeds[:, :first], reading.condition.embeds[:, last:]], dim=1)
        torch.testing.assert_close(embeds, lavit.transformer.embed(torch.tensor([outside])))
        assert reading.ids[first - 1] == lavit.begin_image and reading.ids[last] == lavit.end_image
    texts = lavit.describe([picture(0), picture(1)], ["what is this?", "a"]).texts
    assert texts[1] == lavit.ask(picture(1), "a").texts[0]
    assert lavit.ask(picture(1), ["what is this?", "a"]).texts[1] == texts[1]
    assert "".join(lavit.stream_chat(picture(1), "a")).strip() == texts[1]
    with pytest.raises(ValueError, match="`generator` holds 2 generators, but the call makes 1"):
        lavit.describe(picture(), generator=[generator(1), generator(2)])
    beams = lavit.describe(picture(), search=BeamSearch(num_beams=2)).texts
    assert len(beams) == 1
    assert lavit.describe(picture(), temperature=1.0, sample_tokens=True, generator=generator(1)).texts == (
        lavit.describe(picture(), temperature=1.0, sample_tokens=True, generator=generator(1)).texts
    )


def test_lavit_draws_codes_of_any_number(lavit):
    options = {"output_type": "latent", "output_codes": True}
    generators = [generator(seed) for seed in range(6)]
    made = lavit(["a red bus", "b"], num_images_per_prompt=3, generator=generators, **options)
    numbers = made.codes.mask.sum(1)
    assert len(numbers) == 6 and numbers.min() >= 2 and numbers.max() <= 6
    assert (
        made.codes.ids.max() < tiny.CODES and made.codes.ids.min() >= 0 and not made.codes.ids[~made.codes.mask].any()
    )
    alone = lavit("b", generator=[generator(4)], **options)
    assert torch.equal(alone.codes.ids[0], made.codes.ids[4, made.codes.mask[4]])
    condition = lavit.condition(made.codes)
    assert condition.embeds.shape == (6, 16, 8)
    steps: list[int] = []
    lavit("a", **options, callback_on_step_end=lambda pipe, step, time, tensors: steps.append(step) or {})
    assert steps == list(range(len(steps))) and 2 <= len(steps) <= 6
    with pytest.raises(ValueError, match="between 1 and 16"):
        lavit("a", max_image_tokens=17, **options)
    with pytest.raises(ValueError, match="give either `prompt`"):
        lavit(**options)


def test_guided_text_is_what_two_runs_without_cache_say(lavit):
    model, scale, low = lavit.transformer, 2.5, lavit.end_image
    conditional = [lavit.start_id, 7, 8, lavit.begin_image]
    null = [lavit.begin_image]
    found = decode_text(
        model,
        lavit.drawing_condition([conditional]),
        null_condition=lavit.drawing_condition([null]),
        guidance=Guidance(scale, formula="log_softmax"),
        stop_id=lavit.end_image,
        max_tokens=6,
        min_tokens=6,
        vocabulary=(low, model.vocab_size),
    ).tokens()[0]
    said: list[int] = []
    for _ in range(6):
        first, second = (
            model(torch.tensor([[*row, *said]]), low=low)[0, -1].log_softmax(-1) for row in (conditional, null)
        )
        mixed = second + scale * (first - second)
        mixed[0] = float("-inf")
        said.append(low + int(mixed.argmax()))
    assert found == said


def test_lavit_parts_must_belong_together(lavit):
    with pytest.raises(ValueError, match="cannot hold"):
        tiny.lavit_pipeline(begin_image=25)
    with pytest.raises(ValueError, match="tokens 24 wide"):
        tiny.lavit_pipeline(tokenizer=tiny.lavit_tokenizer(reading_dim=8))
    with pytest.raises(ValueError, match="those of `tokenizer` are 4"):
        tiny.lavit_pipeline(decoder=tiny.lavit_decoder(code_dim=6))
    with pytest.raises(ValueError, match="no `decoder`"):
        tiny.lavit_pipeline(decoder=None).condition(Codes(ids=torch.zeros(1, 2, dtype=torch.long)))
    with pytest.raises(ValueError, match="ids of words"):
        lavit(prompt_ids=[[lavit.begin_image]], output_type="latent")


def test_lavit_round_trips_and_is_read_from_its_authors_folder(lavit, tmp_path):
    options = {"temperature": 0.0, "output_type": "latent"}
    expected, text = lavit("a red bus", **options).images, lavit.describe(picture(), "what").texts
    lavit.save_pretrained(tmp_path / "pipe")
    tiny.write_language_model(tmp_path / "lavit" / "language_model", lavit.transformer, lavit.text_tokenizer)
    visual = tmp_path / "lavit" / "visual_tokenizer"
    visual.mkdir()
    state = authors_state(lavit.tokenizer, lavit_files.TOKENIZER_RULES, lavit_files.VISION)
    prefix = lavit_files.VISION
    vision = {name[len(prefix) :]: state.pop(name) for name in list(state) if name.startswith(prefix)}
    reading = {name: value for name, value in state.items() if name.startswith(("causal_encoder.", "vit_proj."))}
    torch.save(vision, visual / "eva_vitg_psz14.bin")
    torch.save(state, visual / "tokenizer_encoder.bin")
    torch.save(reading, tmp_path / "lavit" / "language_model" / "visual_weight.bin")
    torch.save(authors_state(lavit.decoder, decoder_rules(), "none."), visual / "tokenizer_decoder.bin")
    heads = {"tokenizer": {"vision_heads": 2, "num_heads": 2}, "decoder": {"num_heads": 2}}
    preset = lavit.config.generation_config
    loaded = [
        LaVITPipeline.from_pretrained(tmp_path / "pipe"),
        LaVITPipeline.from_single_file(tmp_path / "lavit", config=heads, generation_config=preset),
    ]
    for pipe in loaded:
        pipe.set_progress_bar_config(disable=True)
        assert torch.equal(pipe("a red bus", **options).images, expected)
        assert pipe.describe(picture(), "what").texts == text
        codes = pipe.encode_image([picture(0), picture(1)])
        assert torch.equal(codes.ids, lavit.encode_image([picture(0), picture(1)]).ids)
        torch.testing.assert_close(pipe.condition(codes).embeds, lavit.condition(codes).embeds)
    assert loaded[1].tokenizer.reading_merger is not None
    with pytest.raises(CheckpointError, match="other `resolution`"):
        LaVITPipeline.from_single_file(tmp_path / "lavit", config={**heads, "resolution": "high"})
    with pytest.raises(CheckpointError, match="no folder of LaVIT"):
        LaVITPipeline.from_single_file(visual)


def decoder_rules() -> Any:
    """Of a decoder with one projection, whose name is `unet_proj`."""
    return [rule for rule in lavit_files.DECODER_RULES if not rule.source.startswith("unet_proj_")]


# ---------------------------------------------------------------------- painters


def test_painters_call_diffusers_pipelines_as_they_want_to_be():
    import diffusers

    calls: list[dict[str, Any]] = []

    def fake(**options: Any) -> Any:
        calls.append(options)
        return SimpleNamespace(images=[1])

    fake.device, fake.unet = torch.device("cpu"), SimpleNamespace(dtype=torch.float32)  # type: ignore[attr-defined]
    condition = ImageCondition(torch.randn(2, 4, 8), torch.randn(2, 6))
    assert UnCLIPPainter(fake)(condition, None, "pil") == [1] and XLPainter(fake)(condition, None, "pil") == [1]
    for call, name in zip(calls, ("StableUnCLIPImg2ImgPipeline", "StableDiffusionXLPipeline"), strict=True):
        assert set(call) <= set(inspect.signature(getattr(diffusers, name).__call__).parameters)
    assert calls[0]["noise_level"] == 0 and calls[0]["guidance_scale"] == 10 and calls[0]["prompt"] == ["", ""]
    assert not calls[1]["negative_prompt_embeds"].any() and calls[1]["num_inference_steps"] == 25
    for painter in (UnCLIPPainter(fake), XLPainter(fake)):
        with pytest.raises(ValueError, match="pooled"):
            painter(ImageCondition(torch.zeros(1, 1, 1)), None, "pil")
    with pytest.raises(ValueError, match="`embeds`, `pooled` or both"):
        ImageCondition()


def test_stable_diffusion_paints_each_image_as_if_alone():
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8, attention_head_dim=2,
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
                        up_block_types=("UpDecoderBlock2D",) * 2)  # fmt: skip
    sizes = {"num_inference_steps": 2, "height": 16, "width": 16}
    painter = StableDiffusionPainter(unet, vae, DDIMScheduler(), torch.randn(1, 3, 8), **sizes)
    embeds = torch.randn(2, 5, 8)
    both = painter(ImageCondition(embeds), [generator(1), generator(2)], "pt")
    one = painter(ImageCondition(embeds[1:]), [generator(2)], "pt")
    assert both.shape == (2, 3, 16, 16)
    torch.testing.assert_close(one[0], both[1], atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="from features"):
        painter(ImageCondition(pooled=torch.zeros(1, 2)), None, "pt")


def test_the_zoo_knows_them():
    assert armm.list_models("seed-llama-*") == [
        f"seed-llama-{name}" for name in ("8b-pretrain", "8b-sft", "14b-pretrain", "14b-sft")
    ]
    entry = armm.zoo.get("lavit-7b-v2")
    assert "LaVIT Community License" in entry.licence and entry.repo == "rain1011/LaVIT-7B-v2"
    assert entry.is_restricted and not armm.zoo.get("llamagen-c2i-b-256").is_restricted
    assert eva.num_heads(1408, None, "vision_heads") == 16
