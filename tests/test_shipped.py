"""The weights in weights/: whole, documented, small, and the same seed draws the same picture whatever surrounds it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import armm
from armm import weights
from pipelines.shipped import task_decodings

PROMPT, OTHER = "a small red sphere to the left of a large blue cube", "two green cones at night"


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture(scope="module")
def pipe():
    pipe = armm.pipeline("text-to-image")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def alone(pipe):
    return pipe(PROMPT, generator=generators(3), output_codes=True)


def same(output, index: int, reference) -> None:
    """Equal tokens; pixels may differ by rounding where other kernels decode a batch of another size."""
    assert torch.equal(output.codes.ids[index], reference.codes.ids[0])
    first, second = (np.asarray(image, dtype=int) for image in (output.images[index], reference.images[0]))
    assert np.abs(first - second).max() <= 1


def test_a_picture_is_the_same_in_a_batch(pipe, alone):
    output = pipe([OTHER, PROMPT, OTHER], generator=generators(1, 3, 2), output_codes=True)
    same(output, 1, alone)
    assert not torch.equal(output.codes.ids[0], output.codes.ids[2])


def test_a_picture_is_the_same_on_any_number_of_threads(pipe, alone):
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            same(pipe(PROMPT, generator=generators(3), output_codes=True), 0, alone)
    finally:
        torch.set_num_threads(threads)


def test_a_picture_is_the_same_after_saving_and_loading(pipe, alone, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    again = type(pipe).from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    same(again(PROMPT, generator=generators(3), output_codes=True), 0, alone)


def test_the_same_weights_read_and_repaint(alone):
    read = armm.pipeline("image-to-text")
    image = alone.images[0]
    assert read(image).texts[0].strip()
    assert read(image, question="how many objects are there?").texts[0].strip()
    paint = armm.pipeline("inpainting")
    paint.set_progress_bar_config(disable=True)
    mask = Image.new("L", image.size)
    mask.paste(255, (0, 0, image.width // 2, image.height))
    assert paint(OTHER, image, mask, generator=generators(0)).images[0].size == image.size


@pytest.mark.parametrize("name", weights.names())
def test_shipped_weights_are_safetensors_with_a_card(name):
    folder = weights.path(name)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert any(path.suffix == ".safetensors" for path in files)
    assert not [path.name for path in files if path.suffix in (".pt", ".pth", ".bin", ".pkl", ".ckpt")]
    cards = [path for path in files if path.suffix == ".md"]
    assert cards, f"{name} has no model card"
    card = cards[0].read_text(encoding="utf-8").lower()
    for fact in ("recipe", "seed", "steps", "loss", "armm train", "armm evaluate"):
        assert fact in card, f"the card of {name} does not say its {fact}"


def test_shipped_weights_are_small():
    total = sum(path.stat().st_size for name in weights.names() for path in Path(weights.path(name)).rglob("*"))
    assert 0 < total <= 46e6


# ---------------------------------------------------------------------- other decodings


def test_every_decoding_of_a_task_is_shipped_and_draws():
    offered = task_decodings("text-to-image")
    assert offered[0] == "next_token" and {"neighboring", "token_shuffle", "next_x", "masked_latents"} <= set(offered)
    for name in offered[1:]:
        pipe = armm.pipeline("text-to-image", decoding=name.replace("_", "-"))
        pipe.set_progress_bar_config(disable=True)
        image = pipe("a large red sphere", generator=torch.Generator().manual_seed(0)).images[0]
        assert image.size == (64, 64), name
    with pytest.raises(ValueError, match="next_token"):
        armm.pipeline("text-to-image", decoding="random")


def test_step_annealing_saves_steps_of_the_next_x_model():
    pipe = armm.pipeline("text-to-image", decoding="next_x")
    pipe.set_progress_bar_config(disable=True)
    plain = pipe.decoding.num_calls(pipe.grid, pipe.generation_config["num_flow_steps"])
    pipe.enable_acceleration(armm.StepAnnealing(12, 4))
    assert pipe.decoding.num_calls(pipe.grid, pipe.generation_config["num_flow_steps"], pipe.acceleration) < plain / 2
    pixels = pipe("a large red sphere", generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert pixels.shape == (1, 3, 64, 64) and pixels.isfinite().all()
