"""Parity with AToken (apple/ml-atoken, commit 3f5afdc): every recorded array of every case, at its README's tolerance."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from harness import Case, Check, all_problems, first_problem, parity_root

from armm.convert import convert
from armm.convert.atoken import RULES
from armm.convert.containers import load_state_dict
from armm.convert.keymap import apply_rules
from tokenizers_visual import ATokenTokenizer, SparseTokens

ATOL = 1e-4
UNIT_ATOL = 2e-5  # of vectors of unit length, whose entries are small; stricter than asked
CASES = [
    pytest.param(Case(path.parent), id=path.parent.name)
    for path in sorted((parity_root() / "atoken").glob("*/config.json"))
]


def load(case: Case) -> ATokenTokenizer:
    return convert("atoken", case.checkpoint, config=case.config["arch_cfg"], dtype=torch.float32)


def tags(case: Case) -> list[str]:
    return sorted({name.split("_")[0] for name in case.io})


def given(case: Case, tag: str) -> dict[int, torch.Tensor]:
    """The pictures or videos of a tag by their number, in our layout [3, T, H, W]."""
    found = {}
    for name, tensor in case.io.items():
        if name.startswith(tag) and name.endswith("hwc"):
            video = tensor if tensor.ndim == 4 else tensor[None]
            found[int(name.split("_")[1])] = video.permute(3, 0, 1, 2)
    return dict(sorted(found.items()))


def decoded(tokenizer: ATokenTokenizer, case: Case, tag: str, latents: SparseTokens, suffix: str) -> Iterator[Check]:
    patches = tokenizer.decode_tokens(latents)
    yield Check(f"{tag}_decoded_feats{suffix}", patches.features, case.io[f"{tag}_decoded_feats{suffix}"], ATOL)
    inputs = given(case, tag)
    for number, video in enumerate(tokenizer.pictures(patches) if inputs else []):
        frames = video.transpose(0, 1)
        name = f"{tag}_pixels{suffix}_{number}"
        yield Check(name, frames[:1] if inputs[number].shape[1] == 1 else frames, case.io[name], ATOL)


def tag_checks(case: Case, tokenizer: ATokenTokenizer, tag: str) -> Iterator[Check]:
    io = case.io
    tokens = SparseTokens(io[f"{tag}_sparse_feats"], io[f"{tag}_sparse_coords"])
    inputs = given(case, tag)
    if inputs:
        own = tokenizer.tokens(list(inputs.values()))
        yield Check(f"{tag}_sparse_feats", own.features, tokens.features, 0)
        yield Check(f"{tag}_sparse_coords", own.coordinates, tokens.coordinates)
    encoding = tokenizer.encode_tokens(tokens)
    yield Check(f"{tag}_encoder_tokens", encoding.features, io[f"{tag}_encoder_tokens"], ATOL)
    yield Check(f"{tag}_moments", encoding.moments, io[f"{tag}_moments"], ATOL)
    yield Check(f"{tag}_pooled_normalized", encoding.pooled, io[f"{tag}_pooled_normalized"], UNIT_ATOL)
    if tokenizer.is_discrete:
        vectors = encoding.moments[:, : tokenizer.latent_channels]
        ids = tokenizer.quantizer.ids(vectors)
        yield Check(f"{tag}_indices", ids, io[f"{tag}_indices"])
        yield Check(f"{tag}_quantized", tokenizer.quantizer(vectors).vectors, io[f"{tag}_quantized"], ATOL)
        yield Check(f"{tag}_quantized", tokenizer.quantizer.lookup(ids), io[f"{tag}_quantized"], ATOL)
        yield from decoded(tokenizer, case, tag, tokens.replace(tokenizer.quantizer.lookup(ids)), "")
        return
    for kind, noise in (("sample", io[f"{tag}_posterior_noise"]), ("mode", None)):
        latents = tokenizer.sample(encoding.moments, noise)
        yield Check(f"{tag}_latent_{kind}", latents, io[f"{tag}_latent_{kind}"], ATOL)
        yield from decoded(tokenizer, case, tag, tokens.replace(latents), f"_{kind}")


def checks(case: Case, tokenizer: ATokenTokenizer) -> Iterator[Check]:
    for tag in tags(case):
        yield from tag_checks(case, tokenizer, tag)


def is_input(name: str) -> bool:
    return name.endswith(("hwc", "_posterior_noise")) or name.startswith("voxel3d_sparse")


def test_there_are_cases():
    assert CASES


@pytest.mark.parametrize("case", CASES)
def test_every_recorded_array_is_reproduced(case):
    found = list(checks(case, load(case)))
    assert not all_problems(iter(found))
    assert {check.name for check in found} | {name for name in case.io if is_input(name)} == set(case.io)


@pytest.mark.parametrize("case", CASES)
def test_scaling_any_tensor_by_a_twentieth_is_noticed(case):
    """On the smallest tag first, in which most tensors are noticed."""
    state, tokenizer = load_state_dict(case.checkpoint), load(case)
    ordered = sorted(tags(case), key=lambda tag: len(case.io[f"{tag}_sparse_feats"]))

    def problem() -> str | None:
        return first_problem(check for tag in ordered for check in tag_checks(case, tokenizer, tag))

    parameters, unnoticed = tokenizer.state_dict(), []
    for name, tensor in state.items():
        scaled = apply_rules({name: tensor * 1.05}, RULES)
        saved = {target: parameters[target].clone() for target in scaled}
        for target, value in scaled.items():
            parameters[target].copy_(value)
        noticed = problem() is not None
        for target, value in saved.items():
            parameters[target].copy_(value)
        if not noticed:
            unnoticed.append(name)
    assert not unnoticed, f"the case does not notice: {unnoticed}"
    assert problem() is None, "the scaled tensors were not restored"
