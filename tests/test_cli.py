"""The `armm` command, run in this process on tiny random models saved to a folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageSequence
from tiny_llamagen import class_pipeline
from tiny_unified import unified_pipeline

import armm
from armm.cli import generate, train
from armm.cli.main import build_parser, main
from armm.cli.output import atomic_file, atomic_folder, image_grid, table

PROMPT, OTHER = "a small red sphere to the left of a large blue cube", "two green cones"
PARITY = Path(__file__).parent / "parity" / "cases" / "llamagen"
ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("generate", "describe", "demo", "train", "evaluate", "convert", "zoo", "bench", "info")


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------------- help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_a_description_and_examples(command, capsys):
    assert run(command, "--help") == 0
    shown = capsys.readouterr().out
    assert "examples:" in shown and f"armm {command}" in shown.split("examples:")[1]


def test_the_main_help_lists_every_command(capsys):
    assert run("--help") == 0
    shown = capsys.readouterr().out
    assert all(f"\n    {command} " in shown for command in COMMANDS)


@pytest.mark.parametrize("task", ["text-to-image", "image-to-text", "reconstruction"])
def test_evaluate_tasks_have_their_own_help(task, capsys):
    assert run("evaluate", task, "--help") == 0
    assert "--json" in capsys.readouterr().out


def test_help_and_refusals_import_nothing_heavy():
    code = (
        "import sys; from armm.cli.main import main\n"
        "lines = [['--help'], ['generate', '--help'], ['generate', 'x', '-o', 'no/such/folder/x.png']]\n"
        "codes = [main(line) for line in lines]\n"
        "heavy = [name for name in ('torch', 'diffusers', 'transformers', 'numpy') if name in sys.modules]\n"
        "assert codes == [0, 0, 2] and not heavy, (codes, heavy)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_version(capsys):
    from armm.version import __version__

    assert run("--version") == 0
    assert __version__ in capsys.readouterr().out


# ---------------------------------------------------------------------- outputs


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert files(tmp_path) == ["a.txt"] and target.read_text() == "old"
    with atomic_file(target) as temporary:
        assert temporary.parent == tmp_path and temporary.suffix == ".txt"
        temporary.write_text("new")
    assert files(tmp_path) == ["a.txt"] and target.read_text() == "new"


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "d") as temporary:
        (temporary / "x").write_text("half")
        raise RuntimeError
    assert files(tmp_path) == []
    with atomic_folder(tmp_path / "d") as temporary:
        (temporary / "x").write_text("whole")
    assert files(tmp_path) == ["d"] and (tmp_path / "d" / "x").read_text() == "whole"


def test_several_pictures_get_numbers():
    assert generate.output_paths(Path("a/out.png"), 1) == [Path("a/out.png")]
    assert generate.output_paths(Path("a/out.png"), 3) == [Path(f"a/out-{i}.png") for i in range(3)]
    assert generate.output_paths(Path("out.jpg"), 11)[3] == Path("out-03.jpg")


def test_a_grid_holds_every_picture():
    images = [Image.new("RGB", (8, 8), (40 * i, 0, 0)) for i in range(5)]
    sheet = image_grid(images, gap=2)
    assert sheet.size == (28, 18)
    assert [sheet.getpixel((10 * (i % 3) + 4, 10 * (i // 3) + 4))[0] for i in range(5)] == [0, 40, 80, 120, 160]


def test_the_table_is_aligned():
    assert table(("a", "bb"), [("xxx", 1)]) == "a    bb\n---  --\nxxx  1"


# ---------------------------------------------------------------------- generate, describe, convert


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Folders of tiny pipelines: `unified` draws and reads, `classes` draws classes, `reader` reads."""
    root = tmp_path_factory.mktemp("models")
    folders = {name: root / name for name in ("unified", "classes", "reader")}
    unified_pipeline().save_pretrained(folders["unified"])
    class_pipeline().save_pretrained(folders["classes"])
    from pipelines.unified_image_to_text import UnifiedImageToTextPipeline

    UnifiedImageToTextPipeline.from_pretrained(folders["unified"]).save_pretrained(folders["reader"])
    return folders


def draw(folder: Path, *arguments: object) -> int:
    return run("generate", *arguments, "--model", folder, "--device", "cpu", "--quiet")


def pixels(path: Path) -> list:
    return list(Image.open(path).convert("RGB").tobytes())


def test_generate_writes_one_picture(models, tmp_path, capfd):
    target = tmp_path / "scene.png"
    assert run("generate", PROMPT, "-o", target, "--model", models["unified"], "--seed", 3, "--device", "cpu") == 0
    assert Image.open(target).size == (32, 32) and files(tmp_path) == ["scene.png"]
    shown = capfd.readouterr()
    assert "seed 3" in shown.out and str(target) in shown.out
    assert "16/16" in shown.err or "it/s" in shown.err or "%" in shown.err


