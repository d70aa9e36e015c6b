"""Parity with LANTERN and LANTERN++ (jadohu/LANTERN, commit 3a56e451)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from harness import Case, Check, all_problems, first_problem, parity_root

from armm.decoding.sampling import Sampler
from armm.decoding.speculative import DraftTree, RelaxedVerifier
from armm.decoding.speculative.drafter import FeatureDrafter, convert_drafter, grow_tree
from armm.decoding.speculative.relaxed import nearest_codes, relaxed_greedy_posterior, relaxed_posterior


def found(name: str) -> list[Case]:
    every = [Case(path.parent) for path in sorted((parity_root() / "lantern").rglob("io.safetensors"))]
    return [pytest.param(case, id=case.name) for case in every if any(name in key for key in case.io)]


def padded(paths: list[list[int]], width: int | None = None) -> torch.Tensor:
    width = width or max(map(len, paths))
    return torch.tensor([path + [-1] * (width - len(path)) for path in paths])


def parent_rows(tree: DraftTree) -> list[int]:
    """Row of the drafter's distributions, inside a level, from which the children of every node are drawn."""
    rows, counts = [], {}
    for node in range(len(tree)):
        depth = tree.depths[node]
        rows.append(counts.get(depth, 0))
        counts[depth] = rows[-1] + bool(tree.children[node])
    return rows


@pytest.mark.parametrize("case", found("tree_attn_mask"))
def test_trees(case: Case) -> None:
    for name, choices in case.config["tree_choices"].items():
        tree, io = DraftTree.from_paths(choices), case.io
        assert torch.equal(tree.mask().float(), io[f"{name}.tree_attn_mask"][0, 0]), name
        assert torch.equal(torch.tensor(tree.depths), io[f"{name}.tree_position_ids"]), name
        leaves = io[f"{name}.retrieve_indices"]
        assert torch.equal(padded(sorted(tree.leaf_paths()), leaves.shape[1]), leaves), name
        rows, top = parent_rows(tree), case.config["topk"]
        parents = [node for node in range(len(tree)) if tree.children[node]]
        flat = [1 + rank + top * parents.index(parent) for rank, parent in zip(tree.ranks, tree.parents, strict=True)]
        assert torch.equal(torch.tensor([0, *flat]), io[f"{name}.tree_indices"]), name
        drawn_from = [[-1, *(rows[parent] for parent in path[:-1])] for path in sorted(tree.leaf_paths())]
        ours, real = padded(drawn_from, leaves.shape[1]), leaves >= 0
        assert torch.equal(ours[real], io[f"{name}.p_indices"][real]), name
        for leaf, path in enumerate(sorted(tree.leaf_paths())):
            for place, node in enumerate(path[1:], start=1):
                earlier = [other for other in tree.children[tree.parents[node - 1]] if other < node]
                recorded = io[f"{name}.b_indices"][leaf, place].tolist()
                assert [other for other in recorded if other >= 0] == earlier, name


@pytest.mark.parametrize("case", found("codebook"))
def test_neighbours(case: Case) -> None:
    vectors, table = case.io["codebook"], case.io["nearest_latents"].long()
    ours = nearest_codes(vectors, torch.arange(len(vectors)), table.shape[1])

    def distances(ids: torch.Tensor) -> torch.Tensor:
        return (vectors[ids] - vectors[:, None]).norm(dim=-1)

    assert torch.allclose(distances(ours), distances(table), atol=1e-4)


def posterior(case: Case, name: str, facts: dict[str, Any], sample: str, nodes: torch.Tensor, tree: DraftTree) -> list[Check]:
    io = {key.removeprefix(f"{sample}."): value for key, value in case.io.items() if key.startswith(f"{sample}.")}
    delta, offset = facts["lantern_delta"] if facts["lantern"] else 0.0, facts["image_token_offset"]
    bound, delta = ("relative", delta - 1) if delta > 1 else ("absolute", delta)
    verifier = RelaxedVerifier(delta, facts["lantern_k"], bound)
    table = case.io["nearest_latents"].long()

    def nearest(tokens: torch.Tensor) -> torch.Tensor:
        return table[(tokens - offset).clamp(min=0)][..., : facts["lantern_k"] + 1] + offset

    candidates, logits = io["candidates"], io["node_logits"]
    if facts["mode"] == "greedy":
        leaf, length = relaxed_greedy_posterior(verifier, candidates, nodes, logits, nearest)
        following = logits[nodes[leaf, length]]
    else:
        sampler = Sampler(facts["temperature"], facts["top_k"])
        drafted = None
        if facts["mode"] == "static":
            rows = parent_rows(tree)

            def drafted(leaf: int, level: int) -> tuple[float, torch.Tensor]:
                node = int(nodes[leaf, level])
                parent = tree.parents[node - 1]
                q = io["drafter_probs"][level - 1, rows[parent]].clone()
                siblings = [other for other in tree.children[parent] if other < node]
                if siblings:
                    q[io["node_tokens"][siblings]] = 0
                    q = q / q.sum()
                return float(io["cart_candidates_prob"][leaf, level]), q

        leaf, length, following = relaxed_posterior(
            verifier, candidates, nodes, sampler.filter(logits), nearest, io["uniforms"].tolist(), drafted
        )
    return [
        Check(f"{sample}.best_candidate", torch.tensor(leaf), io["best_candidate"]),
        Check(f"{sample}.accept_length", torch.tensor(length), io["accept_length"]),
        Check(f"{sample}.sample_p", following, io["sample_p"], atol=1e-5),
    ]


