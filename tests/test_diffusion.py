"""Diffusion: grids of steps, the solver against diffusers' and by hand, the heads, how many positions stay open."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from armm.decoding.mask_schedule import MASK_SCHEDULES, open_counts
from armm.decoding.solvers.diffusion import DiffusionSolver, respaced_timesteps
from armm.decoding.solvers.losses import diffusion_losses
from armm.heads.diffusion import DiffusionHead, DiffusionTransformerHead, build_diffusion_head

SOLVER = DiffusionSolver()


def predictor(x: torch.Tensor, call: int, timestep: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Some smooth function of the state and the timestep."""
    return torch.sin(x + timestep / 500), torch.cos(x * 2)


@given(st.integers(2, 1000))
def test_a_number_of_steps_is_spread_from_the_first_to_the_last_timestep(steps):
    timesteps = respaced_timesteps(steps)
    assert len(timesteps) == steps and timesteps[0] == 0 and timesteps[-1] == 999
    gaps = {b - a for a, b in zip(timesteps, timesteps[1:], strict=False)}
    assert max(gaps) - min(gaps) <= 1


def test_sections_and_strides():
    assert respaced_timesteps("3,2,1") == [0, 166, 333, 334, 666, 667]
    assert respaced_timesteps([3, 2, 1]) == respaced_timesteps("3,2,1")
    assert respaced_timesteps("2,0") == [0, 499]
    assert respaced_timesteps("ddim25") == list(range(0, 1000, 40))


@pytest.mark.parametrize("bad", [1, 0, -3, True, 2.5, "many", "3,x", "ddim7x", "ddim600", "1001", 1001, "900,2", "1,0"])
def test_steps_that_cannot_be(bad):
    with pytest.raises(ValueError, match="num_steps"):
        SOLVER.tables(bad)


@given(st.integers(2, 200), st.integers(0, 999))
def test_a_last_timestep_merges_the_noisier_ones(steps, last):
    timesteps = SOLVER.tables(steps, last).timesteps
    assert list(timesteps) == sorted({min(timestep, last) for timestep in respaced_timesteps(steps)})
    assert SOLVER.num_calls(steps, last) == len(timesteps) <= steps


@pytest.mark.parametrize("variance", ["fixed_large", "learned_range"])
def test_the_solver_walks_the_path_of_diffusers(variance):
    """Where float32 tables are good enough: up to timestep 900."""
    scheduler = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", variance_type=variance, clip_sample=False, prediction_type="epsilon"
    )
    timesteps = list(SOLVER.tables(12, 900).timesteps)
    scheduler.set_timesteps(timesteps=timesteps[::-1])
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 4, 5, generator=generator)
    start = x
    drawn: list[torch.Tensor] = []
    for call, timestep in enumerate(timesteps[::-1]):
        predicted, interpolation = predictor(x, call, timestep)
        output = predicted if variance == "fixed_large" else torch.cat([predicted, interpolation], dim=1)
        drawn.append(torch.randn(x.shape, generator=torch.Generator().manual_seed(call)))
        x = scheduler.step(output, timestep, x, generator=torch.Generator().manual_seed(call)).prev_sample

    def predict(x, call, timestep):
        predicted, interpolation = predictor(x, call, timestep)
        return predicted, None if variance == "fixed_large" else interpolation

    ours = SOLVER(predict, start, num_steps=12, last_timestep=900, step_noise=drawn.__getitem__)
    assert torch.allclose(ours, x, atol=2e-3)


def test_temperature_zero_needs_no_noise_and_known_values_stay():
    start = torch.randn(1, 6, 2, generator=torch.Generator().manual_seed(0))
    calm = SOLVER(predictor, start, num_steps=5, last_timestep=600, step_noise=lambda call: torch.zeros_like(start))
    warm = SOLVER(
        predictor,
        start,
        num_steps=5,
        last_timestep=600,
        temperature=0.0,
        step_noise=lambda call: torch.ones_like(start),
    )
    assert torch.equal(calm, warm)
    known, mask = torch.full_like(start, 3.0), torch.tensor([True, False] * 3)[None, :, None]
    seen: list[torch.Tensor] = []

    def predict(x, call, timestep):
        seen.append(x)
        return predictor(x, call, timestep)

    SOLVER(predict, start, num_steps=5, known=known, known_mask=mask, step_noise=lambda call: torch.ones_like(start))
    for x, cumulative in zip(seen, SOLVER.tables(5).alphas_cumprod.flip(0).tolist(), strict=True):
        expected = 3.0 * math.sqrt(cumulative) + start * math.sqrt(1 - cumulative)
        assert torch.allclose(x[:, ::2], expected[:, ::2], atol=1e-6)


def test_a_perfect_prediction_has_no_loss_and_only_the_bound_trains_the_variance():
    generator = torch.Generator().manual_seed(1)
    target, noise = torch.randn(2, 3, 4, 5, generator=generator).unbind(0)
    timesteps = torch.tensor([[0, 1, 500, 999]]).expand(3, -1)
    variance = torch.zeros(3, 4, 5, requires_grad=True)
    predicted = noise.clone().requires_grad_()
    losses = diffusion_losses(SOLVER, lambda x, t: (predicted, variance), target, timesteps, noise)
    assert losses.mse.abs().max() < 1e-10 and losses.bound.shape == (3, 4)
    losses.bound.sum().backward()
    assert predicted.grad is None and variance.grad.abs().sum() > 0
    fixed = diffusion_losses(SOLVER, lambda x, t: (predicted + 1, None), target, timesteps, noise)
    assert torch.allclose(fixed.total, torch.ones(3, 4)) and not fixed.bound.any()


@pytest.mark.parametrize("kind", ["mlp", "transformer"])
def test_heads(kind):
    torch.manual_seed(0)
    sizes = {"positions": 6, "num_heads": 2} if kind == "transformer" else {}
    head = build_diffusion_head({"type": kind, "width": 8, "depth": 2, **sizes}, 16, 3)
    x, hidden = torch.randn(2, 6, 3), torch.randn(2, 6, 16)
    output = head(x, torch.tensor([[7]]), head.condition(hidden))
    predicted, variance = head.split(output)
    assert predicted.shape == x.shape and not output.any()  # it predicts nothing before it is trained
    assert (variance is not None) == isinstance(head, DiffusionHead) and head.joint == isinstance(
        head, DiffusionTransformerHead
    )
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    whole = head(x, torch.tensor([[7]]), head.condition(hidden))
    changed = head(torch.cat([x[:, :5], x[:, 5:] + 1], 1), torch.tensor([[7]]), head.condition(hidden))
    assert torch.allclose(whole[:, :5], changed[:, :5], atol=1e-6) != head.joint  # alone, or in sight of the others
    for bad, message in (({"type": "linear"}, "head type must be one of"), ({"widht": 8}, "widht")):
        with pytest.raises(ValueError, match=message):
            build_diffusion_head(bad, 16, 3)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 60), st.data(), st.sampled_from(sorted(MASK_SCHEDULES)))
def test_open_counts_fall_to_nothing(total, data, schedule):
    steps = data.draw(st.integers(1, total))
    counts = open_counts(total, steps, schedule)
    assert len(counts) == steps + 1 and counts[0] == total and counts[-1] == 0
    expected = [total]
    for step in range(1, steps):
        wanted = math.floor(total * MASK_SCHEDULES[schedule](step / steps))
        expected.append(max(1, min(expected[-1] - 1, wanted)))
    assert counts == [*expected, 0]
    if schedule == "cos":
        assert all(now > following for now, following in zip(counts, counts[1:], strict=False))
