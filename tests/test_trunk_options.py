"""What continuous-token models need of the trunk: two stacks in one, conditions by segment or by branch, a context to look at."""

from __future__ import annotations

import pytest
import torch

from armm.nn.embedders import TimeEmbedding
from armm.nn.masks import block_causal_mask
from armm.transformer import ARTransformer

BASE = {"dim": 16, "num_heads": 2, "mlp_hidden": 24, "learned_positions": 6, "rotary_axes": [4, 4]}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def trunk(**options) -> ARTransformer:
    torch.manual_seed(0)
    model = ARTransformer(**{**BASE, "num_layers": 2, **options}).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def table(model: ARTransformer):
    return model.position_table(torch.arange(12.0).view(6, 2), index=torch.arange(6).flip(0))


def test_a_bridge_joins_two_stacks():
    whole = trunk(bridges=[1], input_norm=True)
    first, second = trunk(num_layers=1, input_norm=True), trunk(num_layers=1)
    state = whole.state_dict()

    def part(block: int, **renamed: str) -> dict[str, torch.Tensor]:
        prefix = f"blocks.{block}."
        kept = {
            "blocks.0." + name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)
        }
        return {**kept, **{name.replace("__", "."): state[source] for name, source in renamed.items()}}

    first.load_state_dict(
        part(0, norm__weight="bridges.1.norm.weight", input_norm__weight="input_norm.weight")
        | {"position_embedding.weight": state["position_embedding.weight"]}
    )
    second.load_state_dict(
        part(1, norm__weight="norm.weight")
        | {"position_embedding.weight": state["bridges.1.position_embedding.weight"]}
    )
    x = torch.randn(2, 6, 16)
    mask = block_causal_mask([2, 4])
    middle = whole.bridges["1"].projection(first(x, positions=table(first), mask=mask))
    expected = second(middle, positions=table(second), mask=mask)
    assert torch.allclose(whole(x, positions=table(whole), mask=mask), expected, atol=1e-5)
    # with a cache, in two blocks
    cache = whole.allocate_cache(2, 6)
    positions = table(whole)
    parts = [whole(x[:, a:b], positions=positions[a:b], cache=cache) for a, b in ((0, 2), (2, 6))]
    assert torch.allclose(torch.cat(parts, 1), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["block", "shared", "branches"])
def test_segments_spread_a_condition_over_tokens(kind):
    model = trunk(modulation=kind, modulation_dim=8)
    x, rows = torch.randn(2, 6, 16), torch.randn(2, 3, 8)
    segments = torch.tensor([0, 2, 2, 1, 1, 0])
    spread = rows[:, segments]
    few, many = ((rows, rows), (spread, spread)) if kind == "branches" else (rows, spread)
    short = model(x, positions=table(model), modulation=few, segments=segments)
    assert torch.allclose(short, model(x, positions=table(model), modulation=many), atol=1e-5)
    assert not torch.allclose(
        short, model(x, positions=table(model), modulation=few, segments=segments.flip(0)), atol=1e-2
    )


def test_branches_have_a_condition_each():
    model = trunk(modulation="branches")
    order = [model.blocks[0].modulation.indices.index(i) for i in range(6)]
    assert order == [0, 1, 2, 3, 4, 5]
    x, a, b = torch.randn(1, 6, 16), torch.randn(1, 16), torch.randn(1, 16)
    one = model.blocks[0].modulation((a, b))
    other = model.blocks[0].modulation((a, b + 1))
    assert all(torch.equal(p, q) for p, q in zip(one[:3], other[:3], strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(one[3:], other[3:], strict=True))
    assert model(x, positions=table(model), modulation=(a, b)).isfinite().all()


def test_tokens_look_at_their_context():
    model = trunk(context_dim=10)
    x, context = torch.randn(2, 6, 16), torch.randn(2, 6, 10)
    out = model(x, positions=table(model), context=context)
    changed = model(x, positions=table(model), context=context + torch.randn(10))
    assert not torch.allclose(out, changed, atol=1e-2)
    for block in model.blocks:
        torch.nn.init.zeros_(block.cross_attention.to_out.weight)
    plain = trunk()
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if name in plain.state_dict()})
    without = plain(x, positions=table(plain))
    assert torch.allclose(model(x, positions=table(model), context=context), without, atol=1e-5)
    assert not model.blocks[0].fuse()
    for given in ({}, {"context": None}):
        with pytest.raises(ValueError, match="context_dim belong together"):
            model(x, positions=table(model), **given)
    with pytest.raises(ValueError, match="context_dim belong together"):
        plain(x, positions=table(plain), context=context)


@pytest.mark.parametrize("name", ["taps", "bridges"])
def test_places_must_lie_between_blocks(name):
    with pytest.raises(ValueError, match=f"{name} must lie between 1 and"):
        trunk(**{name: [2]})


def test_time_embedding_is_the_sinusoid_and_two_layers():
    embedding = TimeEmbedding(4, frequencies=6)
    index = torch.tensor([[0, 999], [3, 40]])
    angles = index[..., None] * 10000.0 ** (-torch.arange(3) / 3)
    inner = embedding.fc1(torch.cat([angles.cos(), angles.sin()], -1))
    assert torch.allclose(embedding(index), embedding.fc2(inner * inner.sigmoid()), atol=1e-4)
