"""Parity with Grouped Speculative Decoding (junhyukso/GSD, commit 4216c7c2)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import Case, all_problems, parity_root
from jacobi_runs import differs, load, run_checks
from test_sjd import judge, rule_checks

from armm.decoding.speculative import GroupedVerifier
from armm.decoding.speculative.grouped import dynamic_clusters
from armm.model import AutoregressiveModel


def found(kind: str) -> list[Case]:
    every = [Case(path.parent) for path in sorted((parity_root() / "gsd").rglob("io.safetensors"))]
    return [pytest.param(case, id=case.name) for case in every if kind in case.config]


def arguments(facts: dict[str, Any]) -> dict[str, Any]:
    return {
        "group_size": 2 * facts["gsd_half_window"],
        "p_threshold": facts["gsd_p_thr"],
        "distance_threshold": facts["gsd_d_thr"],
        "distance_ids": facts.get("distance_table_rows", 10000),
    }


@pytest.mark.parametrize("case", found("sets"))
def test_the_verification_rule(case: Case) -> None:
    problems = []
    for name, facts in case.config["sets"].items():
        verifier = GroupedVerifier(**arguments(facts), vectors=case.io[f"{name}.embedding"])
        verdict = judge(verifier, case.io[f"{name}.target_logits"], case.io, name)
        problems += all_problems(rule_checks(verdict, case.io, name))
    assert not problems, problems


@pytest.mark.parametrize("case", found("sets"))
def test_groups(case: Case) -> None:
    for name, facts in case.config["sets"].items():
        io, size = case.io, facts["V"]
        logits, tokens = io[f"{name}.target_logits"][:, :-1], io[f"{name}.draft_tokens"][:, 1:]
        ids, members = dynamic_clusters(logits, logits.softmax(-1), tokens, io[f"{name}.embedding"], **arguments(facts))
        expected = io[f"{name}.cluster"]
        if expected.shape[-1] == size:
            reached, plain = (expected != 255).all(-1), (expected == 2).any(-1)
            groups = expected == 1
        else:
            reached, plain = (expected != -2).all(-1), (expected == -1).all(-1)
            groups = torch.zeros(*tokens.shape, size + 1, dtype=torch.bool)
            groups = groups.scatter(-1, torch.where(expected >= 0, expected, size), True)[..., :size]
        assert torch.equal(members.any(-1)[reached], ~plain[reached]), name
        chosen = reached & ~plain
        ours = torch.zeros(*tokens.shape, size, dtype=torch.bool)
        for row, place in chosen.nonzero().tolist():
            ours[row, place, ids[row, place][members[row, place]]] = True
        assert torch.equal(ours[chosen], groups[chosen]), name


def verifier_of(run: dict[str, Any], model: AutoregressiveModel) -> GroupedVerifier:
    return GroupedVerifier(**arguments(run), vectors=model.token_embedding.weight)


@pytest.mark.parametrize("case", found("runs"))
def test_whole_generations(case: Case) -> None:
    model = load(case)
    problems = []
    for name, run in case.config["runs"].items():
        # the authors' window is always 16, whatever they are given
        problems += all_problems(run_checks(case, model, name, verifier_of(run, model), 16))
    assert not problems, problems[:8]


@pytest.mark.parametrize("case", found("runs"))
def test_every_tensor_matters(case: Case) -> None:
    model = load(case)
    name, run = next(iter(case.config["runs"].items()))
    unmoved = []
    for key, parameter in model.named_parameters():
        kept = parameter.data.clone()
        parameter.data.mul_(1.05)
        if not differs(case, model, name, verifier_of(run, model), 16):
            unmoved.append(key)
        parameter.data = kept
    # the norms of queries and keys take a scale of their projections back out
    assert all(key.endswith(("to_q.weight", "to_k.weight")) for key in unmoved), unmoved
