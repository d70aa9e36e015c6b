"""The `armm` command, run in this process on tiny random models saved to a folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from armm.cli import generate, train
from armm.cli.main import build_parser, main
from armm.cli.output import atomic_file, atomic_folder, image_grid, table

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("generate", "describe", "train", "evaluate", "convert", "zoo", "bench", "info")


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


# ---------------------------------------------------------------------- train, zoo, bench, info


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("steps=20", ("steps", 20)),
        ("optimizer.learning_rate=1e-4", ("optimizer.learning_rate", 1e-4)),
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
