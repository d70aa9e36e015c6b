"""Parity with MAR (LTH14/mar, commit fe470ac) and its step annealing (Qinyu-Allen-Zhao/DiSA, commit 283fa59): every recorded array of
every case, at its README's tolerance."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Case, Check, all_problems, first_problem, hidden_by_group_norm, parity_root

from armm.convert import convert, kl, mar
from armm.convert.containers import load_state_dict
from armm.convert.keymap import apply_rules
from armm.decoding.annealing import StepAnnealing
from armm.decoding.guidance import Guidance
from armm.decoding.masked import MaskedLatentDecoding, PlacedNoise, draw_tokens
from armm.decoding.solvers.diffusion import DiffusionSolver
from armm.decoding.solvers.losses import diffusion_losses
from armm.masked_latent_model import MaskedLatentModel
from tokenizers_visual import KLTokenizer


def mar_cases(*families: str) -> list[Any]:
    """The cases of `families`, as pytest parameters."""
    found = [
        (family, Case(path.parent))
        for family in families
        for path in sorted((parity_root() / family).rglob("config.json"))
    ]
    return [pytest.param(case, id=f"{family}/{case.name}") for family, case in found]


CASES = mar_cases("mar", "disa")
SOLVER = DiffusionSolver()


def checkpoint(case: Case) -> Path:
    return case.path / case.config["checkpoint_file"]


def load(case: Case) -> Any:
    """The case's checkpoint through the public converter."""
    if "constructor" not in case.config:
        return convert("kl", checkpoint(case))
    return convert("mar", checkpoint(case), config=case.config["constructor"])


def close(name: str, actual: torch.Tensor, expected: torch.Tensor, relative: bool = True) -> Check:
    """Within 1e-4, relative to the largest value for samples."""
    largest = float(expected.abs().max()) if relative and expected.numel() else 1.0
    return Check(name, actual, expected, atol=1e-4 * max(1.0, largest))


# ---------------------------------------------------------------------- what each kind of case holds


def autoencoder_checks(model: KLTokenizer, case: Case) -> Iterator[Check]:
    io = case.io
    model.register_to_config(scaling_factor=case.config["latent_scale"])
    posterior = model.posterior(io["image"])
    yield Check("encoder_out", model.encoder(io["image"]), io["encoder_out"])
    yield Check("moments", posterior.parameters, io["moments"])
    for name in ("mean", "logvar", "std"):
        yield Check(name, getattr(posterior, name), io[name])
    # The sum of a few thousand values: 1e-4 of each of them.
    yield Check("kl_per_image", posterior.kl(), io["kl_per_image"], atol=1e-4 * io["mean"][0].numel())
    codes = model.encode(io["image"], noise=io["noise"])
    scaled = codes.latents.transpose(1, 2).unflatten(2, codes.grid[1:])
    yield Check("latent_scaled", scaled, io["latent_scaled"])
    yield Check("sample", scaled / model.scaling_factor, io["sample"])
    pixels = model.decode(codes)
    yield Check("decoded_from_sample", pixels, io["decoded_from_sample"])
    yield Check("decoded_from_mean", model.decode(model.encode(io["image"])), io["decoded_from_mean"])
    bytes_ = ((pixels.permute(0, 2, 3, 1) + 1) / 2 * 255).clamp(0, 255).round().long()
    yield Check("decoded_uint8_hwc", bytes_, io["decoded_uint8_hwc"], atol=1)


def _kept(mask: torch.Tensor) -> torch.Tensor:
    """Positions that are not masked, [B, K]."""
    return (mask == 0).nonzero()[:, 1].view(len(mask), -1)


def _codes_of(maps: torch.Tensor) -> torch.Tensor:
    return maps.flatten(2).transpose(1, 2)


