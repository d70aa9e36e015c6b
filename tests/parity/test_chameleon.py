"""Parity with the Chameleon family: Meta (facebookresearch/chameleon, commit dbbe47fd), Lumina-mGPT (commit 104abe45) and transformers;
every recorded array of every case, at its README's tolerance."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from harness import Case, Check, all_problems, first_problem, parity_root

from armm.convert import convert
from armm.convert.chameleon import (
    HF_RULES,
    META_RULES,
    head_counts,
    load_tokenizer,
    merge_shards,
    meta_shards,
)
from armm.convert.chameleon_tokenizer import tokenizer_rules
from armm.convert.chameleon_vocabulary import image_block, read_vocabulary
from armm.convert.containers import load_state_dict
from armm.convert.folders import load_folder
from armm.convert.keymap import apply_rules
from armm.decoding.guidance import ContextGuidance
from armm.decoding.interleaved import InterleavedDecoding
from armm.decoding.sampling import Sampler, UniformSource
from armm.decoding.vocabulary import Grammar
from armm.model import AutoregressiveModel
from pipelines.crops import crop_sizes, on_white, square, to_pixels, variable_crop
from tokenizers_visual import Codes, VQTokenizer


def found(family: str) -> list[Case]:
    return [Case(path.parent) for path in sorted((parity_root() / family).rglob("io.safetensors"))]


def kind(case: Case) -> str:
    if (case.path / "vqgan.ckpt").is_file():
        return "vqgan"
    if (case.path / "params.json").is_file():
        return "meta"
    return "hf" if "pixel_values" in case.io else "lumina"


CASES = [pytest.param(case, id=case.name) for case in found("chameleon")]


def weights(case: Case) -> Path:
    """What `convert` is given."""
    name = kind(case)
    return case.path / "vqgan.ckpt" if name == "vqgan" else case.path if name == "meta" else case.path / "checkpoint"


def after_first_block(model: AutoregressiveModel, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states behind the first block, and final ones."""
    kept = []
    hook = model.trunk.blocks[0].register_forward_hook(lambda module, args, output: kept.append(output))
    try:
        hidden = model.hidden(ids)
    finally:
        hook.remove()
    return kept[0], hidden


GREEDY = Sampler(do_sample=False)


def lumina_checks(model: AutoregressiveModel, case: Case) -> Iterator[Check]:
    io, config = case.io, case.config
    first, hidden = after_first_block(model, io["input_ids"])
    yield Check("hidden_after_layer0", first, io["hidden_after_layer0"])
    yield Check("hidden_last_layer_normed", hidden, io["hidden_last_layer_normed"])
    logits = model(io["input_ids"])
    yield Check("logits_subset", logits[..., io["logit_ids"]], io["logits_subset"])
    yield Check("logits_logsumexp", logits.logsumexp(-1), io["logits_logsumexp"])
    yield Check("logits_last", logits[:, -1], io["logits_last"])
    yield Check("argmax", logits.argmax(-1), io["argmax"])
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), io["labels"][:, 1:].flatten())
    yield Check("loss", loss, io["loss"])
    for name, run in config["runs"].items():
        yield Check(f"{name}.ids", lumina_run(model, case, name, run), io[f"{name}.ids"])


def lumina_run(model: AutoregressiveModel, case: Case, name: str, run: dict[str, Any]) -> torch.Tensor:
    """A guided generation whose size is given, as the authors' logits processors make it."""
    io = case.io
    vocabulary = read_vocabulary(weights(case) / "config.json")
    block = image_block(vocabulary, vocab_size=model.vocab_size)
    grammar = Grammar(block, model.vocab_size, check_sizes=False)
    grid = (run["grid_h"] * block.cells, run["grid_w"] * block.cells)
    opening = torch.tensor([block.opening(grid)])
    noise = UniformSource(io[f"{name}.uniforms"][None]) if run["do_sample"] else None
    samplers = {
        part: Sampler(run["temperature"], top_k=run[f"{part}_top_k"], do_sample=run["do_sample"])
        for part in ("text", "image")
    }
    output = InterleavedDecoding()(
        model,
        io["prompt"],
        max_tokens=opening.shape[1] + block.body(grid),
        grammar=grammar,
        stop_ids=[block.end],
        sampler=samplers["text"],
        image_sampler=samplers["image"],
        guidance=ContextGuidance(run["guidance_scale"]),
        noise=noise,
        forced_ids=opening,
    )
    return torch.cat([io["prompt"], output.ids], dim=1)


