"""The notebooks run from top to bottom, and are committed with their outputs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="reading notebooks needs nbformat")
nbclient = pytest.importorskip("nbclient", reason="running notebooks needs nbclient")
pytest.importorskip("ipykernel", reason='running notebooks needs ipykernel: pip install -e ".[notebooks]"')
pytest.importorskip("matplotlib", reason='the notebooks plot: pip install -e ".[notebooks]"')

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))


def notebooks():
    return [nbformat.read(path, as_version=4) for path in PATHS]


def test_there_are_notebooks_and_they_are_small():
    assert len(PATHS) == 5
    assert sum(path.stat().st_size for path in PATHS) < 2 * 2**20


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_notebook_is_valid_and_shows_its_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert any(key.startswith("image/") for output in outputs for key in output.get("data", ()))
    text = path.read_text(encoding="utf-8")
    assert "/home/" not in text and "site-packages" not in text, "outputs name places of the machine that made them"


@pytest.mark.slow
def test_the_notebooks_run(monkeypatch):
    """One after the other in one kernel, which saves importing torch for each of them; names are cleared in between."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FOLDER.parent), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    whole = nbformat.v4.new_notebook()
    for notebook in notebooks():
        whole.cells += [nbformat.v4.new_code_cell("%reset -f"), *notebook.cells]
    for number, cell in enumerate(whole.cells):
        cell.id = f"cell-{number}"
    client = nbclient.NotebookClient(
        whole, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
    )
    client.execute()  # a cell that fails raises, with its traceback
    outputs = [output for cell in whole.cells for output in cell.get("outputs", ())]
    said = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "drawn alone: True" in said and "same pictures: [True, True, True]" in said and "as written: True" in said
