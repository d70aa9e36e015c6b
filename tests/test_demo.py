"""The work behind the page of `armm demo`, without a browser, on a tiny random model."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_unified import unified_pipeline

from armm.cli.main import main
from armm.serving.live import Pace, live
from armm.serving.requirements import usable_port
from armm.serving.studio import Drawing, Preview, Studio, painted_mask

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "a small red sphere to the left of a large blue cube"


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "model"
    unified_pipeline().save_pretrained(folder)
    return Studio(folder)


def finished(steps):
    steps = list(steps)
    assert isinstance(steps[-1], Drawing) and all(isinstance(step, Preview) for step in steps[:-1])
    return steps[-1], steps[:-1]


# ---------------------------------------------------------------------- live


def test_live_yields_what_is_shown_and_then_the_result():
    def work(show, stop):
        for number in range(3):
            show(number)
        return "done"

    assert list(live(work)) == [0, 1, 2, "done"]


def test_live_hands_over_errors():
    def work(show, stop):
        show(1)
        raise ValueError("no")

    steps = live(work)
    assert next(steps) == 1
    with pytest.raises(ValueError, match="no"):
        next(steps)


def test_live_tells_the_work_that_nobody_listens():
    told = threading.Event()

    def work(show, stop):
        show(1)
        assert stop.wait(10)
        told.set()

    steps = live(work)
    assert next(steps) == 1
    steps.close()
    assert told.wait(10)


def test_the_pace_leaves_time_for_the_work():
    pace = Pace(share=0.5, shortest=30.0)
    assert pace.due
    with pace:
        assert pace.spent == 0
    assert not pace.due and pace.spent > 0


# ---------------------------------------------------------------------- drawing


def test_drawing_gives_the_pipelines_pictures(studio):
    drawing, previews = finished(studio.draw(PROMPT, seed=5, count=2))
    pipe = studio.drawer("next_token")
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    expected = pipe(PROMPT, num_images_per_prompt=2, generator=generators).images
    assert [image.tobytes() for image in drawing.images] == [image.tobytes() for image in expected]
    cells = pipe.transformer.grid[0] * pipe.transformer.grid[1]
    assert drawing.calls == drawing.tokens == cells and not drawing.stopped and drawing.statistics is None
    assert previews and previews[0].known == 1 and previews[0].tokens == cells
    assert [step.known for step in previews] == sorted(step.known for step in previews)


@pytest.mark.parametrize("name", ["JacobiSpeculative", "GroupedSpeculative", "RelaxedSpeculative"])
def test_accelerators_show_their_statistics_and_leave_nothing_behind(studio, name):
    drawing, previews = finished(studio.draw(PROMPT, acceleration=name, window=4))
    assert drawing.statistics is not None and drawing.statistics.calls == drawing.calls
    assert previews and studio.drawer("next_token").acceleration is None


def test_the_shipped_weights_draw_with_all_their_decodings():
    studio = Studio()
    assert studio.decodings[0] == "next_token" and {"neighboring", "next_x"} < set(studio.decodings)
    pipe = studio.drawer("next_x")
    drawing, previews = finished(studio.draw(PROMPT, seed=5, count=2, decoding="next_x"))
    expected = pipe(
        PROMPT, num_images_per_prompt=2, generator=[torch.Generator().manual_seed(s) for s in (5, 6)]
    ).images
    assert [image.tobytes() for image in drawing.images] == [image.tobytes() for image in expected]
    steps = len(pipe.decoding.groups(pipe.grid))
    assert drawing.calls == studio.calls("next_x") == steps * pipe.generation_config["num_flow_steps"]
    assert previews and previews[0].calls * steps == drawing.calls and previews[0].known * steps == drawing.tokens
    assert not studio.accelerations("next_x") and studio.judges("next_token") and not studio.judges("next_x")
    with pytest.raises(ValueError, match="no model chooses among candidates"):
        list(studio.draw(PROMPT, decoding="next_x", candidates=3))


def test_a_drawing_can_be_stopped(studio):
    steps = studio.draw(PROMPT, session="me")
    first = next(steps)
    assert isinstance(first, Preview)
    studio.stop("someone else")
    studio.stop("me")
    *_, last = steps
    assert isinstance(last, Drawing)  # the tiny model may have been faster
    assert last.stopped or last.calls == first.tokens
    assert not studio._stops


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": ""}, "empty"),
        ({"prompt": "a purple dinosaur"}, "dinosaur"),
        ({"seed": -1}, "seed"),
        ({"seed": None}, "seed"),
        ({"count": 99}, "count"),
        ({"decoding": "sideways"}, "decoding"),
        ({"acceleration": "Magic"}, "acceleration"),
        ({"acceleration": "JacobiSpeculative", "window": 0}, "window"),
    ],
)
def test_wrong_drawings_are_refused(studio, change, words):
    with pytest.raises((ValueError, TypeError), match=words):
        list(studio.draw(**{"prompt": PROMPT, **change}))
    assert studio.drawer("next_token").acceleration is None


# ---------------------------------------------------------------------- reading and repainting


def test_answers_grow_and_end_with_the_pipelines_answer(studio):
    image = Image.new("RGB", (64, 64), "red")
    said = list(studio.answer(image, "how many objects are there?"))
    expected = studio.reader(image, "how many objects are there?").texts[0]
    assert said[-1] == expected
    assert all(later.startswith(earlier) for earlier, later in zip(said, said[1:], strict=False))
    assert list(studio.answer(image, " "))[-1] == studio.reader(image).texts[0]


def test_without_a_picture_there_is_a_message(studio):
    for work in (studio.answer, studio.explain):
        with pytest.raises(ValueError, match="no picture"):
            work(None, "")


def test_repainting_keeps_the_rest(studio):
    size = studio.painter.image_size
    image = Image.effect_noise(size, 90).convert("RGB")
    mask = Image.new("L", size, 0)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    drawing, previews = finished(studio.repaint(image, mask, PROMPT, seed=3))
    cells = studio.painter.transformer.grid
    assert drawing.tokens == cells[0] * cells[1] // 2 and previews
    right = (size[0] // 2, 0, *size)
    assert drawing.images[0].crop(right).tobytes() == image.crop(right).tobytes()
    assert drawing.images[0].tobytes() != image.tobytes()
    with pytest.raises(ValueError, match="nothing is marked"):
        studio.repaint(image, Image.new("L", size, 0), PROMPT)


def test_the_mask_is_what_was_painted():
    background = Image.new("RGBA", (32, 24), (255, 0, 0, 255))
    layer = Image.new("RGBA", (32, 24), (0, 0, 0, 0))
    layer.paste((255, 255, 255, 255), (4, 4, 12, 8))
    picture, mask = painted_mask({"background": background, "layers": [layer], "composite": None})
    assert picture.mode == "RGB" and picture.size == mask.size == (32, 24)
    assert mask.getbbox() == (4, 4, 12, 8)
    assert painted_mask(None) == painted_mask({"background": None, "layers": []}) == (None, None)


# ---------------------------------------------------------------------- the command and the page


def test_a_missing_gradio_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo"]) == 2
    shown = capsys.readouterr().err
    assert 'pip install "armm[demo]"' in shown and "Traceback" not in shown


def test_addresses_that_cannot_be_used_are_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port} of 127.0.0.1 is taken"):
            usable_port("127.0.0.1", port)
        assert usable_port("127.0.0.1", 0) not in (0, port)
    with pytest.raises(ValueError, match="no address of this machine"):
        usable_port("203.0.113.7", 0)


def test_the_command_serves_until_it_is_interrupted(studio, monkeypatch, capsys):
    import armm.serving.demo as demo
    import armm.serving.studio as work

    served = []

    @contextlib.contextmanager
    def serve(studio, host, port):
        served.append((studio, host, port))
        yield f"http://{host}:{port}/"
        served.append("closed")

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr("armm.serving.requirements.require_gradio", lambda: None)
    monkeypatch.setattr(work, "Studio", lambda folder, device, dtype: (folder, device.type, dtype))
    monkeypatch.setattr(demo, "serve", serve)
    monkeypatch.setattr(threading.Event, "wait", interrupted)
    assert main(["demo", "--port", "0", "--weights", "some/folder", "--device", "cpu"]) == 0
    (given, host, port), closed = served
    assert given == ("some/folder", "cpu", torch.float32) and host == "127.0.0.1" and port > 0 and closed == "closed"
    assert f"http://127.0.0.1:{port}/" in capsys.readouterr().out


def test_a_wrong_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Studio(tmp_path / "nowhere")


def test_importing_the_work_does_not_import_gradio():
    code = "import sys, armm.serving.demo, armm.serving.studio; assert 'gradio' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_the_page_is_built(studio, tmp_path):
    pytest.importorskip("gradio")
    from armm.serving.demo import build_page

    page = build_page(studio, tmp_path)
    labels = {getattr(component, "elem_id", None) for component in page.blocks.values()}
    assert {"draw", "ask", "repaint"} <= labels
    assert not page.analytics_enabled
