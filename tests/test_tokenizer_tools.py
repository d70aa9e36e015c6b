"""Loading tokenizers by name, comparing them, and `armm reconstruct`."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_dar import tiny_dar_pipeline, tiny_dar_tokenizer
from tiny_llamagen import class_pipeline, tiny_tokenizer
from tiny_semantic import seed_tokenizer

import armm
from armm.cli.main import main
from armm.evaluation.metrics import psnr
from armm.evaluation.tokenizers import fitting_size, reconstruct
from tokenizers_visual import BinaryTokenizer, DepthVQTokenizer, KLTokenizer, VQTokenizer


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    ramp = np.linspace(0, 255, width * height).reshape(height, width)
    noise = np.random.default_rng(seed).integers(0, 60, (height, width, 3))
    return Image.fromarray((ramp[..., None] * 0.7 + noise).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    tiny_tokenizer().save_pretrained(root / "vq")
    tiny_dar_tokenizer().save_pretrained(root / "dar")
    class_pipeline().save_pretrained(root / "pipeline")
    picture(21, 30).save(root / "photo.png")
    return root


# ---------------------------------------------------------------------- loading


def test_tokenizers_are_found_by_folder_pipeline_task_and_instance(folder):
    assert isinstance(armm.tokenizer(folder / "vq"), VQTokenizer)
    assert isinstance(armm.tokenizer(folder / "pipeline"), VQTokenizer)
    assert isinstance(armm.tokenizer("text-to-image"), VQTokenizer)
    model = tiny_dar_tokenizer().train()
    assert armm.tokenizer(model) is model and not model.training
    assert armm.tokenizer(folder / "vq", dtype=torch.bfloat16).quant_conv.weight.dtype == torch.bfloat16


def test_what_is_no_tokenizer_is_refused(folder, tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"x")
    for name, words in (
        ("dar-tokeniser", "dar-tokenizer"),
        (folder, "config.json"),
        (tmp_path / "weights.pt", "armm convert"),
        (folder / "pipeline" / "transformer", "AutoregressiveModel"),
        ("janus-pro-1b", "brings its tokenizer"),
        ("atoken-soc", "download https"),
    ):
        with pytest.raises(ValueError, match=words):
            armm.tokenizer(name)


# ---------------------------------------------------------------------- comparing


def test_figures_are_those_of_each_picture_alone(folder):
    images = [picture(16, 16, seed) for seed in range(3)]
    both = {"vq": folder / "vq", "dar": tiny_dar_tokenizer()}
    result = armm.compare_tokenizers(images, both, size=16, batch_size=2, seed=4)
    assert [row.name for row in result.rows] == ["vq", "dar"] and result.pixels.shape == (3, 3, 16, 16)
    pixels = torch.from_numpy(np.stack([np.array(image) for image in images])).permute(0, 3, 1, 2).float() / 127.5 - 1
    torch.testing.assert_close(result.pixels, pixels)
    vq, dar = result.rows
    model = armm.tokenizer(folder / "vq")
    with torch.no_grad():
        expected = model.decode(model.encode(pixels)).clamp(-1, 1)
    torch.testing.assert_close(vq.pixels, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(vq.psnr, psnr(expected, pixels), atol=1e-3, rtol=0)
    assert vq.tokens == 16 and vq.bits == pytest.approx(16 * math.log2(48))
    assert vq.bits_per_pixel == pytest.approx(16 * math.log2(48) / 256)
    assert dar.tokens == 8 and dar.bits == pytest.approx(8 * math.log2(24))
    alone = armm.compare_tokenizers(images[:1], both, size=16, seed=4).rows[1]
    torch.testing.assert_close(alone.pixels[0], dar.pixels[0], atol=1e-4, rtol=0)
    assert list(result.table()[0]) == [
        "tokenizer", "codes", "numbers", "bits_per_pixel", "psnr", "ssim", "encode_seconds", "decode_seconds"
    ]  # fmt: skip
    sheet = result.sheet()
    assert sheet.size == (3 * 16 + 2 * 4, 16 + 3 * 16 + 2 * 4)
    assert np.array_equal(np.array(sheet)[16:32, :16], np.array(images[0]))


def test_bits_and_sizes_of_other_kinds():
    kl = KLTokenizer(
        base_channels=8, channel_multipliers=[1, 2], num_res_blocks=1, latent_channels=3, norm_groups=4
    ).eval()
    binary = BinaryTokenizer(
        base_channels=8, channel_multipliers=[1, 2], encoder_blocks=1, decoder_blocks=1, z_channels=8, bits=6, sub_codes=2,
        norm_groups=4,
    ).eval()  # fmt: skip
    result = armm.compare_tokenizers(picture(20, 12), [kl, binary, binary], size=(8, 12))
    assert [row.name for row in result.rows] == ["KLTokenizer", "BinaryTokenizer", "BinaryTokenizer (2)"]
    continuous, bits, again = result.table()
    assert continuous["bits_per_pixel"] is None and continuous["numbers"] == 4 * 6 * 3 and continuous["codes"] == 0
    assert bits["codes"] == 48 and bits["bits_per_pixel"] == pytest.approx(24 * 6 / 96)
    assert math.isnan(bits["ssim"]) and bits["psnr"] == again["psnr"]
    assert fitting_size(tiny_dar_tokenizer(), 5, 18) == (8, 16) and fitting_size(kl, 5, 18) == (4, 18)
    row = reconstruct(tiny_dar_tokenizer(), torch.zeros(1, 3, 5, 7))
    assert row.pixels.shape == (1, 3, 5, 7)


def test_comparisons_that_make_no_sense_are_refused():
    depth = DepthVQTokenizer(base_channels=4, num_levels=2, codebook_size=4, codebook_dim=4, image_size=8)
    for arguments, words in (
        ((picture(8, 8), [depth]), "1 channels"),
        ((picture(8, 8), [seed_tokenizer()]), "no decoder"),
        ((picture(8, 8), []), "empty"),
        (([], [tiny_tokenizer()]), "images"),
    ):
        with pytest.raises(ValueError, match=words):
            armm.compare_tokenizers(*arguments)
    with pytest.raises(ValueError, match="size"):
        armm.compare_tokenizers(picture(8, 8), [tiny_tokenizer()], size=(8, 0))


# ---------------------------------------------------------------------- the command


def run(*arguments: object) -> int:
    return main(["reconstruct", *map(str, arguments), "--device", "cpu"])


def test_a_picture_comes_back_in_whole_tokens(folder, tmp_path, capsys):
    assert (
        run(
            folder / "photo.png",
            "--tokenizer",
            folder / "vq",
            "-o",
            tmp_path / "out.png",
            "--json",
            tmp_path / "f.json",
        )
        == 0
    )
    assert Image.open(tmp_path / "out.png").size == (20, 32)
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["width"] == 20 and figures["tokenizers"][0]["codes"] == 40
    shown = capsys.readouterr().out
    assert "psnr" in shown and "out.png (20x32 pixels)" in shown
    assert (
        run(folder / "photo.png", "--tokenizer", folder / "pipeline", "-o", tmp_path / "s.png", "--size", 16, "--quiet")
        == 0
    )
    assert Image.open(tmp_path / "s.png").size == (16, 16) and not capsys.readouterr().out


def test_several_tokenizers_make_a_sheet(folder, tmp_path):
    target = tmp_path / "sheet.png"
    assert (
        run(folder / "photo.png", "--tokenizer", folder / "vq", folder / "dar", "-o", target, "--quiet", "--size", 16)
        == 0
    )
    assert Image.open(target).size == (3 * 16 + 8, 32)
    assert (
        run(folder / "photo.png", "--tokenizer", folder / "dar", "--sheet", "-o", target, "--quiet", "--size", 16) == 0
    )
    assert Image.open(target).size == (2 * 16 + 4, 32)


def test_bad_requests_end_with_two_and_write_nothing(folder, tmp_path, capsys):
    photo, target = folder / "photo.png", tmp_path / "out.png"
    for arguments, words in (
        ([photo, "--tokenizer", "dar-tokeniser", "-o", target], "dar-tokenizer"),
        ([tmp_path / "none.png", "--tokenizer", folder / "vq", "-o", target], "no image file"),
        ([photo, "--tokenizer", folder / "vq", "-o", tmp_path / "out.txt"], "--output"),
        ([photo, "-o", target], "--tokenizer"),
    ):
        assert run(*arguments) == 2
        assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_pipeline_and_its_tokenizer_make_the_same_picture():
    pipe = tiny_dar_pipeline()
    noise = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    output = pipe(class_labels=1, pixel_noise=noise, output_type="pt", output_codes=True)
    pixels = armm.tokenizer(pipe.tokenizer).decode(output.codes, noise=noise)
    torch.testing.assert_close(output.images, pipe.pixels_to_images(pixels, "pt"))
