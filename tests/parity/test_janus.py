"""Parity with Janus (deepseek-ai/Janus, commit 1daa72f): every recorded array of every case, at its README's tolerance."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from harness import Case, Check, all_problems, first_problem, parity_root
from test_llamagen import cannot_matter as tokenizer_tensor_cannot_matter

from armm.convert import convert
from armm.convert.containers import load_state_dict
from armm.convert.janus import MODEL_RULES, TOKENIZER, VISION_RULES
from armm.convert.keymap import apply_rules
from armm.convert.llamagen import TOKENIZER_RULES
from armm.decoding.guidance import Guidance
from armm.decoding.sampling import Sampler
from pipelines.chat import TEMPLATES, expand_images
from pipelines.janus import JanusPipeline
from pipelines.janus_reading import SPECIAL_TOKENS
from tokenizers_visual import Codes

CASES = [
    pytest.param(Case(path.parent), id=path.parent.name)
    for path in sorted((parity_root() / "janus").glob("*/pytorch_model.bin"))
]
IDS = {"bos": "bos", "eos": "eos", "pad": "pad", "boi": "begin_image", "eoi": "end_image", "img": "image"}


def published_folder(case: Case, folder: Any) -> Any:
    """The case as the authors' folder: their config.json and processors' files beside the weights."""
    (folder / "pytorch_model.bin").symlink_to(case.path / "pytorch_model.bin")
    config = dict(case.config["original_config"])
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(case.config["image_processor"]))
    return folder


@pytest.fixture
def load(tmp_path):
    def load(case: Case) -> JanusPipeline:
        towers = case.config["overrides"]["siglip_model_config"]
        tower = towers[case.config["original_config"]["vision_config"]["params"]["model_name"]]
        config = {
            "grid": case.config["generation"]["grid"],
            "vision": {"num_heads": tower["heads"]},
            "special_ids": {ours: case.config["special_ids"][theirs] for theirs, ours in IDS.items()},
        }
        pipe = convert("janus", published_folder(case, tmp_path), config=config, dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return load


def understanding_checks(pipe: JanusPipeline, io: dict[str, torch.Tensor], case: Case) -> Iterator[Check]:
    images = [io[f"und/image{k}_uint8"].numpy() for k in range(len(io["und/pixel_values"]))]
    pixels = torch.cat([pipe.preprocess(image) for image in images])
    yield Check("und/pixel_values", pixels, io["und/pixel_values"], atol=2e-6)
    special, count = pipe.special_ids, pipe.image_encoder.num_tokens
    prompts = [io[f"und/prompt_ids_{k}"].tolist() for k in range(len(images))]
    rows = [
        expand_images(row, special["image"], special["begin_image"], special["end_image"], count) for row in prompts
    ]
    for number, row in enumerate(rows):
        yield Check(f"und/expanded_ids_{number}", torch.tensor(row), io[f"und/expanded_ids_{number}"])
    ids, real = pipe.pad(rows)
    places = ids == special["image"]
    yield Check("und/input_ids", ids, io["und/input_ids"])
    yield Check("und/attention_mask", real.long(), io["und/attention_mask"])
    yield Check("und/images_seq_mask", places, io["und/images_seq_mask"])
    yield Check("und/images_emb_mask", places.sum(1)[:, None, None] > torch.arange(count), io["und/images_emb_mask"])
    yield Check("und/batched_pixel_values", pixels[:, None], io["und/batched_pixel_values"], atol=2e-6)
    features = pipe.image_encoder.encode(pixels)
    yield Check("und/vision_features", features, io["und/vision_features"])
    yield Check("und/aligner_out", pipe.transformer.feature_projection(features), io["und/aligner_out"])
    condition = pipe.transformer.prompt_condition(ids, real, features, places)
    yield Check("und/inputs_embeds", condition.embeds, io["und/inputs_embeds"])
    yield Check("und/position_ids", condition.index.masked_fill(~real, 1), io["und/position_ids"])
    low, high = pipe.text_range
    logits = pipe.transformer.logits(pipe.transformer.hidden(condition), low=low, high=high)
    yield Check("und/logits", logits * real[..., None], io["und/logits"])
    expected = io["und/generated_ids"]
    readings = pipe.readings(images, prompt_ids=prompts)
    for together in ([readings], [[reading] for reading in readings]):  # as a batch, and one at a time
        written = [text for part in together for text in pipe.write(part, max_new_tokens=expected.shape[1])[0]]
        filled = [text + [pipe.stop_id] * (expected.shape[1] - len(text)) for text in written]
        yield Check("und/generated_ids", torch.tensor(filled), expected)


def tokenizer_checks(pipe: JanusPipeline, io: dict[str, torch.Tensor]) -> Iterator[Check]:
    tokenizer = pipe.tokenizer
    pixels = io["vq/pixels"]
    yield Check("vq/encoder_out", tokenizer.features(pixels), io["vq/encoder_out"])
    codes = tokenizer.encode(pixels)
    yield Check("vq/ids", codes.ids, io["vq/ids"])
    quantized = tokenizer.embed(codes).transpose(1, 2).unflatten(2, codes.grid[1:])
    yield Check("vq/quantized", quantized, io["vq/quantized"])
    yield Check("vq/reconstruction", tokenizer.decode(codes), io["vq/reconstruction"])
    decoded = io["vq/decode_pixels"]
    grid = (1, *(side // tokenizer.downsample for side in decoded.shape[-2:]))
    yield Check("vq/decode_pixels", tokenizer.decode(Codes(ids=io["vq/decode_ids"], grid=grid)), decoded)


def generation_checks(pipe: JanusPipeline, io: dict[str, torch.Tensor], case: Case) -> Iterator[Check]:
    model, settings = pipe.transformer, case.config["generation"]
    prompt = io["gen/prompt_ids"].tolist()
    low, high = model.code_range
    last = None
    for name, scale in settings["greedy_cfg_weights"].items():
        ids = io[f"gen/greedy_ids_{name}"]
        condition, null = (part.repeat(len(ids)) for part in pipe.drawing_conditions([prompt]))
        output = pipe.decoding(
            model, condition, null, sampler=Sampler(do_sample=False), guidance=Guidance(scale), vocabulary=(low, high),
            record_logits=True,
        )  # fmt: skip
        yield Check(f"gen/greedy_cfg_logits_{name}", output.logits, io[f"gen/greedy_cfg_logits_{name}"], atol=5e-4)
        last = pipe(
            prompt_ids=prompt,
            guidance_scale=scale,
            do_sample=False,
            output_type="latent",
            num_images_per_prompt=len(ids),
        ).images
        yield Check(f"gen/greedy_ids_{name}", last, ids)
    expected = io["gen/sample_ids"]
    drawn = pipe(
        prompt_ids=prompt, guidance_scale=settings["sample_cfg_weight"], temperature=settings["sample_temperature"],
        num_images_per_prompt=len(expected), noise=io["gen/sample_noise_exponential"].transpose(0, 1), output_type="latent",
    ).images  # fmt: skip
    yield Check("gen/sample_ids", drawn, expected)
    teacher = io["gen/teacher_ids"]
    condition = pipe.drawing_conditions([prompt])[0].repeat(len(teacher))
    logits = pipe.decoding.image_logits(model, teacher + low, condition, low=low, high=high)
    yield Check("gen/teacher_logits", logits, io["gen/teacher_logits"])
    yield Check("gen/gen_embeds", model.embed(teacher + low), io["gen/gen_embeds"])
    decoded = io["gen/decoded_pixels"]
    grid = (1, *(side // pipe.tokenizer.downsample for side in decoded.shape[-2:]))
    pixels = pipe.tokenizer.decode(Codes(ids=last[: len(decoded)], grid=grid))
    yield Check("gen/decoded_pixels", pixels, decoded)
    as_bytes = ((pixels + 1) / 2 * 255).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    yield Check("gen/decoded_uint8", as_bytes, io["gen/decoded_uint8"], atol=1)


def checks(case: Case, pipe: JanusPipeline) -> Iterator[Check]:
    yield from tokenizer_checks(pipe, case.io)
    yield from understanding_checks(pipe, case.io, case)
    yield from generation_checks(pipe, case.io, case)


def is_input(name: str) -> bool:
    given = ("und/image", "und/prompt_ids", "vq/pixels", "vq/decode_ids")
    recorded = name in ("gen/prompt_ids", "gen/sample_noise_exponential", "gen/teacher_ids")
    return recorded or (name.startswith(given) and not name.startswith(("und/images_",)))


def test_there_are_cases():
    assert CASES


@pytest.mark.parametrize("case", CASES)
def test_every_recorded_array_is_reproduced(case, load):
    found = list(checks(case, load(case)))
    assert not all_problems(iter(found))
    named = {check.name for check in found}
    assert named | {name for name in case.io if is_input(name)} == set(case.io), "an array of the case is not checked"


@pytest.mark.parametrize("case", CASES)
def test_conversations_are_written_as_the_authors_do(case):
    for item in json.loads((case.path / "prompts.json").read_text(encoding="utf-8")):
        template = TEMPLATES[item["sft_format"]]
        text = template.format(item["conversation"], item["system_prompt"], SPECIAL_TOKENS["eos"])
        assert text == item["prompt"]


# ---------------------------------------------------------------------- the cases notice every tensor


def cannot_matter(name: str, state: dict[str, torch.Tensor]) -> str | None:
    """Why scaling the tensor `name` cannot change an output, or None where it must."""
    if name.startswith(TOKENIZER):
        coder = {key[len(TOKENIZER) :]: value for key, value in state.items() if key.startswith(TOKENIZER)}
        return tokenizer_tensor_cannot_matter(name[len(TOKENIZER) :], coder)
    return None


def components(pipe: JanusPipeline, name: str) -> tuple[torch.nn.Module, Any, str]:
    """The component that the authors' tensor `name` belongs to, its rules and its name there."""
    if name.startswith(TOKENIZER):
        return pipe.tokenizer, TOKENIZER_RULES, name[len(TOKENIZER) :]
    if name.startswith("vision_model."):
        return pipe.image_encoder, VISION_RULES, name
    return pipe.transformer, MODEL_RULES, name