def test_a_seed_names_a_picture_alone_in_a_batch_and_on_any_number_of_threads(models, tmp_path):
    folder, threads = models["unified"], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert draw(folder, PROMPT, "-o", tmp_path / f"threads{count}.png", "--seed", 7) == 0
    finally:
        torch.set_num_threads(threads)
    assert draw(folder, OTHER, PROMPT, "-o", tmp_path / "batch.png", "--seed", 6) == 0
    assert draw(folder, PROMPT, "-o", tmp_path / "other.png", "--seed", 8) == 0
    once = pixels(tmp_path / "threads1.png")
    assert once == pixels(tmp_path / "threads2.png")
    assert max(abs(a - b) for a, b in zip(once, pixels(tmp_path / "batch-1.png"), strict=True)) <= 1
    assert once != pixels(tmp_path / "other.png")


def test_without_a_seed_one_is_chosen_and_it_repeats_the_picture(models, tmp_path, capsys):
    assert run("generate", PROMPT, "-o", tmp_path / "a.png", "--model", models["unified"], "--device", "cpu") == 0
    seed = capsys.readouterr().out.split("seed ")[1].split(")")[0]
    assert draw(models["unified"], PROMPT, "-o", tmp_path / "b.png", "--seed", seed) == 0
    assert pixels(tmp_path / "a.png") == pixels(tmp_path / "b.png")


def test_several_pictures_a_grid_and_a_size(models, tmp_path):
    common = ("--num-images", 2, "--seed", 1, "--size", 48)
    assert draw(models["unified"], PROMPT, OTHER, "-o", tmp_path / "many.png", *common) == 0
    assert files(tmp_path) == [f"many-{i}.png" for i in range(4)]
    assert draw(models["unified"], PROMPT, OTHER, "-o", tmp_path / "grid.jpg", "--grid", *common) == 0
    assert Image.open(tmp_path / "grid.jpg").size == (98, 98)
    assert Image.open(tmp_path / "many-3.png").size == (48, 48)


def test_candidates_and_decodings_are_options(models, tmp_path, capsys):
    common = ("--seed", 3, "--num-candidates", 3, "--decoding", "next-token")
    assert draw(models["unified"], PROMPT, "-o", tmp_path / "best.png", *common) == 0
    pipe = armm.pipeline(models["unified"])
    best = pipe(PROMPT, num_candidates=3, generator=torch.Generator().manual_seed(3)).images[0]
    assert pixels(tmp_path / "best.png") == list(best.tobytes())
    assert draw(models["unified"], PROMPT, "-o", tmp_path / "no.png", "--decoding", "spiral") == 2
    assert "unknown `decoding`" in capsys.readouterr().err and files(tmp_path) == ["best.png"]


def test_classes_are_drawn_with_settings(models, tmp_path):
    settings = ("--temperature", 0.8, "--top-k", 5, "--top-p", 0.9, "--guidance-scale", 1.5, "--seed", 0)
    assert draw(models["classes"], "--class-labels", 1, 9, "-o", tmp_path / "c.webp", *settings) == 0
    assert files(tmp_path) == ["c-0.webp", "c-1.webp"]


