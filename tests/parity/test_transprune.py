"""Parity with TransPrune (liaolea/TransPrune, commit c9e8284): all scores, indices and logits, at the README's tolerance."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from harness import Case, Check, all_problems, first_problem, parity_root
from test_opera import language_model

from armm.condition import Condition
from armm.convert import llama
from armm.convert.containers import load_state_dict
from armm.convert.keymap import apply_rules
from armm.decoding.base import TokenStream
from armm.multimodal_model import MultimodalModel
from armm.pruning.transition import TokenPruning, TransitionRun, transition_weights

CASES = [
    pytest.param(Case(path.parent), id=path.parent.name)
    for path in sorted((parity_root() / "transprune").glob("*/pytorch_model.bin"))
]


class Recorder(TransitionRun):
    """Also keeps what went into and came out of the branches."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.seen: dict[str, torch.Tensor] = {}

    def observer(self, layer):
        observe = super().observer(layer)
        if observe is None:
            return None

        def record(branch, x, y):
            short = {"attention": "attn", "mlp": "mlp"}[branch]
            self.seen |= {f"layer{layer + 1}/{short}_in": x, f"layer{layer + 1}/{short}_out": y}
            self.seen[f"layer{layer + 1}/ttv_{short}"] = transition_weights(x, y)
            observe(branch, x, y)

        return record


def prompt(model: MultimodalModel, case: Case) -> tuple[Condition, tuple[int, int]]:
    text, image, start = (
        model.embed(case.io["text_ids"][None]),
        case.io["image_embeds"][None],
        case.config["image_index"],
    )
    embeds = torch.cat([text[:, :start], image, text[:, start:]], dim=1)
    return Condition(embeds, None, torch.arange(embeds.shape[1])[None]), (start, start + image.shape[1])


def checks(case: Case, model: MultimodalModel) -> Iterator[Check]:
    io, config = case.io, case.config
    condition, image = prompt(model, case)
    yield Check("inputs_embeds", condition.embeds, io["inputs_embeds"])
    pruning = TokenPruning(
        config["pruning_layer_list"],
        config["image_token_ratio_list"][1:],
        config["accmulating_layer_list"],
        record=True,
    )
    expected = io["generated_ids"]
    following = condition.length + torch.arange(expected.shape[1])[None]
    run = Recorder(pruning, model, condition, [image], following)
    stream = TokenStream(
        model, condition, model.positions_for(condition.index), model.positions_for(following), hook=run
    )
    hidden = stream.prefill_states()[-1]
    for name, value in run.seen.items():
        yield Check(name, value, io[name], atol=1e-6 if "ttv" in name else 1e-4)
    for layer in config["accmulating_layer_list"]:
        name = f"layer{layer}/ttv"
        yield Check(name, run.seen[f"{name}_attn"] + run.seen[f"{name}_mlp"], io[name], atol=1e-6)
    for number, (layer, stage) in enumerate(zip(config["pruning_layer_list"], run.stages, strict=True)):
        name = f"prune{layer}/"
        for theirs, ours in (("iga_normalised", "attention"), ("ttv_normalised", "transition"), ("score", "score")):
            yield Check(name + theirs, stage[ours], io[name + theirs], atol=1e-6)
        yield Check(name + "text_to_all_attention", stage["weights"], io[name + "text_to_all_attention"])
        yield Check(name + "kept_relative", stage["kept"], io[name + "kept_relative"])
        kept = run.kept[number]
        original = kept[(kept >= image[0]) & (kept < image[1])] - image[0]
        yield Check(name + "kept_original", original, io[name + "kept_original"])
    yield Check("prefill_hidden_final", hidden, io["prefill_hidden_final"])
    logits = model.logits(hidden)
    yield Check("prefill_logits", logits, io["prefill_logits"])
    for layer, length in enumerate(stream.cache.lengths):
        yield Check(f"kv_len_layer{layer + 1}", torch.tensor([length]), io[f"kv_len_layer{layer + 1}"])
    steps, ids = [logits[:, -1]], [logits[:, -1].argmax(-1)]
    for step in range(expected.shape[1] - 1):
        steps.append(model.logits(stream.feed(ids[-1], step)))
        ids.append(steps[-1].argmax(-1))
    yield Check("generated_step_logits", torch.stack(steps, dim=1), io["generated_step_logits"])
    yield Check("generated_ids", torch.stack(ids, dim=1), expected)
    plain = model.logits(model.hidden(condition)[:, -1:])
    yield Check("logits_without_pruning_last", plain, io["logits_without_pruning_last"])


def test_there_are_cases():
    assert CASES


@pytest.mark.parametrize("case", CASES)
def test_every_recorded_array_is_reproduced(case):
    found = list(checks(case, language_model(case)))
    assert not all_problems(iter(found))
    assert {check.name for check in found} | {"text_ids", "image_embeds"} == set(case.io)


@pytest.mark.parametrize("case", CASES)
def test_scaling_any_tensor_by_a_twentieth_is_noticed(case):
    model = language_model(case)
    parameters, unnoticed = model.state_dict(), []
    for name, tensor in load_state_dict(case.path / "pytorch_model.bin").items():
        scaled = apply_rules({name: tensor.float() * 1.05}, llama.RULES)
        if not scaled:
            continue  # the rotary table, which is computed and not read
        ((target, value),) = scaled.items()
        saved = parameters[target].clone()
        parameters[target].copy_(value)
        if first_problem(checks(case, model)) is None:
            unnoticed.append(name)
        parameters[target].copy_(saved)
    assert not unnoticed, f"the case does not notice: {unnoticed}"
