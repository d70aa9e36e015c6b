"""Whole generations recorded by SJD and GSD on a Lumina-mGPT model, replayed with our loop."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from harness import Case, Check, first_problem

from armm.condition import Condition
from armm.convert import convert
from armm.decoding.guidance import Guidance
from armm.decoding.sampling import Sampler, top_k_filter
from armm.decoding.speculative import (
    JacobiWindow,
    MatchVerifier,
    Numbers,
    Target,
    Verifier,
    WindowNumbers,
    speculate,
)
from armm.model import AutoregressiveModel

SCHEMES = {"random": "random", "repeat_horizon": "repeat_left", "sample_horizon": "likeliest_left"}


class LuminaFilters:
    """The authors' processors by the number of the new token: begin of image and sizes, then rows of codes with an end-of-line token
    each, then end of image; and top-k."""

    def __init__(self, config: dict[str, Any], run: dict[str, Any]) -> None:
        self.config, self.run = config, run
        self.width, self.height = 2 * run["grid_w"], 2 * run["grid_h"]

    @property
    def total(self) -> int:
        return 3 + (self.width + 1) * self.height + 1

    def forced(self, unit: int) -> int | None:
        config, run = self.config, self.run
        if unit < 3:
            return (config["boi"], config["grid_token_offset"] + run["grid_h"], config["grid_token_offset"] + run["grid_w"])[unit]
        number = unit - 2
        if number % (self.width + 1) == 0:
            return config["eol"]
        return config["eoi"] if number == (self.width + 1) * self.height + 1 else None

    def __call__(self, logits: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
        low, high = self.config["image_token_ids"]
        out = torch.full_like(logits, float("-inf"))
        out[..., low : high + 1] = logits[..., low : high + 1]
        out = top_k_filter(out, self.run["image_top_k"])
        for row, numbers in enumerate(units.tolist()):
            for place, unit in enumerate(numbers):
                token = self.forced(unit)
                if token is not None:
                    out[row, place] = float("-inf")
                    out[row, place, :, token] = 0.0
        return out


def recorded_numbers(io: dict[str, torch.Tensor], name: str, low: int, high: int) -> list[Numbers]:
    drafts = io[f"{name}.draft_init"]

    def tape(what: str) -> torch.Tensor:
        return io.get(f"{name}.{what}", torch.zeros_like(drafts, dtype=torch.double)).double().clamp(min=0)

    draft = ((drafts.double() - low + 0.5) / (high - low)).clamp(min=0)
    draw, accept = tape("u_sample"), tape("u_accept")
    residual = io.get(f"{name}.u_resample", torch.zeros(len(drafts), dtype=torch.double)).double()
    return [
        Numbers(draft[t][None, :, None], draw[t][None, :, None], accept[t][None, :, None], residual[t].view(1, 1).clamp(min=0))
        for t in range(len(drafts))
    ]


def run_checks(case: Case, model: AutoregressiveModel, name: str, verifier: Verifier, window: int) -> Iterator[Check]:
    """Our generation next to the recorded one: what is fed, what is committed, acceptance probabilities, the sequence."""
    config, run, io = case.config, case.config["runs"][name], case.io
    prompt = io["prompt"]
    filters = LuminaFilters(config, run)
    length, units = prompt.shape[1], filters.total
    low, high = config["image_token_ids"][0], config["image_token_ids"][1] + 1
    embeds = model.embed(prompt)
    guided = run["do_cfg"] and run["guidance_scale"] > 1
    condition = Condition(embeds, index=torch.arange(length)[None])
    # the authors' unconditional row: the last prompt token and what follows it, counted from there
    mask = torch.zeros(1, length, dtype=torch.bool)
    mask[:, -1] = True
    null = Condition(embeds, mask, torch.zeros(1, length, dtype=torch.long)) if guided else None
    places = torch.arange(units + 2 * window)
    index = torch.stack([length + places, 1 + places]) if guided else length + places
    target = Target(
        model, condition, null, guidance=Guidance(run["guidance_scale"]), sampler=Sampler(do_sample=run["do_sample"]), spare=window,
        filters=filters, index=index, random_range=(low, high),
    )  # fmt: skip
    interval = (run["jacobi_loop_interval_l"], run["jacobi_loop_interval_r"])
    source = JacobiWindow(window, SCHEMES[run["multi_token_init_scheme"]], interval)
    greedy = run["prefix_token_sampler_scheme"] == "jacobi"
    steps: list[Any] = []
    codes, _ = speculate(
        target,
        source,
        MatchVerifier() if greedy else verifier,
        uniforms=WindowNumbers(recorded_numbers(io, name, low, high), 1, 1),
        units=units,
        trace=lambda draft, verdict, outcome: steps.append((verdict, outcome)),
    )
    # the authors stop at the end of the image, which may come before the end of the last window
    ids = torch.cat([prompt, codes[:, :, 0]], dim=1)
    expected = io[f"{name}.ids"]
    yield Check(f"{name}.ids", ids[:, : expected.shape[1]], expected)
    yield Check(f"{name}.calls", torch.tensor(target.num_calls), torch.tensor(len(io[f"{name}.window_len"])))
    for step, (verdict, outcome) in enumerate(steps):
        if step == 0:
            continue
        fed = torch.full_like(io[f"{name}.window_tokens"][step], -1)
        fed[: outcome.tokens.shape[1]] = outcome.tokens[0, :, 0]
        yield Check(f"{name}.window_tokens[{step}]", fed, io[f"{name}.window_tokens"][step])
        if step < len(steps) - 1:  # of the last, what is behind the end does not count
            yield Check(f"{name}.num_matched[{step}]", torch.tensor(outcome.kept[0]), io[f"{name}.num_matched"][step])
        if f"{name}.accept_prob" in io and verdict.acceptance is not None:
            expected = io[f"{name}.accept_prob"][step]
            tested = int((expected >= 0).sum())
            ours = verdict.acceptance[0, :tested, 0]
            yield Check(f"{name}.accept_prob[{step}]", ours.double(), expected[:tested], atol=1e-4)


def differs(case: Case, model: AutoregressiveModel, name: str, verifier: Verifier, window: int) -> bool:
    """Whether `model` does not give the recorded generation."""
    try:
        return first_problem(run_checks(case, model, name, verifier, window)) is not None
    except ValueError:  # it took more calls than were recorded
        return True


def load(case: Case) -> AutoregressiveModel:
    model = convert("chameleon", case.path / "checkpoint")
    return model.eval()  # type: ignore[return-value]
