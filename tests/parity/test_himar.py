"""Parity with Hi-MAR (HiDream-ai/himar, commit 1d378c1): every recorded array of every case, at its README's tolerance."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from harness import Case, Check, all_problems, first_problem, parity_root

from armm.convert import convert, himar, mar
from armm.decoding.guidance import Guidance
from armm.decoding.pivots import PivotLatentDecoding
from armm.pivot_latent_model import PivotLatentModel

ROOT = parity_root() / "himar"
CASES = [pytest.param(Case(path.parent), id=path.parent.name) for path in sorted(ROOT.rglob("config.json"))]


def checkpoint(case: Case) -> Any:
    return case.path / case.config["checkpoint_file"]


def load(case: Case) -> PivotLatentModel:
    """The case's checkpoint through the public converter."""
    return convert("himar", checkpoint(case), config=case.config["constructor"])


def close(name: str, actual: torch.Tensor, expected: torch.Tensor) -> Check:
    """Within 1e-4 of the largest value."""
    return Check(name, actual, expected, atol=1e-4 * max(1.0, float(expected.abs().max())))


def rows(maps: torch.Tensor) -> torch.Tensor:
    """[..., C, H, W] -> [..., H * W, C]."""
    return maps.flatten(-2).transpose(-1, -2)


def maps(tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    return tokens.transpose(1, 2).unflatten(2, grid)


def forward_checks(model: PivotLatentModel, case: Case) -> Iterator[Check]:
    io, pivots = case.io, model.num_pivots
    condition = model.condition(io["labels"])
    visible = (io["p1_mask"][:, :pivots] == 0).nonzero()[:, 1].view(len(io["p1_mask"]), -1)
    encoded = model.encode_pivots(io["p1_pivots"], visible, condition)
    yield close("p1_encoder_out", encoded, io["p1_encoder_out"])
    yield close("p1_z_pivots", model.decode_pivots(encoded, visible), io["p1_z_pivots"])
    kept = (io["p2_mask"][:, pivots:] == 0).nonzero()[:, 1].view(len(io["p2_mask"]), -1)
    tokens = rows(io["p2_latent_grid"])
    encoded = model.encode(tokens, kept, condition, model.embed_pivots(io["p2_pivot_z"]))
    yield close("p2_encoder_out", encoded, io["p2_encoder_out"])
    yield close("p2_z_dense", model.decode(encoded, kept), io["p2_z_dense"])
    from_latents = model.encode(tokens, kept, condition, model.embed_pivots(latents=io["p1_pivots"]))
    yield close("p2_encoder_out_from_pivot_latents", from_latents, io["p2_encoder_out_from_pivot_latents"])

    head = model.head
    yield close(
        "mlp_out", head(io["mlp_x"][None], io["mlp_t"][None], head.condition(io["mlp_c"][None]))[0], io["mlp_out"]
    )
    dense = model.dense_head
    times, hidden = io["dit_t"][:, None], dense.condition(rows(io["dit_z"]))
    yield close("dit_out", maps(dense(rows(io["dit_x"]), times, hidden), model.grid), io["dit_out"])
    half = rows(io["dit_x"]).chunk(2)[0]
    guided = Guidance(case.config["dit_out_cfg_scale"]).combine(dense(torch.cat([half, half]), times, hidden))
    yield close("dit_out_cfg", maps(guided.repeat(2, 1, 1), model.grid), io["dit_out_cfg"])


def run_checks(model: PivotLatentModel, case: Case, name: str, run: dict[str, Any]) -> Iterator[Check]:
    config = case.config
    io = {key.removeprefix(name + "."): value for key, value in case.io.items() if key.startswith(name + ".")}
    schedule = {"schedule": run["cfg_schedule"], "progress": "done"}
    guidance, pivot_guidance = Guidance(run["cfg"], **schedule), Guidance(run["re_cfg"], **schedule)
    decoding = PivotLatentDecoding(run["num_iter"])
    # Of each iteration the start, then the noise of all steps but the last.
    noise = [
        rows(draw)
        for start, steps in zip(io["dense_init_noise"], io["dense_step_noise"], strict=True)
        for draw in (start, *steps[:-1])
    ]
    output = decoding(
        model,
        model.condition(case.io["labels"]),
        model.null_condition(len(case.io["labels"])),
        head_steps=config.get("dense_head_respacing_override", 250),
        pivot_head_steps=config["constructor"]["num_sampling_steps"],
        temperature=run["temperature"],
        guidance=guidance,
        pivot_guidance=pivot_guidance,
        noise=noise,
        pivot_noise=torch.cat([io["pivot_init_noise"][None], io["pivot_step_noise"]]).transpose(0, 1),
        orders=case.io["orders"],
        record=True,
    )
    first, second = output.pivots, output.picture
    assert first.steps == config["pivot_steps"] and second is not None
    for phase, found, total in (("pivot", first, model.num_pivots), ("dense", second, model.num_tokens)):
        yield Check(f"{phase} mask", torch.stack(found.open).long(), io[f"{phase}_mask_before_step"])
        yield close(f"{phase} tokens", torch.stack(found.states), io[f"{phase}_tokens_before_step"])
        left = [int(mask[0].sum()) for mask in found.open]
        listed = run["pivot_tokens_per_step" if phase == "pivot" else "dense_masked_before_step"]
        yield Check(f"{phase} left", torch.tensor(left), torch.tensor(listed))
        told = pivot_guidance if phase == "pivot" else guidance
        scales = [told.scale_at(total - n - 1, total) if told.active else 1.0 for n in [*left[1:], 1]]
        yield Check(f"{phase} guidance", torch.tensor(scales), torch.tensor(run[f"{phase}_cfg_per_step"]), atol=1e-5)
    yield close("pivot_z_for_dense", output.pivot_states, io["pivot_z_for_dense"])
    yield close("pivot_latents", maps(first.tokens, model.pivot_grid), io["pivot_latents"])
    yield close("latents", maps(second.tokens, model.grid), io["latents"])


def checks(case: Case, model: PivotLatentModel) -> Iterator[Check]:
    yield from forward_checks(model, case)
    for name, run in case.config["runs"].items():
        yield from run_checks(model, case, name, run)


@pytest.mark.parametrize("case", CASES)
def test_every_recorded_array_is_reproduced(case):
    assert not all_problems(checks(case, load(case)))


@pytest.mark.parametrize(
    "path", [pytest.param(path, id=path.stem) for path in sorted(ROOT.rglob("published_shapes/*.json"))]
)
def test_published_sizes(path):
    published = json.loads(path.read_text())
    state = {name: torch.empty(shape, device="meta") for name, shape in published["shapes"].items()}
    model = himar.convert_state_dict(state)
    # Their two fixed tables of positions: one is kept among our parameters, the other is never used.
    fixed = state["cond_diffloss.net.pos_embed"].numel()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters == published["trainable_params"] + fixed == published["state_dict_elements"] - fixed
    constructor = published["constructor"]
    assert model.pivot_grid == (constructor["cond_scale"],) * 2 and model.num_tokens == constructor["seq_len"]
    assert model.dense_head.trunk.config.num_heads == constructor["head"]


UNUSED = {
    "cond_tokens": "seen in training only, in place of pivots",
    "cond_diffloss.net.c_pos_embed": "never used",
}


@pytest.mark.parametrize("case", CASES)
def test_scaling_any_tensor_by_a_twentieth_is_noticed(case):
    config, state = case.config["constructor"], mar.load_weights(checkpoint(case))
    unnoticed = []
    for name, tensor in state.items():
        if name in UNUSED:
            continue
        model = himar.convert_state_dict({**state, name: tensor * 1.05}, config=config)
        if first_problem(checks(case, model)) is None:
            unnoticed.append(name)
    assert not unnoticed, f"the case does not notice: {unnoticed}"
