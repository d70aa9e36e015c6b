"""Parity with xAR (OliverRensu/xAR, commit 121e9c9): every recorded array of every case, at its README's tolerance."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from harness import Case, Check, all_problems, first_problem, parity_root

from armm.convert import convert
from armm.convert.containers import load_state_dict
from armm.convert.keymap import apply_rules
from armm.convert.xar import convert_state_dict, rules
from armm.decoding import Guidance, NextXDecoding, NextXOutput
from armm.decoding.annealing import StepAnnealing
from armm.decoding.solvers.flow import FlowSolver, time_index
from armm.next_x_model import NextXModel
from armm.nn.rotary import apply_rotary
from armm.training.noisy_context import noisy_context_loss

ROOT = parity_root() / "xar"
CASES = [
    pytest.param(case, id=case.name)
    for case in (Case(path.parent) for path in sorted(ROOT.glob("*/config.json")))
    if case.config["class"].endswith(".xAR")
]


def load(case: Case) -> tuple[NextXModel, NextXDecoding]:
    state = load_state_dict(case.path / case.config["checkpoint_file"])
    return convert_state_dict(state, config=case.config["constructor"])


def close(name: str, actual: torch.Tensor, expected: torch.Tensor) -> Check:
    """Within 1e-4 of the largest value."""
    return Check(name, actual, expected, atol=1e-4 * float(expected.abs().max()))


def picture(latents: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[B, H * W, C] -> [B, C, H, W]."""
    return latents.transpose(1, 2).unflatten(2, like.shape[2:])


def training_checks(model: NextXModel, decoding: NextXDecoding, case: Case) -> Iterator[Check]:
    io = case.io
    batch = len(io["labels"])
    plan = decoding.plan(model.grid)
    clean = plan.split(io["latent_grid"].flatten(2).transpose(1, 2))
    yield Check("cells", clean.unflatten(1, io["cells"].shape[1:3]), io["cells"], atol=0)
    yield Check("latent_grid", picture(plan.join(clean), io["latent_grid"]), io["latent_grid"], atol=0)
    times = io["train_t_cellmajor"].unflatten(0, (-1, batch)).T
    noise = io["train_noise_cells"].flatten(1, 2)
    spread = times[:, plan.segments()][..., None]
    noisy = (1 - spread) * clean + spread * noise
    yield close("train_noisy_tokens", noisy, io["train_noisy_tokens"])
    kept: list[torch.Tensor] = []
    (bridge,) = model.trunk.bridges.values()
    handle = bridge.norm.register_forward_hook(lambda module, inputs, output: kept.append(output))
    condition = model.condition(io["labels"])
    velocity = decoding.velocities(model, condition, noisy, time_index(times), plan)
    handle.remove()
    yield close("train_encoder_out", kept[0], io["train_encoder_out"])
    yield close("train_velocity", velocity, io["train_velocity"])
    latents = io["latent_grid"].flatten(2).transpose(1, 2)
    loss = noisy_context_loss(model, decoding, condition, latents, times=times, noise=noise)
    yield close("train_loss", loss[None], io["train_loss"])
    table = model.trunk.position_table(plan.coordinates, index=plan.index)
    turned = apply_rotary(io["rope_in"].transpose(1, 2), table.rotary).transpose(1, 2)
    yield close("rope_out", turned, io["rope_out"])


def recorded(io: dict[str, torch.Tensor], run: str) -> list[torch.Tensor]:
    """The noise of a run in the order of the draws."""
    draws = []
    for cell, start in enumerate(io[f"{run}.init_noise"]):
        draws.append(start)
        if f"{run}.step_noise" in io:
            draws += list(io[f"{run}.step_noise"][cell])
    return draws


def sample(model: NextXModel, decoding: NextXDecoding, case: Case, run: str, **options: Any) -> NextXOutput:
    facts, labels = case.config["runs"][run], case.io["labels"]
    return decoding(
        model,
        model.condition(labels),
        model.null_condition(len(labels)),
        num_steps=facts["num_steps"],
        guidance=Guidance(facts["cfg"], schedule="linear"),
        noise=recorded(case.io, run),
        record=True,
        **options,
    )


def run_checks(model: NextXModel, case: Case, run: str) -> Iterator[Check]:
    io, facts = case.io, case.config["runs"][run]
    solver = "euler" if facts.get("sampler") == "euler_sampler" else "euler_maruyama"
    decoding = NextXDecoding("cell", convert_cell(case), solver=solver)
    plan = decoding.plan(model.grid)
    out = sample(model, decoding, case, run)
    yield close(f"{run}.latents", picture(out.latents, io[f"{run}.latents"]), io[f"{run}.latents"])
    index = time_index(FlowSolver(solver).times(facts["num_steps"])[:-1])
    expected = io[f"{run}.time_index_current"]
    yield Check(f"{run}.time_index_current", index.expand(len(plan.sizes), -1), expected)
    scales = [Guidance(facts["cfg"], schedule="linear").scale_at(k, len(plan.sizes)) for k in range(len(plan.sizes))]
    yield Check(f"{run}.cfg", torch.tensor(scales), torch.tensor(facts["cfg_per_cell"]), atol=1e-6)
    batch = len(io["labels"])
    null = model.null_condition(batch)
    if f"{run}.velocity" in io:
        for cell, wanted in enumerate(io[f"{run}.velocity"]):
            got = out.velocities[cell]
            if got.shape[1] == batch:  # not guided, so its null rows were not computed
                clean = plan.split(out.latents)[:, : sum(plan.sizes[:cell])]
                calls = []
                for call, state in enumerate(out.states[cell]):
                    times = torch.nn.functional.pad(index[call : call + 1], (cell, 0))
                    fed = torch.cat([clean, state.float()], dim=1)
                    calls.append(decoding.velocities(model, null, fed, times, plan)[:, clean.shape[1] :])
                got = torch.cat([got, torch.stack(calls)], dim=1)
            yield close(f"{run}.velocity[{cell}]", got, wanted)
    if f"{run}.cell2_step0_x" in io and facts["cfg"] > 1:
        size = plan.sizes[0]
        tokens = plan.split(out.latents)
        for call in (0, 1):
            noisy = out.states[2][call].float()
            fed = torch.cat([tokens[:, size : 2 * size], noisy], dim=1) if call == 0 else noisy
            yield close(f"{run}.cell2_step{call}_x", fed.repeat(2, 1, 1), io[f"{run}.cell2_step{call}_x"])
            yield close(f"{run}.cell2_step{call}_out", out.velocities[2][call], io[f"{run}.cell2_step{call}_out"])
        labels = torch.cat([io["labels"], torch.full((batch,), model.num_classes)])
        yield Check(f"{run}.cell2_step0_y", labels, io[f"{run}.cell2_step0_y"])
        times = torch.tensor([0.0, 1.0]).repeat_interleave(2 * batch)
        yield Check(f"{run}.cell2_step0_time", times, io[f"{run}.cell2_step0_time"])


