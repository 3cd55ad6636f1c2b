"""Tutorials are notebooks paired with scripts: both hold the same cells, and they run."""

from pathlib import Path

import jupytext
import nbclient
import pytest

TUTORIALS = sorted((Path(__file__).parent.parent / "tutorials").glob("*.py"))


def test_there_are_tutorials():
    assert TUTORIALS


@pytest.mark.parametrize("script", TUTORIALS, ids=lambda p: p.stem)
def test_notebook_and_script_are_paired(script):
    cells = [[cell.source for cell in jupytext.read(path).cells] for path in (script, script.with_suffix(".ipynb"))]
    assert cells[0] == cells[1], f"run: jupytext --sync {script}"


@pytest.mark.parametrize("script", TUTORIALS, ids=lambda p: p.stem)
def test_tutorial_runs_and_shows_a_picture(script, monkeypatch):
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel then draws into the notebook
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # nets this small are slower on two threads
    notebook = jupytext.read(script)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
