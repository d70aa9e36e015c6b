"""Parity with FlowAR (Qinyu-Allen-Zhao/DiSA, commit 283fa59): every recorded array of every case, at its README's tolerance."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch
from harness import Case, Check, all_problems, first_problem, parity_root

from armm.convert import convert
from armm.convert.containers import load_state_dict
from armm.convert.flowar import convert_state_dict, rules
from armm.convert.keymap import apply_rules
from armm.decoding import Guidance, NextScaleFlowDecoding
from armm.decoding.annealing import StepAnnealing
from armm.decoding.next_scale_flow import teacher_maps
from armm.decoding.solvers.flow import FlowSolver, time_index
from armm.next_scale_flow_model import NextScaleFlowModel
from armm.training.next_scale_flow import next_scale_flow_loss

ROOT = parity_root() / "flowar"
CASES = [
    pytest.param(case, id=case.name)
    for case in (Case(path.parent) for path in sorted(ROOT.glob("*/config.json")))
    if case.config["class"].endswith(".FlowAR")
]


def load(case: Case) -> NextScaleFlowModel:
    return convert("flowar", case.path / case.config["checkpoint_file"], config=case.config["constructor"])


def close(name: str, actual: torch.Tensor, expected: torch.Tensor) -> Check:
    """Within 1e-4 of the largest value."""
    return Check(name, actual, expected, atol=1e-4 * float(expected.abs().max()))


def training_checks(model: NextScaleFlowModel, io: dict[str, torch.Tensor]) -> Iterator[Check]:
    latents = io["latent_grid"].flatten(2).transpose(1, 2)
    clean, inputs = teacher_maps(latents, model.scales)
    yield close("train_input_latents", inputs, io["train_input_latents"])
    condition = model.condition(io["labels"])
    features = model(inputs, condition)
    yield close("train_z", features, io["train_z"])
    times = io["train_flow_t"].T
    noisy, places, velocities = io["train_flow_x"], model.coordinates(), []
    parts = [part.split(model.sizes, dim=1) for part in (noisy, features)]
    for step, (x, z) in enumerate(zip(*parts, strict=True)):
        positions = model.head.positions(places.split(model.sizes)[step])
        velocities.append(model.head(x, time_index(times[:, step]), z, positions))
    yield close("train_flow_v", torch.cat(velocities, dim=1), io["train_flow_v"])
    spread = times.repeat_interleave(torch.tensor(model.sizes), dim=1)[..., None]
    noise = (noisy - (1 - spread) * clean) / spread
    loss = next_scale_flow_loss(model, condition, latents, times=times, noise=noise)
    yield close("train_loss", loss[None], io["train_loss"])


def run_checks(model: NextScaleFlowModel, case: Case, run: str) -> Iterator[Check]:
    io, facts = case.io, case.config["runs"][run]
    count, batch = len(model.scales), len(io["labels"])
    guidance = Guidance(facts["cfg"], schedule="linear", high=facts["guidance"])
    scales = [guidance.scale_at(step, count) for step in range(count)]
    yield Check(f"{run}.cfg", torch.tensor(scales), torch.tensor(facts["cfg_per_scale"]), atol=1e-6)
    annealing = StepAnnealing(facts["flow_upper_steps"], facts["flow_lower_steps"])
    yield Check(f"{run}.steps", torch.tensor(annealing.table(count)), torch.tensor(facts["num_steps_per_scale"]))
    out = NextScaleFlowDecoding()(
        model,
        model.condition(io["labels"]),
        model.null_condition(batch),
        annealing=annealing,
        guidance=guidance,
        noise=[io[f"{run}.scale{step}_init_noise"] for step in range(count)],
        record=True,
    )
    for step in range(count):
        yield close(f"{run}.scale{step}_tokens", out.tokens[step], io[f"{run}.scale{step}_tokens"])
        if f"{run}.scale{step}_z" in io:
            yield close(f"{run}.scale{step}_z", out.features[step], io[f"{run}.scale{step}_z"])
    latents = io[f"{run}.latents"]
    yield close(f"{run}.latents", out.latents.transpose(1, 2).unflatten(2, latents.shape[2:]), latents)


def checks(case: Case, model: NextScaleFlowModel) -> Iterator[Check]:
    yield from training_checks(model, case.io)
    for run in case.config["runs"]:
        yield from run_checks(model, case, run)


INPUTS = {"labels", "latent_grid", "train_flow_x", "train_flow_t"}


@pytest.mark.parametrize("case", CASES)
def test_every_recorded_array_is_reproduced(case):
    found = list(checks(case, load(case)))
    assert not all_problems(iter(found))
    unchecked = {
        name for name in set(case.io) - {check.name for check in found} - INPUTS if not name.endswith("init_noise")
    }
    assert not unchecked, f"arrays of the case that are not checked: {unchecked}"


@pytest.mark.parametrize("case", CASES)
def test_the_file_alone_says_everything(case):
    model, told = convert("flowar", case.path / case.config["checkpoint_file"]), load(case)
    assert dict(model.config) == dict(told.config)


def cannot_matter(name: str) -> str | None:
    """Why scaling the tensor `name` changes nothing, or None."""
    if name == "mask":
        return "zero and minus infinity, whatever they are multiplied by"
    if ".rope." in name:
        return "follows from the sizes; the converter reads no more than its shape"
    return None


@pytest.mark.parametrize("case", CASES)
def test_scaling_any_tensor_by_a_twentieth_is_noticed(case):
    state, model = load_state_dict(case.path / case.config["checkpoint_file"]), load(case)
    layers = [
        len({name.split(".")[1] for name in state if name.startswith(stack)}) for stack in ("encoder_b", "decoder_b")
    ]
    table, parameters = rules(*layers), model.state_dict()
    unnoticed = []
    for name, tensor in state.items():
        if cannot_matter(name):
            continue
        scaled = apply_rules({name: tensor * 1.05}, table)
        saved = {target: parameters[target].clone() for target in scaled}
        for target, value in scaled.items():
            parameters[target].copy_(value)
        problem = first_problem(checks(case, model))
        for target, value in saved.items():
            parameters[target].copy_(value)
        if problem is None:
            unnoticed.append(name)
    assert not unnoticed, f"the case does not notice: {unnoticed}"
    assert first_problem(training_checks(model, case.io)) is None, "the scaled tensors were not restored"


@pytest.mark.parametrize("path", sorted(ROOT.glob("published_shapes/*.json")), ids=lambda path: path.stem)
def test_the_tensors_of_every_published_size_are_reproduced(path):
    facts = json.loads(path.read_text(encoding="utf-8"))
    state = {name: torch.empty(shape, device="meta") for name, shape in facts["shapes"].items()}
    scale = torch.arange(5).repeat_interleave(torch.tensor([1, 4, 16, 64, 256]))
    state["mask"] = torch.zeros(1, 1, 341, 341).masked_fill(scale[:, None] < scale, float("-inf"))
    model = convert_state_dict(state)
    assert sum(parameter.numel() for parameter in model.parameters()) == facts["trainable_params"]
    assert model.scales == (1, 2, 4, 8, 16)


@pytest.mark.parametrize(
    "path", sorted((parity_root() / "disa").glob("schedules/schedules.json")), ids=lambda path: path.stem
)
def test_annealed_times_are_exact(path):
    for facts in json.loads(path.read_text(encoding="utf-8"))["flowar"].values():
        solver = FlowSolver(grid="dense_end")
        assert [solver.num_calls(steps) for steps in facts["num_steps"]] == facts["euler_updates"]
        assert [solver.times(steps).tolist() for steps in facts["num_steps"]] == facts["time_grids"]