def test_the_animation_shows_tokens_appearing_and_ends_with_the_picture(models, tmp_path):
    command = (PROMPT, "-o", tmp_path / "a.png", "--animate", tmp_path / "a.gif", "--animate-size", 64, "--seed", 2)
    assert draw(models["unified"], *command) == 0
    assert files(tmp_path) == ["a.gif", "a.png"]
    animation = Image.open(tmp_path / "a.gif")
    frames = [(frame.convert("RGB"), frame.info["duration"]) for frame in ImageSequence.Iterator(animation)]
    assert len(frames) == 17 and frames[0][0].size == (64, 64)
    assert frames[-1][1] > 10 * frames[0][1]
    # Frame k shows k cells in raster order; the others have the neutral color.
    neutral = frames[0][0].getpixel((8, 8))
    for known, (frame, _) in enumerate(frames):
        gray = [frame.getpixel((16 * (i % 4) + 8, 16 * (i // 4) + 8)) == neutral for i in range(16)]
        assert all(gray[known:]) and sum(gray[:known]) <= 1
    final = Image.open(tmp_path / "a.png").convert("RGB").resize((64, 64), Image.Resampling.BICUBIC)
    differences = [abs(a - b) for a, b in zip(final.tobytes(), frames[-1][0].tobytes(), strict=True)]
    assert sum(differences) / len(differences) < 8


def test_describe_captions_answers_and_prints_json(models, tmp_path, capsys):
    picture = tmp_path / "p.png"
    Image.effect_noise((40, 32), 60).save(picture)
    common = (picture, "--model", models["reader"], "--device", "cpu", "--quiet")
    assert run("describe", *common) == 0
    caption = capsys.readouterr().out
    assert len(caption.splitlines()) == 1
    questions = ("-q", "what color is the cube?", "-q", "how many objects are there?")
    assert run("describe", *common, *questions, "--json") == 0
    answers = json.loads(capsys.readouterr().out)["answers"]
    assert [answer["question"] for answer in answers] == list(questions[1::2])
    assert run("describe", *common, "--json") == 0
    assert json.loads(capsys.readouterr().out)["caption"] == caption.strip()
    assert files(tmp_path) == ["p.png"]


def test_a_method_without_an_explanation_is_refused(tmp_path, capsys):
    assert run("describe", tmp_path / "p.png", "--method", "arc") == 2
    assert "--explain" in capsys.readouterr().err


def test_convert_writes_a_pipeline_that_draws(tmp_path):
    out = tmp_path / "model"
    command = (
        "convert",
        "llamagen",
        PARITY / "c2i" / "checkpoint.pt",
        "--tokenizer",
        PARITY / "tokenizer" / "checkpoint.pt",
    )
    assert run(*command, "--config", '{"n_head": 4}', "-o", out) == 0
    assert files(tmp_path) == ["model"] and (out / "model_index.json").is_file()
    import armm

    assert type(armm.pipeline(out)).__name__ == "LlamaGenPipeline"


def test_convert_writes_a_component(tmp_path):
    assert run("convert", "llamagen", PARITY / "tokenizer" / "checkpoint.pt", "-o", tmp_path / "vq") == 0
    assert files(tmp_path / "vq") == ["config.json", "diffusion_pytorch_model.safetensors"]


# ---------------------------------------------------------------------- train, zoo, bench, info


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("steps=20", ("steps", 20)),
        ("optimizer.learning_rate=1e-4", ("optimizer.learning_rate", 1e-4)),
        ("optimizer.betas=[9E-1, .95e0]", ("optimizer.betas", [0.9, 0.95])),
        ("output=infinity", ("output", "infinity")),
        ("precision=no", ("precision", "no")),
        ("precision=bf16", ("precision", "bf16")),
        ("model.channels=[1, 2]", ("model.channels", [1, 2])),
        ("batch_size=[[0, 8], [0.5, 16]]", ("batch_size", [[0, 8], [0.5, 16]])),
        ("loss.adversarial=0.1", ("loss.adversarial", 0.1)),
    ],
)
def test_overrides_are_yaml(text, expected):
    assert train.parse_override(text) == expected


def test_recipes_are_found_by_name_and_by_file(tmp_path, monkeypatch):
    from armm import weights

    monkeypatch.chdir(tmp_path)
    own = tmp_path / "own.yaml"
    own.write_text("task: x")
    assert train.find_recipe(str(own)) == own
    for name in weights.recipe_names():
        assert train.find_recipe(name) == weights.recipe(name) == train.find_recipe(f"recipes/{name}.yaml")


def test_train_list(capsys):
    from armm import weights

    assert run("train", "--list") == 0
    assert capsys.readouterr().out.split() == weights.recipe_names() != []


def test_zoo_lists_and_filters(capsys):
    assert run("zoo") == 0
    everything = capsys.readouterr().out
    assert "llamagen-c2i-b-256" in everything and "llamagen-t2i-xl-512" in everything
    assert run("zoo", "llamagen-c2i*", "--json") == 0
    names = [entry["name"] for entry in json.loads(capsys.readouterr().out)]
    assert "llamagen-c2i-3b-384" in names and all(name.startswith("llamagen-c2i") for name in names)


def test_info(capsys):
    assert run("info", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["packages"]["torch"] and {"sdpa", "reference"} <= set(facts["attention_backends"])
    assert "scenes" in facts["shipped_weights"]
    assert run("info") == 0
    assert "torch" in capsys.readouterr().out


def test_bench_hands_its_options_on(capfd):
    assert run("bench", "decode", "--help") == 0
    assert "usage" in capfd.readouterr().out


def test_every_option_has_a_help_text():
    def parsers(parser):
        yield parser
        for action in parser._actions:
            if isinstance(action.choices, dict):
                for sub in action.choices.values():
                    yield from parsers(sub)

    for parser in parsers(build_parser()):
        for action in parser._actions:
            assert action.help or action.dest in ("command", "task"), f"{parser.prog}: {action.dest} has no help"
