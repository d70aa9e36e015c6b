"""tokenizers_visual: codes, quantizer, autoencoder, VQTokenizer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenizers_visual import Codes, VectorQuantizer, VQTokenizer
from tokenizers_visual.quantizers import MovingAverageCodebook

TINY = {
    "base_channels": 8,
    "encoder_multipliers": [1, 2],
    "decoder_multipliers": [2, 1],
    "num_res_blocks": 1,
    "z_channels": 8,
    "codebook_size": 32,
    "codebook_dim": 4,
    "norm_groups": 4,
}


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    model = VQTokenizer(**TINY).eval()
    torch.nn.init.normal_(model.quantizer.embedding.weight)
    return model


@torch.no_grad()
@pytest.mark.parametrize("height,width", [(2, 2), (8, 8), (6, 14)])
def test_round_trip_shapes(tokenizer, height, width):
    pixels = torch.rand(3, 3, height, width) * 2 - 1
    codes = tokenizer.encode(pixels)
    assert codes.grid == (1, height // 2, width // 2) and codes.ids.shape == (3, height * width // 4)
    assert codes.ids.dtype == torch.int64 and 0 <= codes.ids.min() and codes.ids.max() < 32
    assert tokenizer.decode(codes).shape == pixels.shape
    vectors = tokenizer.embed(codes)
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(vectors.shape[:2]))
    restored, quantized = tokenizer(pixels)
    assert torch.equal(quantized.ids, codes.ids)
    torch.testing.assert_close(restored, tokenizer.decode(codes), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_batch_equals_its_images(tokenizer):
    pixels = torch.rand(4, 3, 8, 8) * 2 - 1
    together = tokenizer.encode(pixels)
    for i in range(4):
        alone = tokenizer.encode(pixels[i : i + 1])
        assert torch.equal(alone.ids[0], together.ids[i])
        torch.testing.assert_close(tokenizer.decode(alone)[0], tokenizer.decode(together)[i], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_patches_fold_into_channels():
    model = VQTokenizer(**{**TINY, "patch_size": 2, "encoder_attention": False, "decoder_attention": False}).eval()
    assert model.downsample == 4
    codes = model.encode(torch.zeros(1, 3, 8, 12))
    assert codes.grid == (1, 2, 3) and model.decode(codes).shape == (1, 3, 8, 12)


@torch.no_grad()
def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = VQTokenizer.from_pretrained(tmp_path)
    pixels = torch.rand(1, 3, 8, 8) * 2 - 1
    assert torch.equal(loaded.decode(loaded.encode(pixels)), tokenizer.decode(tokenizer.encode(pixels)))


def test_clear_errors(tokenizer):
    for pixels in (torch.zeros(1, 3, 7, 8), torch.zeros(1, 1, 8, 8), torch.zeros(3, 8, 8), torch.zeros(1, 3, 8, 8).byte()):
        with pytest.raises(ValueError, match="pixels"):
            tokenizer.encode(pixels)
    with pytest.raises(ValueError, match="another tokenizer"):
        tokenizer.decode(Codes(ids=torch.full((1, 4), 32), grid=(1, 2, 2)))
    with pytest.raises(ValueError, match="grid"):
        tokenizer.decode(Codes(ids=torch.zeros(1, 4, dtype=torch.int64)))
    with pytest.raises(ValueError, match="norm_groups"):
        VQTokenizer(**{**TINY, "norm_groups": 3})
    with pytest.raises(ValueError, match="same number of levels"):
        VQTokenizer(**{**TINY, "decoder_multipliers": [1]})
    with pytest.raises(ValueError, match="num_res_blocks"):
        VQTokenizer(**{**TINY, "num_res_blocks": [1, 1, 1]})
    with pytest.raises(ValueError, match="at least one level, got none"):
        VQTokenizer(**{**TINY, "encoder_multipliers": [], "decoder_multipliers": []})


def test_codes_check_themselves():
    ids = torch.zeros(2, 6, dtype=torch.int64)
    codes = Codes(ids=ids, grid=(1, 2, 3), mask=torch.ones(2, 6, dtype=torch.bool))
    assert codes[:1].batch_size == 1 and codes.to("cpu").num_tokens == 6 and codes.is_discrete
    assert Codes(latents=torch.zeros(1, 2, 3)).to(dtype=torch.float64).latents.dtype == torch.float64
    for bad in ({}, {"ids": ids, "latents": ids.float()[..., None]}, {"ids": ids.float()}, {"latents": ids}):
        with pytest.raises(ValueError):
            Codes(**bad)
    with pytest.raises(ValueError, match="grid"):
        Codes(ids=ids, grid=(1, 2, 2))
    for mask in (torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 6)):
        with pytest.raises(ValueError, match=r"`mask` must be bool of shape \[2, 6\]"):
            Codes(ids=ids, mask=mask)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(1, 8), st.booleans(), st.integers(0, 10**6))
def test_nearest_is_nearest(size, dim, l2_normalize, seed):
    torch.manual_seed(seed)
    quantizer = VectorQuantizer(size, dim, l2_normalize)
    torch.nn.init.normal_(quantizer.embedding.weight)
    vectors = torch.randn(2, 5, dim)
    result = quantizer(vectors)
    codebook, target = quantizer.codebook().double(), quantizer.normalize(vectors).double()
    chosen = (target - codebook[result.ids]).square().sum(-1)
    best = torch.cdist(target, codebook.expand(2, -1, -1)).square().amin(-1)
    torch.testing.assert_close(chosen, best, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(result.vectors, F.embedding(result.ids, quantizer.codebook()), atol=1e-6, rtol=1e-5)
    if l2_normalize is False:
        torch.testing.assert_close(quantizer.lookup(result.ids), quantizer.embedding.weight[result.ids])


def test_gradients_pass_straight_through():
    quantizer = VectorQuantizer(8, 4, l2_normalize=False)
    vectors = torch.randn(1, 3, 4, requires_grad=True)
    quantizer(vectors).vectors.sum().backward()
    assert torch.equal(vectors.grad, torch.ones_like(vectors))


def test_moving_average_codebook_follows_the_data_and_revives_dead_codes():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(16, 4)
    codebook = MovingAverageCodebook(quantizer, decay=0.8, restarts=4)
    centres = F.normalize(torch.randn(16, 4), dim=-1)
    vectors = quantizer.normalize(centres[torch.arange(512) % 16] + 0.01 * torch.randn(512, 4))
    codebook.initialise(quantizer, vectors[:1].expand(512, 4), torch.Generator().manual_seed(0))
    assert codebook.started and quantizer.embedding.weight.requires_grad is False

    def error():
        return (quantizer.lookup(quantizer.nearest(vectors, quantizer.codebook())) - vectors).square().sum(-1).mean()

    before, revived = error(), 0
    for step in range(200):
        ids = quantizer.nearest(vectors, quantizer.codebook())
        revived += codebook.update(quantizer, vectors, ids, restart=step < 150)
    assert revived > 0 and error() < 0.5 * before
    assert codebook.usage.min() > 0.03 * codebook.usage.mean()
