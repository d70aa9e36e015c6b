"""The LARP video tokenizer and its converter; the vision transformer and the position tables under them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny_video import TINY, tiny_video_tokenizer

from armm.cli.main import main
from armm.convert import CheckpointError, CheckpointKeysError, CheckpointShapeError, convert, larp
from armm.convert.containers import load_state_dict
from armm.nn.sincos import sincos_table, video_sincos_table
from tokenizers_visual import Codes, LARPTokenizer, VectorQuantizer, ViT

CASE = Path(__file__).parent / "parity" / "cases" / "nar" / "larp_tokenizer"
CONSTRUCTOR = json.loads((CASE / "config.json").read_text())["constructor"]
HEADS = {"encoder_heads": 4, "decoder_heads": 4}


@pytest.fixture(scope="module")
def tokenizer() -> LARPTokenizer:
    return tiny_video_tokenizer()


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return load_state_dict(CASE / "checkpoint.pth")


def videos(batch: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, 3, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def same(model: LARPTokenizer, other: LARPTokenizer) -> bool:
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---------------------------------------------------------------------- tables and blocks


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))
def test_tables_are_sines_and_cosines(frames, rows, columns, quarter):
    dim = 4 * quarter
    table = video_sincos_table((frames, rows, columns), dim)

    def value(position: int, k: int, width: int) -> float:
        angle = position / 10000 ** ((k % (width // 2)) / (width // 2))
        return math.sin(angle) if k < width // 2 else math.cos(angle)

    for cell, row in enumerate(table.tolist()):
        t, h, w = cell // (rows * columns), cell // columns % rows, cell % columns
        place = [value(w, k, dim // 2) for k in range(dim // 2)] + [value(h, k, dim // 2) for k in range(dim // 2)]
        expected = [value(t, k, dim) + place[k] for k in range(dim)]
        assert row == pytest.approx(expected, abs=1e-6)


def test_tables_need_a_width_that_fits():
    with pytest.raises(ValueError, match="even"):
        sincos_table(torch.arange(3), 5)
    with pytest.raises(ValueError, match="multiple of 4"):
        video_sincos_table((1, 2, 2), 6)


def test_the_vision_transformer_sees_all_tokens_unless_a_mask_says_otherwise():
    torch.manual_seed(0)
    model = ViT(16, 2, 4, norm_eps=1e-5, qkv_bias=False).eval()
    assert model.blocks[0].attention.to_q.bias is None and model.blocks[1].mlp_norm.eps == 1e-5
    x = torch.randn(2, 5, 16)
    changed = x.clone()
    changed[:, 4] *= -1
    seen = torch.ones(5, 5, dtype=torch.bool)
    seen[:4, 4] = False
    with torch.no_grad():
        assert not torch.allclose(model(x)[:, 0], model(changed)[:, 0])
        torch.testing.assert_close(model(x, mask=seen)[:, :4], model(changed, mask=seen)[:, :4])
        torch.testing.assert_close(model(x[:, [3, 1, 0, 2, 4]]), model(x)[:, [3, 1, 0, 2, 4]])
    with pytest.raises(ValueError, match="width 16, 2 layers and 3 heads"):
        ViT(16, 2, 3)


# ---------------------------------------------------------------------- coding


@torch.no_grad()
def test_codes_have_no_place(tokenizer):
    pixels = videos(2)
    codes = tokenizer.encode(pixels)
    assert codes.ids.shape == (2, 6) and codes.ids.dtype == torch.int64 and codes.grid is None
    decoded = tokenizer.decode(codes)
    assert decoded.shape == pixels.shape
    assert torch.equal(tokenizer.decode(Codes(ids=codes.ids, grid=(1, 2, 3))), decoded)
    vectors = tokenizer.embed(codes)
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(2, 6))
    torch.testing.assert_close(tokenizer.decode_vectors(vectors), decoded)
    other = codes.ids.clone()
    other[:, 0] = (other[:, 0] + 1) % 32
    difference = (tokenizer.decode(Codes(ids=other)) - decoded).abs().amin((0, 1))
    assert (difference > 0).all(), "one code changes every place and frame"
    assert tokenizer.is_video and tokenizer.downsample == 4 and tokenizer.latent_channels == 4


@torch.no_grad()
def test_patches_land_where_they_belong():
    model = tiny_video_tokenizer(decoder_temporal_patch_size=1, decoder_patch_size=2)
    for parameter in (model.proj_out.weight, model.proj_out.bias):
        parameter.zero_()
    # channel 1 of the pixel (row 1, column 0) of every patch of one frame
    model.proj_out.bias[(0 * 4 + 1 * 2 + 0) * 3 + 1] = 1
    pixels = model.decode(Codes(ids=torch.zeros(1, 6, dtype=torch.int64)))
    expected = torch.full((1, 3, 4, 8, 8), -1.0)
    expected[:, 1, :, 1::2, 0::2] = 1
    assert torch.equal(pixels, expected)


@torch.no_grad()
def test_a_batch_equals_its_videos(tokenizer):
    pixels = videos(3)
    together = tokenizer.encode(pixels)
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    drawn = tokenizer.encode(pixels, generator=generators, sample=True)
    for i in range(3):
        alone = tokenizer.encode(pixels[i : i + 1])
        assert torch.equal(alone.ids[0], together.ids[i])
        torch.testing.assert_close(tokenizer.decode(alone)[0], tokenizer.decode(together)[i], atol=1e-5, rtol=1e-5)
        generator = torch.Generator().manual_seed(i)
        assert torch.equal(tokenizer.encode(pixels[i : i + 1], generator=generator, sample=True).ids[0], drawn.ids[i])


@torch.no_grad()
def test_a_draw_follows_the_softmax_of_cosines():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(5, 3)
    torch.nn.init.normal_(quantizer.embedding.weight)
    vector = quantizer.normalize(torch.randn(1, 1, 3))
    expected = (vector @ quantizer.codebook().T / 0.5).softmax(-1)[0, 0]
    ids = quantizer.draw(vector.expand(1, 40000, 3), 0.5, torch.Generator().manual_seed(1))
    torch.testing.assert_close(torch.bincount(ids[0], minlength=5) / 40000, expected, atol=0.01, rtol=0)
    cold = quantizer.draw(vector.expand(2, 9, 3), 1e-4, [torch.Generator().manual_seed(i) for i in range(2)])
    assert torch.equal(cold, quantizer.nearest(vector, quantizer.codebook()).expand(2, 9))
    with pytest.raises(ValueError, match="holds 1 generators for a batch of 2"):
        quantizer.draw(vector.expand(2, 1, 3), 1.0, [torch.Generator()])


@pytest.mark.parametrize("sample", [False, True])
def test_every_parameter_gets_a_gradient(sample):
    model = tiny_video_tokenizer().train()
    pixels = videos(2)
    restored, quantized = model(pixels, sample=sample, generator=torch.Generator().manual_seed(0))
    assert restored.shape == pixels.shape
    loss = (restored - pixels).square().mean() + quantized.codebook_loss + 0.25 * quantized.commitment_loss
    loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without
    if not sample:
        assert torch.equal(quantized.ids, model.encode(pixels).ids)


@torch.no_grad()
def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = LARPTokenizer.from_pretrained(tmp_path)
    assert same(loaded, tokenizer) and not any(
        "table" in name or "pe" in name.split(".") for name in loaded.state_dict()
    )
    pixels = videos(1)
    assert torch.equal(loaded.decode(loaded.encode(pixels)), tokenizer.decode(tokenizer.encode(pixels)))
    half = LARPTokenizer.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.quantizer.embedding.weight.dtype == torch.float32 and half.dtype == torch.bfloat16
    codes = half.encode(pixels)
    assert half.decode(codes).dtype == torch.bfloat16
    torch.testing.assert_close(half.decode(codes).float(), tokenizer.decode(codes), atol=0.3, rtol=0.1)


def test_tables_made_without_gradients_serve_training():
    model = tiny_video_tokenizer()
    with torch.inference_mode():
        model.decode(model.encode(videos(1)))
    model(videos(1))[0].sum().backward()


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("pixels", "says"),
    [
        (videos(1)[0], r"\[B, 3, 4, 8, 8\].*\(3, 4, 8, 8\)"),
        (videos(1)[:, :1], "floating point tensor"),
        (videos(0), "floating point tensor"),
        ((videos(1) * 127).byte(), "torch.uint8"),
        (videos(1)[:, :, :3], "4 frames, got 3"),
        (videos(1)[..., :4], "8x8, got 8x4"),
        (videos(1) * 255, "rescale or clamp"),
        (videos(1) * float("nan"), "rescale or clamp"),
    ],
)
def test_unfit_videos_are_refused(tokenizer, pixels, says):
    with pytest.raises(ValueError, match=f"`pixels` must.*{says}"):
        tokenizer.encode(pixels)


@pytest.mark.parametrize(
    ("codes", "says"),
    [
        (Codes(ids=torch.zeros(1, 5, dtype=torch.int64)), "must have 6 ids for each video, got 5"),
        (Codes(ids=torch.full((1, 6), 32)), "another tokenizer"),
        (Codes(ids=torch.full((1, 6), -1)), "another tokenizer"),
        (Codes(ids=torch.zeros(1, 6, 2, dtype=torch.int64)), "one id per position"),
        (Codes(latents=torch.zeros(1, 6, 4)), "one id per position"),
    ],
)
def test_unfit_codes_are_refused(tokenizer, codes, says):
    with pytest.raises(ValueError, match=says):
        tokenizer.decode(codes)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_frames": 5}, "encoder's patches of 2 frames"),
        ({"sample_size": 10}, "cannot tile 4 frames"),
        ({"decoder_patch_size": 3}, "decoder's patches"),
        ({"encoder_dim": 18, "encoder_heads": 1}, "`encoder_dim` must be a multiple of 4"),
        ({"decoder_heads": 3}, "3 heads"),
        ({"num_tokens": 0}, "must be positive"),
        ({"sampling_temperature": 0.0}, "must be positive"),
    ],
)
def test_unfit_sizes_are_refused(change, says):
    with pytest.raises(ValueError, match=says):
        LARPTokenizer(**{**TINY, **change})


def test_vectors_of_another_width_are_refused(tokenizer):
    with pytest.raises(ValueError, match="exactly 6 codes of width 4"):
        tokenizer.decode_vectors(torch.zeros(1, 6, 5))


# ---------------------------------------------------------------------- the authors' files


def folder_of(tmp_path: Path, state: dict, name: str, config: dict | None, config_name: str) -> Path:
    folder = tmp_path / "published"
    folder.mkdir()
    if name.endswith(".safetensors"):
        save_file(state, folder / name)
    else:
        torch.save(state, folder / name)
    if config is not None:
        (folder / config_name).write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("name", "config_name"),
    [("larp.pth", "larp.json"), ("model.safetensors", "config.json"), ("pytorch_model.bin", "config.json")],
)
def test_folders_and_files_give_the_same_tokenizer(state, tmp_path, name, config_name):
    expected = convert("larp", CASE / "checkpoint.pth", config=CONSTRUCTOR)
    prior = {**state, "prior_model.blocks.0.attn.qkv.weight": torch.zeros(3, 1)}
    folder = folder_of(tmp_path, prior, name, {**CONSTRUCTOR, "another_argument": 3}, config_name)
    converted = convert("larp", folder)
    assert same(converted, expected) and not converted.training
    assert dict(converted.config) == dict(expected.config)
    assert same(convert("larp", folder / name, config=folder / config_name if name == "larp" else HEADS), expected)


def test_sizes_come_from_the_tensors(state):
    config = convert("larp", CASE / "checkpoint.pth", config=HEADS).config
    assert (config.num_frames, config.sample_size, config.decoder_patch_size, config.num_tokens) == (8, 16, 4, 24)
    without = {
        name: value for name, value in state.items() if name not in ("encoder_patch_pe", "decoder_patch_query_embed")
    }
    with pytest.raises(ValueError, match="does not say the size of its videos"):
        larp.convert_state_dict(without, config=HEADS)
    given = larp.convert_state_dict(without, config={**HEADS, "num_frames": 8, "input_size": 16})
    assert same(given, larp.convert_state_dict(state, config=HEADS))


def test_coders_may_differ():
    model = tiny_video_tokenizer(decoder_temporal_patch_size=4, decoder_patch_size=2, encoder_mlp_hidden=20)
    state = {}
    for name, tensor in model.state_dict().items():
        rule, match = next((rule, m) for rule in larp.RULES for p in rule.target_patterns if (m := p.fullmatch(name)))
        state.setdefault(rule.source.format(**match.groupdict()), []).append(tensor)
    state = {name: torch.cat(parts) for name, parts in state.items()}
    state["decoder_patch_query_token_type_embed"] = state["decoder_patch_query_token_type_embed"].view(1, 1, -1)
    state["encoder_patch_pe"] = video_sincos_table((2, 2, 2), 16)[None]
    state["decoder_patch_query_embed"] = video_sincos_table((1, 4, 4), 8)[None]
    converted = larp.convert_state_dict(state, config={"encoder_num_heads": 2, "decoder_num_heads": 1})
    assert same(converted, model)
    pixels = videos(1)
    with torch.no_grad():
        assert torch.equal(converted.decode(converted.encode(pixels)), model.decode(model.encode(pixels)))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({}, "how many attention heads"),
        ({**HEADS, "encoder_heads": 7}, "must divide the width 64, got 7"),
        ({**HEADS, "frame_num": 16}, "num_frames = 16, but the tensors of the file say 8"),
        ({**HEADS, "bottleneck_token_num": 25}, "num_tokens = 25"),
        ({**HEADS, "window": 3}, "unknown `config` options window"),
        ({**HEADS, "learned_encoder_patch_pe": True}, "learned_encoder_patch_pe = True"),
        ({**HEADS, "bottleneck": {"name": "bottleneck", "args": {"norm": "layer"}}}, "norm = 'layer'"),
        ({**HEADS, "bottleneck": {"args": {"regularizer": {"name": "kl"}}}}, "regularizer = 'kl'"),
        (
            {**HEADS, "bottleneck": {"args": {"regularizer": {"args": {"l2_normalized": False}}}}},
            "l2_normalized = False",
        ),
        ({**CONSTRUCTOR, "encoder_name": "vit"}, "encoder is 64 wide"),
        ({"_class_name": "LARPTokenizer"}, "from_pretrained"),
    ],
)
def test_unfit_arguments_are_refused(state, config, says):
    with pytest.raises(ValueError, match=says):
        larp.convert_state_dict(state, config=config)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda s: s.pop("bottleneck.regularizer.embedding.weight"), CheckpointKeysError, "no LARP tokenizer"),
        (lambda s: s.pop("final_layer.linear.bias"), CheckpointKeysError, "missing final_layer.linear.bias"),
        (lambda s: s.update(extra=torch.zeros(1)), CheckpointKeysError, "unknown tensors.*extra"),
        (lambda s: s.update(encoder_patch_pe=torch.zeros(1, 32, 64)), CheckpointShapeError, "encoder_patch_pe is not"),
        (lambda s: s["decoder_latent_pe"].mul_(1.01), CheckpointShapeError, "decoder_latent_pe is not"),
        (lambda s: s.update(decoder_patch_query_embed=video_sincos_table((3, 2, 2), 64)[None]), CheckpointShapeError, "cannot tile"),
        (lambda s: s.update({"x_embedder.proj.weight": torch.zeros(64, 3, 4, 4, 2)}), CheckpointShapeError, "expected squares"),
        (lambda s: s.update({"encoder.blocks.0.attn.qkv.weight": torch.zeros(191, 64)}), CheckpointShapeError, "equal size"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused(state, change, error, says):
    changed = {name: tensor.clone() for name, tensor in state.items()}
    change(changed)
    with pytest.raises(error, match=says):
        larp.convert_state_dict(changed, config=HEADS)


def test_ambiguous_folders_are_refused(state, tmp_path):
    folder = folder_of(tmp_path, state, "a.pth", None, "")
    with pytest.raises(ValueError, match="how many attention heads"):
        convert("larp", folder)
    (folder / "a.json").write_text("{}")
    (folder / "b.json").write_text("{}")
    with pytest.raises(CheckpointError, match="one .json of constructor arguments, found a.json, b.json"):
        convert("larp", folder)
    (folder / "b.json").unlink()
    (folder / "b.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="one file of weights .*found a.pth, b.pt"):
        convert("larp", folder)
    (folder / "b.pt").unlink()
    (folder / "a.json").write_text("[")
    with pytest.raises(ValueError, match="not a readable JSON file"):
        convert("larp", folder)


def test_the_command_converts_a_folder(state, tmp_path, capsys):
    folder = folder_of(tmp_path, state, "larp.pth", CONSTRUCTOR, "larp.json")
    assert main(["convert", "larp", str(folder), "-o", str(tmp_path / "out")]) == 0
    assert same(LARPTokenizer.from_pretrained(tmp_path / "out"), convert("larp", folder))
    assert main(["convert", "larp", str(folder), "--tokenizer", str(folder), "-o", str(tmp_path / "no")]) == 2
    assert "family of tokenizers" in capsys.readouterr().err and not (tmp_path / "no").exists()
