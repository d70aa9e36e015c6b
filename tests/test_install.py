"""What a newcomer meets: the commands of the README, the metadata, and a wheel that works outside the checkout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from armm import weights
from armm.version import __version__

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
FIRST_SCREEN = "\n".join(README.splitlines()[:32])


@pytest.mark.parametrize(
    "line",
    [
        'pip install -e . && armm generate "a small red sphere to the left of a large blue cube" -o scene.png',
        'pip install -e ".[test]" && pytest',
        'pipe = armm.pipeline("text-to-image")',
    ],
)
def test_the_readme_begins_with_the_two_commands_and_the_three_lines(line):
    assert line in FIRST_SCREEN.splitlines()


def test_the_readme_shows_a_picture_and_real_figures():
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", FIRST_SCREEN)
    assert pictures and all((ROOT / picture).is_file() for picture in pictures)
    assert not re.findall(r"\{\{.*?\}\}", README), "figures that were not filled in"


def test_every_link_of_the_documents_leads_somewhere():
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    for document in documents:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_the_readme_three_lines_run():
    block = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["image"].size[0] >= 64


def test_the_licence_is_apache():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text


def test_dependencies_name_what_the_package_needs():
    required = PYPROJECT.split("dependencies = [")[1].split("]\n")[0]
    names = set(re.findall(r'^\s+"([A-Za-z_]+)', required, re.MULTILINE))
    assert {"torch", "torchvision", "diffusers", "timm", "accelerate", "pillow", "xformers", "safetensors"} <= names
    assert "platform_system == 'Linux' and platform_machine == 'x86_64'" in required
    assert "transformers" not in names and "gradio" not in names
    assert re.search(r"^armm = \"armm\.cli\.main:main\"$", PYPROJECT, re.MULTILINE)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    return next(folder.glob(f"armm-{__version__}-*.whl"))


def test_the_wheel_holds_the_packages_the_weights_and_the_recipes(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in names}
    assert tops == {"armm", "tokenizers_visual", "pipelines", f"armm-{__version__}.dist-info"}
    for name in weights.names():
        files = [p.relative_to(ROOT / "weights") for p in (ROOT / "weights" / name).rglob("*") if p.is_file()]
        assert files and {f"armm/weights/{file.as_posix()}" for file in files} <= names
    assert {f"armm/recipes/{name}.yaml" for name in weights.recipe_names()} <= names


def test_the_wheel_draws_outside_the_checkout(wheel, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        "import sys, armm, armm.weights\n"
        "from armm.cli.main import main\n"
        "assert armm.__file__.startswith(sys.argv[1]), armm.__file__\n"
        "assert str(armm.weights.path('scenes')).startswith(sys.argv[1])\n"
        "sys.exit(main(['generate', 'a small red sphere to the left of a large blue cube', '-o', 'scene.png']))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(site)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "scene.png").read_bytes().startswith(b"\x89PNG")
    assert "xFormers" not in done.stderr
