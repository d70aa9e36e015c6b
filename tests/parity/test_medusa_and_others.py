"""Parity with Medusa (FasterDecoding/Medusa, commit e2a5d20c) and Token Recycling (smpanaro/token-recycling, commit 3995232d)."""

from __future__ import annotations

import pytest
import torch
from harness import Case, parity_root

from armm.decoding.speculative import DraftTree, TypicalVerifier
from armm.decoding.speculative.medusa import medusa_candidates, medusa_posterior
from armm.decoding.speculative.recycling import deepest_match, recycled_tokens


def found(name: str) -> list[Case]:
    every = [Case(path.parent) for path in sorted((parity_root() / "medusa_and_others").rglob("io.safetensors"))]
    return [pytest.param(case, id=case.name) for case in every if name in case.io]


def padded(paths: list[list[int]]) -> torch.Tensor:
    longest = max(map(len, paths))
    return torch.tensor([path + [-1] * (longest - len(path)) for path in paths])


@pytest.mark.parametrize("case", found("medusa_attn_mask"))
def test_medusa(case: Case) -> None:
    io, config = case.io, case.config
    tree = DraftTree.from_paths(config["medusa_choices"])
    nodes = padded(tree.leaf_paths())
    assert torch.equal(tree.mask().float(), io["medusa_attn_mask"][0, 0])
    assert torch.equal(torch.tensor(tree.depths), io["medusa_position_ids"])
    assert torch.equal(nodes, io["retrieve_indices"])
    heads = 1 + max(io["tree_indices"].tolist()) // 10
    index = [0, *(1 + rank + 10 * (depth - 1) for rank, depth in zip(tree.ranks, tree.depths[1:], strict=True))]
    assert torch.equal(torch.tensor(index), io["tree_indices"]) and heads >= tree.depth
    for name, facts in config["cases"].items():
        root = io[f"{name}.candidates"][:1, 0]
        if facts["temperature"] == 0:
            assert int(root) == int(io[f"{name}.logits"].argmax())
        tokens = medusa_candidates(root, io[f"{name}.medusa_logits"][:, 0, 0][None], tree)
        assert torch.equal(tokens, io[f"{name}.tree_candidates"]), name
        gathered = torch.cat([tokens[0], tokens.new_zeros(1)])[nodes]  # node -1 reads an appended token 0
        assert torch.equal(gathered, io[f"{name}.candidates"]), name
        verifier = TypicalVerifier(facts["posterior_threshold"], facts["posterior_alpha"])
        leaf, length = medusa_posterior(tree, tokens[0], io[f"{name}.node_logits"], verifier, facts["temperature"])
        assert (leaf, length) == (int(io[f"{name}.best_candidate"]), int(io[f"{name}.accept_length"])), name


@pytest.mark.parametrize("case", found("adjacency"))
def test_token_recycling(case: Case) -> None:
    io = case.io
    tree = DraftTree(io["node_parent"][1:].tolist(), io["node_rank"][1:].tolist())
    assert torch.equal(torch.tensor(tree.depths), io["relative_position_ids"])
    assert torch.equal(tree.mask().long(), io["tree_attention_mask"].long())
    for name in sorted({key.split(".")[0] for key in io if key.endswith(".root")}):
        tokens = recycled_tokens(io["adjacency"][None], io[f"{name}.root"], tree)[0]
        assert torch.equal(tokens, io[f"{name}.sequence"]), name
        longest = deepest_match(tree, tokens.tolist(), io[f"{name}.model_argmax"][0].tolist())
        assert longest == io[f"{name}.longest"].tolist(), name
