"""Parity with MingTok and Ming-UniVision (inclusionAI/Ming-UniVision, commit 3bbdd2f): every recorded array of every case."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from harness import Case, Check, all_problems, first_problem, parity_root

from armm.convert import convert
from armm.convert.containers import load_state_dict
from armm.convert.keymap import apply_rules
from armm.convert.ming_univision import RULES as MODEL_RULES
from armm.convert.ming_univision import TOKENIZER
from armm.convert.mingtok import HEAD_RULES, RULES, convert_head
from armm.decoding.guidance import ContextGuidance
from armm.decoding.next_latent import flow_sample
from armm.decoding.solvers.flow import FlowSolver
from armm.heads.diffusion import DiffusionHead
from pipelines.ming_univision import MingUniVisionPipeline
from tokenizers_visual import Codes, MingTokTokenizer

ATOL = 1e-4
MODULES = {"tokenizer": "MingTok", "flow_head": "RectifiedFlowLoss", "ar_generate": "BailingMoe"}


def cases(kind: str) -> list[Any]:
    found = [Case(path.parent) for path in sorted((parity_root() / "mingtok").glob("*/config.json"))]
    return [pytest.param(case, id=case.name) for case in found if MODULES[kind] in case.config["module"]]


def test_there_are_cases():
    assert any(cases(kind) for kind in MODULES)


# ---------------------------------------------------------------------- the tokenizer


def tokenizer_checks(tokenizer: MingTokTokenizer, io: dict[str, torch.Tensor]) -> Iterator[Check]:
    for suffix in ("", "_large"):
        image = io[f"image{suffix}"]
        raw = tokenizer.latents(image)
        if not suffix:
            yield Check("low_level_output", raw, io["low_level_output"], ATOL)
        yield Check(f"latent_normalized{suffix}", tokenizer.scale(raw), io[f"latent_normalized{suffix}"], ATOL)
        codes = tokenizer.encode(image)
        yield Check(f"semantic_tokens{suffix}", tokenizer.features(image), io[f"semantic_tokens{suffix}"], ATOL)
        yield Check(f"semantic_tokens{suffix}", tokenizer.embed(codes), io[f"semantic_tokens{suffix}"], ATOL)
        if not suffix:
            cache = tokenizer.allocate_cache(len(image), codes.num_tokens)
            steps = [tokenizer.read(latent, cache) for latent in codes.tensor.split(1, dim=1)]
            yield Check("semantic_tokens_cached", torch.cat(steps, dim=1), io["semantic_tokens_cached"], ATOL)
        yield Check(
            f"reconstruction{suffix}", tokenizer.decode(codes).clamp(-1, 1), io[f"reconstruction{suffix}"], ATOL
        )


@pytest.mark.parametrize("case", cases("tokenizer"))
def test_the_tokenizer(case):
    tokenizer = convert("mingtok", case.path, dtype=torch.float32)
    for fused in (False, True):
        if fused:
            tokenizer.fuse_projections()
        found = list(tokenizer_checks(tokenizer, case.io))
        assert not all_problems(iter(found))
    assert {check.name for check in found} | {"image", "image_large"} == set(case.io)


@pytest.mark.parametrize("case", cases("tokenizer"))
def test_the_tokenizer_in_a_checkpoint_of_its_training(case, tmp_path):
    state = load_state_dict(case.path / "model.safetensors")
    torch.save({"model": {**state, "target_backbone.norm.weight": torch.ones(3)}}, tmp_path / "training.pth")
    tokenizer = convert("mingtok", tmp_path / "training.pth", config=case.path / "config.json", dtype=torch.float32)
    assert not all_problems(tokenizer_checks(tokenizer, case.io))


# ---------------------------------------------------------------------- the flow head


def head_checks(head: DiffusionHead, io: dict[str, torch.Tensor], steps: int) -> Iterator[Check]:
    velocity = head(io["net_x"][:, None], 1000 * io["net_t"][:, None], head.condition(io["net_cond"][:, None]))
    yield Check("net_velocity", -velocity[:, 0], io["net_velocity"], ATOL)
    rows, noise = io["sample_cond_rows"], io["sample_noise"]
    plain = ContextGuidance(3.0, 1.1)
    runs = {
        "sample_rows1": (1, ContextGuidance(), 1.0, 1.0),
        "sample_rows1_cfg1": (1, ContextGuidance(), 1.0, 1.0),
        "sample_rows2": (2, ContextGuidance(3.0), 1.0, 1.0),
        "sample_rows3": (3, plain, 1.0, 1.0),
        "sample_rows2_temp08_renorm": (2, ContextGuidance(4.5, shorten=True), 0.8, 1.0),
        "sample_rows3_renorm_shift": (3, ContextGuidance(2.5, 1.4, shorten=True), 1.0, 2.0),
    }
    for name, (count, guidance, temperature, shift) in runs.items():
        # theirs: condition, null, null with images; ours: full, images, null
        own = rows[:count] if count < 3 else rows[[0, 2, 1]]
        condition = head.condition(own[:, None])
        solver = FlowSolver(shift=shift)
        drawn = flow_sample(head, condition, noise[:, None] * temperature, solver, steps, guidance)
        yield Check(name, drawn[:, 0].expand(count, -1), io[name], ATOL)


@pytest.mark.parametrize("case", cases("flow_head"))
def test_the_flow_head(case):
    head = convert_head(case.checkpoint, dtype=torch.float32)
    found = list(head_checks(head, case.io, int(case.config["num_sampling_steps"])))
    assert not all_problems(iter(found))
    given = {"net_x", "net_t", "net_cond", "sample_cond_rows", "sample_noise"}
    assert {check.name for check in found} | given == set(case.io)


# ---------------------------------------------------------------------- drawing with the language model


def drawing_checks(
    pipe: MingUniVisionPipeline, io: dict[str, torch.Tensor], tag: str, tokens: int | None = None
) -> Iterator[Check]:
    """tokens: draw no more than so many."""
    model, ids = pipe.transformer, io[f"{tag}_input_ids"]
    image = io.get(f"{tag}_input_image")
    features = None if image is None else pipe.tokenizer.features(image)
    places = None if image is None else ids == pipe.special("image")
    condition = model.prompt_condition(ids, None, features, places)
    yield Check(f"{tag}_prompt_logits", model.logits(model.hidden(condition)), io[f"{tag}_prompt_logits"], ATOL)
    decoded = pipe.tokenizer.decode(Codes(latents=io[f"{tag}_latents"], grid=(1, *model.grid)))
    yield Check(f"{tag}_image", decoded.clamp(-1, 1), io[f"{tag}_image"], 5e-4)
    # theirs: the row that sees images falls away where it equals the one that sees nothing
    masks = [io[name].bool() for row in ("text_uncond", "uncond") if (name := f"{tag}_{row}_attention_mask") in io]
    views = [mask for number, mask in enumerate(masks) if number == len(masks) - 1 or not torch.equal(mask, masks[-1])]
    scales = {0: (1.0, None), 1: (3.0, None), 2: (3.0, 1.1)}[len(views)]
    settings = pipe.check_settings()
    assert (settings["guidance_scale"], settings["image_guidance_scale"]) == (3.0, 1.1)
    output = pipe.draw(
        condition,
        views,
        model.grid if tokens is None else (1, tokens),
        settings,
        guidance=ContextGuidance(*scales),
        noise=list(io[f"{tag}_noise"][:, None]),
        next_word=True,
    )
    yield Check(f"{tag}_latents", output.latents, io[f"{tag}_latents"][:, :tokens], ATOL)
    if tokens is not None:
        return
    pixels = pipe.tokenizer.decode_features(output.features, model.grid)
    yield Check(f"{tag}_image", pixels.clamp(-1, 1), io[f"{tag}_image"], 5e-4)
    yield Check(f"{tag}_next_text_logits", output.logits, io[f"{tag}_next_text_logits"], ATOL)


def drawing_tags(case: Case) -> list[str]:
    """What was drawn, with the most rows first."""
    return sorted(name.removesuffix("_latents") for name in case.io if name.endswith("_latents"))


def load_pipeline(case: Case) -> MingUniVisionPipeline:
    pipe = convert("ming_univision", case.path, dtype=torch.float32)
    pipe._interrupt = False
    return pipe


@pytest.mark.parametrize("case", cases("ar_generate"))
@pytest.mark.parametrize("fused", [False, True])
def test_drawing(case, fused):
    pipe = load_pipeline(case)
    if fused:
        pipe.fuse_projections()
    found = [check for tag in drawing_tags(case) for check in drawing_checks(pipe, case.io, tag)]
    assert not all_problems(iter(found))
    given = ("_input_ids", "_attention_mask", "_input_image", "_noise")
    assert {check.name for check in found} | {name for name in case.io if name.endswith(given)} == set(case.io)


# ---------------------------------------------------------------------- the cases notice every tensor


def unnoticed(
    state: dict[str, torch.Tensor], module: torch.nn.Module, rules: Any, checks: Any, context: Any = None
) -> list[str]:
    """Names of tensors that `checks` do not miss a twentieth of; those that nothing here is made of are left out."""
    parameters, found = module.state_dict(), []
    for name, tensor in state.items():
        scaled = apply_rules({name: tensor.float() * 1.05}, rules, context)
        if not scaled:
            assert name.endswith("mlp.audio_gate.weight"), name  # of speech
            continue
        saved = {target: parameters[target].clone() for target in scaled}
        for target, value in scaled.items():
            parameters[target].copy_(value)
        problem = first_problem(checks())
        for target, value in saved.items():
            parameters[target].copy_(value)
        if problem is None:
            found.append(name)
    assert first_problem(checks()) is None, "the scaled tensors were not restored"
    return found


@pytest.mark.parametrize("case", cases("tokenizer"))
def test_the_tokenizer_notices_every_tensor(case):
    state = load_state_dict(case.path / "model.safetensors")
    tokenizer = convert("mingtok", case.path, dtype=torch.float32)
    assert not unnoticed(state, tokenizer, RULES, partial(tokenizer_checks, tokenizer, case.io))


@pytest.mark.parametrize("case", cases("flow_head"))
def test_the_flow_head_notices_every_tensor(case):
    state = load_state_dict(case.checkpoint)
    head = convert_head(case.checkpoint, dtype=torch.float32)
    module = torch.nn.ModuleDict({"head": head})
    assert not unnoticed(
        state, module, HEAD_RULES, partial(head_checks, head, case.io, int(case.config["num_sampling_steps"]))
    )


@pytest.mark.parametrize("case", cases("ar_generate"))
def test_drawing_notices_every_tensor(case):
    state, pipe = load_state_dict(case.path / "model.safetensors"), load_pipeline(case)
    trunk = pipe.transformer.trunk
    rows = [heads * trunk.head_dim for heads in (trunk.config.num_heads, trunk.num_kv_heads, trunk.num_kv_heads)]

    def checks() -> Iterator[Check]:
        tags = drawing_tags(case)
        yield from drawing_checks(pipe, case.io, tags[0], tokens=1)  # where most are noticed
        for tag in tags:
            yield from drawing_checks(pipe, case.io, tag)

    coder = {name.removeprefix(TOKENIZER): tensor for name, tensor in state.items() if name.startswith(TOKENIZER)}
    model = {name: tensor for name, tensor in state.items() if not name.startswith(TOKENIZER)}
    assert not unnoticed(coder, pipe.tokenizer, RULES, checks)
    assert not unnoticed(model, pipe.transformer, MODEL_RULES, checks, {"qkv_rows": rows})
