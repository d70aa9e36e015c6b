"""Parity with DyVTE (DoubtedSteam/DyVTE, commit b4a3396): gates, exit layer and logits, at the README's tolerance."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from harness import Case, Check, all_problems, first_problem, parity_root
from test_opera import language_model, prompt

from armm.convert import llama
from armm.convert.containers import load_state_dict
from armm.convert.keymap import apply_rules
from armm.decoding.base import TokenStream
from armm.multimodal_model import MultimodalModel
from armm.pruning.exits import ExitRun, VisualTokenExit

CASES = [
    pytest.param(Case(path.parent), id=path.parent.name)
    for path in sorted((parity_root() / "dyvte").glob("*/pytorch_model.bin"))
]


def checks(case: Case, model: MultimodalModel, acceleration: VisualTokenExit) -> Iterator[Check]:
    io, start = case.io, case.config["prefix_tokens"]
    condition = prompt(model, io)
    yield Check("inputs_embeds", condition.embeds, io["inputs_embeds"])
    expected = io["generated_ids"]
    following = condition.length + torch.arange(expected.shape[1])[None]
    run = acceleration.begin(model, condition, [(start, start + case.config["n_image_tokens"])], following)
    assert isinstance(run, ExitRun)
    positions = model.positions_for(condition.index)
    stream = TokenStream(model, condition, positions, model.positions_for(following), hook=run)
    logits = model.logits(stream.prefill_states()[-1])
    for layer, (feature, decision) in enumerate(zip(run.features, run.logits, strict=True)):
        yield Check(f"gate{layer}/feature", feature, io[f"gate{layer}/feature"])
        yield Check(f"gate{layer}/logits", decision, io[f"gate{layer}/logits"])
    left = -1 if run.exit_layer is None else run.exit_layer
    yield Check("exit_layer_zero_based", torch.tensor([left]), io["exit_layer_zero_based"])
    yield Check("prefill_logits", logits, io["prefill_logits"])
    for layer, length in enumerate(stream.cache.lengths):
        name = f"kv_len_layer{layer}_after_prefill"
        yield Check(name, torch.tensor([length]), io[name])
    steps, ids = [logits[:, -1]], [logits[:, -1].argmax(-1)]
    for step in range(expected.shape[1] - 1):
        steps.append(model.logits(stream.feed(ids[-1], step)))
        ids.append(steps[-1].argmax(-1))
    yield Check("step_logits", torch.stack(steps, dim=1), io["step_logits"])
    yield Check("generated_ids", torch.stack(ids, dim=1), expected)
    yield Check("no_exit_last_logits", model.logits(model.hidden(condition)[:, -1]), io["no_exit_last_logits"])


def test_there_are_cases():
    assert CASES


@pytest.mark.parametrize("case", CASES)
def test_every_recorded_array_is_reproduced(case):
    acceleration = VisualTokenExit.from_single_file(case.path / "pytorch_model.bin")
    found = list(checks(case, language_model(case), acceleration))
    assert not all_problems(iter(found))
    given = {"text_before_ids", "text_after_ids", "image_embeds"}
    assert {check.name for check in found} | given == set(case.io)


@pytest.mark.parametrize("case", CASES)
def test_scaling_any_tensor_by_a_twentieth_is_noticed(case):
    model, acceleration = language_model(case), VisualTokenExit.from_single_file(case.path / "pytorch_model.bin")
    left = int(case.io["exit_layer_zero_based"])
    parameters, unnoticed = model.state_dict(), []
    gates = acceleration.gates
    for name, tensor in load_state_dict(case.path / "pytorch_model.bin").items():
        scaled = apply_rules({name: tensor.float() * 1.05}, llama.RULES)
        if scaled:
            ((target, value),) = scaled.items()
            parameter = parameters[target]
        elif "visual_gates_router" in name:
            layer = int(name.split(".")[2])
            if layer > left:
                continue  # gates behind the exit are not asked
            parameter = (gates.enter if ".w1." in name else gates.decide)[layer].weight
            value = tensor.float() * 1.05
        else:
            continue  # the rotary table, which is computed and not read
        saved = parameter.clone()
        parameter.copy_(value)
        if first_problem(checks(case, model, acceleration)) is None:
            unnoticed.append(name)
        parameter.copy_(saved)
    assert not unnoticed, f"the case does not notice: {unnoticed}"
