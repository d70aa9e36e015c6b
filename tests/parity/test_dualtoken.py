"""Parity with DualToken (songweii/DualToken, commit 29e7c84): every recorded array of every case, at its README's tolerance."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import (
    Case,
    Check,
    all_problems,
    first_problem,
    hidden_by_group_norm,
    parity_root,
    staged,
    unnoticed_changes,
)

from armm.convert import convert
from armm.convert.containers import load_state_dict
from armm.convert.dualtoken import VISION, prepare, rules_of
from armm.convert.keymap import apply_rules
from tokenizers_visual import Codes, DualTokenTokenizer

FOLDER = parity_root() / "dualtoken"
CASES = [
    pytest.param(Case(path.parent), id=str(path.parent.relative_to(FOLDER)))
    for path in sorted(FOLDER.rglob("config.json"))
]
INPUTS = {"image", "random_code_pix", "text_ids"}


def load(case: Case, **options: Any) -> DualTokenTokenizer:
    names = ("rqvaesiglip", "siglip_vision_config", "siglip_text_config")
    return convert("dualtoken", case.checkpoint, config={**{n: case.config[n] for n in names}, "text": True, **options})


def checks(
    model: DualTokenTokenizer, io: dict[str, torch.Tensor], drawn: float = 1e-4
) -> Iterator[tuple[str, Callable[[], Check]]]:
    """`drawn`: tolerance of reconstructions."""
    image = io["image"]
    grid = (1, *io["code_sem"].shape[1:3])
    maps = {"sem": (model.semantic_quantizer, 0), "pix": (model.pixel_quantizer, 1)}

    def laid_out(tokens: torch.Tensor) -> torch.Tensor:
        return tokens.unflatten(1, grid[1:])

    def joined(semantic: torch.Tensor, pixel: torch.Tensor) -> Codes:
        return Codes(ids=torch.cat([semantic, pixel], dim=-1).flatten(1, 2), grid=grid)

    codes = joined(io["code_sem"], io["code_pix"])
    other = joined(torch.zeros_like(io["code_sem"]), io["random_code_pix"])
    yield "pixel", lambda: Check("prequant_pix", laid_out(model.features(image).pixel), io["prequant_pix"])
    yield "semantic", lambda: Check("prequant_sem", laid_out(model.features(image).semantic), io["prequant_sem"])
    for kind, (quantizer, place) in maps.items():
        vectors = io[f"prequant_{kind}"].flatten(1, 2)
        name = f"code_{kind}"
        yield "codes", lambda name=name, q=quantizer, v=vectors: Check(name, laid_out(q.encode(v)), io[name])
        name = f"commit_loss_{kind}"
        yield "codes", lambda name=name, q=quantizer, v=vectors: Check(name, q(v).commitment_loss.view(1), io[name])
        name = f"depth_embeddings_{kind}"
        yield "codes", lambda name=name, p=place: Check(name, laid_out(model.depth_embeddings(codes)[p]), io[name])
    yield "encode", lambda: Check("code_sem", laid_out(model.split(model.encode(image))[0]), io["code_sem"])
    yield "encode", lambda: Check("code_pix", laid_out(model.split(model.encode(image))[1]), io["code_pix"])
    width = model.config.codebook_dim
    yield "codes", lambda: Check("quantized_pix", model.embed(codes)[..., width:], io["quantized_pix"])
    yield "words", lambda: Check("semantic_tokens", model.semantic_tokens(codes), io["semantic_tokens"])
    yield "pool", lambda: Check("pooled", model.pool(io["semantic_tokens"]), io["pooled"])
    yield "draw", lambda: Check("reconstruction", model.decode(codes), io["reconstruction"], atol=drawn)
    yield "draw", lambda: Check("random_reconstruction", model.decode(other), io["random_reconstruction"], atol=drawn)
    yield (
        "pool",
        lambda: Check("image_features_normalized", model.image_features(codes), io["image_features_normalized"]),
    )
    yield (
        "text",
        lambda: Check("text_features_normalized", model.text_features(io["text_ids"]), io["text_features_normalized"]),
    )
    yield "text", lambda: Check("siglip_logits", model.similarity(codes, io["text_ids"]), io["siglip_logits"])
    last = "hidden_states_last_prequant"  # of the whole tower, semantic tokens in the place of a hidden state
    yield "pool", lambda: Check(last, model.rest_of_tower(io["semantic_tokens"]), io[last])


def test_there_are_cases():
    assert CASES or not FOLDER.is_dir()


@pytest.mark.parametrize("case", CASES)
def test_every_recorded_array_is_reproduced(case):
    model = load(case)
    found = list(staged(checks(model, case.io), None))
    assert not all_problems(iter(found))
    assert {check.name for check in found} | INPUTS == set(case.io), "an array of the case is not checked"
    assert model.config.shared_codebook == case.config["rqvaesiglip"]["vq_sem"]["shared_codebook"]


# ---------------------------------------------------------------------- the cases notice every tensor


def cannot_matter(name: str, state: dict[str, torch.Tensor]) -> str | None:
    """Why scaling the tensor `name` cannot change an output, or None where it must."""
    if name.endswith((".cluster_size_ema", ".embed_ema")):
        return "a statistic of training, not used by the model"
    if name.endswith(".zero_k_bias"):
        return "zeros"
    if name.endswith((".k_proj.bias", ".k.bias")):
        return "a key bias adds the same number to all logits of a query, and the softmax drops it"
    return hidden_by_group_norm(name, state)


STAGES = {
    "siglip_model.text_model": "text",
    "siglip_model.logit": "text",
    "siglip_model.vision_model.head": "pool",
    "siglip_model.vision_model.post_layernorm": "pool",
    "prequant_sem": "semantic",
    "postquant_sem": "words",
    "quantizer": "codes",
    "postquant_pix": "draw",
    "post_quant_conv": "draw",
    "decoder": "draw",
}


@pytest.mark.parametrize("case", CASES)
def test_scaling_any_tensor_by_a_twentieth_is_noticed(case):
    model = load(case, shared_codebook=False)  # the file holds a codebook for each depth
    state = load_state_dict(case.checkpoint)
    rules = rules_of(len(model.config.channel_multipliers))

    def changed(name: str) -> dict[str, torch.Tensor]:
        part = {name: state[name] * 1.05}
        if name.startswith(VISION) and "_proj." in name and ".out_proj." not in name:
            together = [name.replace(name.split(".")[-2], f"{other}_proj") for other in "qkv"]
            part = {**{other: state[other] for other in together}, **part}
        return apply_rules(prepare(part, text=True, shared=False), rules)

    changes = ((name, changed(name)) for name in state if not cannot_matter(name, state))
    # A bias of the queries in an attention of the decoder moves pictures by half of their tolerance only: more than rounding does.
    drawn = [check() for stage, check in checks(model, case.io) if stage == "draw"]
    rounding = max(float((check.actual - check.expected).abs().max()) for check in drawn)

    def noticed(name: str) -> Iterator[Check]:
        stage = next((stage for prefix, stage in STAGES.items() if name.startswith(prefix)), "pixel")
        return staged(checks(model, case.io, drawn=min(4 * rounding, 1e-4) if name else 1e-4), stage)

    assert not unnoticed_changes(model, changes, noticed)
    assert first_problem(noticed("")) is None, "the scaled tensors were not restored"
    assert F.cosine_similarity(case.io["pooled"], case.io["image_features_normalized"]).min() > 0.9999
