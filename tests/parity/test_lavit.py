"""Parity with LaVIT (jy0205/LaVIT, commit 8cde9b4f): every recorded array of every case, at its README's tolerance."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Case, Check, all_problems, cases, first_problem
from test_seed import pixels_of, with_partner

from armm.convert import convert, eva
from armm.convert.containers import load_state_dict
from armm.convert.keymap import apply_rules
from armm.convert.lavit_tokenizer import DECODER_RULES, TOKENIZER_RULES, VISION, is_decoder
from tokenizers_visual import LaVITDecoder, LaVITTokenizer

CASES = cases("lavit")
INPUTS = {"image", "gumbel_noise", "quantized", "token_nums"}
# The language model's vocabulary: 32000 begins an image, 32001 ends it, the codes follow.
BEGIN, END, FIRST = 32000, 32001, 32002


def checkpoint(case: Case) -> Path:
    """The file that the case is about."""
    (file,) = [path for path in case.path.glob("*.bin") if "tokenizer" in path.name]
    return file


def facts(case: Case, state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What tensors do not say."""
    config = case.config
    if is_decoder(state):
        return {"num_heads": config["dec_heads"]}
    return {"vision_heads": config["width"] // config["eva_head_width"], "num_heads": config["heads"]}


def load(case: Case) -> LaVITTokenizer | LaVITDecoder:
    file = checkpoint(case)
    return convert("lavit", file, config=facts(case, load_state_dict(file)))


def tokenizer_checks(model: LaVITTokenizer, io: dict[str, torch.Tensor]) -> Iterator[Check]:
    pixels = pixels_of(model, io["image"])
    yield Check("encoder_features", model.vision.encode(io["image"]), io["encoder_features"])
    features = model.image_features(pixels)
    yield Check("keep_log_probs", model.selector(features), io["keep_log_probs"])
    for name, noise in (("sampled", io["gumbel_noise"]), ("argmax", None)):
        keep = model.select(features, noise=noise)
        yield Check(f"{name}_keep_decision", keep.long(), io[f"{name}_keep_decision"])
        yield Check(f"{name}_merged_features", model.merger(features, keep), io[f"{name}_merged_features"])
        codes = model.encode(pixels, noise=noise)
        yield Check(f"{name}_token_nums", codes.mask.sum(1), io[f"{name}_token_nums"])
        yield Check(f"{name}_quantized", model.embed(codes)[codes.mask], io[f"{name}_quantized"])
        ids = codes.ids + FIRST
        yield Check(f"{name}_llm_ids_concat", ids[codes.mask], io[f"{name}_llm_ids_concat"])
        written = [
            token for row, real in zip(ids, codes.mask, strict=True) for token in (BEGIN, *row[real].tolist(), END)
        ]
        special = f"{name}_llm_ids_with_special_concat"
        yield Check(special, torch.tensor(written), io[special])
        read, mask = model.reading_features(pixels, noise=noise)
        yield Check(f"{name}_continuous_embeds_concat", read[mask], io[f"{name}_continuous_embeds_concat"])


def decoder_checks(model: LaVITDecoder, io: dict[str, torch.Tensor]) -> Iterator[Check]:
    numbers = io["token_nums"]
    mask = torch.arange(int(numbers.max())) < numbers[:, None]
    vectors = torch.zeros(*mask.shape, io["quantized"].shape[1])
    vectors[mask] = io["quantized"]
    condition = model(vectors, mask)
    name = "unet_condition" if condition.pooled is None else "prompt_embeds"
    yield Check(name, condition.embeds, io[name])
    if condition.pooled is not None:
        yield Check("pooled_prompt_embeds", condition.pooled, io["pooled_prompt_embeds"])


def checks(model: Any, io: dict[str, torch.Tensor]) -> Iterator[Check]:
    return decoder_checks(model, io) if isinstance(model, LaVITDecoder) else tokenizer_checks(model, io)


def test_there_are_cases():
    assert CASES


@pytest.mark.parametrize("case", CASES)
def test_every_recorded_array_is_reproduced(case):
    found = list(checks(load(case), case.io))
    assert not all_problems(iter(found))
    inputs = INPUTS & set(case.io)
    assert {check.name for check in found} | inputs == set(case.io), "an array of the case is not checked"


# ---------------------------------------------------------------------- the cases notice every tensor


def cannot_matter(name: str) -> str | None:
    """Why scaling the tensor `name` cannot change an output, or None where it must."""
    if name.startswith((f"{VISION}norm.", f"{VISION}head.")):
        return "behind the features that are used"
    if name.endswith((".key.bias", ".k_proj.bias")):
        return "a key bias adds the same number to all logits of a query, and the softmax drops it"
    return None


def factor(name: str) -> float:
    """By how much the tensor `name` is scaled: what is only seen through the nearest codes takes more."""
    return -4.0 if name.startswith("encode_task_layer.") else 1.05


@pytest.mark.parametrize("case", CASES)
def test_scaling_any_tensor_by_a_twentieth_is_noticed(case):
    state, model, io = load_state_dict(checkpoint(case)), load(case), case.io
    rules = DECODER_RULES if isinstance(model, LaVITDecoder) else TOKENIZER_RULES
    if isinstance(model, LaVITTokenizer):
        state |= {VISION + name: value for name, value in load_state_dict(case.path / "eva_vitg_psz14.bin").items()}
    parameters, unnoticed = model.state_dict(), []
    for name, tensor in state.items():
        if cannot_matter(name):
            continue
        changed = apply_rules(eva.joined_biases(with_partner(state, name, tensor * factor(name)), VISION), rules)
        saved = {target: parameters[target].clone() for target in changed}
        for target, value in changed.items():
            parameters[target].copy_(value)
        if first_problem(checks(model, io)) is None:
            unnoticed.append(name)
        for target, value in saved.items():
            parameters[target].copy_(value)
    assert not unnoticed, f"the case does not notice: {unnoticed}"
    assert first_problem(checks(model, io)) is None, "the scaled tensors were not restored"
