"""Mixtures of experts against sums written out; in the trunk: fused, cached, routed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from armm import ARTransformer
from armm.condition import Condition, concatenate
from armm.nn import MixtureOfExperts


def mixture(**changes) -> MixtureOfExperts:
    torch.manual_seed(0)
    return MixtureOfExperts(**{"dim": 8, "count": 5, "active": 2, "hidden": 6, "shared": 4, "routers": 3} | changes)


def written_out(module: MixtureOfExperts, token: torch.Tensor, route: int) -> torch.Tensor:
    chances = torch.softmax(module.routers[route](token).double(), -1)
    best = sorted(range(len(chances)), key=lambda number: -float(chances[number]))[: module.active]
    total = sum(float(chances[number]) for number in best)
    out = sum(float(chances[number]) / total * module.experts[number](token) for number in best)
    return out if module.shared is None else out + module.shared(token)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 5), st.integers(1, 7), st.integers(0, 9), st.booleans(), st.booleans())
@torch.no_grad()
def test_experts_are_weighted_sums_of_the_likeliest(active, tokens, seed, shared, routed):
    module = mixture(active=active, shared=4 if shared else 0)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, tokens, 8, generator=generator)
    routes = torch.randint(3, (2, tokens), generator=generator) if routed else None
    out = module(x, routes)
    for row in range(2):
        for place in range(tokens):
            route = 0 if routes is None else int(routes[row, place])
            torch.testing.assert_close(out[row, place], written_out(module, x[row, place], route), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_gathered_weights_give_what_the_loop_gives():
    for bias in (False, True):
        module = mixture(bias=bias)
        x = torch.randn(6, 8)
        weights, index = module.choose(x)
        expected = module.looped(x, weights, index)
        module.fuse()
        torch.testing.assert_close(module.gathered(x, weights, index, *module._stacked), expected, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(module.looped(x, weights, index), expected)
        assert set(module.state_dict()) == set(mixture(bias=bias).state_dict())


def trunk() -> ARTransformer:
    torch.manual_seed(1)
    experts = {"count": 4, "active": 2, "hidden": 12, "shared": 8, "routers": 2}
    model = ARTransformer(16, 2, 2, experts=experts, rotary_axes=[8], rotary_layout="half_split").eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
def test_a_trunk_of_experts_fused_and_cached_is_itself():
    model, x = trunk(), torch.randn(3, 7, 16)
    routes = torch.tensor([[0, 1, 1, 0, 1, 0, 0]]).expand(3, -1)
    positions = model.position_table(torch.arange(7)[:, None])
    expected = model(x, positions=positions, causal=True, routes=routes)
    assert not torch.allclose(expected, model(x, positions=positions, causal=True), atol=1e-3)
    for _ in range(2):
        cache = model.allocate_cache(3, 7)
        parts = [
            model(x[:, low:high], positions=positions[low:high], causal=True, cache=cache, routes=routes[:, low:high])
            for low, high in ((0, 4), (4, 5), (5, 7))
        ]
        torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-5, rtol=1e-5)
        model.fuse_projections()
        assert all(block._fused is not None for block in model.blocks)
    model.unfuse_projections()
    torch.testing.assert_close(
        model(x, positions=positions, causal=True, routes=routes), expected, atol=1e-5, rtol=1e-5
    )


def test_every_expert_that_is_chosen_learns():
    model, x = trunk().train(), torch.randn(4, 9, 16)
    model(x, positions=model.position_table(torch.arange(9)[:, None]), causal=True).square().mean().backward()
    for block in model.blocks:
        assert block.mlp.routers[0].weight.grad.abs().sum() > 0 and block.mlp.routers[1].weight.grad is None
        assert all(expert.down.weight.grad is not None for expert in block.mlp.experts)


def test_routes_of_conditions_follow_their_tokens():
    one = Condition(torch.randn(1, 2, 4), routes=torch.tensor([[1, 0]]))
    two = Condition(torch.randn(1, 3, 4))
    both = concatenate([one, two])
    assert both.routes.tolist() == [[0, 1, 0], [0, 0, 0]] and both.mask.tolist() == [[False, True, True], [True] * 3]
    assert both.repeat(2).routes.tolist() == [[0, 1, 0]] * 2 + [[0, 0, 0]] * 2
    assert both.select(slice(0, 1)).unpadded().routes.tolist() == [[1, 0]]
    assert one.extend(torch.zeros(1, 1, 4), torch.tensor([2])).routes.tolist() == [[1, 0, 0]]
    assert one.spread(2).routes.tolist() == [[1, 1, 0, 0]]


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="active <= count"):
        mixture(active=6)
    with pytest.raises(ValueError, match="experts are gated networks"):
        ARTransformer(16, 1, 2, mlp="gelu", experts={"count": 2, "active": 1, "hidden": 4})
    with pytest.raises(ValueError, match="this transformer has none"):
        ARTransformer(16, 1, 2)(torch.zeros(1, 2, 16), routes=torch.zeros(1, 2, dtype=torch.long))
