"""Parity with D-AR (showlab/D-AR, commit 3fb0f2d): every recorded array of every case, at its README's tolerance."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from harness import Case, Check, all_problems, first_problem, parity_root, staged, unnoticed_changes

from armm.convert import convert, llamagen
from armm.convert.containers import load_state_dict
from armm.convert.dar import TOKENIZER_RULES
from armm.convert.keymap import apply_rules
from armm.decoding.sampling import Sampler
from pipelines.dar import DARPipeline
from tokenizers_visual import Codes, DARTokenizer

Staged = Iterator[tuple[str, Callable[[], Check]]]


def found_cases(name: str) -> list[Any]:
    """The cases of the class `name` of the authors."""
    folder = parity_root() / "dar"
    cases = [Case(path.parent) for path in sorted(folder.rglob("config.json"))]
    return [
        pytest.param(case, id=str(case.path.relative_to(folder)))
        for case in cases
        if case.config["class"].rpartition(".")[2] == name
    ]


TOKENIZERS, MODELS = found_cases("VQModel"), found_cases("Transformer")


def load_tokenizer(case: Case) -> DARTokenizer:
    return convert("dar", case.checkpoint, config=case.config["config"])


def load_pipeline(case: Case) -> DARPipeline:
    facts, known = case.config["model_args"], {*llamagen.OPTION_NAMES, *llamagen.TRANSFORMER_OPTIONS}
    pipe = DARPipeline.from_single_file(
        case.checkpoint,
        tokenizer=Case((case.path / case.config["tokenizer_case"]).resolve()).checkpoint,
        config={name: value for name, value in facts.items() if name in known},
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ---------------------------------------------------------------------- what each kind of case holds


def tokenizer_checks(model: DARTokenizer, io: dict[str, torch.Tensor]) -> Staged:
    codes, noise = Codes(ids=io["ids"]), io["noise"]

    def pixels(name: str, codes: Codes = codes, noise: torch.Tensor = noise, **options: Any) -> Callable[[], Check]:
        return lambda: Check(name, model.decode(codes, noise=noise, **options), io[name], atol=5e-4)

    yield "read", lambda: Check("prequant", model.features(io["image"]), io["prequant"])
    yield "read", lambda: Check("ids", model.encode(io["image"]).ids, io["ids"])
    yield "condition", lambda: Check("quantized", model.embed(codes), io["quantized"])
    yield "condition", lambda: Check("cond", model.condition(io["quantized"]), io["cond"])
    times, starts = model.schedule()
    yield "time", lambda: Check("schedule_full", torch.tensor(times), io["schedule_full"], atol=1e-6)
    yield "time", lambda: Check("group_starts", torch.tensor(starts), io["group_starts"])
    window = io["cond"][:, starts[1] : starts[1] + model.config.window]
    yield "flow", lambda: Check("velocity", model.flow(io["velocity_x"], io["velocity_t"], window), io["velocity"])
    for name in io:
        match = re.fullmatch(r"preview_(\d+)_tokens_needed", name)
        if match:
            steps = int(match[1])
            decoding = model.start_decoding(len(noise), noise=noise)
            needed = decoding.tokens_of(steps)
            yield "time", lambda name=name, needed=needed: Check(name, torch.tensor(needed), io[name])
            preview = f"pixels_preview_{steps}_steps"
            yield "pixels", pixels(preview, Codes(ids=io["ids"][:, :needed]))
            yield "pixels", pixels(preview, preview_steps=steps)
    yield "pixels", pixels("pixels_full")
    yield "pixels", pixels("pixels_full_euler", solver="euler")
    for name in io:
        match = re.fullmatch(r"pixels_full_(\d+)_steps", name)
        if match:
            yield "pixels", pixels(name, num_inference_steps=int(match[1]))
    yield "pixels", pixels("pixels_full_larger", noise=io["noise_larger"])
    yield "pixels", pixels("pixels_random_ids", Codes(ids=io["random_ids"]))


def model_checks(pipe: DARPipeline, io: dict[str, torch.Tensor], config: dict[str, Any]) -> Staged:
    model, labels, ids = pipe.transformer, io["labels"], io["teacher_ids"]
    yield "logits", lambda: Check("teacher_logits", model(ids, model.condition(labels=labels)), io["teacher_logits"])
    null = model.null_condition(len(labels))
    yield "logits", lambda: Check("teacher_logits_uncond", model(ids, null), io["teacher_logits_uncond"])

    def generated(name: str, key: str, **options: Any) -> Callable[[], Check]:
        scale = config["cfg_scales"][key]
        if isinstance(scale, str):
            start, end = map(float, scale.split(","))
            options |= {"guidance_start": start, "guidance_scale": end}
        else:
            options |= {"guidance_scale": scale}
        return lambda: Check(
            name, pipe(class_labels=labels, output_type="latent", do_sample=False, **options).images, io[name]
        )

    for key in config["cfg_scales"]:
        yield "ids", generated(f"greedy_{key}", key)
    for key, interval in config["cfg_interval"].items():
        yield "ids", generated(f"greedy_{key}", re.sub(r"_interval\d+$", "", key), guidance_interval=interval)
    yield "ids", generated("greedy_shared_prefix", "cfg_constant", shared_prefix=int(io["shared_prefix_length"]))
    for name in io:
        match = re.fullmatch(r"filter_probs_t([\d.]+)(?:_k(\d+))?(?:_p([\d.]+))?", name)
        if match:
            sampler = Sampler(temperature=float(match[1]), top_k=int(match[2] or 0), top_p=float(match[3] or 1.0))
            yield (
                "ids",
                lambda name=name, sampler=sampler: Check(
                    name, sampler.filter(io["filter_logits"][:, -1].clone()).softmax(-1), io[name], atol=1e-5
                ),
            )
    codes = Codes(ids=io["greedy_cfg_linear"])
    yield (
        "pixels",
        lambda: Check(
            "decoded_pixels", pipe.tokenizer.decode(codes, noise=io["decode_noise"]), io["decoded_pixels"], atol=5e-4
        ),
    )


INPUTS = {
    "tokenizer": {"image", "velocity_x", "velocity_t", "noise", "noise_larger", "random_ids"},
    "model": {"labels", "teacher_ids", "filter_logits", "decode_noise", "shared_prefix_length"},
}


def test_there_are_cases():
    assert (TOKENIZERS and MODELS) or not (parity_root() / "dar").is_dir()


@pytest.mark.parametrize("case", TOKENIZERS)
def test_every_recorded_array_of_a_tokenizer_is_reproduced(case):
    found = list(staged(tokenizer_checks(load_tokenizer(case), case.io), None))
    assert not all_problems(iter(found))
    assert {check.name for check in found} | INPUTS["tokenizer"] == set(case.io), "an array of the case is not checked"


@pytest.mark.parametrize("case", MODELS)
def test_every_recorded_array_of_a_model_is_reproduced(case):
    found = list(staged(model_checks(load_pipeline(case), case.io, case.config), None))
    assert not all_problems(iter(found))
    assert {check.name for check in found} | INPUTS["model"] == set(case.io), "an array of the case is not checked"


@pytest.mark.parametrize("case", MODELS)
def test_previews_while_tokens_arrive_are_the_recorded_partial_decodes(case):
    pipe = load_pipeline(case)
    io = Case((case.path / case.config["tokenizer_case"]).resolve()).io
    seen = []
    output = pipe(
        class_labels=[0] * len(io["ids"]), latents=io["ids"], pixel_noise=io["noise"], output_type="pt", output_previews=True,
        callback_on_preview=lambda pipe, tokens, images: seen.append((tokens, images)),
    )  # fmt: skip
    steps = sorted(int(match[1]) for name in io if (match := re.fullmatch(r"preview_(\d+)_tokens_needed", name)))
    assert [tokens for tokens, _ in seen] == [int(io[f"preview_{k}_tokens_needed"]) for k in steps]
    for k, preview, (_, images) in zip(steps, output.previews, seen, strict=True):
        expected = pipe.pixels_to_images(io[f"pixels_preview_{k}_steps"], "pt")
        assert (preview - expected).abs().max() < 5e-4 and torch.equal(preview, images)
    assert (output.images - pipe.pixels_to_images(io["pixels_full"], "pt")).abs().max() < 5e-4


# ---------------------------------------------------------------------- the cases notice every tensor


def cannot_matter(name: str) -> str | None:
    """Why scaling the tensor `name` cannot change an output, or None where it must."""
    if name == "quantize.codebook_used" or ".repa_out." in name:
        return "of the training, not used by the model"
    if name == "quantize.embedding.weight":
        return "code vectors are normalised to unit length, so a common scale drops out"
    if name.endswith(".k_norm.bias") and (name.startswith("decoder_layers.") or ".cross_attn." in name):
        return "keys that are not turned: it adds the same number to all logits of a query, and the softmax drops it"
    return None


STAGES = {"decoder_": "condition", "quant_out_conv": "condition", "diff_decoder": "flow"}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_scaling_any_tensor_of_a_tokenizer_by_a_twentieth_is_noticed(case):
    model, state = load_tokenizer(case), load_state_dict(case.checkpoint, keys=("ema",))
    context = {"num_tokens": model.config.num_tokens}
    changes = (
        (name, apply_rules({name: tensor * 1.05}, TOKENIZER_RULES, context))
        for name, tensor in state.items()
        if not cannot_matter(name)
    )

    def checks(name: str) -> Iterator[Check]:
        stage = next((stage for prefix, stage in STAGES.items() if name.startswith(prefix)), "read")
        return staged(tokenizer_checks(model, case.io), stage)

    assert not unnoticed_changes(model, changes, checks)
    assert first_problem(checks("read")) is None, "the scaled tensors were not restored"


@pytest.mark.parametrize("case", MODELS)
def test_scaling_any_tensor_of_a_model_by_a_twentieth_is_noticed(case):
    pipe, state = load_pipeline(case), load_state_dict(case.checkpoint)
    pipe.unfuse_projections()
    attention = pipe.transformer.trunk.blocks[0].attention
    context = {"qkv_rows": tuple(getattr(attention, f"to_{part}").out_features for part in "qkv")}
    changes = (
        (name, apply_rules({name: tensor * 1.05}, llamagen.TRANSFORMER_RULES, context))
        for name, tensor in state.items()
    )

    def checks(name: str) -> Iterator[Check]:
        return staged(model_checks(pipe, case.io, case.config), "logits")

    assert not unnoticed_changes(pipe.transformer, changes, checks)
    assert first_problem(checks("")) is None, "the scaled tensors were not restored"
