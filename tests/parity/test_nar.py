"""Parity with NAR (ThisisBillhe/NAR, commit 225c1fb): every recorded array of every case, at its README's tolerance.

Each kind of case has an entry in `KINDS`: how its checkpoint is loaded, what is compared, which arrays are inputs, and which
tensors cannot matter.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Case, Check, all_problems, cases, first_problem

from armm.convert import CheckpointError, convert, larp
from armm.convert.containers import load_state_dict
from tokenizers_visual import Codes, LARPTokenizer


@dataclass(frozen=True)
class Kind:
    """How one kind of case is checked.

    Args:
        load: the case's checkpoint through the public converter; the folder is for files the case implies.
        from_state: the same from tensors under the authors' names.
        checks: the comparisons of a model with the case.
        inputs: recorded arrays that are inputs and are not compared.
        cannot_matter: authors' names of tensors whose scale cannot change an output, with the reason.
    """

    load: Callable[[Case, Path], Any]
    from_state: Callable[[Case, Mapping[str, torch.Tensor]], Any]
    checks: Callable[[Any, Case], Iterator[Check]]
    inputs: set[str]
    cannot_matter: dict[str, str] = field(default_factory=dict)


# ---------------------------------------------------------------------- the video tokenizer


def larp_arguments(case: Case) -> dict[str, Any]:
    return {**case.config["constructor"], "block_layernorm_eps": case.config["block_layernorm_eps"]}


def load_larp(case: Case, folder: Path) -> LARPTokenizer:
    """As the authors' loader has it: a folder with the weights and the constructor arguments."""
    (folder / case.checkpoint.name).symlink_to(case.checkpoint.resolve())
    (folder / "tokenizer.json").write_text(json.dumps(larp_arguments(case)))
    return convert("larp", folder)


def larp_from_state(case: Case, state: Mapping[str, torch.Tensor]) -> LARPTokenizer:
    return larp.convert_state_dict(state, config=larp_arguments(case))


def larp_checks(model: LARPTokenizer, case: Case) -> Iterator[Check]:
    io = case.io
    pixels = io["video"] * 2 - 1
    yield Check("projected_z", model.features(pixels), io["projected_z"])
    codes = model.encode(pixels)
    yield Check("ids", codes.ids, io["ids"])
    yield Check("quantized_projected", model.post_quant_proj(model.embed(codes)), io["quantized_projected"])
    yield Check("recon", (model.decode(codes) + 1) / 2, io["recon"])
    yield Check("decode_pixels", (model.decode(Codes(ids=io["decode_ids"])) + 1) / 2, io["decode_pixels"])


KINDS: dict[str, Kind] = {
    "larp_tokenizer": Kind(
        load_larp,
        larp_from_state,
        larp_checks,
        inputs={"video", "decode_ids"},
        cannot_matter={
            "bottleneck.regularizer.embedding.weight": "code vectors are normalised to unit length, so a common scale drops out"
        },
    ),
}
CASES = [case for kind in KINDS for case in cases("nar", kind)]


def kind_of(case: Case) -> Kind:
    return KINDS[case.config["kind"]]


def test_there_are_cases_of_every_kind():
    assert {case.values[0].config["kind"] for case in CASES} == set(KINDS)


@pytest.mark.parametrize("case", CASES)
def test_every_recorded_array_is_reproduced(case, tmp_path):
    kind = kind_of(case)
    found = list(kind.checks(kind.load(case, tmp_path), case))
    assert not all_problems(iter(found))
    assert {check.name for check in found} | kind.inputs == set(case.io), "an array of the case is not checked"


@pytest.mark.parametrize("case", CASES)
def test_scaling_any_tensor_by_a_twentieth_is_noticed(case):
    kind, state = kind_of(case), load_state_dict(case.checkpoint)

    def noticed(changed: Mapping[str, torch.Tensor]) -> bool:
        try:
            model = kind.from_state(case, changed)
        except CheckpointError:  # a fixed table that is not what it must be
            return True
        return first_problem(kind.checks(model, case)) is not None

    unnoticed = {name for name, tensor in state.items() if not noticed({**state, name: tensor * 1.05})}
    assert unnoticed <= set(kind.cannot_matter), f"the case does not notice: {unnoticed - set(kind.cannot_matter)}"
    assert not noticed(state)