@pytest.mark.parametrize("case", found("accept_length"))
def test_posteriors(case: Case) -> None:
    problems = []
    for name, facts in case.config["cases"].items():
        tree = DraftTree.from_paths(case.config["tree_choices"][facts["tree"]])
        width = case.io[f"{name}.0.candidates"].shape[1]
        for number in range(facts["samples"]):
            sample = f"{name}.{number}"
            tokens, candidates = case.io[f"{sample}.node_tokens"], case.io[f"{sample}.candidates"]
            paths = leaves_in_order(tree, tokens, candidates, width)
            problems += [check.problem for check in posterior(case, name, facts, sample, paths, tree) if check.problem]
    assert not problems, problems


def leaves_in_order(tree: DraftTree, tokens: torch.Tensor, candidates: torch.Tensor, width: int) -> torch.Tensor:
    """The paths to the leaves in the authors' order, which sorts them by node."""
    paths = padded(sorted(tree.leaf_paths()), width)
    gathered = torch.where(paths >= 0, tokens[paths.clamp(min=0)], -1)
    assert torch.equal(gathered, candidates)
    return paths


def drafter_checks(case: Case, drafter: FeatureDrafter) -> Iterator[Check]:
    io, config = case.io, case.config
    head = io["lm_head.weight"]
    cache = drafter.trunk.allocate_cache(2, 1024)

    def guided(logits: torch.Tensor) -> torch.Tensor:
        conditional, null = logits.chunk(2)
        return null + config["cfg_scale"] * (conditional - null)

    for step in sorted({key.split(".")[0] for key in io if key.startswith("step")}):
        hidden, ids = io[f"{step}.hidden_states"], io[f"{step}.input_ids"]
        tokens = ids[:, 1:][:, cache.length :]
        grown = grow_tree(
            drafter, lambda states: states @ head.T, tokens, hidden, cache,
            top_k=config["top_k"], depth=config["depth"], nodes=config["total_tokens"] - 1, combine=guided,
        )  # fmt: skip
        yield Check(f"{step}.draft_tokens", grown.tokens[None], io[f"{step}.draft_tokens"])
        yield Check(f"{step}.tree_mask", grown.tree.mask().float()[None, None], io[f"{step}.tree_mask"])
        yield Check(f"{step}.tree_position_ids", torch.tensor(grown.tree.depths), io[f"{step}.tree_position_ids"])
        leaves = [grown.tree.path(node) for node in range(1, len(grown.tree)) if not grown.tree.children[node]]
        yield Check(f"{step}.retrieve_indices", padded(leaves), io[f"{step}.retrieve_indices"])
    for name in [key for key in io if key.endswith(".out_hidden")]:
        # Recorded after the last step, when the mask of its tree's last level still held for the last rows and columns.
        hidden, tokens = io[name.replace("out_hidden", "hidden_states")], io[name.replace("out_hidden", "input_ids")][:, 1:]
        count = tokens.shape[1]
        mask = torch.ones(count, count, dtype=torch.bool).tril()
        mask[-len(grown.seen) :, -grown.seen.shape[1] :] &= grown.seen
        again = drafter.trunk.allocate_cache(2, count)
        out = drafter(tokens, hidden, drafter.positions()[:count], again, mask)
        yield Check(name, out, io[name])


def drafter_of(case: Case) -> FeatureDrafter:
    state = torch.load(case.path / "pytorch_model.bin", weights_only=True)
    return convert_drafter(state, case.config["drafter_config"] | {"rms_norm_eps": case.config["rms_norm_eps"]})


@pytest.mark.parametrize("case", found("out_hidden"))
def test_drafter(case: Case) -> None:
    problems = all_problems(drafter_checks(case, drafter_of(case)))
    assert not problems, problems


@pytest.mark.parametrize("case", found("out_hidden"))
def test_every_tensor_of_the_drafter_matters(case: Case) -> None:
    drafter = drafter_of(case)
    for name, parameter in drafter.named_parameters():
        kept = parameter.data.clone()
        parameter.data.mul_(1.05)
        assert first_problem(drafter_checks(case, drafter)) is not None, name
        parameter.data = kept


def test_a_wrong_drafter_is_refused() -> None:
    for case in (parameter.values[0] for parameter in found("out_hidden")):
        state = torch.load(case.path / "pytorch_model.bin", weights_only=True)
        with pytest.raises(ValueError, match="unknown tensors"):
            convert_drafter({**state, "extra.weight": torch.zeros(1)}, case.config["drafter_config"])
