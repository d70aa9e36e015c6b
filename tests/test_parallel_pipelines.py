"""NARPipeline (images, texts, videos) and PARPipeline: calls, files, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_llamagen import tiny_tokenizer
from tiny_video import tiny_video_tokenizer

import armm
from armm.convert import CheckpointError, convert
from armm.convert.containers import CheckpointKeysError
from armm.convert.llamagen import load_single_file as load_llamagen
from armm.decoding import NeighboringDecoding, NextTokenDecoding, ParallelGroupsDecoding
from armm.model import AutoregressiveModel
from pipelines.nar import NARPipeline
from pipelines.par import PARPipeline

CODES = 48


def transformer(grid: tuple[int, ...], condition: dict[str, Any] | None = None, codes: int = CODES, **options: Any):
    torch.manual_seed(2)
    trunk = {"dim": 32, "num_layers": 3, "num_heads": 2, "mlp_hidden": 48, **options.pop("transformer", {})}
    trunk.setdefault("rotary_axes", [8, 8])
    condition = condition or {"type": "class", "num_classes": 10}
    model = AutoregressiveModel(codes, trunk, condition, grid, **options).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def nar(condition: dict[str, Any] | None = None) -> NARPipeline:
    head = {"type": "neighboring", "axes": 2}
    model = transformer((4, 4), condition, head=head, transformer={"taps": [2]})
    return quiet(NARPipeline(tiny_tokenizer(CODES), model, NeighboringDecoding(), generation_config={"guidance_scale": 2.0}))


def nar_video() -> NARPipeline:
    tokenizer = tiny_video_tokenizer(num_tokens=8)
    trunk = {"num_layers": 3, "taps": [1, 2], "rotary_axes": [], "learned_positions": 9}
    model = transformer((2, 2, 2), codes=32, head={"type": "neighboring", "axes": 3}, transformer=trunk)
    return quiet(NARPipeline(tokenizer, model, NeighboringDecoding()))


def par() -> PARPipeline:
    model = transformer((4, 4), transition_tokens=3)
    return quiet(PARPipeline(tiny_tokenizer(CODES), model, ParallelGroupsDecoding(2)))


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize(("make", "calls"), [(nar, 7), (par, 7)])
def test_images_do_not_depend_on_their_batch_and_survive_saving(make, calls, tmp_path):
    pipe = make()
    together = pipe(class_labels=[1, 2], generator=generators(0, 1)).images
    assert [image.size for image in together] == [(16, 16)] * 2 and pipe.num_timesteps == calls
    alone = pipe(class_labels=2, generator=generators(1)).images[0]
    assert alone.tobytes() == together[1].tobytes()
    pipe.save_pretrained(tmp_path / "saved")
    again = quiet(armm.ARPipeline.from_pretrained(tmp_path / "saved"))
    assert type(again) is type(pipe) and type(again.decoding) is type(pipe.decoding)
    assert again(class_labels=2, generator=generators(1)).images[0].tobytes() == alone.tobytes()
    latents = pipe(class_labels=2, generator=generators(1), output_type="latent", output_codes=True)
    assert latents.codes.grid == (1, 4, 4) and torch.equal(latents.codes.ids, latents.images)


def test_other_sizes_are_drawn_and_callbacks_see_open_cells():
    pipe, seen = nar(), []

    def watch(pipe, step, timestep, tensors):
        seen.append(tensors["latents"].clone())
        return {}

    image = pipe(class_labels=3, height=8, width=24, generator=generators(0), callback_on_step_end=watch).images[0]
    assert image.size == (24, 8) and len(seen) == 7
    assert [int((ids >= 0).sum()) for ids in seen] == [1, 3, 5, 7, 9, 11, 12]


def test_texts_through_given_embeddings():
    pipe = nar({"type": "caption", "in_dim": 6, "num_tokens": 5})
    embeds, mask = torch.randn(2, 5, 6), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    both = pipe(prompt_embeds=embeds, prompt_attention_mask=mask, generator=generators(0, 1), output_type="latent").images
    alone = pipe(prompt_embeds=embeds[:1], prompt_attention_mask=mask[:1], generator=generators(0), output_type="latent").images
    assert torch.equal(both[:1], alone)


def test_videos_end_in_frames(tmp_path):
    pipe = nar_video()
    output = pipe(class_labels=[1, 2], generator=generators(0, 1))
    assert [len(frames) for frames in output.frames] == [4, 4] and output.frames[0][0].size == (8, 8)
    assert pipe.num_timesteps == 4
    array = pipe(class_labels=[1], generator=generators(0), output_type="np").frames
    assert array.shape == (1, 4, 8, 8, 3)
    pipe.save_pretrained(tmp_path / "video")
    again = quiet(armm.NARPipeline.from_pretrained(tmp_path / "video"))
    assert (again(class_labels=[1], generator=generators(0), output_type="np").frames == array).all()


def test_kept_tokens_stay():
    pipe = par()
    latents = torch.full((1, 16), -1)
    latents[:, :8] = 5
    out = pipe(class_labels=1, latents=latents, generator=generators(0), output_type="latent").images
    assert (out[:, :8] == 5).all()


def test_a_llamagen_file_is_no_nar_or_par_file(tmp_path):
    state = {"tok_embeddings.weight": torch.zeros(8, 8), "output.weight": torch.zeros(8, 8)}
    torch.save(state, tmp_path / "file.pt")
    for family, missing in (("nar", "medusa_output.weight"), ("par", "spe_tok_embeddings")):
        with pytest.raises(CheckpointKeysError, match=missing):
            convert(family, tmp_path / "file.pt")
    with pytest.raises(CheckpointError):
        load_llamagen(tmp_path / "file.pt", tokenizer=tiny_tokenizer(CODES))


BAD = {
    "an image tokenizer for a video model": (
        lambda: NARPipeline(tiny_tokenizer(CODES), nar_video().transformer, NeighboringDecoding()),
        "do not belong together",
    ),
    "a video tokenizer for an image model": (
        lambda: NARPipeline(tiny_video_tokenizer(), nar().transformer, NeighboringDecoding()),
        "do not belong together",
    ),
    "a transformer without neighboring heads": (
        lambda: NARPipeline(tiny_tokenizer(CODES), transformer((4, 4)), NeighboringDecoding()),
        "neighboring head",
    ),
    "a video of another size": (lambda: nar_video()(class_labels=1, height=16), "the size of this checkpoint's videos"),
    "regions that do not fit": (lambda: par()(class_labels=1, height=20), "cannot be cut into 2x2"),
    "next-token decoding of a neighboring model": (lambda: decode_plainly(nar()), "made for NeighboringDecoding"),
    "an unknown class": (lambda: par()(class_labels=10), "between 0 and 9"),
    "noise of another shape": (lambda: nar()(class_labels=1, noise=torch.ones(1, 3, CODES)), "`noise` must be a tensor"),
}


def decode_plainly(pipe: Any) -> None:
    model = pipe.transformer
    NextTokenDecoding()(model, model.condition(labels=torch.tensor([1])))


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()
