"""The trunk and the model around it: cached equals uncached, fused equals separate, saving, training, errors."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from armm.cache import KVCache
from armm.model import AutoregressiveModel
from armm.nn import PositionTable, attention_backend
from armm.nn.masks import additive_mask, block_causal_mask
from armm.transformer import ARTransformer

few = settings(max_examples=10, deadline=None)
TINY = {"dim": 16, "num_layers": 2, "num_heads": 2, "mlp_hidden": 24, "rotary_axes": [4, 4]}


def tiny_trunk(**options) -> ARTransformer:
    return ARTransformer(**{**TINY, **options}).eval()


def test_modulation_that_nobody_applies_is_an_error():
    x, condition = torch.randn(1, 3, 16), torch.randn(1, 16)
    with pytest.raises(ValueError, match="modulation"):
        tiny_trunk(rotary_axes=[])(x, modulation=condition)
    with pytest.raises(ValueError, match="modulation"):
        tiny_trunk(rotary_axes=[], modulation="block")(x)


def tiny_model(kind="class", **options) -> AutoregressiveModel:
    torch.manual_seed(0)
    condition = {
        "class": {"type": "class", "num_classes": 5},
        "caption": {"type": "caption", "in_dim": 6, "num_tokens": 4},
    }
    if kind == "unified":
        grid = options.pop("grid", (2, 3))
        size = 3 + 1 + grid[0] * grid[1] + 4
        rotary = {"learned_positions": size, "qk_norm": "rms", "rotary_axes": [2, 2, 4]}
        transformer = {**TINY, **rotary, **options.pop("transformer", {})}
        return AutoregressiveModel(20, transformer, None, grid, text_slots=3, answer_slots=4, **options).eval()
    transformer = {**TINY, **options.pop("transformer", {})}
    return AutoregressiveModel(12, transformer, condition[kind], options.pop("grid", (2, 3)), **options).eval()


configurations = st.fixed_dictionaries(
    {
        "num_heads": st.sampled_from([2, 4]),
        "num_kv_heads": st.sampled_from([1, 2]),
        "mlp": st.sampled_from(["swiglu", "geglu", "gelu", "gelu_tanh"]),
        "norm": st.sampled_from(["rms", "layer"]),
        "qk_norm": st.sampled_from([None, "rms", "l2"]),
        "qkv_bias": st.booleans(),
        "mlp_bias": st.booleans(),
        "rotary_layout": st.sampled_from(["interleaved", "half_split"]),
        "learned_positions": st.sampled_from([0, 30]),
    }
)


@torch.no_grad()
@few
@given(
    options=configurations,
    grid=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    chunks=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    fuse=st.booleans(),
)
def test_cached_equals_uncached(options, grid, chunks, fuse):
    head_dim = 16 // options["num_heads"]
    trunk = ARTransformer(
        dim=16, num_layers=2, mlp_hidden=24, rotary_axes=[head_dim // 2] * 2, rotary_theta=50.0, **options
    ).eval()  # fmt: skip
    length = grid[0] * grid[1] + 2
    coordinates = torch.cat([torch.zeros(2, 2), torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1]))])
    table = trunk.position_table(coordinates, zero=torch.arange(length) < 2, index=torch.arange(length))
    x = torch.randn(2, length, 16)
    expected = trunk(x, positions=table, causal=True)
    if fuse:
        trunk.fuse_projections()
    cache, start, outputs = trunk.allocate_cache(2, length), 0, []
    while start < length:
        end = min(start + chunks[len(outputs) % len(chunks)], length)
        outputs.append(trunk(x[:, start:end], positions=table[start:end], causal=True, cache=cache))
        start = end
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@few
@given(sizes=st.lists(st.integers(1, 3), min_size=1, max_size=4), fuse=st.booleans())
def test_block_causal_cached_equals_masked(sizes, fuse):
    """Entity by entity with a draft of the entity seen but not kept, as cell- and frame-wise decoders do."""
    trunk = tiny_trunk()
    if fuse:
        trunk.fuse_projections()
    length = sum(sizes)
    table = trunk.position_table(torch.arange(length)[:, None].expand(-1, 2))
    x = torch.randn(2, length, 16)
    expected = trunk(x, positions=table, mask=block_causal_mask(sizes))
    cache, start, outputs = trunk.allocate_cache(2, length), 0, []
    for size in sizes:
        window = slice(start, start + size)
        trunk(torch.randn(2, size, 16), positions=table[window], cache=cache, discard=size)
        assert cache.length == start
        outputs.append(trunk(x[:, window], positions=table[window], cache=cache))
        start += size
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_reference_backend_equals_default():
    trunk = tiny_trunk(num_kv_heads=1)
    x = torch.randn(2, 5, 16)
    table = trunk.position_table(torch.randn(5, 2))
    expected = trunk(x, positions=table, causal=True)
    with attention_backend("reference"):
        torch.testing.assert_close(trunk(x, positions=table, causal=True), expected, atol=1e-5, rtol=1e-4)
    trunk.set_attention_backend("reference")
    torch.testing.assert_close(trunk(x, positions=table, causal=True), expected, atol=1e-5, rtol=1e-4)
    trunk.reset_attention_backend()


@torch.no_grad()
def test_additive_and_boolean_masks_agree():
    trunk = tiny_trunk()
    x = torch.randn(2, 4, 16)
    table = trunk.position_table(torch.randn(4, 2))
    mask = torch.rand(2, 1, 4, 4) > 0.4
    mask = mask | torch.eye(4, dtype=torch.bool)
    expected = trunk(x, positions=table, mask=mask)
    torch.testing.assert_close(trunk(x, positions=table, mask=additive_mask(mask, torch.float32)), expected)


@torch.no_grad()
def test_positions_with_zero_rows_see_only_the_mean():
    """Zero queries attend uniformly: the output of a zero position does not depend on its own query."""
    trunk = tiny_trunk(num_layers=1)
    table = trunk.position_table(torch.zeros(3, 2), zero=torch.tensor([True, True, True]))
    attention = trunk.blocks[0].attention
    x = torch.randn(1, 3, 16)
    h = trunk.blocks[0].attention_norm(x)
    mean = attention.to_out(attention.to_v(h).mean(1, keepdim=True)).expand_as(h)
    torch.testing.assert_close(attention(h, table.rotary, None, False, None, 0, 0, None), mean, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_taps_hand_out_earlier_hidden_states():
    trunk = tiny_trunk(num_layers=3, taps=[1, 2])
    x = torch.randn(1, 4, 16)
    table = trunk.position_table(torch.randn(4, 2))
    hidden, tapped = trunk(x, positions=table, causal=True)
    assert sorted(tapped) == [1, 2]
    one = trunk.blocks[0](x, table.rotary, None, True)
    torch.testing.assert_close(tapped[1], trunk.tap_norms["1"](one))
    assert not torch.equal(hidden, tapped[2])


@pytest.mark.parametrize("kind", ["block", "shared"])
def test_modulated_trunk_trains_every_parameter(kind):
    trunk = tiny_trunk(modulation=kind, modulation_dim=8, norm="layer", norm_affine=False, mlp="gelu_tanh").train()
    out = trunk(torch.randn(2, 4, 16), positions=trunk.position_table(torch.randn(4, 2)), modulation=torch.randn(2, 8))
    out.square().sum().backward()
    assert [name for name, parameter in trunk.named_parameters() if parameter.grad is None] == []


# The model


@torch.no_grad()
@pytest.mark.parametrize("kind", ["class", "caption", "unified"])
def test_fused_model_equals_plain_and_keeps_its_names(kind, tmp_path):
    model = tiny_model(kind)
    names = list(model.state_dict())
    ids = torch.randint(0, 12, (2, 5))
    condition = None
    if kind == "class":
        condition = model.condition(labels=torch.tensor([0, 4]))
    elif kind == "caption":
        condition = model.condition(features=torch.randn(2, 4, 6), mask=torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]))
    expected = model(ids, condition)
    model.fuse_projections()
    assert all(block._fused is not None for block in model.trunk.blocks)
    torch.testing.assert_close(model(ids, condition), expected, atol=1e-5, rtol=1e-4)
    assert list(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    loaded = AutoregressiveModel.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    torch.testing.assert_close(loaded(ids, condition), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_fused_weights_never_go_stale():
    model = tiny_model()
    ids, condition = torch.randint(0, 12, (2, 6)), model.condition(labels=torch.tensor([1, 2]))
    model.fuse_projections()
    twin = copy.deepcopy(model)
    assert twin.trunk.blocks[0]._fused is None
    torch.testing.assert_close(twin(ids, condition), model(ids, condition), atol=1e-5, rtol=1e-4)

    other = tiny_model()
    for parameter in other.parameters():
        parameter.mul_(1.3)
    expected = other(ids, other.condition(labels=torch.tensor([1, 2])))
    model.load_state_dict(other.state_dict())
    actual = model(ids, model.condition(labels=torch.tensor([1, 2])))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)

    model.fuse_projections()
    model.to(torch.float64)
    assert model.trunk.blocks[0]._fused.qkv.weight.dtype == torch.float64
    model.train()
    assert model.trunk.blocks[0]._fused is None
    pointers = {p.untyped_storage().data_ptr() for p in model.trunk.blocks[0].parameters()}
    assert len(pointers) == len(list(model.trunk.blocks[0].parameters()))


@torch.no_grad()
def test_left_padding_does_not_change_a_caption():
    """The same text with more padding in front gives the same logits for the image."""
    model = tiny_model("unified")
    text, image = torch.tensor([[7, 3]]), torch.randint(8, 20, (1, 6))
    short = torch.cat([text, image], dim=1)
    index = torch.arange(2, 2 + short.shape[1])
    expected = model(short, index=index)
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), short], dim=1)
    positions = torch.cat([torch.zeros(2, dtype=torch.long), index])[None]
    key_mask = torch.arange(padded.shape[1])[None] >= 2
    actual = model(padded, index=positions, key_mask=key_mask)[:, 2:]
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def test_low_precision_loading_keeps_positions_exact(tmp_path):
    model = tiny_model()
    expected = model.image_positions().rotary
    model.save_pretrained(tmp_path)
    loaded = AutoregressiveModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(loaded.image_positions().rotary, expected)
    assert loaded.embed(torch.zeros(1, 1, dtype=torch.long)).dtype == torch.bfloat16


def test_logits_of_a_range_of_the_vocabulary():
    model = tiny_model(head_bias=True)
    hidden = torch.randn(3, 16)
    whole = model.logits(hidden)
    assert whole.dtype == torch.float32
    torch.testing.assert_close(model.logits(hidden, low=4, high=9), whole[:, 4:9])
    model.fuse_projections()
    with torch.no_grad():
        torch.testing.assert_close(model.logits(hidden.repeat(2, 1), low=4, high=9), whole[:, 4:9].repeat(2, 1))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_under_autocast_reaches_every_parameter(checkpointing):
    model = tiny_model("unified", transformer={"dropout": 0.1, "token_dropout": 0.1}).train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.randint(0, 20, (2, 14)))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.randint(0, 20, (28,)))
    loss.backward()
    assert logits.dtype == torch.float32
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_gradients_equal_those_of_plain_attention():
    """Training uses another route through attention on a CPU."""
    grads = []
    ids = torch.randint(0, 12, (2, 6))
    for backend in ("sdpa", "reference"):
        model = tiny_model()
        model.set_attention_backend(backend)
        model(ids, model.condition(labels=torch.tensor([1, 2]))).square().mean().backward()
        grads.append(model.trunk.blocks[0].attention.to_q.weight.grad)
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-4)


def bad(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_configurations_say_what_is_allowed():
    bad(lambda: ARTransformer(dim=10, num_heads=4), "dim=10 is not divisible by num_heads=4")
    bad(lambda: ARTransformer(dim=16, num_heads=4, num_kv_heads=3), "must be a multiple of num_kv_heads=3")
    bad(lambda: ARTransformer(dim=16, num_heads=2, rotary_axes=[2, 2]), "must add up to head_dim=8")
    bad(lambda: ARTransformer(dim=16, num_heads=2, rotary_axes=[3, 5]), "even numbers")
    bad(lambda: ARTransformer(dim=16, num_heads=2, qk_norm="l1"), "qk_norm must be")
    bad(lambda: ARTransformer(dim=16, num_heads=2, taps=[6]), "taps must lie between")
    bad(lambda: ARTransformer(num_layers=0), "num_layers must be a positive integer")
    bad(lambda: AutoregressiveModel(12, {"width": 3}), r"unknown entries \['width'\]")
    bad(lambda: AutoregressiveModel(0, TINY), "vocab_size must be a positive integer")
    bad(lambda: AutoregressiveModel(12, TINY, {"type": "sound"}), "condition type must be")
    bad(lambda: AutoregressiveModel(12, TINY, {"type": "class"}), r"takes \['num_classes'\]")
    bad(lambda: AutoregressiveModel(12, TINY, grid=[0, 4]), "grid must be two positive integers")
    bad(lambda: AutoregressiveModel(12, TINY, {"type": "class", "num_classes": 2}, text_slots=4), "text_slots")
    bad(lambda: AutoregressiveModel(12, {**TINY, "learned_positions": 9}, None, [2, 2]), "learned_positions=9, but")


def test_bad_calls_say_what_was_given():
    model, text, unified = tiny_model(), tiny_model("caption"), tiny_model("unified")
    bad(
        lambda: model.condition(labels=torch.tensor([6])),
        r"labels must lie in 0 .. 4 \(5 is the null class\), got \[6\]",
    )
    bad(lambda: model.condition(labels=torch.tensor([0.5])), "labels must be a vector of integers")
    bad(lambda: model.condition(features=torch.zeros(1, 4, 6)), "conditioned on classes")
    bad(lambda: text.condition(labels=torch.tensor([1])), "conditioned on text features")
    bad(lambda: text.condition(features=torch.zeros(1, 3, 6)), r"features must be \[batch, 4, 6\], got \(1, 3, 6\)")
    bad(lambda: unified.condition(labels=torch.tensor([1])), "no condition embedder")
    bad(lambda: unified.null_condition(1), "no condition embedder")
    bad(lambda: unified.prefix_condition(torch.zeros(1, 9, dtype=torch.long)), "prefix has 9 tokens; at most 3")
    bad(lambda: model.prefix_condition(torch.zeros(1, 1, dtype=torch.long)), "models with text_slots")
    bad(lambda: unified.image_positions([5, 5]), r"learned positions for a grid of \(2, 3\)")
    bad(lambda: model.logits(torch.zeros(1, 16), low=3, high=99), "low, high must select rows")
    bad(
        lambda: model.trunk(torch.zeros(1, 2, 16), positions=PositionTable(None, torch.zeros(3, 16))),
        "describe 3 tokens",
    )
    bad(lambda: model.trunk.position_table(None), "coordinates must be given")
    bad(lambda: model.set_attention_backend("magic"), "attention backend must be one of")


def test_cache_is_a_value_in_the_dtype_of_the_trunk():
    trunk = tiny_trunk(num_kv_heads=1).to(torch.bfloat16)
    cache = trunk.allocate_cache(3, 7)
    assert isinstance(cache, KVCache)
    assert cache.buffer.shape == (2, 2, 3, 1, 7, 8)
    assert cache.buffer.dtype == torch.bfloat16
    assert not list(trunk.buffers())
