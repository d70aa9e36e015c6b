"""Parity with VAR (FoundationVision/VAR, commit 78b9539): every recorded array of every case, at its README's tolerance."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from harness import Case, Check, all_problems, first_problem, hidden_by_group_norm, parity_root

from armm.convert import convert
from armm.convert.containers import load_state_dict
from armm.convert.keymap import apply_rules
from armm.convert.var import TRANSFORMER_RULES, tokenizer_rules
from armm.decoding import Guidance, NextScaleDecoding, Sampler, scale_masks
from armm.next_scale_model import NextScaleModel
from pipelines.var import VARPipeline
from tokenizers_visual import Codes, MultiScaleVQTokenizer
from tokenizers_visual.multi_scale import refiner_index

GREEDY = Sampler(top_k=1, do_sample=False)


def var_cases(kind: str) -> list[Any]:
    """The cases of the authors' class `kind`, as pytest parameters."""
    folder = parity_root() / "var"
    found = [Case(path.parent) for path in sorted(folder.rglob("config.json"))]
    return [
        pytest.param(case, id=str(case.path.relative_to(folder)))
        for case in found
        if case.config["class"].endswith("." + kind)
    ]


TOKENIZERS, TRANSFORMERS = var_cases("VQVAE"), var_cases("VAR")


def load(case: Case) -> Any:
    """The case's checkpoint through the public converter."""
    return convert("var", case.checkpoint, config=case.config["constructor"])


@functools.cache
def tokenizer_of(case: Case) -> MultiScaleVQTokenizer:
    """The tokenizer that belongs to a transformer's case; it is not changed by any test."""
    return load(Case((case.path / case.config["vqvae_case"]).resolve()))


def numbered(io: dict[str, torch.Tensor], prefix: str) -> list[tuple[str, int]]:
    """The arrays called `prefix` and a number."""
    found = [(name, re.fullmatch(prefix + r"(\d+)", name)) for name in io]
    return [(name, int(match[1])) for name, match in found if match]


# ---------------------------------------------------------------------- what each kind of case holds


def tokenizer_checks(model: MultiScaleVQTokenizer, io: dict[str, torch.Tensor], config: Any) -> Iterator[Check]:
    quantizer, scales = model.quantizer, model.scales
    features = model.features(io["image"])
    yield Check("latent_f", features, io["latent_f"])
    random = Codes(ids=io["random_ids_all"], scales=scales)
    yield Check("pixels_random_ids", model.decode(random).clamp(-1, 1), io["pixels_random_ids"])
    yield Check("transformer_input_random_ids", quantizer.inputs(random.ids), io["transformer_input_random_ids"])
    steps = list(quantizer.steps(features))
    for name, step in numbered(io, "ids_scale_"):
        yield Check(name, steps[step][0], io[name])
    for name, step in numbered(io, "fhat_scale_"):
        yield Check(name, steps[step][1], io[name])
    codes = model.encode(io["image"])
    yield Check("ids_all", codes.ids, io["ids_all"])
    yield Check("transformer_input", quantizer.inputs(codes.ids), io["transformer_input"])
    for name, step in numbered(io, "pixels_up_to_scale_"):
        yield Check(name, model.decode(codes, num_scales=step + 1).clamp(-1, 1), io[name])
    yield Check("pixels_unclamped", model.decode(codes), io["pixels_unclamped"])
    index = [refiner_index(step, len(scales), len(quantizer.refiners)) for step in range(len(scales))]
    yield Check("phi_index_per_scale", torch.tensor(index), io["phi_index_per_scale"])
    for name, shorter in ((key.removesuffix("_patch_nums"), value) for key, value in config.items() if "patch_nums" in key):
        if name in io:
            yield Check(name, model.encode(io["image"], scales=shorter).ids, io[name])


