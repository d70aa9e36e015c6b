"""Gaussians of voxels: windows, shapes, geometry, gradients, files."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenizers_visual import ATokenTokenizer, GaussianDecoder, Gaussians, SparseTokens
from tokenizers_visual.gaussians import CONSTANT_HARMONIC, gaussians_of
from tokenizers_visual.sparse import voxel_windows

TINY = {
    "in_channels": 5, "dim": 12, "num_layers": 2, "num_heads": 2, "mlp_hidden": 16, "window": 4, "grid_size": 8, "num_gaussians": 3,
}  # fmt: skip


def decoder(**changes) -> GaussianDecoder:
    torch.manual_seed(0)
    model = GaussianDecoder(**{**TINY, **changes}).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.4)
    return model


def voxels(*numbers: int, width: int = 5, seed: int = 0) -> SparseTokens:
    """So many voxels of each thing of a batch, at different places of a grid of 8."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number, count in enumerate(numbers):
        cells = torch.randperm(512, generator=generator)[:count]
        places = torch.stack([cells // 64, cells // 8 % 8, cells % 8], dim=1)
        rows.append(torch.cat([torch.tensor([[number, 1]]).expand(count, -1), places], dim=1))
    features = torch.randn(sum(numbers), width, generator=generator)
    return SparseTokens(features, torch.cat(rows))


# ---------------------------------------------------------------------- windows


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 1), *[st.integers(0, 7)] * 3), min_size=1, max_size=20),
    st.integers(1, 5),
    st.integers(0, 4),
)
def test_windows_are_the_voxels_of_a_cube(rows, side, shift):
    coordinates = torch.tensor([[batch, 1, *place] for batch, *place in rows])
    placed = voxel_windows(coordinates, side, shift)
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, (batch, *place) in enumerate(rows):
        groups.setdefault((batch, *((axis + shift) // side for axis in place)), []).append(number)
    found = [index[real].tolist() for index, real in zip(placed.index, placed.real, strict=True)]
    assert found == [groups[key] for key in sorted(groups)] and placed.batch.tolist() == [
        key[0] for key in sorted(groups)
    ]
    assert torch.equal(placed.coordinates[placed.real], coordinates[placed.index[placed.real]][:, 1:])


# ---------------------------------------------------------------------- the decoder


@torch.no_grad()
def test_every_voxel_has_its_gaussians_beside_it():
    model, given = decoder(), voxels(6, 9)
    made = model(given)
    assert len(made) == 45 and torch.equal(made.batch, given.coordinates[:, 0].repeat_interleave(3))
    middles = ((given.coordinates[:, 2:] + 0.5) / 8 - 0.5).repeat_interleave(3, dim=0)
    distance = (made.positions - middles).abs()
    assert 0 < distance.max() <= 1 / 8
    assert (decoder(reach=0.25)(given).positions - middles).abs().max() <= 1 / 32
    assert made.scales.min() > 0 and made.opacities.min() > 0 and made.opacities.max() < 1
    torch.testing.assert_close(made.rotations.norm(dim=-1), torch.ones(45))
    assert made.colors.isfinite().all() and made.positions.unique(dim=0).shape == (45, 3)
    assert len(made.of(1)) == 27 and torch.equal(made.of(1).colors, made.colors[18:])


@torch.no_grad()
def test_things_of_a_batch_are_what_they_are_alone_in_any_order():
    model, given = decoder(), voxels(6, 9, 1)
    made = model(given)
    for number in range(3):
        own = given.coordinates[:, 0] == number
        alone = model(SparseTokens(given.features[own], given.coordinates[own]))
        torch.testing.assert_close(alone.positions, made.of(number).positions, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(alone.colors, made.of(number).colors, atol=1e-5, rtol=1e-5)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    shuffled = model(SparseTokens(given.features[order], given.coordinates[order]))
    expected = made.positions.unflatten(0, (16, 3))[order].flatten(0, 1)
    torch.testing.assert_close(shuffled.positions, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_voxels_see_their_cube_and_in_every_second_block_the_shifted_one():
    features = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    places = torch.tensor([[0, 0, 0], [3, 0, 0], [5, 0, 0]])  # cubes 0-3 and 4-7; shifted by 2: 0-1, 2-5
    coordinates = torch.cat([torch.zeros(3, 2, dtype=torch.long), places], dim=1)
    other = features.clone()
    other[2] += 1

    def change(layers: int) -> list[bool]:
        model = decoder(num_layers=layers)
        made, moved = (model(SparseTokens(item, coordinates)).colors.unflatten(0, (3, 3)) for item in (features, other))
        return [bool(row) for row in (made - moved).abs().amax((1, 2)) > 1e-5]

    assert change(1) == [False, False, True]
    assert change(2) == [False, True, True]  # 3 and 5 are in one shifted cube
    assert change(3) == [True, True, True]  # and 0 sees 3 in the cube behind


@torch.no_grad()
def test_only_the_first_channels_are_read():
    model, given = decoder(), voxels(7, width=9)
    made = model(given)
    assert torch.equal(model(given.replace(given.features[:, :5])).positions, made.positions)


def test_every_parameter_learns():
    model = decoder().train()
    made = model(voxels(6, 9))
    target = torch.rand(45, 3, generator=torch.Generator().manual_seed(0))
    loss = (made.positions - target + 0.5).square().mean() + (made.colors - target).square().mean()
    loss = loss + made.covariances().square().sum() + (made.opacities - 0.9).square().mean()
    loss.backward()
    small = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-9}
    assert all(name.endswith("to_k.bias") for name in small)  # which add the same to all logits of a query


def test_voxels_become_gaussians_through_the_tokenizer():
    torch.manual_seed(0)
    tokenizer = ATokenTokenizer(
        patch_size=[2, 4, 4], latent_channels=6, encoder_dim=16, encoder_layers=1, encoder_heads=2, encoder_mlp_hidden=24, decoder_dim=16,
        decoder_layers=1, decoder_heads=1, decoder_mlp_hidden=20, position_table=4, window_frames=4, codebook_size=64, num_codebooks=3,
    )  # fmt: skip
    model, places = decoder(), voxels(7).coordinates[:, 2:]
    features = torch.rand(7, 5, generator=torch.Generator().manual_seed(0))
    tokens = tokenizer.voxel_tokens(features, places)
    quantized = tokenizer.quantizer(tokenizer.encode_tokens(tokens).moments[:, :6])
    patches = tokenizer.decode_tokens(tokens.replace(quantized.vectors))
    made = model(patches)
    assert patches.features.shape == (7, 96) and len(made) == 21
    (made.colors.square().mean() + (patches.features - tokens.features)[:, :5].square().mean()).backward()
    trained = [name for name, p in tokenizer.named_parameters() if p.grad is not None and p.grad.abs().max() > 0]
    assert "encoder.input_projection.weight" in trained and "pixel_projection.weight" in trained


@torch.no_grad()
def test_decoders_are_saved_and_loaded(tmp_path):
    model, given = decoder(reach=0.5), voxels(5)
    model.save_pretrained(tmp_path)
    again = GaussianDecoder.from_pretrained(tmp_path)
    assert torch.equal(again(given).positions, model(given).positions) and again.config.reach == 0.5
    half = GaussianDecoder.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half(given).positions.dtype == torch.float32
    torch.testing.assert_close(half(given).positions, model(given).positions, atol=0.05, rtol=0.1)


def test_bad_inputs_are_named():
    for change, match in (
        ({"in_channels": 0}, "`in_channels`, `window`"),
        ({"dim": 16}, "`dim` must be a multiple of 6"),
        ({"reach": 0.0}, "`reach` must be"),
        ({"num_heads": 5}, "heads divide"),
    ):
        with pytest.raises(ValueError, match=match):
            decoder(**change)
    model, given = decoder(), voxels(4)
    with pytest.raises(ValueError, match="at least 5 wide, got 3"):
        model(given.replace(given.features[:, :3]))
    with pytest.raises(ValueError, match=r"in \[0, 7\] along each axis, got one at 8"):
        model(
            SparseTokens(
                given.features, given.coordinates + torch.tensor([0, 0, 0, 0, 8 - given.coordinates[:, 4].max()])
            )
        )
    with pytest.raises(ValueError, match="at one time"):
        model(
            SparseTokens(given.features, given.coordinates + torch.arange(4)[:, None] * torch.tensor([0, 1, 0, 0, 0]))
        )


# ---------------------------------------------------------------------- Gaussians


def test_zeros_are_grey_balls_in_the_middle():
    middles = torch.tensor([[0.25, 0.0, -0.25]])
    made = gaussians_of(torch.zeros(1, 2, 14), middles, 0.125, 1.0, torch.tensor([3]))
    assert torch.equal(made.positions, middles.expand(2, -1)) and made.batch.tolist() == [3, 3]
    torch.testing.assert_close(made.covariances(), torch.eye(3).expand(2, -1, -1) * (0.125 / 4) ** 2)
    assert made.opacities.tolist() == [0.5, 0.5] and made.colors.unique().tolist() == [0.5]


def test_covariances_turn_with_the_rotation():
    angle = torch.tensor(0.7)
    turn = torch.tensor([[angle.cos(), -angle.sin(), 0], [angle.sin(), angle.cos(), 0], [0, 0, 1]])
    rotation = torch.stack([(angle / 2).cos(), torch.tensor(0.0), torch.tensor(0.0), (angle / 2).sin()])
    scales = torch.tensor([0.1, 0.2, 0.3])
    one = torch.zeros(1, dtype=torch.long)
    made = Gaussians(torch.zeros(1, 3), scales[None], rotation[None], torch.ones(1), torch.zeros(1, 3), one)
    torch.testing.assert_close(made.covariances()[0], turn @ torch.diag(scales**2) @ turn.T)
    with pytest.raises(ValueError, match=r"`rotations` must be \[1, 4\], got \[1, 3\]"):
        Gaussians(torch.zeros(1, 3), scales[None], scales[None], torch.ones(1), torch.zeros(1, 3), one)


@torch.no_grad()
def test_a_ply_holds_what_was_written(tmp_path):
    made = decoder()(voxels(4))
    made.save_ply(tmp_path / "thing.ply")
    header, _, body = (tmp_path / "thing.ply").read_bytes().partition(b"end_header\n")
    lines = header.decode().splitlines()
    assert lines[:3] == ["ply", "format binary_little_endian 1.0", "element vertex 12"]
    names = [line.split()[2] for line in lines[3:]]
    rows = torch.frombuffer(bytearray(body), dtype=torch.float32).view(12, len(names))
    found = {name: rows[:, i] for i, name in enumerate(names)}
    torch.testing.assert_close(torch.stack([found[name] for name in "xyz"], dim=1), made.positions)
    torch.testing.assert_close(torch.stack([found[f"scale_{i}"].exp() for i in range(3)], dim=1), made.scales)
    torch.testing.assert_close(torch.stack([found[f"rot_{i}"] for i in range(4)], dim=1), made.rotations)
    torch.testing.assert_close(found["opacity"].sigmoid(), made.opacities)
    colors = torch.stack([0.5 + CONSTANT_HARMONIC * found[f"f_dc_{i}"] for i in range(3)], dim=1)
    torch.testing.assert_close(colors, made.colors)
