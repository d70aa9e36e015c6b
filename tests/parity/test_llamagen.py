"""Parity with LlamaGen (FoundationVision/LlamaGen, commit ce98ec4): every recorded array of every case, at its README's tolerance."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from harness import Case, Check, all_problems, cases, first_problem

from armm.convert import convert
from armm.convert.containers import load_state_dict
from armm.convert.keymap import apply_rules
from armm.convert.llamagen import TOKENIZER_RULES, TRANSFORMER_RULES
from armm.decoding.guidance import Guidance
from armm.decoding.next_token import NextTokenDecoding
from armm.decoding.sampling import Sampler
from armm.model import AutoregressiveModel
from armm.nn.masks import prefix_mask
from pipelines.llamagen import LlamaGenPipeline
from tokenizers_visual import Codes, VQTokenizer

TOKENIZER_FACTS = (
    "codebook_size", "codebook_embed_dim", "codebook_l2_norm", "encoder_ch_mult", "decoder_ch_mult", "z_channels", "ch",
    "num_res_blocks",
)  # fmt: skip
TRANSFORMER_FACTS = (
    "dim", "n_layer", "n_head", "n_kv_head", "num_classes", "caption_dim", "vocab_size", "block_size", "cls_token_num", "model_type",
)  # fmt: skip


def load(case: Case) -> Any:
    """The case's checkpoint through the public converter."""
    facts = TOKENIZER_FACTS if case.config["kind"] == "vq_tokenizer" else TRANSFORMER_FACTS
    return convert("llamagen", case.checkpoint, config={key: case.config[key] for key in facts if key in case.config})


def pipeline_of(model: AutoregressiveModel) -> LlamaGenPipeline:
    """A pipeline around `model` and the smallest tokenizer that has its codes."""
    tokenizer = VQTokenizer(
        base_channels=32, encoder_multipliers=[1], decoder_multipliers=[1], num_res_blocks=1, z_channels=32,
        codebook_size=model.vocab_size,
    )  # fmt: skip
    pipe = LlamaGenPipeline(tokenizer=tokenizer, transformer=model, decoding=NextTokenDecoding())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def greedy_logits(model: AutoregressiveModel, condition: Any, scale: float) -> torch.Tensor:
    """The logits each cached greedy step chose from: [B, N, V]."""
    guidance = Guidance(scale)
    null = model.null_condition(condition.batch, like=condition) if guidance.active else None
    output = NextTokenDecoding()(
        model,
        condition,
        null,
        model.grid,
        sampler=Sampler(do_sample=False),
        guidance=guidance,
        noise=None,
        record_logits=True,
    )
    return output.logits


# ---------------------------------------------------------------------- what each kind of case holds


def tokenizer_checks(model: VQTokenizer, io: dict[str, torch.Tensor]) -> Iterator[Check]:
    yield from encoder_checks(model, io)
    yield from decoder_checks(model, io)