def transformer_checks(model: NextScaleModel, case: Case) -> Iterator[Check]:
    io, config = case.io, case.config
    tokenizer = tokenizer_of(case)
    pipe = VARPipeline(tokenizer=tokenizer, transformer=model, decoding=NextScaleDecoding())
    pipe.set_progress_bar_config(disable=True)
    labels, scales = io["labels"], model.scales
    batch = len(labels)
    inputs = tokenizer.quantizer.inputs(io["teacher_ids"], scales)
    yield Check("teacher_input", inputs, io["teacher_input"])
    yield Check("teacher_logits", model(inputs, model.condition(labels)), io["teacher_logits"])
    yield Check("teacher_logits_uncond", model(inputs, model.null_condition(batch)), io["teacher_logits_uncond"])

    def generate(scale: float, **arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        settings = {"top_k": 1, "top_p": 1.0, "do_sample": False, **arguments}
        out = pipe(labels, guidance_scale=scale, output_type="pt", output_codes=True, **settings)
        return out.codes.ids, out.images

    for name in io:
        if name.startswith("greedy_ids_cfg_"):
            scale = name.removeprefix("greedy_ids_cfg_")
            ids, pixels = generate(float(scale))
            yield Check(name, ids, io[name])
            yield Check(f"greedy_pixels_cfg_{scale}", pixels, io[f"greedy_pixels_cfg_{scale}"])
    if "smooth_pixels" in io:
        smooth = config["smooth"]
        filters = {"top_k": smooth["top_k"], "top_p": smooth["top_p"] or 1.0, "do_sample": True, "more_smooth": True}
        # a Gumbel variable is minus the logarithm of an exponential one
        _, pixels = generate(smooth["cfg"], noise=io["smooth_gumbel_noise"].double().neg().exp().float(), **filters)
        yield Check("smooth_pixels", pixels, io["smooth_pixels"])
    if "edit_mask" in io:
        yield from edit_checks(model, case, pipe)
    for name in io:
        match = re.fullmatch(r"filter_kept(?:_k(\d+))?(?:_p([\d.]+))?", name)
        if match:
            sampler = Sampler(top_k=int(match[1] or 0), top_p=float(match[2] or 1.0), top_p_from_tail=True)
            yield Check(name, sampler.filter(io["filter_logits"].clone()).isfinite(), io[name])


def edit_checks(model: NextScaleModel, case: Case, pipe: VARPipeline) -> Iterator[Check]:
    io, edit, scales = case.io, case.config["edit"], model.scales
    batch = len(io["labels"])
    keep = scale_masks(io["edit_mask"], scales)
    parts = pipe.tokenizer.quantizer.split(keep, scales)
    for name, step in numbered(io, "edit_keep_mask_scale_"):
        yield Check(name, parts[step].reshape(io[name].shape).int(), io[name])
    latents = torch.where(keep.expand(batch, -1), io["edit_keep_ids"], -1)
    arguments = {"guidance_scale": edit["cfg"], "top_k": edit["top_k"], "top_p": 1.0, "do_sample": False}
    yield Check("edit_pixels", pipe(io["labels"], latents=latents, output_type="pt", **arguments).images, io["edit_pixels"])
    # the raw samples, before the kept codes are pasted in, are the largest logits
    output = NextScaleDecoding()(
        model,
        pipe.tokenizer.quantizer,
        model.condition(io["labels"]),
        model.null_condition(batch),
        sampler=GREEDY,
        guidance=Guidance(1.0 + edit["cfg"], schedule="linear"),
        known_ids=io["edit_keep_ids"],
        known_mask=keep.expand(batch, -1),
        record_logits=True,
    )
    yield Check("edit_sampled_ids", output.logits.argmax(-1), io["edit_sampled_ids"])


def checks(case: Case, model: Any) -> Iterator[Check]:
    if isinstance(model, MultiScaleVQTokenizer):
        return tokenizer_checks(model, case.io, case.config)
    return transformer_checks(model, case)


INPUTS = {
    "models.vqvae.VQVAE": {"image", "random_ids_all"},
    "models.var.VAR": {
        "labels", "teacher_ids", "smooth_gumbel_noise", "edit_keep_ids", "edit_mask", "filter_logits",
    },
}  # fmt: skip


@pytest.mark.parametrize("case", [*TOKENIZERS, *TRANSFORMERS])
def test_every_recorded_array_is_reproduced(case):
    model = load(case)
    found = list(checks(case, model))
    assert not all_problems(iter(found))
    unchecked = set(case.io) - {check.name for check in found} - INPUTS[case.config["class"]]
    assert not unchecked, f"arrays of the case that are not checked: {unchecked}"


@pytest.mark.parametrize("case", TRANSFORMERS)
def test_the_file_alone_says_everything_about_a_transformer(case):
    if case.config["constructor"].get("attn_l2_norm"):
        model, told = convert("var", case.checkpoint), load(case)
        assert dict(model.config) == dict(told.config) and list(model.scales) == case.config["constructor"]["patch_nums"]


# ---------------------------------------------------------------------- the cases notice every tensor


def cannot_matter(name: str, state: dict[str, torch.Tensor]) -> str | None:
    """Why scaling the tensor `name` changes nothing, or None."""
    if name in ("quantize.ema_vocab_hit_SV", "lvl_1L", "attn_bias_for_masking"):
        return "statistics of training, and buffers that follow from the sizes of the scales"
    if name.endswith("zero_k_bias") and not state[name].any():
        return "zeros, so scaling changes nothing"
    return hidden_by_group_norm(name, state)


@pytest.mark.parametrize("case", [*TOKENIZERS, *TRANSFORMERS])
def test_scaling_any_tensor_by_a_twentieth_is_noticed(case):
    state, model = load_state_dict(case.checkpoint), load(case)
    context: dict[str, Any] = {}
    if isinstance(model, MultiScaleVQTokenizer):
        rules = tokenizer_rules(len(model.config.channel_multipliers), len(model.quantizer.refiners))
    else:
        rules, context = TRANSFORMER_RULES, {"qkv_rows": (model.trunk.dim,) * 3}
    parameters = model.state_dict()
    unnoticed = []
    for name, tensor in state.items():
        if cannot_matter(name, state):
            continue
        scaled = apply_rules({name: tensor * 1.05}, rules, context)
        saved = {target: parameters[target].clone() for target in scaled}
        for target, value in scaled.items():
            parameters[target].copy_(value)
        problem = first_problem(checks(case, model))
        for target, value in saved.items():
            parameters[target].copy_(value)
        if problem is None:
            unnoticed.append(name)
    assert not unnoticed, f"the case does not notice: {unnoticed}"
    assert first_problem(checks(case, model)) is None, "the scaled tensors were not restored"
