"""Videos out of pipelines and out of the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from tiny_llamagen import class_pipeline
from tiny_video import video_pipeline

from armm.cli import generate
from armm.cli.main import main
from armm.cli.output import gif_durations, save_video
from pipelines import ARPipeline, ARPipelineOutput, ARVideoOutput


@pytest.fixture(scope="module")
def pipe():
    return video_pipeline()


def draw(pipe, count: int = 2, **options):
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    return pipe(class_labels=list(range(count)), generator=generators, **options)


# ---------------------------------------------------------------------- outputs of pipelines


def test_frames_in_every_form(pipe):
    output = draw(pipe)
    assert isinstance(output, ARVideoOutput) and output.codes is None and output[0] is output.frames
    assert [len(video) for video in output.frames] == [4, 4]
    assert all(isinstance(frame, Image.Image) and frame.size == (8, 8) for video in output.frames for frame in video)
    array, tensor = draw(pipe, output_type="np").frames, draw(pipe, output_type="pt").frames
    assert isinstance(array, np.ndarray) and array.shape == (2, 4, 8, 8, 3) and array.dtype == np.float32
    assert tensor.shape == (2, 4, 3, 8, 8) and 0 <= tensor.min() and tensor.max() <= 1
    np.testing.assert_allclose(array, tensor.permute(0, 1, 3, 4, 2).numpy())
    shown = np.stack([[np.asarray(frame) for frame in video] for video in output.frames])
    assert np.abs(shown / 255 - array).max() < 0.003
    codes = draw(pipe, output_codes=True, output_type="latent")
    assert torch.equal(codes.frames, codes.codes.ids) and codes.frames.shape == (2, 6)
    assert len(draw(pipe, return_dict=False)) == 1 and len(draw(pipe, return_dict=False, output_codes=True)) == 2
    with pytest.raises(ValueError, match="`output_type` must be one of"):
        draw(pipe, output_type="mp4")


@torch.no_grad()
def test_frames_are_the_clamped_pixels_in_order(pipe):
    output = draw(pipe, output_type="pt", output_codes=True)
    pixels = pipe.tokenizer.decode(output.codes)
    torch.testing.assert_close(output.frames, (pixels / 2 + 0.5).clamp(0, 1).transpose(1, 2))
    ramp = torch.linspace(-1.5, 1.5, 5)[None, None, :, None, None].expand(1, 3, 5, 2, 2)
    (frames,) = ARPipeline.pixels_to_frames(ramp.bfloat16(), "pil")
    assert [frame.getpixel((0, 0))[0] for frame in frames] == pytest.approx([0, 32, 128, 223, 255], abs=1)


def test_pipelines_of_images_still_return_images():
    output = class_pipeline()([1], generator=torch.Generator().manual_seed(0))
    assert isinstance(output, ARPipelineOutput) and output.images[0].size == (16, 16)


# ---------------------------------------------------------------------- the command


@pytest.fixture
def command(pipe, monkeypatch):
    """Runs `armm generate` on the tiny video pipeline."""
    monkeypatch.setattr(generate, "load_pipeline", lambda model, args: pipe)
    return lambda *arguments: main(["generate", "--device", "cpu", *map(str, arguments)])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_gif_holds_the_frames_at_their_rate(pipe, command, tmp_path, capsys):
    assert command("--class-labels", 0, "--video", tmp_path / "a.gif", "--seed", 0, "--fps", 16, "--size", 32) == 0
    assert "a.gif (seed 0)" in capsys.readouterr().out and names(tmp_path) == ["a.gif"]
    shown = [frame.copy() for frame in ImageSequence.Iterator(Image.open(tmp_path / "a.gif"))]
    assert [frame.info["duration"] for frame in shown] == [60, 60, 70, 60] and shown[0].info["loop"] == 0
    expected = draw(pipe, 1).frames[0]
    for frame, picture in zip(shown, expected, strict=True):
        picture = np.asarray(generate.resized(picture, 32)).astype(float)
        assert np.abs(np.asarray(frame.convert("RGB")) - picture).mean() < 12


def test_several_videos_and_a_grid(command, tmp_path):
    common = ("--class-labels", 0, 1, "--num-images", 2, "--quiet", "--seed", 3)
    assert command(*common, "--video", tmp_path / "v.gif") == 0
    assert names(tmp_path) == [f"v-{i}.gif" for i in range(4)]
    assert command(*common, "--video", tmp_path / "grid.gif", "--grid") == 0
    assert Image.open(tmp_path / "grid.gif").size == (18, 18) and Image.open(tmp_path / "grid.gif").n_frames == 4


def test_an_mp4_is_written_whole_or_not_at_all(pipe, tmp_path, monkeypatch):
    import diffusers.utils

    written = {}

    def export(frames, path, fps, macro_block_size):
        written.update(frames=frames, fps=fps)
        Path(path).write_bytes(b"video")
        assert Path(path).suffix == ".mp4" and Path(path).name != "a.mp4" and macro_block_size == 2
        if fps == 1:
            raise RuntimeError("no codec")

    monkeypatch.setattr(diffusers.utils, "export_to_video", export)
    frames = draw(pipe, 1).frames[0]
    with pytest.raises(RuntimeError):
        save_video(frames, 1, tmp_path / "a.mp4")
    assert names(tmp_path) == []
    save_video(frames, 24, tmp_path / "a.mp4")
    assert (tmp_path / "a.mp4").read_bytes() == b"video" and written == {"frames": frames, "fps": 24}


def test_an_mp4_without_its_packages_names_the_extra(command, tmp_path, monkeypatch, capsys):
    from armm.cli import output

    monkeypatch.setattr(output, "MP4_PACKAGES", ("no_such_package",))
    assert command("--class-labels", 0, "--video", tmp_path / "a.mp4") == 2
    shown = capsys.readouterr().err
    assert "pip install 'armm[video]'" in shown and len(shown.splitlines()) == 1 and names(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("-o", "{out}/a.png"), "makes videos: give --video"),
        (("-o", "{out}/a.png", "--video", "{out}/a.gif"), "not allowed with"),
        ((), "-o/--output --video is required"),
        (("--video", "{out}/a.avi"), "'.avi'"),
        (("--video", "{out}/no/a.gif"), "does not exist"),
        (("--video", "{out}/a.gif", "--fps", "0"), "--fps"),
        (("--video", "{out}/a.gif", "--fps", "60"), "at most 50 frames a second"),
        (("-o", "{out}/a.png", "--fps", "8"), "--fps belongs to --video"),
        (("--video", "{out}/a.gif", "--animate", "{out}/b.gif"), "--animate"),
        (("--video", "{out}/a.gif", "--temperature", "1"), "does not take --temperature"),
    ],
)
def test_bad_requests_write_nothing(command, tmp_path, capsys, arguments, says):
    assert command("--class-labels", 0, *(text.format(out=tmp_path) for text in arguments)) == 2
    shown = capsys.readouterr().err
    assert says in shown and len(shown.splitlines()) == 1 and names(tmp_path) == []


def test_a_pipeline_of_pictures_makes_no_video(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(generate, "load_pipeline", lambda model, args: class_pipeline())
    assert main(["generate", "--class-labels", "1", "--device", "cpu", "--video", str(tmp_path / "a.gif")]) == 2
    assert "makes pictures: give --output" in capsys.readouterr().err and names(tmp_path) == []


@pytest.mark.parametrize("fps", [1, 3, 7, 12, 24, 30, 50])
def test_durations_do_not_drift(fps):
    durations = gif_durations(97, fps)
    assert len(durations) == 97 and min(durations) >= 20
    assert abs(sum(durations) - 97000 / fps) <= 5