def encoder_checks(model: VQTokenizer, io: dict[str, torch.Tensor]) -> Iterator[Check]:
    height, width = (side // model.downsample for side in io["image"].shape[-2:])
    yield Check("latent_pre_quant", model.features(io["image"]), io["latent_pre_quant"])
    codes = model.encode(io["image"])
    yield Check("ids", codes.ids, io["ids"])
    quant = model.embed(codes)
    yield Check("quant", quant.transpose(1, 2).unflatten(2, (height, width)), io["quant"])
    yield Check("recon", model.decode(codes), io["recon"])


def decoder_checks(model: VQTokenizer, io: dict[str, torch.Tensor]) -> Iterator[Check]:
    pixels = model.decode(Codes(ids=io["decode_ids"], grid=grid_like(io["decode_pixels"], model)))
    yield Check("decode_pixels", pixels, io["decode_pixels"])
    bytes_ = (127.5 * pixels + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    yield Check("decode_pixels_uint8", bytes_, io["decode_pixels_uint8"], atol=1)


def grid_like(pixels: torch.Tensor, model: VQTokenizer) -> tuple[int, int, int]:
    return (1, pixels.shape[-2] // model.downsample, pixels.shape[-1] // model.downsample)


def c2i_checks(model: AutoregressiveModel, io: dict[str, torch.Tensor], config: dict[str, Any]) -> Iterator[Check]:
    labels, ids, batch = io["labels"], io["ids"], len(io["labels"])
    condition = model.condition(labels=labels)
    yield Check("logits_full", model(ids, condition), io["logits_full"])
    yield Check("logits_full_uncond", model(ids, model.null_condition(batch)), io["logits_full_uncond"])
    yield Check("freqs_cis", torch.view_as_real(model.image_positions().rotary.squeeze(-2)), io["freqs_cis"])
    scale, sampling = config["cfg_scale"], config["sampling"]
    for name, guided in (("greedy_logits", 1.0), ("greedy_cfg_logits", scale)):
        yield Check(name, greedy_logits(model, condition, guided), io[name])
    pipe = pipeline_of(model)

    def generate(**arguments: Any) -> torch.Tensor:
        settings = {"top_k": 0, "top_p": 1.0, "temperature": 1.0, "do_sample": False, **arguments}
        return pipe(class_labels=labels, output_type="latent", **settings).images

    yield Check("greedy_ids", generate(guidance_scale=1.0), io["greedy_ids"])
    yield Check("greedy_cfg_ids", generate(guidance_scale=scale), io["greedy_cfg_ids"])
    interval = generate(guidance_scale=scale, guidance_interval=config["cfg_interval"])
    yield Check("greedy_cfg_interval_ids", interval, io["greedy_cfg_interval_ids"])
    sampled = generate(guidance_scale=scale, do_sample=True, noise=io["sample_exp_noise"], **sampling)
    yield Check("sample_ids", sampled, io["sample_ids"])
    for name, top_k, top_p in (
        ("filter_topk", sampling["top_k"], 1.0),
        ("filter_topp", 0, sampling["top_p"]),
        ("filter_both", sampling["top_k"], sampling["top_p"]),
    ):
        yield Check(name, Sampler(top_k=top_k, top_p=top_p).filter(io["filter_in"].clone()), io[name])


def t2i_checks(model: AutoregressiveModel, io: dict[str, torch.Tensor], config: dict[str, Any]) -> Iterator[Check]:
    def close(name: str, actual: torch.Tensor) -> Check:
        return Check(name, actual, io[name], atol=1e-4, rtol=1e-5)

    pipe = pipeline_of(model)
    features, mask = pipe.encode_prompt(prompt_embeds=io["text_features"], prompt_attention_mask=io["text_mask"])
    yield close("cond", features)
    yield close("cond_mask", mask)
    condition = model.condition(features=features, mask=mask)
    yield close("cond_projected", condition.embeds)
    slots, ids = condition.length, io["ids"]
    total = slots + ids.shape[1]
    yield close("attn_mask_full", prefix_mask(condition.mask, total).expand(len(ids), 1, total, total))
    yield close("logits_full_image", model(ids, condition)[:, slots - 1 :])
    null = model.null_condition(len(ids), like=condition)
    yield close("logits_full_image_uncond", model(ids, null)[:, slots - 1 :])
    scale = config["cfg_scale"]
    for name, guided in (("greedy_logits", 1.0), ("greedy_cfg_logits", scale)):
        yield close(name, greedy_logits(model, condition, guided))

    def generate(scale: float, mask: torch.Tensor | None) -> torch.Tensor:
        settings = {"top_k": 0, "top_p": 1.0, "do_sample": False, "output_type": "latent", "guidance_scale": scale}
        return pipe(prompt_embeds=io["text_features"], prompt_attention_mask=mask, **settings).images

    yield close("greedy_ids", generate(1.0, io["text_mask"]))
    yield close("greedy_cfg_ids", generate(scale, io["text_mask"]))
    yield close("nomask_greedy_cfg_ids", generate(scale, None))


def checks(case: Case, model: Any) -> Iterator[Check]:
    kind = case.config["kind"]
    if kind == "vq_tokenizer":
        return tokenizer_checks(model, case.io)
    return (c2i_checks if kind == "gpt_c2i" else t2i_checks)(model, case.io, case.config)


INPUTS = {
    "vq_tokenizer": {"image", "decode_ids"},
    "gpt_c2i": {"labels", "ids", "sample_exp_noise", "filter_in"},
    "gpt_t2i": {"text_features", "text_mask", "ids"},
}
TOKENIZERS, C2I, T2I = (cases("llamagen", kind) for kind in ("vq_tokenizer", "gpt_c2i", "gpt_t2i"))


def test_there_are_cases():
    assert TOKENIZERS and C2I and T2I


@pytest.mark.parametrize("case", [*TOKENIZERS, *C2I, *T2I])
def test_every_recorded_array_is_reproduced(case):
    model = load(case)
    found = list(checks(case, model))
    assert not all_problems(iter(found))
    assert {check.name for check in found} | INPUTS[case.config["kind"]] == set(case.io), (
        "an array of the case is not checked"
    )


# ---------------------------------------------------------------------- the cases notice every tensor


GROUPS = 32  # of every group norm


def cannot_matter(name: str, state: dict[str, torch.Tensor]) -> str | None:
    """Why scaling the tensor `name` cannot change an output, or None where it must."""
    if name == "quantize.codebook_used":
        return "a statistic of training, not used by the model"
    if name == "quantize.embedding.weight":
        return "code vectors are normalised to unit length, so a common scale drops out"
    if name.endswith(".k.bias"):
        return "a key bias adds the same number to all logits of a query, and the softmax drops it"
    if ".conv1." in name and len(state[name]) == GROUPS:
        return "its output goes into a group norm with one channel a group, which drops each channel's scale and offset"
    if name.endswith(".bias") and len(state[name]) == GROUPS and adds_to_last_stage(name, state):
        return "a constant in each channel of what is only read through group norms with one channel a group"
    return None


def adds_to_last_stage(name: str, state: dict[str, torch.Tensor]) -> bool:
    """Whether `name` belongs to a layer whose output is added to the residual stream behind a coder's last change of resolution."""
    coder, _, rest = name.partition(".")
    levels = {int(key.split(".")[2]) for key in state if key.startswith(f"{coder}.conv_blocks.")}
    last = max(levels, default=0)
    entry = f"conv_blocks.{last - 1}." + ("downsample." if coder == "encoder" else "upsample.")
    inside = rest.startswith((f"conv_blocks.{last}.", "mid.") if coder == "encoder" else (f"conv_blocks.{last}.",))
    return rest.startswith(entry) or (inside and rest.split(".")[-2] in ("conv2", "nin_shortcut", "v", "proj_out"))


@pytest.mark.parametrize("case", [*TOKENIZERS, *C2I, *T2I])
def test_scaling_any_tensor_by_a_twentieth_is_noticed(case):
    state = load_state_dict(case.checkpoint)
    model = load(case)
    is_tokenizer = case.config["kind"] == "vq_tokenizer"
    rules = TOKENIZER_RULES if is_tokenizer else TRANSFORMER_RULES
    rows = (
        () if is_tokenizer else [getattr(model.trunk.blocks[0].attention, f"to_{part}").out_features for part in "qkv"]
    )
    parameters = model.state_dict()
    unnoticed = []
    for name, tensor in state.items():
        scaled = apply_rules({name: tensor * 1.05}, rules, {"qkv_rows": tuple(rows)})
        saved = {target: parameters[target].clone() for target in scaled}
        for target, value in scaled.items():
            parameters[target].copy_(value)
        of_decoder = is_tokenizer and name.startswith(("decoder.", "post_quant_conv."))
        problem = first_problem(decoder_checks(model, case.io) if of_decoder else checks(case, model))
        for target, value in saved.items():
            parameters[target].copy_(value)
        if problem is None and not cannot_matter(name, state):
            unnoticed.append(name)
    assert not unnoticed, f"the case does not notice: {unnoticed}"
    assert first_problem(checks(case, model)) is None, "the scaled tensors were not restored"