def forward_checks(model: MaskedLatentModel, case: Case) -> Iterator[Check]:
    """The transformer, the head and its loss, each by itself."""
    io, config, head = case.io, case.config, model.head
    tokens = model.patchify(_codes_of(io["latent_grid"]))
    yield Check("patchify", tokens, io["patchify"])
    kept = _kept(io["tf_mask"])
    for suffix, condition in (("", model.condition(io["labels"])), ("_uncond", model.null_condition(len(kept)))):
        encoded = model.encode(tokens, kept, condition)
        yield Check(f"tf_encoder_out{suffix}", encoded, io[f"tf_encoder_out{suffix}"])
        yield Check(f"tf_decoder_z{suffix}", model.decode(encoded, kept), io[f"tf_decoder_z{suffix}"])

    def denoise(x: torch.Tensor, t: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return head(x[None], t[None], head.condition(z[None]))[0]

    yield Check("head_out", denoise(io["head_x"], io["head_t"], io["head_c"]), io["head_out"])
    half = io["head_x"].chunk(2)[0]
    predicted, variance = head.split(denoise(torch.cat([half, half]), io["head_t"], io["head_c"]))
    guided = Guidance(config["head_cfg_scale_for_head_out_cfg"]).combine(predicted)
    yield Check("head_out_cfg", torch.cat([guided.repeat(2, 1), variance], -1), io["head_out_cfg"])

    condition = head.condition(io["train_z"][None])
    losses = diffusion_losses(
        SOLVER,
        lambda x, t: head.split(head(x, t, condition)),
        *(io[f"train_{name}"][None] for name in ("target", "t", "noise")),
    )
    for name, value in (("mse", losses.mse), ("vb", losses.bound), ("loss", losses.mse + losses.bound)):
        yield close(f"train_{name}", value[0], io[f"train_{name}"])

    settings = config["head_sampling"]
    for name in ("nocfg", "cfg"):
        if f"ddpm_{name}_out" not in io:
            continue
        start, steps = io[f"ddpm_{name}_init_noise"], io[f"ddpm_{name}_step_noise"]
        guidance = Guidance(settings["cfg"]) if name == "cfg" else None
        hidden = io["head_c"][: (1 if guidance is None else 2) * len(start)]
        output = sample_head(model, hidden, start, steps, settings, guidance)
        yield close(f"ddpm_{name}_out", output, io[f"ddpm_{name}_out"])


def sample_head(
    model: MaskedLatentModel,
    z: torch.Tensor,
    start: torch.Tensor,
    steps: torch.Tensor,
    settings: Any,
    guidance: Guidance | None,
) -> torch.Tensor:
    """What the head draws from recorded noise, with hidden states of the condition and then, if guided, of none."""
    recorded = torch.cat([start[None], steps])[None]
    source = PlacedNoise(recorded, 1, *start.shape)
    hidden = z[None] if guidance is None else torch.stack(z.chunk(2))
    places = torch.arange(len(start))[None]
    return draw_tokens(
        SOLVER, model.head, hidden, places, source, start.shape[1], settings["temperature"], guidance, (0, 1),
        num_steps=settings["respacing"],
    )[0]  # fmt: skip


def run_checks(model: MaskedLatentModel, case: Case, name: str, run: dict[str, Any]) -> Iterator[Check]:
    """One recorded run of the whole loop."""
    io, arguments = case.io, run["kwargs"]
    guidance = Guidance(arguments["cfg"], schedule=arguments["cfg_schedule"], progress="done")
    batch = len(io["orders"])
    labelled = run.get("labels", True)
    condition = model.condition(io["labels"]) if labelled else model.null_condition(batch)
    steps: dict[str, Any] = {}
    if "disa" not in run:
        steps["head_steps"] = case.config["constructor"]["num_sampling_steps"]
    elif run["disa"]["diff_sampler"] == "default":
        steps["head_steps"] = run["disa"]["diff_upper_steps"]
    else:
        annealing = {key: run["disa"][f"diff_{key}_steps"] for key in ("upper", "lower")}
        steps["annealing"] = StepAnnealing(**annealing, schedule=run["disa"]["diff_annealing_strategy"])
    decoding = MaskedLatentDecoding(num_inference_steps=arguments["num_iter"])
    output = decoding(
        model,
        condition,
        model.null_condition(batch) if guidance.active else None,
        temperature=arguments["temperature"],
        guidance=guidance,
        noise=torch.cat([io[f"{name}.init_noise"][None], io[f"{name}.step_noise"]]).transpose(0, 1),
        orders=io["orders"],
        record=True,
        **steps,
    )
    yield Check(f"{name}.mask_before_step", torch.stack(output.open).long(), io[f"{name}.mask_before_step"])
    counts = decoding.counts(model.num_tokens)
    drawn = [now - following for now, following in zip(counts, counts[1:], strict=False)]
    yield Check(f"{name} tokens", torch.tensor(drawn), torch.tensor(run["tokens_predicted_per_step"]))
    yield Check(f"{name} steps", torch.tensor(output.head_calls), torch.tensor(run["diffusion_steps_run_per_step"]))
    if "timestep_map_per_step" in run:
        schedule = decoding.head_schedule(arguments["num_iter"], steps.get("head_steps"), steps.get("annealing"))
        maps = [list(SOLVER.tables(**each).timesteps) for each in schedule]
        assert maps == run["timestep_map_per_step"]
    total = model.num_tokens
    scales = [
        guidance.scale_at(total - left - 1, total) if guidance.active else 1.0
        for left in (max(1, n) for n in counts[1:])
    ]
    yield Check(f"{name} guidance", torch.tensor(scales), torch.tensor(run["cfg_per_step"]), atol=1e-6)
    yield close(f"{name}.tokens_before_step", torch.stack(output.states), io[f"{name}.tokens_before_step"])
    if f"{name}.decoder_z_step0" in io:
        yield close(f"{name}.decoder_z_step0", output.hidden[0], io[f"{name}.decoder_z_step0"])
        yield close(f"{name}.decoder_z_last_step", output.hidden[-1], io[f"{name}.decoder_z_last_step"])
    maps = model.unpatchify(output.tokens).transpose(1, 2).unflatten(2, model.grid)
    yield close(f"{name}.latents", maps, io[f"{name}.latents"])


def checks(case: Case, model: Any, runs: int | None = None) -> Iterator[Check]:
    """All comparisons of a case, or those of the `runs` shortest runs only."""
    if isinstance(model, KLTokenizer):
        yield from autoencoder_checks(model, case)
        return
    if "tf_mask" in case.io:
        yield from forward_checks(model, case)
    recorded = list((case.config.get("sampling") or case.config["runs"]).items())
    if runs is not None:
        recorded = sorted(recorded, key=lambda entry: sum(entry[1]["diffusion_steps_run_per_step"]))[:runs]
    for name, run in recorded:
        yield from run_checks(model, case, name, run)


def is_input(name: str) -> bool:
    inputs = {"image", "noise", "labels", "latent_grid", "tf_mask", "orders", "head_x", "head_t", "head_c"}
    inputs |= {"train_target", "train_noise", "train_t", "train_z"}
    return name in inputs or name.endswith(("init_noise", "step_noise"))


@pytest.mark.parametrize("case", CASES)
def test_every_recorded_array_is_reproduced(case):
    model = load(case)
    found = list(checks(case, model))
    assert not all_problems(iter(found))
    unchecked = {name for name in case.io if not is_input(name)} - {check.name for check in found}
    assert not unchecked, f"arrays of the case that are not checked: {unchecked}"


# ---------------------------------------------------------------------- tables without weights


def table_files(family: str) -> list[Any]:
    return [
        pytest.param(path, id=str(path.relative_to(parity_root())))
        for path in (parity_root() / family).rglob("schedules.json")
    ]


@pytest.mark.parametrize("path", table_files("mar"))
def test_diffusion_tables(path):
    for name, expected in json.loads(path.read_text()).items():
        tables = SOLVER.tables(int(name.split("_")[1]))
        assert list(tables.timesteps) == expected["timestep_map"]
        ours = {
            "betas": tables.betas,
            "alphas_cumprod": tables.alphas_cumprod,
            "posterior_mean_coef1": tables.posterior_mean_coef1,
            "posterior_mean_coef2": tables.posterior_mean_coef2,
            "posterior_log_variance_clipped": tables.posterior_log_variance,
            "fixed_large_log_variance": tables.large_log_variance,
        }
        assert set(expected) <= {"timestep_map", *ours}
        for key in expected.keys() - {"timestep_map"}:
            assert torch.allclose(ours[key], torch.tensor(expected[key], dtype=torch.float64), rtol=1e-10, atol=0), key


@pytest.mark.parametrize("path", table_files("disa"))
def test_annealing_tables(path):
    expected = json.loads(path.read_text())
    for family in ("mar", "harmon"):
        for name, tables in expected[family].items():
            calls, upper, lower = (int(part) for part in name.removeprefix("iters").replace("to_", "").split("_"))
            for schedule, steps in tables.items():
                assert StepAnnealing(upper, lower, schedule).table(calls) == steps, (name, schedule)
    for name, steps in expected["xar"].items():
        upper, lower = map(int, name.split("_to_"))
        assert StepAnnealing(upper, lower).table(len(steps)) == steps
    for name, found in expected["flowar"].items():
        upper, lower = map(int, name.split("_to_"))
        assert StepAnnealing(upper, lower).table(len(found["num_steps"])) == found["num_steps"]
    for nominal, found in expected["nominal_to_executed"].items():
        assert list(SOLVER.tables(int(nominal), 950).timesteps) == found["timestep_map"]
        assert SOLVER.num_calls(int(nominal), 950) == found["executed"]
    sizes = {"B": "base", "S": "small", "L": "large", "H": "huge"}
    for name, found in expected["published_configs"].items():
        model, _, size = name.lower().partition("-")
        preset = StepAnnealing.preset(f"{model}-{sizes.get(size.upper(), size)}")
        if "upper" in found:
            assert (preset.upper, preset.lower) == (found["upper"], found["lower"])
        assert preset.settings["guidance_scale"] == found["cfg"]
        assert preset.settings.get("num_inference_steps") == found.get("num_iter")


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem) for path in sorted((parity_root() / "mar").rglob("published_shapes/*.json"))],
)
def test_published_sizes(path):
    published = json.loads(path.read_text())
    state = {name: torch.empty(shape, device="meta") for name, shape in published["shapes"].items()}
    model = (kl if path.stem.startswith("kl") else mar).convert_state_dict(state)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters == published["trainable_params"] == published["state_dict_elements"]
    if path.stem.startswith("mar"):
        constructor = published["constructor"]
        assert model.grid == (constructor["img_size"] // constructor["vae_stride"],) * 2
        assert mar.PRESETS[model.encoder.dim]["head_steps"] == int(constructor["num_sampling_steps"])


# ---------------------------------------------------------------------- the cases notice every tensor


def cannot_matter(name: str, state: dict[str, torch.Tensor]) -> str | None:
    """Why scaling the tensor `name` changes nothing, or None."""
    if name.endswith(".k.bias"):
        return "a constant added to all keys cancels in the softmax"
    if name.endswith(("attn.0.norm.bias", "attn_1.norm.bias", "q.bias")):
        return "over a hundred cells the attention of random weights is almost even, and stays so within the tolerance"
    if name.endswith(".v.bias"):
        return hidden_by_group_norm(name.replace(".v.", ".proj_out."), {**state, name.replace(".v.", ".proj_out."): state[name]})
    return hidden_by_group_norm(name, state)


@pytest.mark.parametrize("case", [case for case in CASES if "constructor" in case.values[0].config])
def test_scaling_any_tensor_by_a_twentieth_is_noticed(case):
    config, state = case.config["constructor"], mar.load_weights(checkpoint(case))
    unnoticed = []
    for name, tensor in state.items():
        model = mar.convert_state_dict({**state, name: tensor * 1.05}, config=config)
        if first_problem(checks(case, model, runs=1)) is None:
            unnoticed.append(name)
    assert not unnoticed, f"the case does not notice: {unnoticed}"


@pytest.mark.parametrize("case", [case for case in CASES if "constructor" not in case.values[0].config])
def test_scaling_any_tensor_of_an_autoencoder_is_noticed(case):
    state, model, io = load_state_dict(checkpoint(case)), load(case), case.io
    parameters = model.state_dict()
    rules = kl.rules_of(len(model.config.channel_multipliers))
    unnoticed = []
    for name, tensor in state.items():
        if cannot_matter(name, state):
            continue
        scaled = apply_rules({name: tensor * 1.05}, rules)
        saved = {target: parameters[target].clone() for target in scaled}
        for target, value in scaled.items():
            parameters[target].copy_(value)
        # One half of the autoencoder, on one image: what a tensor of it changes first.
        if name.startswith(("encoder", "quant_conv")):
            check = Check("moments", model.posterior(io["image"][:1]).parameters, io["moments"][:1])
        else:
            check = Check("decoded", model.decode_features(io["mean"][:1]), io["decoded_from_mean"][:1])
        for target, value in saved.items():
            parameters[target].copy_(value)
        if check.problem is None:
            unnoticed.append(name)
    assert not unnoticed, f"the case does not notice: {unnoticed}"
