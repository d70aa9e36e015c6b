"""The KL autoencoder: sampling, shapes, its converter, and agreement with diffusers where diffusers has it."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL

from armm.convert import CheckpointKeysError, CheckpointShapeError, kl
from tokenizers_visual import Codes, KLTokenizer


def tiny(**options) -> KLTokenizer:
    torch.manual_seed(0)
    arguments = {
        "base_channels": 8,
        "channel_multipliers": [1, 2],
        "num_res_blocks": 1,
        "latent_channels": 3,
        "norm_groups": 4,
    }
    return KLTokenizer(**{**arguments, **options}).eval()


PIXELS = torch.rand(3, 3, 8, 12, generator=torch.Generator().manual_seed(1)) * 2 - 1


def authors_state(model: KLTokenizer) -> dict[str, torch.Tensor]:
    """The tensors of `model` under the authors' names."""
    rules = kl.rules_of(len(model.config.channel_multipliers))
    state = {}
    for name, value in model.state_dict().items():
        source = next(found for rule in rules if not isinstance(rule.target, tuple) and (found := rule.source_of(name)))
        square = ".weight" in source and value.ndim == 2
        state[source] = value[:, :, None, None] if square else value
    return state


@torch.no_grad()
def test_mean_sample_and_recorded_noise():
    model = tiny()
    mean, again = model.encode(PIXELS), model.encode(PIXELS)
    assert mean.grid == (1, 4, 6) and mean.latents.shape == (3, 24, 3) and not mean.is_discrete
    assert torch.equal(mean.latents, again.latents)
    posterior = model.posterior(PIXELS)
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(2))
    expected = (posterior.mean + posterior.std * noise) * model.scaling_factor
    sampled = model.encode(PIXELS, sample=True, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(sampled.latents, expected.flatten(2).transpose(1, 2), atol=1e-6)
    assert torch.allclose(model.encode(PIXELS, noise=noise).latents, sampled.latents, atol=1e-6)
    assert model.decode(mean).shape == PIXELS.shape


@torch.no_grad()
def test_an_image_sampled_with_its_own_generator_does_not_depend_on_the_batch():
    model = tiny()
    whole = model.encode(PIXELS, sample=True, generator=[torch.Generator().manual_seed(i) for i in range(3)])
    for i in range(3):
        alone = model.encode(PIXELS[i : i + 1], sample=True, generator=torch.Generator().manual_seed(i))
        assert torch.allclose(alone.latents[0], whole.latents[i], atol=1e-6)


@torch.no_grad()
def test_without_attention_in_the_levels_it_is_the_autoencoder_of_diffusers():
    model = tiny(encoder_attention=False)
    theirs = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=3,
        norm_num_groups=4,
    ).eval()
    names = {"down.": "down_blocks.", "up.": "up_blocks.", ".block.": ".resnets.", "nin_shortcut": "conv_shortcut"}
    names |= {"downsample.": "downsamplers.0.", "upsample.": "upsamplers.0.", "mid.block_1": "mid_block.resnets.0"}
    names |= {
        "mid.block_2": "mid_block.resnets.1",
        "mid.attn_1": "mid_block.attentions.0",
        ".norm_out": ".conv_norm_out",
    }
    attention = {
        ".q.": ".to_q.",
        ".k.": ".to_k.",
        ".v.": ".to_v.",
        ".proj_out.": ".to_out.0.",
        ".0.norm.": ".0.group_norm.",
    }
    state = {}
    for name, value in authors_state(model).items():
        if name.startswith("decoder.up."):
            level = int(name.split(".")[2])
            name = name.replace(f"up.{level}.", f"up.{1 - level}.")
        for old, new in names.items():
            name = name.replace(old, new)
        if "attentions" in name:
            value = value.flatten(1) if value.ndim == 4 else value
            for old, new in attention.items():
                name = name.replace(old, new)
        state[name] = value
    theirs.load_state_dict(state)
    assert torch.allclose(theirs.encode(PIXELS).latent_dist.mean, model.posterior(PIXELS).mean, atol=1e-5)
    latents = model.posterior(PIXELS).mean
    assert torch.allclose(theirs.decode(latents).sample, model.decode_features(latents), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("attention", [True, False, [True, False], [True, True]])
def test_conversion_and_saving_round_trip(tmp_path, attention):
    model = tiny(encoder_attention=attention)
    state = {**authors_state(model), "loss.logvar": torch.zeros(())}
    converted = kl.convert_state_dict(state, config={"norm_groups": 4, "scale_factor": 0.5})
    assert converted.scaling_factor == 0.5
    assert torch.equal(converted.posterior(PIXELS).mean, model.posterior(PIXELS).mean)
    converted.save_pretrained(tmp_path)
    loaded = KLTokenizer.from_pretrained(tmp_path)
    codes = converted.encode(PIXELS)
    assert torch.equal(loaded.encode(PIXELS).latents, codes.latents)
    assert torch.equal(loaded.decode(codes), converted.decode(codes))


def test_bad_inputs():
    model = tiny()
    with pytest.raises(ValueError, match="latents .* of width 5.*another tokenizer"):
        model.decode(Codes(latents=torch.zeros(1, 4, 5), grid=(1, 2, 2)))
    with pytest.raises(ValueError, match="got discrete ids"):
        model.decode(Codes(ids=torch.zeros(1, 4, dtype=torch.long), grid=(1, 2, 2)))
    with pytest.raises(ValueError, match=r"`grid` must be \(1, h, w\)"):
        model.decode(Codes(latents=torch.zeros(1, 4, 3)))
    with pytest.raises(ValueError, match="multiples of 2"):
        model.encode(torch.zeros(1, 3, 7, 8))
    with pytest.raises(ValueError, match="`noise` must be"):
        model.encode(PIXELS, noise=torch.zeros(1, 3, 4, 6))
    with pytest.raises(ValueError, match="`scaling_factor` must be a positive number, got 0"):
        tiny(scaling_factor=0)
    with pytest.raises(CheckpointKeysError, match="no KL autoencoder"):
        kl.convert_state_dict({"weight": torch.zeros(1)})
    with pytest.raises(CheckpointShapeError, match="latent_channels = 4"):
        kl.convert_state_dict(authors_state(model), config={"embed_dim": 4})