def concerned(case: Case, pipe: JanusPipeline, name: str) -> Iterator[Check]:
    """The checks of the part that `name` belongs to, all of which run when nothing is scaled."""
    if name.startswith(TOKENIZER):
        return tokenizer_checks(pipe, case.io)
    if name.startswith(("vision_model.", "aligner.")):
        return understanding_checks(pipe, case.io, case)
    if name.startswith("gen_"):
        return generation_checks(pipe, case.io, case)
    return (check for part in (understanding_checks, generation_checks) for check in part(pipe, case.io, case))


@pytest.mark.parametrize("case", CASES)
def test_scaling_any_tensor_by_a_twentieth_is_noticed(case, load):
    state, pipe = load_state_dict(case.path / "pytorch_model.bin"), load(case)
    select = case.config["original_config"]["vision_config"]["params"].get("select_layer", -1)
    unnoticed = []
    for name, tensor in state.items():
        if name.startswith("vision_model.vision_tower.attn_pool."):
            continue  # features are taken before the pooling head, which is never run
        module, rules, own = components(pipe, name)
        parameters = module.state_dict()
        scaled = apply_rules({own: tensor.float() * 1.05}, rules)
        scaled = {target: value for target, value in scaled.items() if target in parameters}
        saved = {target: parameters[target].clone() for target in scaled}
        for target, value in scaled.items():
            parameters[target].copy_(value)
        problem = first_problem(concerned(case, pipe, name))
        for target, value in saved.items():
            parameters[target].copy_(value)
        unused = name.startswith("vision_model.vision_tower.blocks.") and not scaled and select != -1
        if problem is None and not cannot_matter(name, state) and not unused:
            unnoticed.append(name)
    assert not unnoticed, f"the case does not notice: {unnoticed}"
    assert first_problem(checks(case, pipe)) is None, "the scaled tensors were not restored"
