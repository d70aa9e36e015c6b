"""Building blocks against naive definitions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from armm import nn as armm_nn
from armm.nn import block as block_module
from armm.nn.linear import FusedLinear

few = settings(max_examples=12, deadline=None)


def test_a_mask_of_heads_without_batch_is_of_heads_when_key_heads_are_shared():
    query, key, value = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    mask = torch.rand(4, 1, 5) > 0.4
    mask[..., 0] = True
    found = armm_nn.attention(query, key, value, mask=mask, backend="sdpa")
    torch.testing.assert_close(found, armm_nn.attention(query, key, value, mask=mask, backend="reference"))


def test_a_narrowed_position_table_keeps_its_bridges():
    own, shared = torch.randn(4, 3, 2), torch.randn(3, 2)
    table = armm_nn.PositionTable(None, own, (own + 1, shared)).narrow(2)
    assert torch.equal(table.bridges[0], own[:2] + 1) and torch.equal(table.bridges[1], shared)
    assert torch.equal(table.learned, own[:2])


# Norms


@pytest.mark.parametrize("affine", [True, False])
def test_rms_norm_is_its_definition(affine):
    norm = armm_nn.build_norm("rms", 12, 1e-5, affine)
    x = torch.randn(2, 3, 12)
    expected = x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-5)
    if affine:
        torch.nn.init.normal_(norm.weight)
        expected = expected * norm.weight
    torch.testing.assert_close(norm(x), expected)


def test_norms_keep_low_precision_but_compute_in_float32():
    x = (torch.randn(4, 16) * 100).to(torch.bfloat16)
    for kind in ("rms", "layer"):
        norm = armm_nn.build_norm(kind, 16, 1e-5).to(torch.bfloat16)
        out = norm(x)
        reference = armm_nn.build_norm(kind, 16, 1e-5)(x.float())
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), reference, atol=0.02, rtol=0.01)


def test_norm_under_autocast_returns_the_matmul_dtype():
    with torch.autocast("cpu", torch.bfloat16):
        assert armm_nn.build_norm("rms", 8, 1e-5)(torch.randn(2, 8)).dtype == torch.bfloat16


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="norm must be 'rms' or 'layer', got 'batch'"):
        armm_nn.build_norm("batch", 8, 1e-5)
    with pytest.raises(ValueError, match="mlp must be one of"):
        armm_nn.build_mlp("relu", 8, 16, False)
    with pytest.raises(ValueError, match="modulation_order"):
        armm_nn.BlockModulation("block", 8, 8, ["shift1"])
    with pytest.raises(ValueError, match="layout must be one of"):
        armm_nn.rotary_table(torch.zeros(1, 1), [4], layout="spiral")


# Rotary


def naive_rotary(x, positions, axes, theta, zero, layout):
    """One pair at a time: x [N, H, d]."""
    out = torch.zeros_like(x)
    half = x.shape[-1] // 2
    for n in range(x.shape[0]):
        pair = 0
        for axis, size in enumerate(axes):
            for j in range(size // 2):
                angle = float(positions[n, axis]) * theta ** (-2.0 * j / size)
                cos, sin = (0.0, 0.0) if zero is not None and bool(zero[n]) else (math.cos(angle), math.sin(angle))
                first, second = (2 * pair, 2 * pair + 1) if layout == "interleaved" else (pair, pair + half)
                a, b = x[n, :, first], x[n, :, second]
                out[n, :, first], out[n, :, second] = a * cos - b * sin, a * sin + b * cos
                pair += 1
    return out


@few
@given(
    axes=st.lists(st.integers(1, 3).map(lambda n: 2 * n), min_size=1, max_size=3),
    length=st.integers(1, 5),
    layout=st.sampled_from(["interleaved", "half_split"]),
    zero=st.booleans(),
    seed=st.integers(0, 99),
)
def test_rotary_against_one_pair_at_a_time(axes, length, layout, zero, seed):
    torch.manual_seed(seed)
    positions = torch.randint(-3, 30, (length, len(axes))).float()
    flags = torch.arange(length) % 2 == 0 if zero else None
    x = torch.randn(length, 2, sum(axes))
    table = armm_nn.rotary_table(positions, axes, 100.0, flags, layout)
    out = armm_nn.apply_rotary(x[None], table)[0]
    torch.testing.assert_close(out, naive_rotary(x, positions, axes, 100.0, flags, layout), atol=2e-5, rtol=1e-4)
    if zero:
        assert (out[flags] == 0).all()


def test_rotary_tables_are_float32_whatever_the_default_dtype():
    torch.set_default_dtype(torch.bfloat16)
    try:
        table = armm_nn.rotary_table(torch.tensor([[575, 3]]), [32, 32])
    finally:
        torch.set_default_dtype(torch.float32)
    assert table.dtype == torch.complex64
    assert table[0, 0, 0].real.item() == pytest.approx(math.cos(575.0), abs=1e-5)


def test_rotary_per_row_tables():
    positions = torch.randint(0, 9, (3, 4, 2))
    table = armm_nn.rotary_table(positions, [4, 4])
    x = torch.randn(3, 4, 2, 8)
    rows = [armm_nn.apply_rotary(x[i : i + 1], armm_nn.rotary_table(positions[i], [4, 4])) for i in range(3)]
    torch.testing.assert_close(armm_nn.apply_rotary(x, table), torch.cat(rows))


# Positions


def test_layouts():
    image = armm_nn.image_layout(2, 2, 3)
    assert len(image) == 8
    assert image.zero.tolist() == [True, True] + [False] * 6
    assert image.coordinates[2:].tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    unified = armm_nn.unified_layout(3, 2, 2, 2)
    assert unified.coordinates.tolist() == [
        [-3, 0.5, 0.5], [-2, 0.5, 0.5], [-1, 0.5, 0.5], [0, 0.5, 0.5],
        [0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1], [1, 0.5, 0.5], [2, 0.5, 0.5],
    ]  # fmt: skip


def test_position_table_slices():
    table = armm_nn.PositionTable(armm_nn.rotary_table(torch.randn(6, 1), [4]), torch.randn(6, 5))
    part = table[2:4]
    assert len(part) == 2
    assert torch.equal(part.rotary, table.rotary[2:4])
    assert torch.equal(part.learned, table.learned[2:4])
    assert len(table[4:99]) == 2
    with pytest.raises(ValueError, match="step 1"):
        table[::2]


# Masks


@few
@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_block_causal_mask_brute_force(sizes):
    blocks = [index for index, size in enumerate(sizes) for _ in range(size)]
    mask = armm_nn.block_causal_mask(sizes)
    for i, a in enumerate(blocks):
        for j, b in enumerate(blocks):
            assert bool(mask[i, j]) == (b <= a)


@few
@given(queries=st.integers(1, 5), extra=st.integers(0, 4))
def test_causal_mask_brute_force(queries, extra):
    mask = armm_nn.causal_mask(queries, queries + extra)
    for i in range(queries):
        for j in range(queries + extra):
            assert bool(mask[i, j]) == (j <= i + extra)


@few
@given(lengths=st.lists(st.integers(0, 4), min_size=1, max_size=3), tail=st.integers(0, 3), whole=st.integers(0, 4))
def test_prefix_mask_brute_force(lengths, tail, whole):
    prefix = torch.stack([torch.arange(4) >= 4 - n for n in lengths])
    mask = armm_nn.prefix_mask(prefix, 4 + tail, whole)
    for row in range(len(lengths)):
        for i in range(4 + tail):
            for j in range(4 + tail):
                visible = (j <= i or j < whole) and (j >= 4 or bool(prefix[row, j]))
                assert bool(mask[row, 0, i, j]) == (visible or i == j)


# Attention


@few
@given(
    kv_heads=st.sampled_from([1, 2, 4]),
    queries=st.integers(1, 4),
    extra=st.integers(0, 3),
    kind=st.sampled_from(["none", "bool", "additive"]),
    causal=st.booleans(),
    seed=st.integers(0, 99),
)
def test_sdpa_equals_reference(kv_heads, queries, extra, kind, causal, seed):
    torch.manual_seed(seed)
    query = torch.randn(2, 4, queries, 8)
    key, value = torch.randn(2, 2, kv_heads, queries + extra, 8)
    mask = None
    if kind != "none":
        mask = torch.rand(2, 1, queries, queries + extra) > 0.3
        mask = mask | torch.eye(queries, dtype=torch.bool).expand(2, 1, -1, -1).new_ones(queries, 1)
        if kind == "additive":
            mask = armm_nn.additive_mask(mask, torch.float32) + torch.randn(queries, queries + extra)
    expected = armm_nn.attention(query, key, value, mask=mask, causal=causal, scale=0.3, backend="reference")
    actual = armm_nn.attention(query, key, value, mask=mask, causal=causal, scale=0.3)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
    training = armm_nn.attention(query.clone().requires_grad_(), key, value, mask=mask, causal=causal, scale=0.3)
    torch.testing.assert_close(training, expected, atol=1e-5, rtol=1e-4)


def test_backend_context_is_local_and_restored():
    assert armm_nn.current_backend() == "sdpa"
    with armm_nn.attention_backend("reference"):
        assert armm_nn.current_backend() == "reference"
    assert armm_nn.current_backend() == "sdpa"
    with pytest.raises(ValueError, match="attention backend must be one of"):
        with armm_nn.attention_backend("flash9"):
            pass


# Fused linears


def test_fused_linear_equals_its_parts_for_every_row_count():
    layers = [torch.nn.Linear(24, size, bias=True) for size in (8, 16, 8)]
    before = [(layer.weight.clone(), layer.bias.clone()) for layer in layers]
    fused = FusedLinear.merge(layers)
    with torch.no_grad():
        for rows in (1, 2, 3, 4, 7, 16, 33):
            x = torch.randn(rows, 24)
            parts = torch.cat([torch.nn.functional.linear(x, w, b) for w, b in before], dim=-1)
            for out in (fused(x), fused.rows(x), fused.rows(x, pack=True)):
                torch.testing.assert_close(out, parts, atol=1e-5, rtol=1e-4)
            residual = torch.randn(rows, 32)
            for pack in (False, True):
                added = fused.add_rows(residual.clone(), x, pack, inplace=pack)
                torch.testing.assert_close(added, residual + parts, atol=1e-5, rtol=1e-4)
    for layer, (weight, _) in zip(layers, before, strict=True):
        assert torch.equal(layer.weight, weight)
        assert layer.weight.untyped_storage().data_ptr() == fused.weight.untyped_storage().data_ptr()


def test_fused_linear_rows_do_not_depend_on_other_rows():
    fused = FusedLinear.merge([torch.nn.Linear(32, 64, bias=False)])
    x = torch.randn(8, 32)
    y = torch.cat([x[:4], torch.randn(4, 32) * 1e6])
    with torch.no_grad():
        for pack in (False, True):
            torch.testing.assert_close(fused.rows(x, pack)[:4], fused.rows(y, pack)[:4], atol=0, rtol=0)


# Block


@pytest.mark.parametrize("mlp", ["swiglu", "geglu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("qk_norm", [None, "rms", "l2"])
def test_fused_block_equals_block(mlp, qk_norm):
    config = armm_nn.BlockConfig(
        dim=16, num_heads=4, num_kv_heads=2, head_dim=4, mlp=mlp, mlp_hidden=24, mlp_bias=True,
        norm="layer" if qk_norm == "l2" else "rms", qkv_bias=True, out_bias=True, qk_norm=qk_norm,
    )  # fmt: skip
    block = armm_nn.Block(config).eval()
    rotary = armm_nn.rotary_table(torch.arange(5)[:, None], [4])
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        expected = block(x, rotary, None, True)
        assert block.fuse()
        torch.testing.assert_close(block(x, rotary, None, True), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["block", "shared"])
def test_modulation_order_is_data(kind):
    order = ["gate1", "gate2", "scale1", "scale2", "shift1", "shift2"]
    modulation = armm_nn.BlockModulation(kind, 6, 6, order)
    if kind == "block":
        condition = torch.randn(2, 6)
        values = modulation.projection(condition)
    else:
        torch.nn.init.normal_(modulation.table)
        condition = torch.randn(2, 1, 36)
        values = condition + modulation.table.flatten()
    chunks = dict(zip(order, values.chunk(6, dim=-1), strict=True))
    for name, value in zip(armm_nn.modulation.NAMES, modulation(condition), strict=True):
        assert torch.equal(value, chunks[name])


def test_gates_of_zero_leave_the_input_alone():
    config = armm_nn.BlockConfig(
        dim=8, num_heads=2, num_kv_heads=2, head_dim=4, mlp="gelu", mlp_hidden=16, norm="layer", norm_affine=False,
        modulation="block",
    )  # fmt: skip
    block = armm_nn.Block(config)
    torch.nn.init.zeros_(block.modulation.projection.linear.weight)
    torch.nn.init.zeros_(block.modulation.projection.linear.bias)
    x = torch.randn(2, 3, 8)
    assert torch.equal(block(x, condition=torch.randn(2, 8)), x)
    assert block_module.NAMES == ("shift1", "scale1", "gate1", "shift2", "scale2", "gate2")


# Embedders


def test_label_embedding_null_row():
    embedding = armm_nn.LabelEmbedding(5, 8)
    assert torch.equal(embedding(torch.tensor([5, 5])), embedding.null(2))


def test_caption_embedding_null_goes_through_the_same_layers():
    embedding = armm_nn.CaptionEmbedding(6, 8, 3)
    torch.testing.assert_close(embedding.null(2), embedding(embedding.null_embedding.expand(2, -1, -1)))
