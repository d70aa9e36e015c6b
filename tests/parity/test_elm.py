"""Parity with ELM (Pepper-lll/LMforImageGeneration, commit c2f29f0): every recorded array of every case, at its README's tolerance."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Case, Check, all_problems, cases, first_problem

from armm.convert import convert
from armm.convert.containers import load_state_dict
from armm.convert.elm import autoencoder_only, convert_state_dict
from armm.convert.elm_tokenizer import tokenizer_layout
from armm.convert.keymap import apply_rules
from armm.decoding.masked_tokens import MaskedTokenDecoding, join_noise
from armm.decoding.next_token import NextTokenDecoding
from armm.decoding.sampling import Sampler
from armm.model import AutoregressiveModel
from pipelines.elm import ELMPipeline
from tokenizers_visual import BinaryTokenizer, Codes

TOKENIZER_FACTS = (
    "n_channels", "nf", "ch_mult", "emb_dim", "codebook_size", "norm_first", "use_tanh", "token_each", "code_dim",
)  # fmt: skip
TRANSFORMER_FACTS = ("token_each", "code_dim", "pos_type", "dim", "n_layer", "n_head", "num_classes", "block_size")
SCHEDULES = ("constant", "linear", "cos", "log", "square", "square_root")
BAE, AR, MLM = "bae_tokenizer", "elm_ar", "elm_mlm"


def checkpoint(case: Case) -> Path:
    (path,) = case.path.glob("checkpoint.*")
    return path


def facts(case: Case) -> dict[str, Any]:
    names = TOKENIZER_FACTS if case.config["kind"] == BAE else TRANSFORMER_FACTS
    return {name: case.config[name] for name in names if name in case.config}


def pipeline_of(model: AutoregressiveModel, decoding: Any) -> ELMPipeline:
    """A pipeline around `model` and the smallest tokenizer that has its codes."""
    bits = model.sub_codes * (model.vocab_size.bit_length() - 1)
    tokenizer = BinaryTokenizer(
        base_channels=32, channel_multipliers=[1], encoder_blocks=1, decoder_blocks=1, z_channels=32, bits=bits,
        sub_codes=model.sub_codes,
    )  # fmt: skip
    pipe = ELMPipeline(tokenizer=tokenizer, transformer=model, decoding=decoding)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ours(ids: torch.Tensor) -> torch.Tensor:
    """Recorded ids [B, N, K] in our shape: [B, N] for one sub-code."""
    return ids.squeeze(-1) if ids.shape[-1] == 1 else ids


# ---------------------------------------------------------------------- what each kind of case holds


def decoder_checks(model: BinaryTokenizer, io: dict[str, torch.Tensor]) -> Iterator[Check]:
    height, width = (side // model.downsample for side in io["image"].shape[-2:])
    given = Codes(ids=ours(io["decode_indices"]), grid=(1, height, width))
    bits = model.to_bits(given).transpose(1, 2).unflatten(2, (height, width))
    yield Check("decode_bits", bits.long(), io["decode_bits"].long())
    image = (model.decode(given) + 1) / 2
    yield Check("decode_pixels", image, io["decode_pixels"])
    bytes_ = (255 * image).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    yield Check("decode_pixels_uint8", bytes_, io["decode_pixels_uint8"], atol=1)


def tokenizer_checks(model: BinaryTokenizer, io: dict[str, torch.Tensor], config: dict[str, Any]) -> Iterator[Check]:
    pixels = 2 * io["image"] - 1
    features = model.features(pixels)
    grid = (1, *features.shape[-2:])

    def as_map(value: torch.Tensor) -> torch.Tensor:
        return value.transpose(1, 2).unflatten(2, grid[1:])

    def decoded(codes: Codes) -> torch.Tensor:
        return (model.decode(codes) + 1) / 2

    def as_ids(codes: Codes) -> torch.Tensor:
        return codes.ids.view(len(codes.ids), -1, model.sub_codes)

    yield Check("encoder_features", features, io["encoder_features"])
    quantized = model.quantizer(features.flatten(2).transpose(1, 2))
    yield Check("bit_probs", as_map(quantized.probabilities), io["bit_probs"])
    yield from decoder_checks(model, io)
    codes = model.encode(pixels)
    yield Check("indices", as_ids(codes), io["indices"])
    yield Check("bits", as_map(model.to_bits(codes)).long(), io["bits"].long())
    yield Check("quant", as_map(model.embed(codes)), io["quant"])
    yield Check("recon", decoded(codes), io["recon"])
    yield Check("recon", (model(pixels)[0] + 1) / 2, io["recon"])
    drawn = model.encode(pixels, sample=True, uniform=io["sample_uniform"].flatten(2).transpose(1, 2))
    yield Check("sampled_bits", as_map(model.to_bits(drawn)).long(), io["sampled_bits"].long())
    yield Check("sampled_decode", decoded(drawn), io["sampled_decode"])


def close(name: str, actual: torch.Tensor, expected: torch.Tensor) -> Check:
    return Check(name, actual.view(expected.shape), expected, atol=1e-4, rtol=1e-5)


def ar_checks(model: AutoregressiveModel, io: dict[str, torch.Tensor], config: dict[str, Any]) -> Iterator[Check]:
    labels, ids = io["labels"], io["ids"]
    condition, null = model.condition(labels=labels), model.null_condition(len(labels))
    yield close("logits_full", model(ours(ids)[:, :-1], condition), io["logits_full"])
    yield close("logits_full_uncond", model(ours(ids)[:, :-1], null), io["logits_full_uncond"])
    yield Check("freqs_cis", torch.view_as_real(model.image_positions().rotary.squeeze(-2)), io["freqs_cis"])
    pipe, scale, sampling = pipeline_of(model, NextTokenDecoding()), config["cfg_scale"], config["sampling"]

    def generate(**arguments: Any) -> torch.Tensor:
        return pipe(class_labels=labels, output_type="latent", **{"do_sample": False, **arguments}).images

    def logits(scale: float, schedule: str) -> torch.Tensor:
        settings = pipe.check_settings(
            guidance_scale=scale, guidance_schedule=schedule, guidance_power=None, temperature=None, top_k=None,
            do_sample=None, num_inference_steps=None,
        )  # fmt: skip
        greedy = Sampler(do_sample=False)
        guidance = pipe.guidance(settings)
        return pipe.decoding(
            model, condition, null, sampler=greedy, guidance=guidance, noise=None, record_logits=True
        ).logits

    yield close("greedy_logits", logits(1.0, "constant"), io["greedy_logits"])
    yield close("greedy_ids", generate(guidance_scale=1.0), io["greedy_ids"])
    for schedule in SCHEDULES:
        name = f"greedy_cfg_{schedule}"
        if f"{name}_logits" in io:
            yield close(f"{name}_logits", logits(scale, schedule), io[f"{name}_logits"])
        yield close(f"{name}_ids", generate(guidance_scale=scale, guidance_schedule=schedule), io[f"{name}_ids"])
    start = ours(ids).clone()
    start[:, config["prefix_len"] :] = -1
    continued = generate(guidance_scale=scale, guidance_schedule="linear", latents=start)
    yield close("prefix_greedy_ids", continued, io["prefix_greedy_ids"])
    noise = io["sample_exp_noise"]
    noise = noise.squeeze(2) if model.sub_codes == 1 else noise
    sampled = generate(
        guidance_scale=scale, guidance_schedule=sampling["cfg_schedule"], do_sample=True, noise=noise,
        top_k=sampling["top_k"], temperature=sampling["temperature"],
    )  # fmt: skip
    yield close("sample_ids", sampled, io["sample_ids"])


def mlm_checks(model: AutoregressiveModel, io: dict[str, torch.Tensor], config: dict[str, Any]) -> Iterator[Check]:
    labels, ids, mask = io["labels"], io["ids"], io["mask"]
    batch, tokens, parts = ids.shape
    condition, null = model.condition(labels=labels), model.null_condition(batch)
    masked = ids.masked_fill(mask.bool(), model.mask_id)

    def logits(ids: torch.Tensor, condition: Any) -> torch.Tensor:
        return model(ours(ids), condition)[:, 1:]

    yield close("logits", logits(masked, condition), io["logits"])
    yield close("logits_uncond", logits(masked, null), io["logits_uncond"])
    yield close("logits_all_masked", logits(torch.full_like(ids, model.mask_id), condition), io["logits_all_masked"])
    pipe = pipeline_of(model, MaskedTokenDecoding(mask_schedule=config["mask_schtype"]))
    steps, sampling = config["num_iter"], config["sampling"]

    def generate(**arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The ids, and what was fed in every step."""
        states = [torch.full_like(ids, model.mask_id)]

        def keep(pipe: Any, step: int, time: int, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            after = tensors["latents"].view(ids.shape)
            states.append(after.masked_fill(after < 0, model.mask_id))
            return {}

        result = pipe(
            class_labels=labels, output_type="latent", num_inference_steps=steps, guidance_scale=config["cfg_scale"],
            callback_on_step_end=keep, **arguments,
        )  # fmt: skip
        return result.images, torch.stack(states[:-1])

    found, states = generate(do_sample=False, guidance_schedule="constant")
    yield close("greedy_states", states, io["greedy_states"])
    yield close("greedy_ids", found, io["greedy_ids"])
    found, _ = generate(do_sample=False, guidance_schedule="linear")
    yield close("greedy_linear_ids", found, io["greedy_linear_ids"])
    guesses, confidence = ((-io[f"noise_{kind}_gumbel"]).exp().transpose(0, 1) for kind in ("token", "confidence"))
    found, states = generate(
        guidance_schedule=sampling["cfg_schedule"],
        temperature=sampling["temperature"],
        noise=join_noise(guesses.unflatten(2, (tokens, parts)), confidence),
    )
    yield close("sample_states", states, io["sample_states"])
    yield close("sample_ids", found, io["sample_ids"])


CHECKS = {BAE: tokenizer_checks, AR: ar_checks, MLM: mlm_checks}
INPUTS = {
    BAE: {"image", "decode_indices", "sample_uniform"},
    AR: {"labels", "ids", "sample_exp_noise"},
    MLM: {"labels", "ids", "mask", "noise_token_gumbel", "noise_confidence_gumbel"},
}
CASES = {kind: cases("elm", kind) for kind in CHECKS}
ALL = [case for found in CASES.values() for case in found]


def checks(case: Case, model: Any) -> Iterator[Check]:
    return CHECKS[case.config["kind"]](model, case.io, case.config)


def test_there_are_cases():
    assert all(CASES.values())


@pytest.mark.parametrize("case", ALL)
def test_every_recorded_array_is_reproduced(case):
    model = convert("elm", checkpoint(case), config=facts(case))
    found = list(checks(case, model))
    assert not all_problems(iter(found))
    assert {check.name for check in found} | INPUTS[case.config["kind"]] == set(case.io), (
        "an array of the case is not checked"
    )


# ---------------------------------------------------------------------- the cases notice every tensor

GROUPS = 32  # of every group norm


def cannot_matter(name: str, state: dict[str, torch.Tensor]) -> str | None:
    """Why scaling the tensor `name` cannot change an output, or None where it must."""
    if name.startswith(("disc.", "perceptual.")):
        return "of the losses of training"
    if ".logsigma." in name:
        return "of a loss that was given up"
    if ".conv_out." in name:
        weight = state[name.rpartition(".")[0] + ".weight"]
        if weight.shape[0] == weight.shape[1]:
            return "a shortcut where the width does not change is not used"
    if any(key.startswith("mlm_layer.") for key in state) and name.startswith(("output.", "proj.", "pos_embed.")):
        return "stored, but not used by the masked model"
    if name.endswith(".k.bias"):
        return "a key bias adds the same number to all logits of a query, and the softmax drops it"
    if ".conv1." in name and len(state[name]) == GROUPS:
        return "its output goes into a group norm with one channel a group, which drops each channel's scale and offset"
    if name.endswith(".bias") and len(state[name]) == GROUPS and adds_to_last_stage(name, state):
        return "a constant in each channel of what is only read through group norms with one channel a group"
    return None


def adds_to_last_stage(name: str, state: dict[str, torch.Tensor]) -> bool:
    """Whether `name` belongs to a layer whose output is added to the residual stream behind a coder's last change of resolution."""
    match = re.fullmatch(r"(.*\.blocks)\.(\d+)\.(\w+)\.bias", name)
    if match is None:
        return False
    changes = [int(key.split(".")[-3]) for key in state if re.fullmatch(re.escape(match[1]) + r"\.\d+\.conv\.weight", key)]
    last, number = max(changes, default=-1), int(match[2])
    return number == last or (number > last and match[3] in ("conv2", "conv_out", "v", "proj_out"))


@pytest.mark.parametrize("case", ALL)
def test_scaling_any_tensor_by_a_twentieth_is_noticed(case):
    state = load_state_dict(checkpoint(case))
    model = convert_state_dict(state, config=facts(case))
    parameters, unnoticed = model.state_dict(), []
    for name, tensor in state.items():
        if cannot_matter(name, state):
            continue
        changed = changed_parameters(case, state, name, tensor * 1.05)
        saved = {target: parameters[target].clone() for target in changed}
        for target, value in changed.items():
            parameters[target].copy_(value)
        of_decoder = case.config["kind"] == BAE and all(target.startswith(("decoder.", "post_quant")) for target in changed)
        if first_problem(decoder_checks(model, case.io) if of_decoder else checks(case, model)) is None:
            unnoticed.append(name)
        for target, value in saved.items():
            parameters[target].copy_(value)
    assert not unnoticed, f"the case does not notice: {unnoticed}"
    assert first_problem(checks(case, model)) is None, "the scaled tensors were not restored"


def changed_parameters(
    case: Case, state: dict[str, torch.Tensor], name: str, tensor: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Our parameters that the authors' tensor `name` fills, with `tensor` in its place."""
    if case.config["kind"] != BAE:
        return dict(convert_state_dict({**state, name: tensor}, config=facts(case)).state_dict())
    options = {key: value for key, value in facts(case).items() if key != "use_tanh"}
    _, rules = tokenizer_layout(autoencoder_only(state), options)
    return apply_rules(autoencoder_only({name: tensor}), rules)
