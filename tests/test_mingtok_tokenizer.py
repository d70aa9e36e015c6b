"""MingTok's tokenizer: what is read token by token is what is read at once; sizes, precision, what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from armm.convert import CheckpointKeysError, convert
from armm.convert.containers import CheckpointShapeError
from armm.convert.mingtok import convert_head
from armm.nn.positions import resize_positions
from tokenizers_visual import Codes, MingTokTokenizer

TINY = {
    "image_size": 12, "patch_size": 4, "latent_channels": 4, "encoder_dim": 16, "encoder_layers": 1, "encoder_heads": 2,
    "encoder_mlp_hidden": 20, "semantic_dim": 24, "semantic_layers": 2, "semantic_heads": 3, "semantic_mlp_hidden": 28, "pixel_dim": 12,
    "pixel_layers": 1, "pixel_heads": 1, "pixel_mlp_hidden": 20, "pixel_patch_size": 2, "scaling_factor": 1.5, "shift": 0.3,
}  # fmt: skip


def build(**changes) -> MingTokTokenizer:
    torch.manual_seed(0)
    model = MingTokTokenizer(**{**TINY, **changes}).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return build()


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(1, 3), st.booleans())
@torch.no_grad()
def test_latents_read_in_pieces_are_read_as_at_once(pieces, batch, fused):
    model = build()
    if fused:
        model.fuse_projections()
    latents = torch.randn(batch, sum(pieces), 4)
    cache = model.allocate_cache(batch, sum(pieces))
    found = torch.cat([model.read(piece, cache) for piece in latents.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(found, build().read(latents), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_what_is_read_of_pixels_is_what_is_read_of_their_codes(tokenizer):
    pixels = torch.rand(2, 3, 12, 12) * 2 - 1
    codes = tokenizer.encode(pixels)
    assert codes.grid == (1, 3, 3) and codes.tensor.shape == (2, 9, 4)
    features = tokenizer.features(pixels)
    assert features.shape == (2, 9, tokenizer.feature_dim)
    torch.testing.assert_close(tokenizer.embed(codes), features, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        tokenizer.decode(codes), tokenizer.decode_features(features, (3, 3)), atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(tokenizer.unscale(tokenizer.scale(codes.tensor)), codes.tensor)


@torch.no_grad()
@pytest.mark.parametrize("height,width", [(12, 12), (4, 8), (20, 12)])
def test_images_of_any_size_in_patches_alone_and_in_a_batch(tokenizer, height, width):
    pixels = torch.rand(3, 3, height, width) * 2 - 1
    codes = tokenizer.encode(pixels)
    restored = tokenizer.decode(codes)
    assert restored.shape == pixels.shape and codes.grid == (1, height // 4, width // 4)
    for row in range(3):
        alone = tokenizer.encode(pixels[row : row + 1])
        torch.testing.assert_close(alone.tensor[0], codes.tensor[row], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(tokenizer.decode(alone)[0], restored[row], atol=1e-4, rtol=1e-4)


def test_stretched_positions_keep_a_plane_a_plane():
    rows, columns = torch.meshgrid(torch.arange(6.0), torch.arange(6.0), indexing="ij")
    table = torch.stack([rows, columns], dim=-1)
    assert torch.equal(resize_positions(table, 6, 6), table.flatten(0, 1))
    inner = resize_positions(table, 12, 12, mode="bilinear").unflatten(0, (12, 12))[2:-2, 2:-2]
    expected = (torch.arange(2, 10) + 0.5) / 2 - 0.5
    torch.testing.assert_close(inner[..., 0], expected[:, None].expand(8, 8))
    torch.testing.assert_close(inner[..., 1], expected.expand(8, 8))
    assert resize_positions(table, 9, 5, offset=0.1).shape == (45, 2)


@torch.no_grad()
def test_pixels_stay_in_float32_in_a_half_precision_tokenizer(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again, pixels = MingTokTokenizer.from_pretrained(tmp_path), torch.rand(1, 3, 12, 12) * 2 - 1
    assert torch.equal(again.decode(again.encode(pixels)), tokenizer.decode(tokenizer.encode(pixels)))
    half = MingTokTokenizer.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.semantic_projection.weight.dtype == torch.bfloat16
    assert half.pixel_projection.weight.dtype == half.pixel_decoder.blocks[0].mlp.fc1.weight.dtype == torch.float32
    restored = half.decode(half.encode(torch.zeros(1, 3, 12, 12)))
    assert restored.dtype == torch.float32 and restored.isfinite().all()


def test_every_parameter_learns():
    model = build().train()
    restored, latents = model(torch.rand(1, 3, 12, 12) * 2 - 1)
    restored.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_bad_inputs_are_named(tokenizer):
    with pytest.raises(ValueError, match="`pixel_patch_size` must divide"):
        build(pixel_patch_size=3)
    with pytest.raises(ValueError, match="`semantic_dim` must be a multiple"):
        build(semantic_dim=27)
    with pytest.raises(ValueError, match="cannot be tiled"):
        tokenizer.encode(torch.zeros(1, 3, 13, 12))
    with pytest.raises(ValueError, match=r"`latents` must be \[B, n, 4\]"):
        tokenizer.read(torch.zeros(1, 2, 3))
    with pytest.raises(ValueError, match="got discrete ids"):
        tokenizer.decode(Codes(ids=torch.zeros(1, 9, dtype=torch.long), grid=(1, 3, 3)))
    with pytest.raises(ValueError, match="`grid` must be"):
        tokenizer.decode(Codes(latents=torch.zeros(1, 9, 4)))
    cache = tokenizer.allocate_cache(1, 2)
    with pytest.raises(ValueError, match="cannot take 3 more"):
        tokenizer.read(torch.zeros(1, 3, 4), cache)


def test_files_that_are_no_mingtok_are_refused(tmp_path):
    torch.save({"something": torch.zeros(2)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointKeysError, match="lacks low_level_encoder"):
        convert("mingtok", tmp_path / "a.pt")
    torch.save({"net.input_proj.weight": torch.zeros(8, 4)}, tmp_path / "head.pt")
    with pytest.raises(CheckpointKeysError, match="lacks net.time_embed"):
        convert_head(tmp_path / "head.pt")
    with pytest.raises(CheckpointKeysError, match="holds a flow head"):
        convert("mingtok", tmp_path / "head.pt")
    state = {
        "low_level_encoder.patch_embed.proj.weight": torch.zeros(64, 3, 4, 4),
        "low_level_encoder.pos_embed": torch.zeros(1, 9, 64),
    }
    torch.save(state, tmp_path / "b.pt")
    with pytest.raises(CheckpointShapeError, match="no square image"):
        convert("mingtok", tmp_path / "b.pt")
