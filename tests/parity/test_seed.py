"""Parity with SEED (AILab-CVC/SEED, commit 93b3cf40): every recorded array of every case, at its README's tolerance."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from harness import Case, Check, all_problems, cases, first_problem

from armm.convert import convert, eva
from armm.convert.containers import load_state_dict
from armm.convert.keymap import apply_rules
from armm.convert.seed_tokenizer import RULES, VISION
from tokenizers_visual import Codes, SEEDTokenizer

CASES = cases("seed")
INPUTS = {"image", "random_token_ids"}


def facts(config: dict[str, Any]) -> dict[str, Any]:
    """What tensors do not say."""
    return {
        "vision_heads": config["vit"]["num_heads"],
        "num_heads": config["bert"]["num_attention_heads"],
        "decoder_heads": config["blocks_num_heads"],
    }


def pixels_of(model: Any, normalised: torch.Tensor) -> torch.Tensor:
    """Pixels in [-1, 1] of what the vision transformer is given."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in model.pixel_statistics)
    return 2 * (normalised * std + mean) - 1


def load(case: Case) -> SEEDTokenizer:
    return convert("seed", case.path / "seed_quantizer.pt", config=facts(case.config))


def checks(model: SEEDTokenizer, io: dict[str, torch.Tensor]) -> Iterator[Check]:
    pixels = pixels_of(model, io["image"])
    yield Check("vit_output", model.vision.encode(io["image"]), io["vit_output"])
    yield Check("ln_vision_output", model.image_features(pixels), io["ln_vision_output"])
    features = model.query_features(pixels)
    yield Check("qformer_output", features, io["qformer_output"])
    yield Check("pre_quant", model.quant_proj(features), io["pre_quant"])
    codes = model.encode(pixels)
    yield Check("token_ids", codes.ids, io["token_ids"])
    yield Check("decoded_query_features", model.decoded_features(model.embed(codes)), io["decoded_query_features"])
    yield Check("image_embedding", model.condition(codes).pooled, io["image_embedding"])
    drawn = model.condition(Codes(ids=io["random_token_ids"])).pooled
    yield Check("random_image_embedding", drawn, io["random_image_embedding"])


def test_there_are_cases():
    assert CASES


@pytest.mark.parametrize("case", CASES)
def test_every_recorded_array_is_reproduced(case):
    found = list(checks(load(case), case.io))
    assert not all_problems(iter(found))
    assert {check.name for check in found} | INPUTS == set(case.io), "an array of the case is not checked"


# ---------------------------------------------------------------------- the cases notice every tensor


def cannot_matter(name: str) -> str | None:
    """Why scaling the tensor `name` cannot change an output, or None where it must."""
    if name == "pos_embed" or name.startswith("blocks."):
        return "of a loss of training"
    if name in ("query_tokens", "reverse_tokens"):
        return "goes into a layer norm, which drops its scale"
    if name.endswith("position_ids"):
        return "a table of numbers that is not used"
    if name.startswith("Reverse_") and any(f".attention.self.{part}." in name for part in ("query", "key")):
        return "the one query can only look at itself"
    if name.endswith(".self.key.bias"):
        return "a key bias adds the same number to all logits of a query, and the softmax drops it"
    return None


@pytest.mark.parametrize("case", CASES)
def test_scaling_any_tensor_by_a_twentieth_is_noticed(case):
    state, model, io = load_state_dict(case.path / "seed_quantizer.pt"), load(case), case.io
    parameters, unnoticed = model.state_dict(), []
    for name, tensor in state.items():
        if cannot_matter(name):
            continue
        changed = apply_rules(eva.joined_biases(with_partner(state, name, tensor * 1.05), VISION), RULES)
        saved = {target: parameters[target].clone() for target in changed}
        for target, value in changed.items():
            parameters[target].copy_(value)
        if first_problem(checks(model, io)) is None:
            unnoticed.append(name)
        for target, value in saved.items():
            parameters[target].copy_(value)
    assert not unnoticed, f"the case does not notice: {unnoticed}"
    assert first_problem(checks(model, io)) is None, "the scaled tensors were not restored"


def with_partner(state: dict[str, torch.Tensor], name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """`name` with `tensor`, and the other of the two biases that become one."""
    other = name.replace("q_bias", "v_bias") if name.endswith("q_bias") else name.replace("v_bias", "q_bias")
    return {name: tensor} if other == name else {name: tensor, other: state[other]}
