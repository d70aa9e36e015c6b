"""Next-X prediction: entities, the flow solver, cached against computed, the loss, and where the two published families use them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_next_x import tiny_flowar, tiny_model

from armm.condition import Condition
from armm.decoding import Guidance, NextScaleFlowDecoding, NextXDecoding
from armm.decoding.annealing import StepAnnealing
from armm.decoding.entities import ENTITIES, EntityPlan
from armm.decoding.next_scale_flow import next_map
from armm.decoding.solvers.flow import FlowSolver, time_index
from armm.decoding.solvers.noise import GaussianNoise
from armm.next_x_model import NextXModel
from armm.training.next_scale_flow import next_scale_flow_loss
from armm.training.noisy_context import noisy_context_loss

KINDS = [("patch", 1), ("cell", 1), ("cell", 2), ("subsample", 2), ("scale", 2), ("image", 1)]
GRID = (4, 6)


def model_of(entity: str, size: int, **options) -> tuple[NextXModel, NextXDecoding]:
    decoding = NextXDecoding(entity, size)
    extra = 4 if "vocab_size" in options else 0
    return tiny_model(GRID, decoding.plan(GRID).num_tokens + extra, **options), decoding


# ---------------------------------------------------------------------- entities


def brute_force(entity: str, height: int, width: int, size: int) -> list[list[int]]:
    """Raster cells of every entity, by their definition."""
    cells = [(row, column) for row in range(height) for column in range(width)]
    keys = {
        "patch": lambda row, column: (row, column),
        "cell": lambda row, column: (row // size, column // size),
        "subsample": lambda row, column: (row % size, column % size),
        "image": lambda row, column: 0,
    }
    groups: dict = {}
    for row, column in cells:
        groups.setdefault(keys[entity](row, column), []).append(row * width + column)
    return [groups[key] for key in sorted(groups)]


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([name for name in ENTITIES if name != "scale"]),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
)
def test_entities_are_what_they_are_called(entity, height, width, size):
    plan = EntityPlan.of(entity, (height * size, width * size), size)
    groups = brute_force(entity, height * size, width * size, size)
    assert [group.tolist() for group in plan.index.split(plan.sizes)] == groups
    assert plan.coordinates.tolist() == [[i // (width * size), i % (width * size)] for group in groups for i in group]
    assert plan.segments().tolist() == [k for k, group in enumerate(groups) for _ in group]
    picture = torch.randn(2, len(plan.index), 3)
    assert torch.equal(plan.join(plan.split(picture)), picture)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.sampled_from([2, 3]), st.integers(1, 2))
def test_scales_are_averages_coarse_to_fine(height, width, ratio, levels):
    grid = (height * ratio**levels, width * ratio**levels)
    plan = EntityPlan.of("scale", grid, ratio)
    assert plan.factors[-1] == 1 and all(a == b * ratio for a, b in zip(plan.factors, plan.factors[1:], strict=False))
    picture = torch.randn(1, grid[0] * grid[1], 2)
    tokens = plan.split(picture)
    assert torch.equal(plan.join(tokens), picture)
    for part, places, factor in zip(
        tokens.split(plan.sizes, 1), plan.coordinates.split(plan.sizes), plan.factors, strict=True
    ):
        square = picture.view(*grid, 2)[:factor, :factor].mean((0, 1))
        assert torch.allclose(part[0, 0], square, atol=1e-5)
        assert places.max(0).values.tolist() == [grid[0] - factor, grid[1] - factor]
    assert sorted(plan.index.tolist()) == list(range(plan.num_tokens))
    assert plan.index[-plan.sizes[-1] :].tolist() == list(range(plan.sizes[-1]))


@pytest.mark.parametrize(
    ("entity", "grid", "size", "message"),
    [
        ("cell", (4, 6), 4, "cannot be cut into cells of 4x4"),
        ("subsample", (4, 6), 3, "no equal subsamples of stride 3"),
        ("scale", (3, 5), 2, "has no coarser scale"),
        ("token", (4, 4), 2, "entity must be one of"),
        ("cell", (4, 0), 2, "grid must be two positive integers"),
    ],
)
def test_entities_that_do_not_fit_are_refused(entity, grid, size, message):
    with pytest.raises(ValueError, match=message):
        EntityPlan.of(entity, grid, size)


# ---------------------------------------------------------------------- the solver


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_euler_steps_along_a_straight_path_are_exact(steps):
    data, noise = torch.randn(2, 3), torch.randn(2, 3)
    times: list[float] = []

    def velocity(x, call, time):
        assert call == len(times) and x.dtype == torch.float64
        times.append(time)
        return noise - data

    assert torch.allclose(FlowSolver()(velocity, noise, num_steps=steps), data, atol=1e-6)
    assert times == FlowSolver().times(steps)[:-1].tolist() and time_index(torch.tensor(times[:1])).item() == 1000


def test_euler_maruyama_follows_its_formula():
    torch.manual_seed(0)
    start, draws = torch.randn(2, 3), torch.randn(5, 2, 3)
    solver = FlowSolver("euler_maruyama", last_time=0.1)
    out = solver(lambda x, call, time: torch.sin(x) + time, start, num_steps=4, step_noise=lambda step: draws[step])
    x, times = start.double(), solver.times(4).tolist()
    assert len(times) == 5 and times[0] == 1 and times[-1] == 0
    for i, (t, after) in enumerate(zip(times, times[1:], strict=False)):
        # the score's variance t^2 + (1 - t) t is t, so velocity - t * score is (2 - t) * velocity + x
        x_next = x + ((2 - t) * (torch.sin(x) + t) + x) * (after - t)
        x = x_next + math.sqrt(2 * t * (t - after)) * draws[i].double() if i < 3 else x_next
    assert torch.allclose(out.double(), x, atol=1e-6)
    assert solver.num_noises(4) == 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FlowSolver("heun"), "method must be one of"),
        (lambda: FlowSolver(grid="late"), "grid must be one of"),
        (lambda: FlowSolver(last_time=0.0), "last_time must lie"),
        (lambda: FlowSolver().times(0), "at least 1"),
        (lambda: FlowSolver("euler_maruyama").times(1), "at least 2"),
        (lambda: FlowSolver("euler_maruyama")(lambda x, i, t: x, torch.zeros(1), num_steps=3), "needs step_noise"),
        (lambda: Guidance(2.0, high=1.5), "high must be a flow time"),
    ],
)
def test_bad_solvers_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_noise_comes_from_where_it_is_said():
    lists = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    rows = [torch.randn(2, 5, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4)]
    assert torch.equal(GaussianNoise(lists, 2).draw(2, 5), torch.stack(rows))
    recorded = GaussianNoise([torch.ones(2, 3)], 2)
    assert torch.equal(recorded.draw(3), torch.ones(2, 3))
    with pytest.raises(ValueError, match="used up"):
        recorded.draw(3)
    with pytest.raises(ValueError, match=r"must be \[2, 4\]"):
        GaussianNoise([torch.ones(2, 3)], 2).draw(4)
    with pytest.raises(ValueError, match="one per sample"):
        GaussianNoise(lists, 3)
    with pytest.raises(TypeError, match="noise must be"):
        GaussianNoise([3], 1)


# ---------------------------------------------------------------------- decoding


@pytest.mark.parametrize(("entity", "size"), KINDS)
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_cached_equals_computed(entity, size, scale):
    model, decoding = model_of(entity, size)
    labels = torch.tensor([3, 7])
    runs = [
        decoding(
            model,
            model.condition(labels),
            model.null_condition(2),
            num_steps=3,
            guidance=Guidance(scale, schedule="linear"),
            noise=torch.Generator().manual_seed(5),
            use_cache=use_cache,
        )
        for use_cache in (True, False)
    ]
    assert torch.allclose(runs[0].latents, runs[1].latents, atol=1e-4 * float(runs[0].latents.abs().max()))
    assert runs[0].num_calls == decoding.num_calls(GRID, 3) == 3 * len(decoding.plan(GRID).sizes)
    assert float(runs[0].latents.std()) > 0.1 and runs[0].latents.isfinite().all()


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(ENTITIES), st.integers(2, 3), st.integers(1, 3), st.integers(1, 2), st.booleans())
def test_cached_equals_computed_on_any_grid(entity, size, height, width, stochastic):
    grid = (height * size, width * size)
    decoding = NextXDecoding(entity, size, solver="euler_maruyama" if stochastic else "euler")
    model = tiny_model(grid, decoding.plan(grid).num_tokens)
    runs = [
        decoding(
            model,
            model.condition(torch.tensor([3])),
            num_steps=2,
            noise=torch.Generator().manual_seed(5),
            use_cache=flag,
        )
        for flag in (True, False)
    ]
    assert torch.allclose(runs[0].latents, runs[1].latents, atol=1e-4 * float(runs[0].latents.abs().max()))


@pytest.mark.parametrize(("entity", "size"), [("cell", 2), ("image", 1)])
def test_cached_equals_computed_behind_words(entity, size):
    transformer = {"head_dim": 8, "rotary_axes": [2, 2, 4]}
    model, decoding = model_of(entity, size, vocab_size=9, text_length=4, transformer=transformer)
    ids = torch.randint(8, (2, 4), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True, True, True, True], [False, False, True, True]])
    condition = model.caption_condition(ids, mask)
    null = model.caption_condition(torch.full((2, 4), 8))

    def run(use_cache: bool, condition: Condition) -> torch.Tensor:
        noise, guidance = torch.Generator().manual_seed(5), Guidance(2.0, schedule="linear")
        return decoding(
            model, condition, null, num_steps=3, guidance=guidance, noise=noise, use_cache=use_cache
        ).latents

    cached, computed = run(True, condition), run(False, condition)
    assert torch.allclose(cached, computed, atol=1e-4 * float(cached.abs().max()))
    padding, word = ids.clone(), ids.clone()
    padding[1, 0], word[1, 3] = (ids[1, 0] + 1) % 8, (ids[1, 3] + 1) % 8
    assert torch.allclose(run(True, model.caption_condition(padding, mask)), cached, atol=1e-5)
    assert not torch.allclose(run(True, model.caption_condition(word, mask)), cached, atol=1e-2)


@pytest.mark.parametrize(("entity", "size"), KINDS)
def test_a_sample_does_not_depend_on_its_batch(entity, size):
    model, decoding = model_of(entity, size)
    arguments = {"num_steps": 3, "guidance": Guidance(2.0, schedule="linear")}

    def run(labels: list[int], seeds: list[int]) -> torch.Tensor:
        noise = [torch.Generator().manual_seed(seed) for seed in seeds]
        return decoding(
            model, model.condition(torch.tensor(labels)), model.null_condition(len(labels)), noise=noise, **arguments
        ).latents

    both = run([3, 7], [11, 12])
    assert torch.allclose(run([7], [12])[0], both[1], atol=1e-4)
    assert not torch.allclose(run([7], [13])[0], both[1], atol=1e-2)


def test_the_clean_entity_is_fed_once_and_noisy_ones_are_not_kept():
    model, decoding = model_of("cell", 2)
    fed: list[tuple[int, int]] = []
    inner = model.trunk.forward

    def forward(embeds, **arguments):
        cache = arguments["cache"]
        before = 0 if cache is None else cache.length
        fed.append((before, embeds.shape[1]))
        return inner(embeds, **arguments)

    model.trunk.forward = forward
    decoding(model, model.condition(torch.tensor([1])), num_steps=2)
    assert fed == [(0, 4), (0, 4), *((start, n) for k in range(5) for start, n in ((4 * k, 8), (4 * k + 4, 4)))]


def test_steps_can_be_annealed_per_entity():
    model, decoding = model_of("cell", 2)
    annealing = StepAnnealing(7, 2)
    out = decoding(model, model.condition(torch.tensor([1])), annealing=annealing)
    assert out.num_calls == sum(annealing.table(6)) == decoding.num_calls(GRID, annealing=annealing)


def test_callback_and_interruption():
    model, decoding = model_of("subsample", 2)
    condition, seen = model.condition(torch.tensor([1])), []
    noise = torch.Generator().manual_seed(1)
    picture = torch.randn(1, 24, 4)

    def callback(entity, latents):
        seen.append((entity, latents.clone()))
        return picture if entity == 1 else None

    out = decoding(model, condition, num_steps=2, noise=noise, callback=callback, interrupt=lambda: len(seen) == 3)
    plan = decoding.plan(GRID)
    assert out.steps == 3 and [entity for entity, _ in seen] == [0, 1, 2]
    tokens = plan.split(out.latents).split(plan.sizes, 1)
    assert torch.equal(tokens[1], plan.split(picture).split(plan.sizes, 1)[1])
    assert not tokens[3].any() and bool(tokens[2].any())


def test_a_picture_of_scales_is_previewed_at_its_full_size():
    model, decoding = model_of("scale", 2)
    seen: list[torch.Tensor] = []
    decoding(model, model.condition(torch.tensor([1])), num_steps=2, callback=lambda k, x: seen.append(x))
    assert [tuple(x.shape) for x in seen] == [(1, 24, 4)] * 2
    assert seen[0].view(4, 6, 4)[:2, :2].flatten(0, 1).unique(dim=0).shape[0] == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: NextXDecoding("cells"), "entity must be one of"),
        (lambda: NextXDecoding(size=0), "size must be a positive integer"),
        (lambda: NextXDecoding("cell", 8).plan((12, 16)), "cells of 8x8"),
        (lambda: tiny_model().condition(torch.tensor([11])), "labels must lie"),
        (lambda: tiny_model().caption_condition(torch.zeros(1, 1, dtype=torch.long)), "has no words"),
        (lambda: NextXModel(vocab_size=4), "give both or neither"),
        (lambda: NextXModel(transformer={"modulation": None}), "must have modulation"),
    ],
)
def test_bad_next_x_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---------------------------------------------------------------------- training


@pytest.mark.parametrize(("entity", "size"), KINDS)
def test_the_loss_sees_earlier_entities_as_noisy_as_they_are(entity, size):
    model, decoding = model_of(entity, size)
    plan = decoding.plan(GRID)
    torch.manual_seed(4)
    latents, noise = torch.randn(2, 24, 4), torch.randn(2, plan.num_tokens, 4)
    times = torch.rand(2, len(plan.sizes))
    condition = model.condition(torch.tensor([1, 10]))
    loss = noisy_context_loss(model, decoding, condition, latents, times=times, noise=noise)
    clean = plan.split(latents)
    spread = times[:, plan.segments()][..., None]
    noisy, total, stop = (1 - spread) * clean + spread * noise, 0.0, 0
    for entity_number, count in enumerate(plan.sizes):  # entity by entity, each with no more than what it may see
        start, stop = stop, stop + count
        index = time_index(times[:, : entity_number + 1])
        velocity = decoding.velocities(model, condition, noisy[:, :stop], index, plan)[:, start:]
        total += float((velocity - (noise - clean)[:, start:stop]).detach().square().sum())
    assert math.isclose(loss.item(), total / noise.numel(), rel_tol=1e-4)
    loss.backward()
    silent = [
        name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert silent in ([], ["trunk.blocks.0.attention.to_k.bias", "trunk.blocks.1.attention.to_k.bias"])


def test_the_loss_checks_what_it_is_given():
    model, decoding = model_of("cell", 2)
    condition = model.condition(torch.tensor([1]))
    with pytest.raises(ValueError, match="times must be"):
        noisy_context_loss(model, decoding, condition, torch.randn(1, 24, 4), times=torch.rand(1, 3))
    with pytest.raises(ValueError, match="latents must be"):
        noisy_context_loss(model, decoding, condition, torch.randn(1, 20, 4))


# ---------------------------------------------------------------------- maps with a flow head


@pytest.mark.parametrize("cross", [False, True])
def test_maps_do_not_depend_on_the_batch_and_train(cross):
    model, decoding = tiny_flowar(cross), NextScaleFlowDecoding()

    def run(labels: list[int], seeds: list[int]) -> torch.Tensor:
        noise = [torch.Generator().manual_seed(seed) for seed in seeds]
        guidance = Guidance(2.0, schedule="linear", high=0.9)
        condition = model.condition(torch.tensor(labels))
        out = decoding(model, condition, model.null_condition(len(labels)), num_steps=5, guidance=guidance, noise=noise)
        assert (out.num_calls, out.head_calls) == (3, 12)
        return out.latents

    assert torch.allclose(run([7], [12])[0], run([3, 7], [11, 12])[1], atol=1e-4)
    next_scale_flow_loss(model, model.condition(torch.tensor([1, 10])), torch.randn(2, 16, 4)).backward()
    silent = {
        name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()
    }
    assert all(name.endswith("to_k.bias") for name in silent)


@pytest.mark.parametrize("cross", [False, True])
def test_the_features_are_those_of_one_pass_without_a_cache(cross):
    model = tiny_flowar(cross)
    condition = model.condition(torch.tensor([4]))
    out = NextScaleFlowDecoding()(model, condition, num_steps=3, noise=torch.Generator().manual_seed(2), record=True)
    inputs = [next_map(tokens, side, 4) for tokens, side in zip(out.tokens, (2, 4), strict=False)]
    expected = model(torch.cat(inputs, dim=1), condition)
    assert torch.allclose(torch.cat(out.features, dim=1), expected, atol=1e-4)