def convert_cell(case: Case) -> int:
    return int(case.io["cells"].shape[2] ** 0.5)


def checks(case: Case, model: NextXModel, decoding: NextXDecoding) -> Iterator[Check]:
    yield from training_checks(model, decoding, case)
    for run in case.config["runs"]:
        yield from run_checks(model, case, run)


INPUTS = {"labels", "train_t_cellmajor", "train_noise_cells", "rope_in"}


@pytest.mark.parametrize("case", CASES)
def test_every_recorded_array_is_reproduced(case):
    model, decoding = load(case)
    found = list(checks(case, model, decoding))
    assert not all_problems(iter(found))
    names = {check.name.partition("[")[0] for check in found} | INPUTS
    unchecked = {name for name in set(case.io) - names if not name.endswith(("init_noise", "step_noise"))}
    assert not unchecked, f"arrays of the case that are not checked: {unchecked}"


@pytest.mark.parametrize("case", CASES)
def test_the_file_alone_says_everything(case):
    path = case.path / case.config["checkpoint_file"]
    model, told = convert("xar", path), load(case)[0]
    assert dict(model.config) == dict(told.config)


@pytest.mark.parametrize("case", CASES)
def test_without_a_cache_the_run_is_the_same(case):
    model, decoding = load(case)
    run = next(iter(case.config["runs"]))
    cached, computed = (sample(model, decoding, case, run, use_cache=flag).latents for flag in (True, False))
    assert torch.allclose(cached, computed, atol=1e-4 * float(cached.abs().max()))


def cannot_matter(name: str) -> str | None:
    """Why scaling the tensor `name` changes nothing, or None."""
    if name == "mask":
        return "zero and minus infinity, whatever they are multiplied by"
    if ".rope." in name:
        return "follows from the sizes; the converter reads no more than its shape"
    return None


@pytest.mark.parametrize("case", CASES)
def test_scaling_any_tensor_by_a_twentieth_is_noticed(case):
    state = load_state_dict(case.path / case.config["checkpoint_file"])
    model, decoding = load(case)
    layers = [
        len({name.split(".")[1] for name in state if name.startswith(stack)}) for stack in ("encoder_b", "decoder_b")
    ]
    table, context = rules(*layers), {"order": decoding.plan(model.grid).index}
    parameters = model.state_dict()
    unnoticed = []
    for name, tensor in state.items():
        if cannot_matter(name):
            continue
        scaled = apply_rules({name: tensor * 1.05}, table, context)
        saved = {target: parameters[target].clone() for target in scaled}
        for target, value in scaled.items():
            parameters[target].copy_(value)
        problem = first_problem(checks(case, model, decoding))
        for target, value in saved.items():
            parameters[target].copy_(value)
        if problem is None:
            unnoticed.append(name)
    assert not unnoticed, f"the case does not notice: {unnoticed}"
    assert first_problem(training_checks(model, decoding, case)) is None, "the scaled tensors were not restored"


@pytest.mark.parametrize("path", sorted(ROOT.glob("published_shapes/*.json")), ids=lambda path: path.stem)
def test_the_tensors_of_every_published_size_are_reproduced(path):
    facts = json.loads(path.read_text(encoding="utf-8"))
    state = {name: torch.empty(shape, device="meta") for name, shape in facts["shapes"].items()}
    cell = torch.arange(256) // 64
    state["mask"] = torch.zeros(1, 1, 256, 256).masked_fill(cell[:, None] < cell, float("-inf"))
    model, decoding = convert_state_dict(state)
    assert sum(parameter.numel() for parameter in model.parameters()) == facts["trainable_params"]
    assert (decoding.config.entity, decoding.config.size, model.grid) == ("cell", 8, (16, 16))


@pytest.mark.parametrize("path", sorted(ROOT.glob("time_tables/*.json")), ids=lambda path: path.stem)
def test_times_are_exact(path):
    for name, facts in json.loads(path.read_text(encoding="utf-8")).items():
        method, steps = name.rsplit("_", 1)
        times = FlowSolver(method).times(int(steps))
        assert times.tolist() == facts["t"], name
        assert time_index(times[:-1]).tolist() == facts["time_index"], name


@pytest.mark.parametrize(
    "path", sorted((parity_root() / "disa").glob("schedules/schedules.json")), ids=lambda path: path.stem
)
def test_annealed_steps_are_exact(path):
    for name, steps in json.loads(path.read_text(encoding="utf-8"))["xar"].items():
        upper, lower = map(int, name.split("_to_"))
        assert StepAnnealing(upper, lower).table(len(steps)) == steps