def hf_checks(model: AutoregressiveModel, case: Case, tokenizer: VQTokenizer) -> Iterator[Check]:
    io, ids = case.io, case.io["input_ids"]
    yield Check("vq_latent", tokenizer.features(io["pixel_values"]), io["vq_latent"])
    codes = tokenizer.encode(io["pixel_values"])
    published = json.loads((weights(case) / "config.json").read_text())
    grid = codes.grid[1:]
    block = image_block(
        published["vocabulary_map"], vocab_size=model.vocab_size, num_codes=tokenizer.codebook_size, grid=grid
    )
    image_ids = block.to_ids(codes.ids)
    yield Check("image_token_ids", image_ids, io["image_token_ids"])
    filled = ids.masked_scatter(ids == published["image_token_id"], image_ids)
    yield Check("input_ids_filled", filled, io["input_ids_filled"])
    first, _ = after_first_block(model, filled)
    yield Check("hidden_after_layer0", first, io["hidden_after_layer0"])
    yield Check("logits_raw", model(filled), io["logits_raw"])
    decoding = InterleavedDecoding()
    words = io["greedy_text_ids"].shape[1] - filled.shape[1]
    grammar = Grammar(block, model.vocab_size, images=False)
    text = decoding(model, filled, max_tokens=words, grammar=grammar, sampler=GREEDY).ids
    # what the class hands back still holds the placeholders
    yield Check("greedy_text_ids", torch.cat([ids, text], dim=1), io["greedy_text_ids"])
    number = io["greedy_image_ids"].shape[1]
    grammar = Grammar(block, model.vocab_size)
    image = decoding(model, io["image_prompt"], max_tokens=number, grammar=grammar, sampler=GREEDY).ids
    yield Check("greedy_image_ids", image, io["greedy_image_ids"])


def meta_checks(model: AutoregressiveModel, case: Case) -> Iterator[Check]:
    io = case.io
    first, _ = after_first_block(model, io["input_ids"])
    yield Check("hidden_after_layer0", first, io["hidden_after_layer0"])
    yield Check("logits", model(io["input_ids"]), io["logits"])
    prompt = io["input_ids"][:1, :8]
    rest = io["greedy_ids"].shape[1] - prompt.shape[1]
    ids = InterleavedDecoding()(model, prompt, max_tokens=rest, sampler=GREEDY).ids
    yield Check("greedy_ids", torch.cat([prompt, ids], dim=1), io["greedy_ids"])


