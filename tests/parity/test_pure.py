"""Parity with PURE (nonwhy/PURE, commit 4fb55531): every recorded array of every case, at its README's tolerance."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from harness import Case, Check, all_problems, first_problem, parity_root

from armm.convert import convert
from armm.convert.chameleon import HF_RULES, head_counts
from armm.convert.chameleon_vocabulary import image_block, read_vocabulary
from armm.convert.folders import load_folder
from armm.convert.keymap import apply_rules
from armm.decoding.guidance import ContextGuidance
from armm.decoding.interleaved import InterleavedDecoding, SequenceOutput
from armm.decoding.sampling import Sampler, UniformSource, entropy, entropy_top_k, entropy_top_k_filter
from armm.decoding.vocabulary import Grammar, ImageBlock
from armm.model import AutoregressiveModel
from pipelines.color_fix import adain_color_fix, wavelet_color_fix

CASES = [
    pytest.param(Case(path.parent), id=path.parent.name)
    for path in sorted((parity_root() / "pure").rglob("io.safetensors"))
]
RUNS = [case for case in CASES if "runs" in case.values[0].config]
RELEASED = ImageBlock(begin=8197, end=8196, codes=((4, 8192),), end_of_line=8803, size=8804, max_size=64, cells=4)


def kept(logits: torch.Tensor) -> torch.Tensor:
    return (logits > -torch.inf).sum(-1)


def rule_checks(case: Case) -> Iterator[Check]:
    io, config = case.io, case.config
    bounds = config["min_top_k"], config["max_top_k"]
    yield Check("top_k_grid", entropy_top_k(io["entropy_grid"], *bounds), io["top_k_grid"])
    other = config["grid_b"]["min_top_k"], config["grid_b"]["max_top_k"]
    yield Check("top_k_grid_b", entropy_top_k(io["entropy_grid"], *other), io["top_k_grid_b"])
    scores = io["image_scores"]
    yield Check("image_entropy", entropy(scores), io["image_entropy"].float())
    sampler = Sampler(temperature=0.9, entropy_top_k=bounds)
    yield Check("image_top_k", kept(sampler.filter(scores)), io["image_top_k"])
    grammar = Grammar(RELEASED, scores.shape[-1])
    inside = torch.stack([grammar.start(io[name][None]).open[0] for name in ("context_image", "context_text")])
    yield Check("contexts", inside.long(), torch.tensor([1, 0]))
    text = Sampler(top_k=config["text_top_k"]).filter(io["text_scores"])
    yield Check("text_kept", (text > -torch.inf).nonzero()[:, 0], io["text_kept"].sort().values)
    window = scores[None, 1 : 1 + len(io["window_top_k"])]
    yield Check("window_mean_entropy", entropy(window).mean(), io["window_mean_entropy"].float())
    yield Check("window_top_k", kept(entropy_top_k_filter(window, *bounds, shared=True))[0], io["window_top_k"])

    def picture(name: str) -> torch.Tensor:
        return io[name].permute(2, 0, 1)[None].float() / 255

    def bytes_of(image: torch.Tensor) -> torch.Tensor:
        return (image.clamp(0, 1) * 255).to(torch.uint8)[0].permute(1, 2, 0)

    target, source = picture("wavelet_target_uint8"), picture("wavelet_source_uint8")
    fixed = wavelet_color_fix(target, source)
    yield Check("wavelet_out", fixed, io["wavelet_out"], atol=1e-5)
    yield Check("wavelet_out_uint8", bytes_of(fixed), io["wavelet_out_uint8"], atol=1)
    yield Check("adain_out_uint8", bytes_of(adain_color_fix(target, source)), io["adain_out_uint8"], atol=1)


def run(model: AutoregressiveModel, case: Case, name: str) -> tuple[SequenceOutput, torch.Tensor]:
    """A restoration, and how many candidates each draw had."""
    io, config, options = case.io, case.config, case.config["runs"][name]
    block = image_block(
        read_vocabulary(case.path / "checkpoint" / "config.json"),
        vocab_size=model.vocab_size,
        cells=config["latents_per_grid"],
    )
    grammar = Grammar(block, model.vocab_size, check_sizes=False)
    grid = (options["grid_h"] * block.cells, options["grid_w"] * block.cells)
    text = Sampler(options["temperature"], top_k=options["text_top_k"])
    image = Sampler(options["temperature"], entropy_top_k=(1, 2000))
    output = InterleavedDecoding()(
        model,
        io["prompt"],
        max_tokens=len(io["forced"]) + block.body(grid),
        grammar=grammar,
        stop_ids=[block.end],
        sampler=text,
        image_sampler=image,
        guidance=ContextGuidance(options["guidance_scale"]),
        noise=UniformSource(io[f"{name}.uniforms"][None]),
        forced_ids=io["forced"][None],
        record_logits=True,
    )
    counts, state = [], grammar.start(io["prompt"])
    for step, token in enumerate(output.ids[0]):
        sampler = image if bool(state.open) else text
        counts.append(kept(sampler.filter(output.logits[0, step])))
        state = grammar.advance(state, token[None])
    return output, torch.stack(counts)


def run_checks(case: Case, model: AutoregressiveModel) -> Iterator[Check]:
    for name in case.config["runs"]:
        output, counts = run(model, case, name)
        yield Check(f"{name}.ids", torch.cat([case.io["prompt"], output.ids], dim=1), case.io[f"{name}.ids"])
        yield Check(f"{name}.top_k_kept", counts, case.io[f"{name}.top_k_kept"])


INPUTS = {
    "entropy_grid", "image_scores", "text_scores", "wavelet_target_uint8", "wavelet_source_uint8", "prompt", "forced",
    "context_image", "context_text",
}  # fmt: skip


def test_there_are_cases():
    assert CASES


@pytest.mark.parametrize("case", CASES)
def test_every_recorded_array_is_reproduced(case):
    has_model = "runs" in case.config
    found = list(run_checks(case, convert("chameleon", case.path / "checkpoint")) if has_model else rule_checks(case))
    assert not all_problems(iter(found))
    given = {name for name in case.io if name in INPUTS or name.endswith(".uniforms")}
    assert {check.name for check in found if check.name != "contexts"} | given == set(case.io), (
        "an array is not checked"
    )


@pytest.mark.parametrize("case", RUNS)
def test_scaling_any_tensor_by_a_twentieth_is_noticed(case):
    model: Any = convert("chameleon", case.path / "checkpoint")
    context, parameters = head_counts({"transformer": dict(model.config["transformer"])}), model.state_dict()
    unnoticed = []
    for name, tensor in load_folder(case.path / "checkpoint").items():
        if name.endswith((".q_proj.weight", ".k_proj.weight")):
            continue  # each head of queries and keys goes through a layer norm, which drops its scale
        scaled = apply_rules({name: tensor * 1.05}, HF_RULES, context)
        saved = {target: parameters[target].clone() for target in scaled}
        for target, value in scaled.items():
            parameters[target].copy_(value)
        if first_problem(run_checks(case, model)) is None:
            unnoticed.append(name)
        for target, value in saved.items():
            parameters[target].copy_(value)
    assert not unnoticed, f"the case does not notice: {unnoticed}"
    assert first_problem(run_checks(case, model)) is None, "the scaled tensors were not restored"
