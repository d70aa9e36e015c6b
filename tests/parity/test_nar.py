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
import torch.nn.functional as F
from harness import Case, Check, all_problems, cases, first_problem

from armm.convert import CheckpointError, convert, larp, nar
from armm.convert.containers import load_state_dict
from armm.decoding.base import DecodingOutput
from armm.decoding.guidance import Guidance
from armm.decoding.neighboring import NeighboringDecoding, near_to_far_mask
from armm.decoding.sampling import Sampler
from armm.model import AutoregressiveModel
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


# ---------------------------------------------------------------------- the transformers


TRANSFORMER_FACTS = (
    "dim", "n_layer", "n_head", "num_classes", "caption_dim", "vocab_size", "block_size", "cls_token_num", "model_type", "latent_shape",
    "max_seq_len", "medusa_attention_num",
)  # fmt: skip


def transformer_facts(case: Case) -> dict[str, Any]:
    return {name: case.config[name] for name in TRANSFORMER_FACTS if name in case.config}


def load_transformer(case: Case, folder: Path) -> AutoregressiveModel:
    return convert("nar", case.checkpoint, config=transformer_facts(case))


def transformer_from_state(case: Case, state: Mapping[str, torch.Tensor]) -> AutoregressiveModel:
    return nar.convert_state_dict(state, config=transformer_facts(case))


def transformer_checks(model: AutoregressiveModel, case: Case) -> Iterator[Check]:
    io, config, decoding = case.io, case.config, NeighboringDecoding()

    def close(name: str, actual: torch.Tensor) -> Check:
        return Check(name, actual, io[name], atol=1e-4, rtol=1e-5)

    if model.condition_type == "class":
        condition = model.condition(labels=io["labels"])
    else:
        condition = model.condition(features=io["cond"], mask=io["cond_mask"].bool())
    null = model.null_condition(condition.batch, like=condition)
    logits = decoding.image_logits(model, io["ids"], condition)
    yield close("logits_full", logits)
    yield close("logits_full_uncond", decoding.image_logits(model, io["ids"], null))
    yield close("loss", F.cross_entropy(logits.flatten(0, 1), io["ids"].flatten())[None])
    groups = decoding.groups(model.grid)
    order = torch.cat(groups)
    steps = torch.cat([torch.full_like(group, step) for step, group in enumerate(groups)])
    yield close("decode_order", order)
    yield close("decode_step", steps)
    mask = near_to_far_mask(condition.length, model.grid).expand(condition.batch, -1, -1)
    if condition.mask is not None:
        real = torch.cat([condition.mask, condition.mask.new_ones(io["ids"].shape)], dim=1)
        mask = (mask & real[:, None]) | torch.eye(mask.shape[1], dtype=torch.bool)
    yield close("mask_full", mask.to(io["mask_full"].dtype))
    kept = next(name for name in io if name.startswith("cache_mask"))
    # The rows and columns that round the authors' cache up to a multiple of 8 are never read.
    yield Check(kept, mask[0].to(io[kept].dtype), io[kept][: mask.shape[1], : mask.shape[1]])
    if "freqs_cis" in io:
        yield close("freqs_cis", torch.view_as_real(model.image_positions().rotary.squeeze(-2)))
    scale, greedy = config["cfg_scale"], Sampler(do_sample=False)

    def decode(guidance: Guidance, **options: Any) -> DecodingOutput:
        return decoding(model, condition, null, guidance=guidance, **{"sampler": greedy, **options})

    for name, guidance in (("greedy", Guidance()), ("greedy_cfg", Guidance(scale))):
        output = decode(guidance, record_logits=True)
        assert output.num_calls == len(groups) == decoding.num_calls(model.grid)
        yield close(f"{name}_ids", output.ids)
        yield close(f"{name}_logits_in_order", output.logits[:, order])
    interval = Guidance(scale, interval=config["cfg_interval"])
    yield close("greedy_cfg_interval_ids", decode(interval).ids)
    if "sample_ids" in io:
        sampler = Sampler(**config["sampling"])
        yield close("sample_ids", decode(Guidance(scale), sampler=sampler, noise=io["sample_exp_noise"]).ids)


TRANSFORMER = Kind(
    load_transformer,
    transformer_from_state,
    transformer_checks,
    inputs={"labels", "ids", "cond", "cond_mask", "lengths", "sample_exp_noise"},
)
KINDS: dict[str, Kind] = {
    "nar_c2i": TRANSFORMER,
    "nar_t2i": TRANSFORMER,
    "nar_video": TRANSFORMER,
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
    assert {check.name for check in found} == set(case.io) - kind.inputs, "an array of the case is not checked"


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
