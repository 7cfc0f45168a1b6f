"""Every notebook runs from top to bottom, with its loops cut short."""

from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.py"))


@pytest.mark.real_model
@pytest.mark.parametrize("source", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(source, tmp_path, monkeypatch, smollm2):
    monkeypatch.setenv("SMOKE", "1")
    notebook = jupytext.read(source)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    nbformat.validate(notebook)


@pytest.mark.parametrize("source", NOTEBOOKS, ids=lambda path: path.stem)
def test_rendered_notebook_is_of_the_same_source(source):
    rendered = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    written = jupytext.read(source)
    assert [cell.source for cell in rendered.cells] == [cell.source for cell in written.cells]