def vqgan_checks(model: VQTokenizer, case: Case) -> Iterator[Check]:
    io = case.io

    def picture(name: str) -> PIL.Image.Image:
        return PIL.Image.fromarray(io[name].numpy())

    def array(image: PIL.Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(image))

    pixels = to_pixels(on_white(picture("image_uint8")))
    yield Check("pixel_values", pixels, io["pixel_values"])
    yield Check("encoder_latent", model.features(pixels), io["encoder_latent"])
    codes = model.encode(pixels)
    yield Check("codes", codes.ids[0], io["codes"])
    yield Check("codes2", model.encode(to_pixels(picture("image2_uint8"))).ids[0], io["codes2"])
    yield Check("quantized", model.embed(codes).transpose(1, 2).unflatten(2, codes.grid[1:]), io["quantized"])
    vocabulary = read_vocabulary(case.path / "text_tokenizer.json")
    block = image_block(
        vocabulary, vocab_size=max(vocabulary.values()) + 1, num_codes=model.codebook_size, grid=codes.grid[1:]
    )
    yield Check("bpe_ids", block.to_ids(codes.ids[0]), io["bpe_ids"])
    yield Check("codes_from_bpe", block.to_codes(io["bpe_ids"]), io["codes_from_bpe"])
    decoded = model.decode(codes)
    yield Check("decoded", decoded, io["decoded"])
    bytes_ = ((decoded[0].clamp(-1, 1) + 1) / 2 * 255).to(torch.uint8).permute(1, 2, 0)
    yield Check("decoded_uint8", bytes_, io["decoded_uint8"], atol=1)
    drawn = Codes(ids=io["random_codes"][None], grid=codes.grid)
    yield Check("decoded_random", model.decode(drawn), io["decoded_random"])
    yield Check("whitened_uint8", array(on_white(picture("rgba_uint8"))), io["whitened_uint8"], atol=1)
    size = io["meta_preprocessed_32"].shape[-1]
    meta = picture("meta_input_uint8")
    yield Check("meta_preprocessed_32", to_pixels(square(meta, size)), io["meta_preprocessed_32"], atol=1e-4)
    for target in (768, 512):
        sizes = torch.tensor(crop_sizes((target // 32) ** 2, 32))
        yield Check(f"crop_sizes_{target}", sizes, io[f"crop_sizes_{target}"])
    yield Check("lumina_crop_uint8", array(variable_crop(meta, crop_sizes(4, 16))), io["lumina_crop_uint8"], atol=1)


INPUTS = {
    "vqgan": {"image_uint8", "image2_uint8", "random_codes", "rgba_uint8", "meta_input_uint8"},
    "meta": {"input_ids"},
    "hf": {"input_ids", "pixel_values", "image_prompt"},
    "lumina": {"input_ids", "labels", "logit_ids", "prompt"},
}


def load(case: Case) -> dict[str, Any]:
    """The modules of a case through the public converter."""
    modules: dict[str, Any] = {"model": convert("chameleon", weights(case))}
    if kind(case) == "hf":
        modules["tokenizer"] = load_tokenizer(weights(case))
    return modules


def checks(case: Case, modules: dict[str, Any]) -> Iterator[Check]:
    run = {"vqgan": vqgan_checks, "meta": meta_checks, "hf": hf_checks, "lumina": lumina_checks}[kind(case)]
    model = modules["model"]
    return run(model, case, modules["tokenizer"]) if kind(case) == "hf" else run(model, case)


def test_there_are_cases():
    assert CASES and {kind(case.values[0]) for case in CASES} <= set(INPUTS)


@pytest.mark.parametrize("case", CASES)
def test_every_recorded_array_is_reproduced(case):
    found_checks = list(checks(case, load(case)))
    assert not all_problems(iter(found_checks))
    given = {name for name in case.io if name in INPUTS[kind(case)] or name.endswith(".uniforms")}
    assert {check.name for check in found_checks} | given == set(case.io), "an array of the case is not checked"


# ---------------------------------------------------------------------- the cases notice every tensor


GROUPS = 32  # of every group norm


def states(case: Case) -> list[dict[str, torch.Tensor]]:
    """The tensors of the files, one dictionary for each of Meta's parts."""
    shards = meta_shards(case.path) if kind(case) == "meta" else []
    if shards:
        return [load_state_dict(shard) for shard in shards]
    return [load_state_dict(weights(case))] if kind(case) == "vqgan" else [load_folder(weights(case))]


def cannot_matter(name: str, tensor: torch.Tensor) -> str | None:
    """Why scaling the tensor `name` cannot change an output, or None where it must."""
    if name == "rope.freqs":
        return "the rotary frequencies, recomputed"
    if name.endswith((".q_proj.weight", ".k_proj.weight", ".wq.weight", ".wk.weight")):
        return "each head of queries and keys goes through a layer norm, which drops its scale"
    if name.startswith("model.vqmodel.post_quant_conv"):
        return "belongs to the decoder, which this layout leaves out"
    if name.endswith(".k.bias"):
        return "a key bias adds the same number to all logits of a query, and the softmax drops it"
    local = name.removeprefix("model.vqmodel.")
    if local.startswith(("encoder.", "decoder.")) and len(tensor) == GROUPS:
        if ".conv1." in local:
            return "its output goes into a group norm with one channel a group, which drops each channel's scale and offset"
        if (
            local.endswith(".bias")
            and local.startswith("decoder.up.0.")
            and local.split(".")[-2] in ("conv2", "nin_shortcut")
        ):
            return "a constant in each channel of what is only read through group norms with one channel a group"
    return None


def targets_of(name: str, tensors: list[torch.Tensor], modules: dict[str, Any]) -> tuple[Any, dict[str, torch.Tensor]]:
    """The module that holds a tensor of the files and our tensors made of it."""
    model = modules["model"]
    if name.startswith("model.vqmodel.") or isinstance(model, VQTokenizer):
        module = modules.get("tokenizer", model)
        rules = tokenizer_rules(len(module.encoder.levels))
        return module, apply_rules({name.removeprefix("model.vqmodel."): tensors[0]}, rules)
    trunk = dict(model.config["transformer"])
    meta = not name.startswith(("model.", "lm_head."))
    merged = merge_shards([{name: tensor} for tensor in tensors]) if meta else {name: tensors[0]}
    return model, apply_rules(merged, META_RULES if meta else HF_RULES, head_counts({"transformer": trunk}))


@pytest.mark.parametrize("case", CASES)
def test_scaling_any_tensor_by_a_twentieth_is_noticed(case):
    parts, modules = states(case), load(case)
    unnoticed = []
    for part in range(len(parts)):
        for name, tensor in parts[part].items():
            if cannot_matter(name, tensor):
                continue
            tensors = [state[name] * (1.05 if number == part else 1.0) for number, state in enumerate(parts)]
            module, scaled = targets_of(name, tensors, modules)
            parameters = module.state_dict()
            saved = {target: parameters[target].clone() for target in scaled}
            for target, value in scaled.items():
                parameters[target].copy_(value)
            problem = first_problem(checks(case, modules))
            for target, value in saved.items():
                parameters[target].copy_(value)
            if problem is None:
                unnoticed.append(f"{name} of part {part}")
    assert not unnoticed, f"the case does not notice: {unnoticed}"
    assert first_problem(checks(case, modules)) is None, "the scaled tensors were not restored"
