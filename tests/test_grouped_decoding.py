"""Strategies that draw several tokens with one call: orders, masks, cache, batches, callbacks, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from armm.decoding import (
    DECODING_STRATEGIES,
    Guidance,
    NeighboringDecoding,
    NextTokenDecoding,
    ParallelGroupsDecoding,
    Sampler,
    TokenShuffleDecoding,
)
from armm.decoding.neighboring import near_to_far_mask
from armm.decoding.orders import manhattan_distance, near_to_far, parallel_regions, raster, windows
from armm.decoding.parallel_groups import group_mask
from armm.heads.neighboring import NeighboringHead, neighbor_links
from armm.model import AutoregressiveModel
from armm.nn.shuffle import TokenShuffle

few = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
grids = st.tuples(st.integers(1, 4), st.integers(1, 5))
videos = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4))
GREEDY = Sampler(do_sample=False)
VOCABULARY = 14


def build(kind: str, grid: tuple[int, ...], seed: int = 0, unified: bool = False, regions: int = 2, window: int = 2):
    """A small class-conditional (or unified) model of one kind, its weights large, so that greedy choices are far from ties."""
    torch.manual_seed(seed)
    trunk = {"dim": 16, "num_layers": 2, "num_heads": 2, "mlp_hidden": 24}
    trunk["rotary_axes"] = [2, 2, 4] if len(grid) == 3 or unified else [4, 4]
    options = {}
    if kind == "neighboring":
        trunk |= {"num_layers": 1 + len(grid), "taps": list(range(2, 1 + len(grid)))}
        options["head"] = {"type": "neighboring", "axes": len(grid)}
    elif kind == "parallel":
        options["transition_tokens"] = regions * regions - 1
    elif kind in ("shuffle", "causal shuffle"):
        options["shuffle"] = {"window": window, "num_mlps": 1, "mlp_hidden": 24, "causal_mlps": int(kind != "shuffle")}
    condition = None if unified else {"type": "class", "num_classes": 5}
    if unified:
        options |= {"text_slots": 3, "answer_slots": 4, "bidirectional_prompt": True}
    model = AutoregressiveModel(VOCABULARY, trunk, condition, grid, **options).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.35)
    return model


def conditions(model: AutoregressiveModel, batch: int = 2):
    if model.condition_type == "class":
        return model.condition(labels=torch.arange(batch) % 5), model.null_condition(batch)
    ids = torch.randint(0, 4, (batch, 4), generator=torch.Generator().manual_seed(1))
    return model.prefix_condition(ids), model.prefix_condition(torch.full((batch, 4), 3))


def uses(kind: str, window: int = 2, regions: int = 2):
    strategies = {
        "plain": NextTokenDecoding(),
        "neighboring": NeighboringDecoding(),
        "parallel": ParallelGroupsDecoding(regions),
        "shuffle": TokenShuffleDecoding(window),
        "causal shuffle": TokenShuffleDecoding(window),
    }
    return strategies[kind]


# ---------------------------------------------------------------------- orders and masks


@few
@given(grid=st.one_of(grids, videos), scale=st.integers(1, 3))
def test_every_order_visits_every_cell_once(grid, scale):
    count = math.prod(grid)
    for groups in (raster(grid), near_to_far(grid)):
        assert sorted(torch.cat(groups).tolist()) == list(range(count))
    assert len(near_to_far(grid)) == sum(grid) - len(grid) + 1
    height, width = grid[-2] * scale, grid[-1] * scale
    assert sorted(windows((height, width), scale).flatten().tolist()) == list(range(height * width))
    assert sorted(parallel_regions((height, width), scale).tolist()) == list(range(height * width))
    strategies = [NeighboringDecoding(), TokenShuffleDecoding(scale)]
    strategies += [ParallelGroupsDecoding(scale)] if scale > 1 else []
    for strategy in strategies:
        assert sorted(torch.cat(strategy.groups((height, width))).tolist()) == list(range(height * width))
        assert strategy.num_calls((height, width)) == len(strategy.groups((height, width)))


def test_orders_of_small_grids_are_the_papers():
    assert [group.tolist() for group in near_to_far((2, 3))] == [[0], [1, 3], [2, 4], [5]]
    assert parallel_regions((4, 4), 2).tolist() == [0, 2, 8, 10, 1, 3, 9, 11, 4, 6, 12, 14, 5, 7, 13, 15]
    assert windows((2, 4), 2).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]


@few
@given(grid=st.one_of(grids, videos), prefix=st.integers(1, 3))
def test_the_near_to_far_mask_by_brute_force(grid, prefix):
    mask, distance = near_to_far_mask(prefix, grid), manhattan_distance(grid).tolist()
    for i in range(len(mask)):
        for j in range(len(mask)):
            if i < prefix:
                expected = j <= i
            else:
                expected = j < prefix or distance[j - prefix] <= distance[i - prefix]
            assert bool(mask[i, j]) == expected


@few
@given(prefix=st.integers(1, 2), regions=st.integers(2, 3), groups=st.integers(0, 3))
def test_the_group_mask_by_brute_force(prefix, regions, groups):
    size = regions * regions
    total = size if not groups else 2 * size - 1 + groups * size
    mask = group_mask(prefix, size, total)
    start = prefix + size - 1

    def group(place: int) -> int:
        return place if place < start else start + (place - start) // size

    for i in range(len(mask)):
        for j in range(len(mask)):
            assert bool(mask[i, j]) == (group(j) <= group(i))


@few
@given(grid=st.one_of(grids, videos))
def test_neighbor_links_are_the_cells_one_step_back(grid):
    groups = near_to_far(grid)
    for before, after in zip(groups, groups[1:], strict=False):
        links, count = neighbor_links(before, after, grid)
        for place, cell in enumerate(after.tolist()):
            coordinates, found = list(torch.unravel_index(torch.tensor(cell), grid)), 0
            for axis, (source, weight) in zip(reversed(range(len(grid))), links, strict=True):
                inside = int(coordinates[axis]) > 0
                assert float(weight[place]) == float(inside)
                if inside:
                    back = [int(value) - (k == axis) for k, value in enumerate(coordinates)]
                    expected = int(sum(value * math.prod(grid[k + 1 :]) for k, value in enumerate(back)))
                    assert int(before[source[place]]) == expected
                found += inside
            assert int(count[place]) == found > 0
    with pytest.raises(ValueError, match="near to far"):
        neighbor_links(torch.tensor([0]), torch.tensor([0]), (2, 2))


# ---------------------------------------------------------------------- cached decoding


@torch.no_grad()
@few
@given(
    kind=st.sampled_from(["plain", "neighboring", "parallel", "shuffle", "causal shuffle"]),
    grid=grids,
    unified=st.booleans(),
    fuse=st.booleans(),
)
def test_recorded_logits_equal_teacher_forcing(kind, grid, unified, fuse):
    grid = grid if kind in ("plain", "neighboring") else (2 * grid[0], 2 * grid[1])
    model = build(kind, grid, unified=unified and kind != "parallel")
    if fuse:
        model.fuse_projections()
    condition, null = conditions(model)
    out = uses(kind)(model, condition, null, sampler=GREEDY, guidance=Guidance(1.7), record_logits=True)
    assert out.num_calls == uses(kind).num_calls(grid) == out.steps
    guided, plain = (uses(kind).image_logits(model, out.ids, part) for part in (condition, null))
    torch.testing.assert_close(out.logits, plain + (guided - plain) * 1.7, atol=1e-4, rtol=1e-4)
    assert torch.equal(out.ids, out.logits.argmax(-1))


@torch.no_grad()
@few
@given(grid=videos)
def test_videos_are_decoded_along_three_axes(grid):
    model = build("neighboring", grid)
    condition, _ = conditions(model)
    out = NeighboringDecoding()(model, condition, sampler=GREEDY, record_logits=True)
    torch.testing.assert_close(out.logits, NeighboringDecoding().image_logits(model, out.ids, condition), atol=1e-4, rtol=1e-4)
    assert out.num_calls == sum(grid) - 2


@torch.no_grad()
@pytest.mark.parametrize("kind", ["neighboring", "parallel", "shuffle", "causal shuffle"])
def test_a_sample_is_the_same_alone_and_in_a_batch(kind):
    model = build(kind, (4, 6))
    condition, null = conditions(model, batch=3)
    options = {"sampler": Sampler(top_k=9), "guidance": Guidance(2.0)}
    noise = [torch.Generator().manual_seed(seed) for seed in range(3)]
    together = uses(kind)(model, condition, null, noise=noise, **options)
    for row in range(3):
        window, generator = slice(row, row + 1), torch.Generator().manual_seed(row)
        alone = uses(kind)(model, condition.select(window), null.select(window), noise=generator, **options)
        assert torch.equal(alone.ids[0], together.ids[row])


@torch.no_grad()
def test_windows_of_one_token_are_next_token_decoding_bit_for_bit():
    model = build("plain", (3, 4))
    condition, null = conditions(model)
    for sampler in (GREEDY, Sampler(temperature=0.9, top_k=8)):
        options = {"sampler": sampler, "guidance": Guidance(1.5, schedule="half_linear"), "record_logits": True}
        generators = [[torch.Generator().manual_seed(seed) for seed in (3, 4)] for _ in range(2)]
        plain = NextTokenDecoding()(model, condition, null, noise=generators[0], **options)
        windowed = TokenShuffleDecoding(1)(model, condition, null, noise=generators[1], **options)
        assert torch.equal(plain.ids, windowed.ids) and torch.equal(plain.logits, windowed.logits)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["neighboring", "parallel", "shuffle", "causal shuffle"])
def test_known_tokens_stay_and_steer_the_others(kind):
    model = build(kind, (4, 4))
    condition, _ = conditions(model)
    free = uses(kind)(model, condition, sampler=GREEDY).ids
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[:, :4] = True
    wanted = (free + 1) % VOCABULARY
    kept = uses(kind)(model, condition, sampler=GREEDY, known_ids=wanted, known_mask=mask).ids
    assert torch.equal(kept[mask], wanted[mask]) and not torch.equal(kept[~mask], free[~mask])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["neighboring", "parallel", "shuffle", "causal shuffle"])
def test_callbacks_see_open_cells_and_may_replace_and_interrupt(kind):
    model, grid = build(kind, (4, 4)), (4, 4)
    condition, _ = conditions(model)
    strategy, seen = uses(kind), []

    def watch(step, ids):
        seen.append(ids.clone())

    out = strategy(model, condition, sampler=GREEDY, callback=watch)
    drawn = torch.zeros(16, dtype=torch.bool)
    for group, ids in zip(strategy.groups(grid), seen, strict=True):
        drawn[group] = True
        assert torch.equal(ids >= 0, drawn.expand(2, -1))
    assert torch.equal(seen[-1], out.ids)

    def replace(step, ids):
        return torch.where(ids >= 0, 1, ids) if step == 0 else None

    first = strategy.groups(grid)[0]
    assert (strategy(model, condition, sampler=GREEDY, callback=replace).ids[:, first] == 1).all()
    stopped = strategy(model, condition, sampler=GREEDY, callback=watch, interrupt=lambda: len(seen) >= len(strategy.groups(grid)) + 2)
    assert stopped.steps == 2 and stopped.num_calls == 2 and (stopped.ids >= 0).all()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["neighboring", "parallel", "shuffle", "causal shuffle"])
def test_an_interval_drops_the_null_rows_for_good(kind):
    model = build(kind, (4, 4))
    condition, null = conditions(model)
    full = uses(kind)(model, condition, null, sampler=GREEDY, guidance=Guidance(3.0), record_logits=True)
    short = uses(kind)(model, condition, null, sampler=GREEDY, guidance=Guidance(3.0, interval=0), record_logits=True)
    first = uses(kind).groups((4, 4))[0]
    assert torch.equal(full.logits[:, first], short.logits[:, first])
    assert not torch.allclose(full.logits, short.logits)


# ---------------------------------------------------------------------- the modules


@few
@given(window=st.integers(2, 3), batch=st.integers(1, 2), windows_=st.integers(1, 3))
def test_token_shuffle_keeps_slots_in_order(window, batch, windows_):
    slots = window * window
    shuffle = TokenShuffle(dim=slots * 2, window=window, num_mlps=0)
    embeds = torch.randn(batch, windows_, slots, slots * 2)
    fused = shuffle.fuse(embeds)
    assert fused.shape == (batch, windows_, slots * 2)
    for slot in range(slots):
        torch.testing.assert_close(fused[..., 2 * slot : 2 * slot + 2], shuffle.compress(embeds[:, :, slot]))
    states = shuffle.unfuse(fused)
    for slot in range(slots):
        torch.testing.assert_close(states[:, :, slot], shuffle.expand(fused[..., 2 * slot : 2 * slot + 2]))


def test_slots_of_a_causal_shuffle_see_those_before_them():
    torch.manual_seed(0)
    plain, causal = (TokenShuffle(dim=16, window=2, causal_mlps=number) for number in (0, 2))
    causal.load_state_dict(plain.state_dict(), strict=False)
    states, embeds = plain.unfuse(torch.randn(3, 16)), torch.randn(3, 4, 16)
    assert torch.equal(causal.refine(causal.unfuse(torch.zeros(3, 16)) * 0 + states, embeds), states)  # the identity at first
    for parameter in causal.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    whole = causal.refine(states, embeds)
    for slot in range(4):
        changed = embeds.clone()
        changed[:, slot] += 1
        other = causal.refine(states, changed)
        assert torch.equal(other[:, : slot + 1], whole[:, : slot + 1])
        assert all(not torch.allclose(other[:, later], whole[:, later]) for later in range(slot + 1, 4))
        torch.testing.assert_close(causal.refine(states[:, : slot + 1], embeds[:, :slot]), whole[:, : slot + 1])


@pytest.mark.parametrize("kind", ["neighboring", "parallel", "shuffle", "causal shuffle"])
def test_every_parameter_gets_a_gradient_and_a_round_trip_keeps_the_model(kind, tmp_path):
    model = build(kind, (4, 4))
    condition, _ = conditions(model)
    ids = torch.randint(VOCABULARY, (2, 16))
    logits = uses(kind).image_logits(model, ids, condition)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    silent = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not silent
    model.save_pretrained(tmp_path / "model")
    uses(kind).save_pretrained(tmp_path / "decoding")
    again = AutoregressiveModel.from_pretrained(tmp_path / "model").eval()
    strategy = type(uses(kind)).from_pretrained(tmp_path / "decoding")
    assert dict(strategy.config) == dict(uses(kind).config) or strategy.groups((4, 4))[1].equal(uses(kind).groups((4, 4))[1])
    with torch.no_grad():
        expected = uses(kind)(model, condition, sampler=GREEDY).ids
        assert torch.equal(strategy(again, conditions(again)[0], sampler=GREEDY).ids, expected)


def test_the_table_names_every_strategy():
    assert {type(uses(kind)) for kind in ("plain", "neighboring", "parallel", "shuffle")} <= set(DECODING_STRATEGIES.values())


# ---------------------------------------------------------------------- bad input

BAD = {
    "neighboring without its head": (lambda: decode(NeighboringDecoding(), "plain"), "needs a model with a neighboring head"),
    "a video grid for an image model": (lambda: decode(NeighboringDecoding(), "neighboring", grid=(2, 2, 2)), "2 axes"),
    "regions that do not fit": (lambda: decode(ParallelGroupsDecoding(2), "parallel", grid=(3, 4)), "cannot be cut into 2x2"),
    "regions without transition tokens": (lambda: decode(ParallelGroupsDecoding(2), "plain"), "3 transition tokens"),
    "more regions than trained": (lambda: decode(ParallelGroupsDecoding(4), "parallel"), "15 transition tokens"),
    "windows that do not fit": (lambda: decode(TokenShuffleDecoding(2), "shuffle", grid=(3, 4)), "cannot be cut into windows"),
    "windows the model does not know": (lambda: decode(TokenShuffleDecoding(2), "plain"), "has window 1"),
    "other windows than trained": (lambda: decode(TokenShuffleDecoding(4), "shuffle"), "has window 2"),
    "one region": (lambda: ParallelGroupsDecoding(1), "at least 2"),
    "a window of nothing": (lambda: TokenShuffleDecoding(0), "positive integer"),
    "a head of four axes": (lambda: NeighboringHead(8, 8, axes=4), "axes must be 2"),
    "a head without its taps": (
        lambda: AutoregressiveModel(8, {"dim": 8, "num_layers": 2, "num_heads": 1}, head={"type": "neighboring", "axes": 2}),
        "do not belong together",
    ),
    "an unknown head": (lambda: AutoregressiveModel(8, {"dim": 8, "num_heads": 1}, head={"type": "far"}), "head type must be one of"),
    "an unknown argument of a head": (
        lambda: AutoregressiveModel(8, {"dim": 8, "num_heads": 1}, head={"type": "categorical", "width": 3}),
        "unexpected keyword",
    ),
    "a window that does not divide the width": (lambda: TokenShuffle(dim=6, window=2), "multiple of window"),
    "a negative number of MLPs": (lambda: TokenShuffle(dim=8, causal_mlps=-1), "causal_mlps must be an integer"),
    "a shuffle that does nothing": (lambda: TokenShuffle(dim=8, window=1), "leave the shuffle out"),
    "a grid of one axis": (lambda: AutoregressiveModel.check_grid([4]), "two positive integers"),
}


def decode(strategy, kind: str, grid: tuple[int, ...] | None = None):
    model = build(kind, (4, 4))
    return strategy(model, conditions(model)[0], grid=grid, sampler=GREEDY)


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()
