"""Parity with PAR (Epiphqny/PAR, commit d96acea): every recorded array of every case, at its README's tolerance."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import Case, Check, all_problems, cases, first_problem

from armm.convert import convert
from armm.convert.containers import load_state_dict
from armm.convert.keymap import apply_rules
from armm.convert.par import TRANSFORMER_RULES
from armm.decoding.guidance import Guidance
from armm.decoding.orders import parallel_regions
from armm.decoding.parallel_groups import ParallelGroupsDecoding, group_mask
from armm.decoding.sampling import Sampler
from armm.model import AutoregressiveModel

FACTS = (
    "dim", "n_layer", "n_head", "num_classes", "vocab_size", "block_size", "cls_token_num", "model_type", "spe_token_num", "ar_token_num",
)  # fmt: skip


def load(case: Case) -> AutoregressiveModel:
    """The case's checkpoint through the public converter."""
    return convert("par", case.checkpoint, config={key: case.config[key] for key in FACTS if key in case.config})


def checks(case: Case, model: AutoregressiveModel) -> Iterator[Check]:
    io, config = case.io, case.config
    decoding = ParallelGroupsDecoding(round(config["ar_token_num"] ** 0.5))
    order = parallel_regions(model.grid, decoding.regions)

    def close(name: str, actual: torch.Tensor) -> Check:
        return Check(name, actual, io[name], atol=1e-4, rtol=1e-5)

    yield close("sequence_to_raster", order)
    yield close("ids_sequence", io["ids_raster"][:, order])
    condition, batch = model.condition(labels=io["labels"]), len(io["labels"])
    null = model.null_condition(batch)
    logits = decoding.image_logits(model, io["ids_raster"], condition)[:, order]
    yield close("logits_full", logits)
    yield close("logits_full_uncond", decoding.image_logits(model, io["ids_raster"], null)[:, order])
    yield close("loss", F.cross_entropy(logits.flatten(0, 1), io["ids_sequence"].flatten())[None])
    rows = io["group_mask_full"].shape[-1]
    total = model.prefix_slots + order.numel() + decoding.group_size - 1
    mask = group_mask(model.prefix_slots, decoding.group_size, total - model.prefix_slots)[:rows, :rows]
    yield close("group_mask_full", mask.to(io["group_mask_full"].dtype))
    yield close("cache_mask", mask[: io["cache_mask"].shape[-2], : io["cache_mask"].shape[-1]].to(io["cache_mask"].dtype))
    index = decoding.sequence_index(model, model.grid)[: io["freqs_cis"].shape[0]]
    yield close("freqs_cis", torch.view_as_real(model.positions_for(index).rotary.squeeze(-2)))
    for name, scale in (("greedy", 1.0), ("greedy_cfg", config["cfg_scale"])):
        output = decoding(
            model, condition, null, sampler=Sampler(do_sample=False), guidance=Guidance(scale), record_logits=True
        )
        yield close(f"{name}_ids_raster", output.ids)
        yield close(f"{name}_ids_sequence", output.ids[:, order])
        yield close(f"{name}_logits", output.logits[:, order])
        assert output.num_calls == decoding.num_calls(model.grid)


CASES = cases("par", "par_c2i")


def test_there_are_cases():
    assert CASES


@pytest.mark.parametrize("case", CASES)
def test_every_recorded_array_is_reproduced(case):
    found = list(checks(case, load(case)))
    assert not all_problems(iter(found))
    assert {check.name for check in found} | {"labels", "ids_raster"} == set(case.io), "an array of the case is not checked"


@pytest.mark.parametrize("case", CASES)
def test_scaling_any_tensor_by_a_twentieth_is_noticed(case):
    model, state = load(case), load_state_dict(case.checkpoint)
    assert not unnoticed_tensors(case, model, state, TRANSFORMER_RULES, checks)
    assert first_problem(checks(case, model)) is None, "the scaled tensors were not restored"


def unnoticed_tensors(case: Case, model: Any, state: Any, rules: Any, run: Any) -> list[str]:
    """Names of the authors' tensors that can be scaled by 1.05 without any recorded array noticing."""
    attention = model.trunk.blocks[0].attention
    context = {"qkv_rows": tuple(getattr(attention, f"to_{part}").out_features for part in "qkv")}
    parameters, unnoticed = model.state_dict(), []
    for name, tensor in state.items():
        scaled = apply_rules({name: tensor * 1.05}, rules, context)
        saved = {target: parameters[target].clone() for target in scaled}
        for target, value in scaled.items():
            parameters[target].copy_(value)
        if scaled and first_problem(run(case, model)) is None:
            unnoticed.append(name)
        for target, value in saved.items():
            parameters[target].copy_(value)
    return unnoticed
