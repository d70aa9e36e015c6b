"""DualToken: residual codes, projections around them, its two kinds of codes, the training script's file."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from armm.convert import CheckpointKeysError, CheckpointShapeError, convert, dualtoken
from tokenizers_visual import Codes, DualTokenTokenizer, VisionEncoder
from tokenizers_visual.attention_projection import AttentionProjection
from tokenizers_visual.quantizers import ResidualQuantizer

TINY = {
    "image_size": 16, "patch_size": 4, "dim": 16, "num_layers": 4, "num_heads": 2, "mlp_hidden": 24, "semantic_layer": 3,
    "pixel_layer": 2, "shortcut_layer": 1, "semantic_codebook_size": 10, "pixel_codebook_size": 14, "codebook_dim": 4,
    "semantic_depth": 2, "pixel_depth": 3, "base_channels": 8, "channel_multipliers": [1, 1, 1], "num_res_blocks": 1,
    "norm_groups": 4, "decoder_channels": 8, "decoder_grid": [4, 4], "decoder_attention": [False, False, True],
}  # fmt: skip
TEXT = {"vocab_size": 12, "max_tokens": 4, "dim": 8, "num_layers": 1, "num_heads": 2, "mlp_hidden": 8, "out_dim": 16}


def build(**options) -> DualTokenTokenizer:
    torch.manual_seed(0)
    model = DualTokenTokenizer(**{**TINY, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


@pytest.fixture(scope="module")
def tokenizer() -> DualTokenTokenizer:
    return build(text=TEXT)


PIXELS = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


# ---------------------------------------------------------------------- parts


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 4), st.booleans(), st.integers(0, 1000))
def test_residual_codes_are_the_nearest_to_what_is_left(size, depth, shared, seed):
    generator = torch.Generator().manual_seed(seed)
    quantizer = ResidualQuantizer(size, 3, depth, shared)
    for book in quantizer.codebooks:
        book.embedding.weight.data.copy_(torch.randn(size, 3, generator=generator))
    vectors = torch.randn(2, 4, 3, generator=generator)
    ids = quantizer.encode(vectors)
    for row in range(2):
        for place in range(4):
            rest = vectors[row, place].clone()
            for level in range(depth):
                table = quantizer.at(level).embedding.weight.detach()
                distances = (table - rest).square().sum(1)
                assert distances[ids[row, place, level]] <= distances.min() + 1e-5
                rest = rest - table[ids[row, place, level]]
    quantized = quantizer(vectors)
    assert torch.equal(quantized.ids, ids)
    torch.testing.assert_close(quantized.vectors, quantizer.lookup(ids).sum(-2))
    errors = [(vectors - quantizer.lookup(ids)[..., : d + 1, :].sum(-2)).square().mean() for d in range(depth)]
    torch.testing.assert_close(quantized.commitment_loss, torch.stack(errors).mean())


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([(12, 4, 3), (12, 4, 2), (12, 3, 2), (4, 12, 3), (6, 6, 2)]), st.booleans(), st.integers(0, 99))
@torch.no_grad()
def test_projections_average_or_join_their_heads(sizes, causal, seed):
    in_dim, out_dim, heads = sizes
    torch.manual_seed(seed)
    layer, x = AttentionProjection(in_dim, out_dim, heads, causal), torch.randn(2, 5, in_dim)
    width = max(in_dim, out_dim) // heads
    q, k, v = (part(x).view(2, 5, heads, width) for part in (layer.to_q, layer.to_k, layer.to_v))
    found = []
    for head in range(heads):
        scores = q[:, :, head] @ k[:, :, head].transpose(1, 2) * width**-0.5
        if causal:
            scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
        found.append(scores.softmax(-1) @ v[:, :, head])
    expected = torch.cat(found, dim=-1)
    if in_dim > out_dim:
        expected = F.adaptive_avg_pool1d(torch.stack(found).mean(0), out_dim)
    torch.testing.assert_close(layer.attend(x), layer.to_out(expected), atol=1e-5, rtol=1e-5)
    if causal:
        changed = x.clone()
        changed[:, 3:] += 1
        torch.testing.assert_close(layer(changed)[:, :3], layer(x)[:, :3])


@torch.no_grad()
def test_an_encoder_in_parts_is_the_whole_encoder():
    torch.manual_seed(0)
    encoder = VisionEncoder(16, 4, 16, 3, 2, 24, activation="gelu_tanh", pooling=True).eval()
    parts = encoder.finish(encoder.blocks(encoder.blocks(encoder.patches(PIXELS), 0, 2), 2, 3))
    torch.testing.assert_close(parts, encoder.encode(PIXELS))
    assert encoder.pool(parts).shape == (2, 16)
    with pytest.raises(ValueError, match="pooling"):
        VisionEncoder(16, 4, 16, 1, 2, 24).pool(parts)
    with pytest.raises(ValueError, match="activation"):
        VisionEncoder(16, 4, 16, 1, 2, 24, activation="relu")


# ---------------------------------------------------------------------- the tokenizer


@torch.no_grad()
def test_each_kind_of_codes_does_its_own_work(tokenizer):
    codes = tokenizer.encode(PIXELS)
    assert codes.ids.shape == (2, 16, 5) and codes.grid == (1, 4, 4)
    assert tokenizer.codebook_sizes == (10, 10, 14, 14, 14) and tokenizer.codebook_size == 14
    semantic, pixel = tokenizer.split(codes)
    other = codes.ids.clone()
    other[..., :2] = (other[..., :2] + 1) % 10
    other = Codes(ids=other, grid=codes.grid)
    assert torch.equal(tokenizer.decode(codes), tokenizer.decode(other))
    assert (tokenizer.semantic_tokens(codes) - tokenizer.semantic_tokens(other)).abs().max() > 1e-2
    vectors = tokenizer.embed(codes)
    torch.testing.assert_close(vectors[..., :4], tokenizer.semantic_quantizer.lookup(semantic).sum(-2))
    torch.testing.assert_close(vectors[..., 4:], tokenizer.depth_embeddings(codes)[1].sum(-2))
    assert torch.equal(tokenizer.decode(Codes(ids=codes.ids)), tokenizer.decode(codes))
    assert tokenizer.bits_per_token == pytest.approx(2 * 3.3219281 + 3 * 3.8073549)


@torch.no_grad()
def test_images_and_texts_are_compared(tokenizer):
    codes, ids = tokenizer.encode(PIXELS), torch.arange(12).view(3, 4)
    images, texts = tokenizer.image_features(codes), tokenizer.text_features(ids)
    torch.testing.assert_close(images.norm(dim=-1), torch.ones(2))
    expected = texts @ images.T * tokenizer.logit_scale.exp() + tokenizer.logit_bias
    torch.testing.assert_close(tokenizer.similarity(codes, ids), expected)
    with pytest.raises(ValueError, match="at most 4"):
        tokenizer.text_features(torch.zeros(1, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match="text tower"):
        build().text_features(ids)


def test_ids_of_each_codebook_have_their_range(tokenizer):
    ids = torch.zeros(1, 16, 5, dtype=torch.int64)
    ids[..., 0] = 12  # a pixel id, but no semantic one
    with pytest.raises(ValueError, match=r"\[0, 9\] \(semantic\)"):
        tokenizer.embed(Codes(ids=ids))
    ids[..., 0], ids[..., 4] = 9, 13
    assert tokenizer.embed(Codes(ids=ids)).shape == (1, 16, 8)
    with pytest.raises(ValueError, match="grid"):
        tokenizer.decode(Codes(ids=ids[:, :7]))


def test_impossible_tokenizers_are_refused():
    for options, words in (
        ({"pixel_layer": 4, "semantic_layer": 3}, "semantic_layer"),
        ({"shortcut_layer": 3}, "shortcut_layer"),
        ({"codebook_dim": 5}, "codebook_dim"),
        ({"semantic_depth": 0}, "depth"),
    ):
        with pytest.raises(ValueError, match=words):
            build(**options)


@torch.no_grad()
def test_patches_may_leave_a_margin_and_be_resized_for_the_decoder():
    """As at 384 pixels: 27 patches of 14, which are decoded from 24 x 24 cells."""
    model = build(image_size=18, decoder_grid=[3, 3])
    pixels = F.pad(PIXELS, (0, 2, 0, 2), value=0.5)
    codes = model.encode(pixels)
    assert codes.grid == (1, 4, 4) and model.required_size == (18, 18)
    pixels[..., 17] = -1.0  # behind the last whole patch
    assert torch.equal(model.encode(pixels).ids, codes.ids)
    assert model.decode(codes).shape == (2, 3, 12, 12)
    x = model.pixel_out(model.embed(codes)[..., 4:]).transpose(1, 2).unflatten(2, (4, 4))
    shrunk = F.interpolate(x, size=(3, 3), mode="bilinear", align_corners=False)
    torch.testing.assert_close(model.decode(codes), model.decoder(model.decoder_in(shrunk)))


def test_the_published_configuration_is_the_default():
    with torch.device("meta"):
        model = DualTokenTokenizer()
    assert model.vision.grid == (27, 27) and model.sub_codes == 16 and model.semantic_in.num_heads == 36
    assert model.required_size == (384, 384) and model.decoder.levels[0].blocks[0].conv1.in_channels == 1024


# ---------------------------------------------------------------------- the training script's file


def authors_state(model: DualTokenTokenizer) -> dict[str, torch.Tensor]:
    """The tensors of `model` as the training script stores them."""
    rules = dualtoken.rules_of(len(model.config.channel_multipliers))
    ours, state = model.state_dict(), {}
    for rule in rules:
        if rule.target is None:
            continue
        for name in ours:
            match = rule.target_patterns[0].fullmatch(name)
            if match is None or rule.source.format(**match.groupdict()) in state:
                continue
            names = [target.format(**match.groupdict()) for target in rule.targets]
            value = torch.cat([ours[part] for part in names]) if len(names) > 1 else ours[name]
            source = rule.source.format(**match.groupdict())
            if source.endswith("position_embedding.weight") and value.ndim == 3:
                value = value[0]
            if source.startswith("siglip_model.logit_"):
                value = value[None]
            if (
                source.startswith(("decoder.mid.attn_1", "decoder.up"))
                and ".attn" in source
                and source.endswith(".weight")
            ):
                value = value[:, :, None, None] if value.ndim == 2 else value
            if source.startswith("quantizer_"):
                value = torch.cat([value, torch.zeros(1, value.shape[1])])
            state[source] = value
    for name in list(state):
        if ".self_attn.qkv." in name:
            parts = state.pop(name).chunk(3)
            state |= {name.replace(".qkv.", f".{part}_proj."): value for part, value in zip("qkv", parts, strict=True)}
        if name.endswith(".attn.q_bias"):
            state[name.replace("q_bias", "zero_k_bias")] = torch.zeros_like(state[name])
        if name.startswith("quantizer_") and name.endswith("codebooks.0.weight"):
            depth = model.config.semantic_depth if "_sem." in name else model.config.pixel_depth
            for level in range(depth):
                state[name.replace(".0.", f".{level}.")] = state[name]
                state[name.replace(".0.weight", f".{level}.embed_ema")] = state[name][:-1] * 2
    return state


CONFIG = {
    "rqvaesiglip": {
        "layer_recon": 2, "layer_sem": 3, "layer_shortcut": 1, "weight_shortcut": 0.6, "decoder_latent_shape": [4, 4],
        "vq_sem": {"bottleneck_type": "rq_ema", "latent_shape": [4, 4, 4], "code_shape": [4, 4, 2]},
    },
    "siglip_vision_config": {"num_attention_heads": 2, "image_size": 16},
    "siglip_text_config": {"num_attention_heads": 2},
    "norm_groups": 4,
}  # fmt: skip


@torch.no_grad()
def test_a_file_of_the_training_script_is_read(tokenizer, tmp_path):
    torch.save({"epoch": 1, "state_dict": authors_state(tokenizer), "optimizer": {}}, tmp_path / "epoch_1.pt")
    loaded = convert("dualtoken", tmp_path / "epoch_1.pt", config={**CONFIG, "text": True})
    ours = tokenizer.state_dict()
    assert loaded.config.shared_codebook and loaded.state_dict().keys() == ours.keys()
    assert all(torch.equal(value, ours[name]) for name, value in loaded.state_dict().items())
    without = convert("dualtoken", tmp_path / "epoch_1.pt", config=CONFIG)
    assert without.text_tower is None
    codes = tokenizer.encode(PIXELS)
    assert torch.equal(without.encode(PIXELS).ids, codes.ids) and torch.equal(
        without.decode(codes), tokenizer.decode(codes)
    )


def test_files_that_do_not_fit_are_refused(tokenizer):
    state = authors_state(tokenizer)
    nested = {**CONFIG["rqvaesiglip"], "vq_pix": {"bottleneck_type": "vq"}}
    for config, words in (
        ({**CONFIG, "color": 1}, "color"),
        ({**CONFIG, "rqvaesiglip": nested}, "bottleneck_type"),
        ({**CONFIG, "dim": 99}, "dim"),
        ({**CONFIG, "siglip_vision_config": {}}, "num_heads"),
        ({**CONFIG, "image_size": 24}, "image_size"),
    ):
        with pytest.raises(ValueError, match=words):
            dualtoken.convert_state_dict(state, config=config)
    different = {**state, "quantizer_sem.codebooks.1.weight": state["quantizer_sem.codebooks.1.weight"] * 2}
    assert not dualtoken.convert_state_dict(different, config=CONFIG).config.shared_codebook
    with pytest.raises(CheckpointShapeError, match="shared_codebook"):
        dualtoken.convert_state_dict(different, config={**CONFIG, "shared_codebook": True})
    with pytest.raises(CheckpointShapeError, match="zeros"):
        dualtoken.convert_state_dict({**state, "prequant_sem.attn.zero_k_bias": torch.ones(16)}, config=CONFIG)
    name = "siglip_model.vision_model.encoder.layers.2.self_attn.k_proj.bias"
    with pytest.raises(CheckpointKeysError, match="k_proj"):
        dualtoken.convert_state_dict({key: value for key, value in state.items() if key != name}, config=CONFIG)
    with pytest.raises(CheckpointKeysError, match="no DualToken"):
        dualtoken.convert_state_dict({"a": torch.zeros(1)})
