"""Parity with OPERA (shikiw/OPERA, commit 61426ef): every step of every recorded search, at its README's tolerance."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from harness import Case, Check, all_problems, first_problem, parity_root

from armm.condition import Condition
from armm.convert import llama
from armm.convert.containers import load_state_dict
from armm.convert.keymap import apply_rules
from armm.decoding.beam import BeamSearch
from armm.decoding.opera import OPERA
from armm.multimodal_model import MultimodalModel
from armm.nn.attention import record_attention

CASES = [
    pytest.param(Case(path.parent), id=path.parent.name)
    for path in sorted((parity_root() / "opera").glob("*/pytorch_model.bin"))
]


def language_model(case: Case) -> MultimodalModel:
    names = {**llama.OPTION_NAMES, "vocab_size": "vocab_size"}
    config = {name: value for name, value in case.config["config"].items() if name in names}
    return llama.convert(case.path / "pytorch_model.bin", config=config, dtype=torch.float32)


def prompt(model: MultimodalModel, io: dict[str, torch.Tensor]) -> Condition:
    """Text, image features that are embeddings already, text."""
    before, after = (model.embed(io[f"text_{part}_ids"][None]) for part in ("before", "after"))
    embeds = torch.cat([before, io["image_embeds"][None], after], dim=1)
    return Condition(embeds, None, torch.arange(embeds.shape[1])[None])


def run(case: Case, model: MultimodalModel, search: Any) -> torch.Tensor:
    config = case.config
    place = config["key_position"]
    output = search(
        model, prompt(model, case.io), stop_id=config["eos_token_id"], max_tokens=config["max_new_tokens"],
        image=(place["image_start"], place["image_end"] + 1),
    )  # fmt: skip
    (text,) = output.tokens()
    ended = config["eos_token_id"] is not None and len(text) < config["max_new_tokens"]
    return torch.tensor([text + [config["eos_token_id"]] * ended])


def opera(case: Case) -> OPERA:
    config = case.config
    return OPERA(
        num_beams=config["num_beams"], length_penalty=config["length_penalty"], scale=config["scale_factor"],
        threshold=config["threshold"], candidates=config["num_attn_candidates"], penalty=config["penalty_weights"],
        history=config["window_size"], trace=[],
    )  # fmt: skip


def full_rows(model: MultimodalModel, condition: Condition, response: torch.Tensor) -> torch.Tensor:
    """Normalised attention of the last layer of prompt and response [W, n], without a cache."""
    index = condition.length + torch.arange(response.shape[1])
    whole = condition.repeat(len(response)).extend(model.embed(response), index)
    layer = len(model.trunk.blocks) - 1
    with record_attention([layer]) as record:
        model.hidden(whole)
    rows = record[layer][0].amax(1)
    return rows / rows.sum(-1, keepdim=True)


def checks(case: Case, model: MultimodalModel) -> Iterator[Check]:
    io, search = case.io, opera(case)
    condition = prompt(model, io)
    yield Check("inputs_embeds", condition.embeds, io["inputs_embeds"])
    generated = run(case, model, search)
    for step, (ours, theirs) in enumerate(zip(search.trace, case.config["trace"], strict=False)):
        name = f"step{step}/"
        names = {
            "candidate_tokens": (ours["candidates"], {}), "candidate_logits": (ours["logits"], {}),
            "image_attention_sum": (ours["image"], {}), "rollback_locs": (ours["locations"], {}),
            "rollback_scores_fp16_as_f32": (ours["highest"].float(), {"rtol": 2e-3}),
            "local_scores_fp16_as_f32": (ours["scores"].float(), {"rtol": 2e-3}),
            "penalty": (ours["penalty"], {"rtol": 2e-3}), "local_window_scaled": (ours["window"], {"atol": 1e-3}),
            "logits_to_beam_search": (ours["judged"], {"rtol": 1e-6}), "input_ids": (ours["ids"], {}),
        }  # fmt: skip
        for key, (value, tolerance) in names.items():
            if name + key in io:
                yield Check(name + key, value, io[name + key], **tolerance)
        yield Check(name + "agreed", torch.tensor(ours["agreed"]), torch.tensor(theirs["rollback_loc"]))
        returned = torch.tensor(ours["returned"] is not None)
        yield Check(name + "returned", returned, torch.tensor(theirs["rolled_back"]))
        if name + "attn_rows_normalised" in io:
            expected = io[name + "attn_rows_normalised"]
            yield Check(name + "last rows", ours["rows"], expected[:, :, -1])
            whole = [
                full_rows(model, condition, torch.cat([ours["asked"], ours["candidates"][:, k : k + 1]], dim=1))
                for k in range(expected.shape[1])
            ]
            yield Check(name + "attn_rows_normalised", torch.stack(whole, dim=1), expected)
    yield Check("steps", torch.tensor(len(search.trace)), torch.tensor(len(case.config["trace"])))
    yield Check("generated_ids", generated, io["generated_ids"])
    plain = BeamSearch(num_beams=case.config["num_beams"], length_penalty=case.config["length_penalty"])
    yield Check("plain_beam_search_ids", run(case, model, plain), io["plain_beam_search_ids"])


def quick_checks(case: Case, model: MultimodalModel) -> Iterator[Check]:
    """One uncached pass, then everything: what a changed tensor shows in is found early."""
    name = "step0/"
    condition, words = prompt(model, case.io), case.io[name + "candidate_tokens"]
    logits = model.logits(model.hidden(condition)[:, -1])
    yield Check("candidate_logits", logits.topk(words.shape[1]).values[0], case.io[name + "candidate_logits"][0])
    yield from checks(case, model)


def test_there_are_cases():
    assert CASES


@pytest.mark.parametrize("case", CASES)
def test_every_recorded_array_is_reproduced(case):
    found = list(checks(case, language_model(case)))
    assert not all_problems(iter(found))
    given = {"text_before_ids", "text_after_ids", "image_embeds"}
    assert set(case.io) <= {check.name for check in found} | given, "an array of the case is not checked"


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
        if first_problem(quick_checks(case, model)) is None:
            unnoticed.append(name)
        parameters[target].copy_(saved)
    assert not unnoticed, f"the case does not notice: {unnoticed}"
