"""Parity with Speculative Jacobi Decoding (tyshiwo1/Accelerating-T2I-AR-with-SJD, commit b389cfb2)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from harness import Case, Check, all_problems, parity_root
from jacobi_runs import SCHEMES, differs, load, run_checks

from armm.decoding.speculative import Draft, Numbers, Verifier
from armm.decoding.speculative.jacobi import initial_drafts
from armm.decoding.speculative.verify import Evidence, Verdict


def found(kind: str) -> list[Case]:
    """Cases whose config has the entry `kind`."""
    every = [Case(path.parent) for path in sorted((parity_root() / "sjd").rglob("io.safetensors"))]
    return [pytest.param(case, id=case.name) for case in every if kind in case.config]


def judge(verifier: Verifier, logits: torch.Tensor, io: dict[str, torch.Tensor], name: str) -> Verdict:
    """All windows of a set of `rule` in one batch."""
    tokens, q = io[f"{name}.draft_tokens"][..., None], io[f"{name}.draft_prob"][:, :, None]
    accept, residual = io[f"{name}.u_accept"].double()[..., None], io[f"{name}.u_resample"].double()[:, None]
    numbers = Numbers(torch.zeros_like(accept), torch.zeros_like(accept), accept, residual.clamp(min=0))
    lengths = [tokens.shape[1]] * len(tokens)
    return verifier(Evidence(logits[:, :, None], Draft(tokens[:, 1:], q[:, 1:]), lengths, numbers))


def rule_checks(verdict: Verdict, io: dict[str, torch.Tensor], name: str) -> Iterator[Check]:
    drafts, out = io[f"{name}.draft_tokens"], io[f"{name}.sampled_tokens"].clone()
    expected = io[f"{name}.accept_prob"]
    length = drafts.shape[1]
    for row, accepted in enumerate(verdict.accepted.tolist()):
        out[row, :accepted] = drafts[row, 1 : accepted + 1]
        if accepted < length - 1:
            out[row, accepted] = verdict.next[row, 0]
    yield Check(f"{name}.num_committed", verdict.accepted + 1, io[f"{name}.num_committed"])
    yield Check(f"{name}.out_tokens", out, io[f"{name}.out_tokens"])
    reached = expected >= 0
    yield Check(f"{name}.accept_prob", verdict.acceptance[..., 0].double()[reached], expected[reached], atol=1e-5)


@pytest.mark.parametrize("case", found("sets"))
def test_the_verification_rule(case: Case) -> None:
    problems = []
    for name in case.config["sets"]:
        verdict = judge(Verifier(), case.io[f"{name}.target_prob"].log(), case.io, name)
        problems += all_problems(rule_checks(verdict, case.io, name))
    assert not problems, problems


@pytest.mark.parametrize("case", found("cases"))
def test_initial_drafts(case: Case) -> None:
    for name, facts in case.config["cases"].items():
        io = {key.removeprefix(f"{name}."): value for key, value in case.io.items() if key.startswith(f"{name}.")}
        known = torch.cat([io["input_ids"], io.get("kept_draft_tokens", io["input_ids"][:, :0])], dim=1)
        scores = torch.cat([io["scores"], io.get("kept_draft_scores", io["scores"][:, :0])], dim=1)
        start, width = facts["prefill_num"] + 3, facts["img_width"] + 1
        places = known.shape[1] + torch.arange(facts["num_new"])
        scheme = SCHEMES[facts["scheme"]] if known.shape[1] >= start else "random"
        tokens = initial_drafts(
            scheme,
            io["random_tokens"][..., None],
            known[:, -1:],
            scores[:, -1:].argmax(-1),
            keep_random=((places - start) % width == 0)[None],
        )
        assert torch.equal(tokens[..., 0], io["draft_tokens"]), name


@pytest.mark.parametrize("case", found("runs"))
def test_whole_generations(case: Case) -> None:
    model = load(case)
    problems = []
    for name, run in case.config["runs"].items():
        problems += all_problems(run_checks(case, model, name, Verifier(), run["max_num_new_tokens"]))
    assert not problems, problems[:8]


@pytest.mark.parametrize("case", found("runs"))
def test_every_tensor_matters(case: Case) -> None:
    model = load(case)
    runs = {name: run for name, run in case.config["runs"].items() if run["do_sample"]}
    unmoved = []
    for key, parameter in model.named_parameters():
        kept = parameter.data.clone()
        parameter.data.mul_(1.05)
        if not any(differs(case, model, name, Verifier(), run["max_num_new_tokens"]) for name, run in runs.items()):
            unmoved.append(key)
        parameter.data = kept
    # The norms of queries and keys take a scale of their projections back out. Only ids are recorded, which need not move when these
    # norms change a little; the probabilities in GSD's runs of the same model do.
    excused = ("to_q.weight", "to_k.weight", "query_norm.weight", "query_norm.bias", "key_norm.weight", "key_norm.bias")
    assert all(key.endswith(excused) for key in unmoved), unmoved
