"""Parity with AURORA's depth tokenizer (mahtabbigverdi/Aurora-perception, commit a3da45f): every recorded array of every case."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from harness import Case, Check, all_problems, first_problem, parity_root, staged, unnoticed_changes

from armm.convert import convert
from armm.convert.aurora import rules_of
from armm.convert.containers import load_state_dict
from armm.convert.keymap import apply_rules
from tokenizers_visual import Codes, DepthVQTokenizer

FOLDER = parity_root() / "aurora"
CASES = [
    pytest.param(Case(path.parent), id=str(path.parent.relative_to(FOLDER)))
    for path in sorted(FOLDER.rglob("config.json"))
]


def load(case: Case) -> DepthVQTokenizer:
    (path,) = case.path.glob("*.pt")
    return convert("aurora", path, config=case.config["model"])


def checks(model: DepthVQTokenizer, io: dict[str, torch.Tensor]) -> Iterator[tuple[str, Callable[[], Check]]]:
    side = io["pixels"].shape[-1] // model.downsample
    grid = (1, io["pixels"].shape[-2] // model.downsample, side)
    yield "read", lambda: Check("encoder_out", model.features(io["pixels"]), io["encoder_out"])
    yield "read", lambda: Check("ids", model.encode(io["pixels"]).ids, io["ids"])
    given, encoded = Codes(ids=io["decode_ids"], grid=grid), Codes(ids=io["ids"], grid=grid)
    yield "draw", lambda: Check("decode_pixels", model.decode(given), io["decode_pixels"])
    yield "draw", lambda: Check("reconstruction", model.decode(encoded), io["reconstruction"])
    yield "draw", lambda: Check("reconstruction", model(io["pixels"])[0], io["reconstruction"])


def cannot_matter(name: str) -> str | None:
    """Why scaling the tensor `name` cannot change an output, or None where it must."""
    return "a statistic of training, not used by the model" if name.startswith("_vq_vae._ema_") else None


def test_there_are_cases():
    assert CASES or not FOLDER.is_dir()


@pytest.mark.parametrize("case", CASES)
def test_every_recorded_array_is_reproduced(case):
    found = list(staged(checks(load(case), case.io), None))
    assert not all_problems(iter(found))
    assert {check.name for check in found} | {"pixels", "decode_ids"} == set(case.io), (
        "an array of the case is not checked"
    )


@pytest.mark.parametrize("case", CASES)
def test_scaling_any_tensor_by_a_twentieth_is_noticed(case):
    model = load(case)
    (path,) = case.path.glob("*.pt")
    rules = rules_of(model.config.num_levels, model.config.num_res_blocks)
    changes = (
        (name, apply_rules({name: tensor * 1.05}, rules))
        for name, tensor in load_state_dict(path, keys=("weights",)).items()
        if not cannot_matter(name)
    )

    def noticed(name: str) -> Iterator[Check]:
        return staged(checks(model, case.io), "draw" if name.startswith(("decoder", "_vq_vae")) else "read")

    assert not unnoticed_changes(model, changes, noticed)
    assert first_problem(noticed("encoder")) is None, "the scaled tensors were not restored"
