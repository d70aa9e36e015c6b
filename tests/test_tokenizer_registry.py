"""What holds for every visual tokenizer. A new one is an entry in `ENTRIES`; a class without an entry fails the first test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import tokenizers_visual
from tokenizers_visual import Codes, LaVITDecoder, VisualTokenizer, lavit_losses
from tokenizers_visual.loading import NotATokenizerError, load_tokenizer, tokenizer_classes


def default_loss(model: VisualTokenizer, pixels: torch.Tensor) -> torch.Tensor:
    """A reconstruction and the losses of a quantizer, of what `forward` returns."""
    restored, quantized = model(pixels)
    loss = (restored - pixels).square().mean()
    for name in ("codebook_loss", "commitment_loss"):
        loss = loss + getattr(quantized, name, 0.0)
    return loss


def kl_loss(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    restored, posterior = model(pixels)
    return (restored - pixels).square().mean() + 1e-3 * posterior.kl().mean()


def dual_loss(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """With the terms that train the rest of the tower and the text tower."""
    semantic, _ = model.quantize(pixels)
    images = F.normalize(model.pool(model.semantic_out(semantic.vectors)), dim=-1)
    texts = model.text_features(torch.arange(12).view(3, 4))
    return default_loss(model, pixels) + (texts @ images.T * model.logit_scale.exp() + model.logit_bias).square().mean()


def seed_loss(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    return sum(value.square().mean() for value in model(pixels)[:3]) + model(pixels)[3].codebook_loss


def atoken_loss(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """With the pooled vector, which is compared with texts."""
    pooled = model.encode_tokens(model.tokens(list(pixels))).pooled
    return default_loss(model, pixels) + (pooled - torch.linspace(-1, 1, pooled.shape[1])).square().mean()


def lavit_loss(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """With the features that a language model reads."""
    torch.manual_seed(0)
    sizes = {"code_dim": model.latent_channels, "num_queries": model.max_tokens, "feature_dim": model.config.dim}
    decoder = LaVITDecoder(**sizes, dim=12, num_layers=1, num_heads=2, mlp_hidden=16, embed_dims=(8,))
    losses = lavit_losses(model, decoder, pixels, generator=generators(len(pixels)))
    return losses.total() + model.reading_features(pixels)[0].square().mean()


@dataclass(frozen=True)
class Entry:
    """One tokenizer in a tiny config.

    Args:
        name: of the class.
        config: its arguments.
        sizes: shapes (channels, [frames,] height, width) that are encoded and decoded; one where only that is possible.
        other_size: one that is refused; None where none is.
        loss: what trains every parameter, of (model, pixels).
        decode: arguments of `decode` for a shape.
        encode: arguments of `encode` for a shape.
        paints: whether it decodes to pixels.
        embed_width: of what `embed` gives, if that is not `latent_channels`.
    """

    name: str
    config: dict[str, Any]
    sizes: list[tuple[int, ...]]
    other_size: tuple[int, ...] | None
    loss: Callable[[Any, torch.Tensor], torch.Tensor] = default_loss
    decode: Callable[[tuple[int, ...]], dict[str, Any]] = lambda shape: {}
    encode: Callable[[tuple[int, ...]], dict[str, Any]] = lambda shape: {}
    paints: bool = True
    embed_width: int | None = None


CONV = {"base_channels": 8, "num_res_blocks": 1, "norm_groups": 4}
ATOKEN = {
    "patch_size": [2, 4, 4], "latent_channels": 6, "encoder_dim": 16, "encoder_layers": 1, "encoder_heads": 2, "encoder_mlp_hidden": 24,
    "decoder_dim": 16, "decoder_layers": 1, "decoder_heads": 1, "decoder_mlp_hidden": 20, "position_table": 4, "window_frames": 4,
}  # fmt: skip
ENTRIES = [
    Entry(
        "VQTokenizer",
        {**CONV, "encoder_multipliers": [1, 2], "decoder_multipliers": [1, 2], "z_channels": 8, "codebook_size": 32, "codebook_dim": 4},
        [(3, 8, 8), (3, 6, 10)],
        (3, 7, 8),
    ),
    Entry(
        "BinaryTokenizer",
        {
            "base_channels": 8, "channel_multipliers": [1, 2], "encoder_blocks": 1, "decoder_blocks": 1, "z_channels": 8, "bits": 6,
            "sub_codes": 2, "norm_groups": 4,
        },
        [(3, 8, 8), (3, 6, 10)],
        (3, 7, 8),
    ),
    Entry(
        "KLTokenizer",
        {**CONV, "channel_multipliers": [1, 2], "latent_channels": 3},
        [(3, 8, 8), (3, 6, 10)],
        (3, 7, 8),
        loss=kl_loss,
    ),
    Entry(
        "MultiScaleVQTokenizer",
        {**CONV, "channel_multipliers": [1, 2], "latent_channels": 4, "codebook_size": 16, "scales": [1, 2, 4], "shared_refiners": 2},
        [(3, 8, 8), (3, 12, 12)],
        (3, 10, 10),
        encode=lambda shape: {"scales": [1, 2, shape[1] // 2]},
    ),
    Entry(
        "LARPTokenizer",
        {
            "num_frames": 4, "sample_size": 8, "num_tokens": 6, "codebook_size": 24, "codebook_dim": 4, "temporal_patch_size": 2,
            "patch_size": 4, "encoder_dim": 16, "encoder_layers": 1, "encoder_heads": 2, "decoder_dim": 16, "decoder_layers": 1,
            "decoder_heads": 2,
        },
        [(3, 4, 8, 8)],
        (3, 4, 16, 16),
    ),
    Entry(
        "DARTokenizer",
        {
            "image_size": 8, "patch_size": 4, "pixel_patch_size": 4, "num_tokens": 8, "num_groups": 4, "window": 2, "num_steps": 4,
            "codebook_size": 24, "codebook_dim": 4, "query_dim": 4, "encoder_dim": 64, "encoder_layers": 1, "decoder_dim": 64,
            "decoder_layers": 1, "pixel_dim": 64, "pixel_layers": 1,
        },
        [(3, 8, 8), (3, 12, 16)],
        (3, 10, 8),
        decode=lambda shape: {"height": shape[1], "width": shape[2]},
    ),
    Entry(
        "DepthVQTokenizer",
        {"base_channels": 4, "num_levels": 2, "num_res_blocks": 1, "codebook_size": 12, "codebook_dim": 6, "image_size": 8},
        [(1, 8, 8), (1, 4, 12)],
        (1, 6, 8),
    ),
    Entry(
        "DualTokenTokenizer",
        {
            "image_size": 16, "patch_size": 4, "dim": 16, "num_layers": 4, "num_heads": 2, "mlp_hidden": 24, "semantic_layer": 3,
            "pixel_layer": 2, "shortcut_layer": 1, "semantic_codebook_size": 10, "pixel_codebook_size": 14, "codebook_dim": 4,
            "semantic_depth": 2, "pixel_depth": 3, "base_channels": 8, "channel_multipliers": [1, 1, 1], "num_res_blocks": 1,
            "norm_groups": 4, "decoder_channels": 8, "decoder_grid": [4, 4],
            "text": {
                "vocab_size": 12, "max_tokens": 4, "dim": 8, "num_layers": 1, "num_heads": 2, "mlp_hidden": 8, "out_dim": 16,
            },
        },
        [(3, 16, 16)],
        (3, 20, 20),
        loss=dual_loss,
    ),
    Entry(
        "MingTokTokenizer",
        {
            "image_size": 12, "patch_size": 4, "latent_channels": 4, "encoder_dim": 16, "encoder_layers": 1, "encoder_heads": 2,
            "encoder_mlp_hidden": 20, "semantic_dim": 24, "semantic_layers": 1, "semantic_heads": 3, "semantic_mlp_hidden": 28,
            "pixel_dim": 12, "pixel_layers": 1, "pixel_heads": 1, "pixel_mlp_hidden": 20, "pixel_patch_size": 2,
            "scaling_factor": 1.5, "shift": 0.3,
        },
        [(3, 12, 12), (3, 8, 16)],
        (3, 10, 12),
        embed_width=24,
    ),
    Entry("ATokenTokenizer", ATOKEN, [(3, 8, 8), (3, 8, 12), (3, 4, 8, 8)], None, loss=atoken_loss),
    Entry(
        "ATokenTokenizer",
        {**ATOKEN, "codebook_size": 64, "num_codebooks": 3},
        [(3, 8, 8), (3, 8, 12), (3, 4, 8, 8)],
        None,
        loss=atoken_loss,
    ),
    Entry(
        "ATokenTokenizer",
        {**ATOKEN, "latent_channels": 10, "codebook_size": 64, "num_codebooks": 3, "chunk_size": 2},
        [(3, 8, 8), (3, 8, 12)],
        None,
        loss=atoken_loss,
    ),
    Entry(
        "SEEDTokenizer",
        {
            "image_size": 8, "patch_size": 4, "vision_dim": 16, "vision_layers": 1, "vision_heads": 2, "vision_mlp_hidden": 20,
            "dim": 12, "num_layers": 2, "num_heads": 2, "mlp_hidden": 16, "num_tokens": 5, "codebook_size": 12, "codebook_dim": 4,
            "decoder_layers": 1, "decoder_heads": 2, "reduction": [6, 3], "embedding_dim": 8,
        },
        [(3, 8, 8)],
        (3, 12, 12),
        loss=seed_loss,
        paints=False,
    ),
    Entry(
        "LaVITTokenizer",
        {
            "image_size": 8, "patch_size": 2, "dim": 16, "vision_layers": 1, "vision_heads": 2, "vision_mlp_hidden": 20,
            "num_layers": 2, "num_heads": 2, "mlp_hidden": 20, "codebook_size": 12, "codebook_dim": 4, "reading_dim": 24,
        },
        [(3, 8, 8)],
        (3, 12, 12),
        loss=lavit_loss,
        paints=False,
    ),
]  # fmt: skip
# Parameters whose gradient is zero but for rounding: what a key bias adds to all logits of a query, the softmax drops.
WITHOUT_EFFECT = ("to_k.bias", "key_norm.bias")
every_entry = pytest.mark.parametrize("entry", ENTRIES, ids=[entry.name for entry in ENTRIES])


def build(entry: Entry) -> VisualTokenizer:
    """The tokenizer with weights that make its codes and pictures depend on everything."""
    torch.manual_seed(0)
    model = getattr(tokenizers_visual, entry.name)(**entry.config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.dim() > 1 else 0.05))
    return model


def pictures(shape: tuple[int, ...], batch: int = 3) -> torch.Tensor:
    return torch.rand(batch, *shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


def generators(batch: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(batch)]


def same_codes(one: Codes, other: Codes) -> None:
    assert (one.grid, one.scales) == (other.grid, other.scales)
    if one.mask is not None:  # batches of unequal lengths are filled up
        assert torch.equal(one.ids[one.mask], other.ids[other.mask])
    elif one.is_discrete:
        assert torch.equal(one.ids, other.ids)
    else:
        torch.testing.assert_close(one.latents, other.latents, atol=1e-5, rtol=1e-5)


def test_every_tokenizer_has_an_entry():
    assert sorted({entry.name for entry in ENTRIES}) == tokenizer_classes()


@every_entry
@torch.no_grad()
def test_sizes_are_encoded_and_decoded(entry):
    model = build(entry)
    assert len(entry.sizes) > 1 or entry.other_size is not None
    assert model.is_discrete == (model.codebook_size > 0)
    for shape in entry.sizes:
        pixels = pictures(shape)
        codes = model.encode(pixels, **entry.encode(shape))
        assert codes.is_discrete == model.is_discrete and codes.batch_size == 3
        if codes.is_discrete:
            assert codes.ids.shape[2:] == ((model.sub_codes,) if model.sub_codes > 1 else ())
            assert 0 <= codes.ids.min() and codes.ids.max() < model.codebook_size
            assert codes.ids.unique().numel() > 1
        else:
            assert codes.latents.shape[2] == model.latent_channels
        vectors = model.embed(codes)
        width = entry.embed_width or model.latent_channels
        assert vectors.shape == (3, codes.num_tokens, width) and vectors.dtype == torch.float32
        if not entry.paints:
            with pytest.raises(ValueError, match="no decoder"):
                model.decode(codes)
            continue
        restored = model.decode(codes, generator=generators(3), **entry.decode(shape))
        assert restored.shape == pixels.shape and restored.isfinite().all()


@every_entry
@torch.no_grad()
def test_a_batch_equals_its_pictures(entry):
    model = build(entry)
    shape = entry.sizes[-1]
    pixels = pictures(shape)
    codes = model.encode(pixels, **entry.encode(shape))
    restored = model.decode(codes, generator=generators(3), **entry.decode(shape)) if entry.paints else None
    for i in range(3):
        alone = model.encode(pixels[i : i + 1], **entry.encode(shape))
        same_codes(alone, codes[i : i + 1])
        if restored is None:
            continue
        again = model.decode(alone, generator=[generators(3)[i]], **entry.decode(shape))
        torch.testing.assert_close(again[0], restored[i], atol=1e-4, rtol=1e-4)


@every_entry
@torch.no_grad()
def test_a_saved_tokenizer_is_the_same(entry, tmp_path):
    model, shape = build(entry), entry.sizes[0]
    model.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert type(loaded) is type(model) and not loaded.training
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    codes = model.encode(pictures(shape), **entry.encode(shape))
    same_codes(loaded.encode(pictures(shape), **entry.encode(shape)), codes)
    if entry.paints:
        pixels = [item.decode(codes, generator=generators(3), **entry.decode(shape)) for item in (model, loaded)]
        assert torch.equal(*pixels)


@every_entry
@torch.no_grad()
def test_half_precision_takes_pictures_in_float32(entry, tmp_path):
    model, shape = build(entry), entry.sizes[0]
    model.save_pretrained(tmp_path)
    half = load_tokenizer(tmp_path, dtype=torch.bfloat16)
    assert any(parameter.dtype == torch.bfloat16 for parameter in half.parameters())
    codes = half.encode(pictures(shape), **entry.encode(shape))
    assert codes.is_discrete == model.is_discrete
    half(pictures(shape))  # the same for training
    if entry.paints:
        restored = half.decode(codes, generator=generators(3), **entry.decode(shape))
        assert restored.shape == (3, *shape) and restored.isfinite().all()


@every_entry
def test_every_parameter_is_trained(entry):
    model = build(entry).train()
    entry.loss(model, pictures(entry.sizes[0])).backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert not without
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    size = {name: float(parameter.grad.abs().max()) for name, parameter in model.named_parameters()}
    assert not {name: value for name, value in size.items() if value < 1e-9 and not name.endswith(WITHOUT_EFFECT)}


@every_entry
@torch.no_grad()
def test_wrong_pictures_are_refused(entry):
    model, pixels = build(entry), pictures(entry.sizes[0])
    options = entry.encode(entry.sizes[0])
    for wrong in (
        (pixels * 100).to(torch.int64),
        (pixels * 100).to(torch.uint8),
        pixels[0],
        torch.cat([pixels, pixels], dim=1),
        pixels[:, :, :0],
        pixels[:0],
        (pixels + 1) * 127.5,
        pixels * float("nan"),
    ):
        with pytest.raises(ValueError, match="`pixels`|frames"):
            model.encode(wrong, **options)
    if entry.other_size is not None:
        with pytest.raises(ValueError, match=rf"{entry.other_size[-2]}"):
            model.encode(pictures(entry.other_size), **options)


@every_entry
@torch.no_grad()
def test_wrong_codes_are_refused(entry):
    model, shape = build(entry), entry.sizes[0]
    codes = model.encode(pictures(shape), **entry.encode(shape))
    options = entry.decode(shape)
    if codes.is_discrete:
        wrong = [codes.ids - 10_000, codes.ids + 10_000, codes.ids[..., None].repeat(*[1] * codes.ids.ndim, 7)]
        wrong = [replace(codes, ids=ids) for ids in wrong[:2]] + (
            [replace(codes, ids=wrong[2])] if codes.ids.ndim == 2 else []
        )
        other = Codes(latents=torch.zeros(3, codes.num_tokens, 5), grid=codes.grid, scales=codes.scales)
    else:
        wrong = [replace(codes, latents=torch.cat([codes.latents, codes.latents], dim=-1))]
        other = Codes(ids=torch.zeros(3, codes.num_tokens, dtype=torch.int64), grid=codes.grid)
    kind = "ids" if codes.is_discrete else "latents"
    nothing = [Codes(**{kind: codes.tensor[:0]}), Codes(**{kind: codes.tensor[:, :0]})]
    for item in [*wrong, *nothing, other]:
        for use in (model.embed, lambda codes: model.decode(codes, **options))[: 1 + entry.paints]:
            with pytest.raises(ValueError, match="`codes"):
                use(item)


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(NotATokenizerError, match=r"config\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "ARTransformer"}')
    with pytest.raises(NotATokenizerError, match="VQTokenizer"):
        load_tokenizer(tmp_path)
