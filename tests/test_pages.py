"""Tutorials on the site: code, with what it prints and draws where that is of this code."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import jupytext
import nbformat
import pytest

PAGES = Path(__file__).parent.parent / "docs" / "pages.py"
SOURCE = "# %% [markdown]\n# # A title\n\n# %%\nprint(6 * 7)\n"
# Of one pixel.
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNkYAAAAAYAAjCB0C8AAAAASUVORK5CYII="


@pytest.fixture
def tutorial():
    for needed in ("mkdocs", "nbconvert"):
        pytest.importorskip(needed, reason="the documentation is not installed: make docs")
    spec = importlib.util.spec_from_file_location("pages", PAGES)
    assert spec is not None and spec.loader is not None
    pages = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pages)
    return pages.tutorial


def executed(path: Path, source: str) -> Path:
    """A notebook as a run leaves it."""
    notebook = jupytext.reads(source, fmt="py:percent")
    outputs = [
        {"output_type": "stream", "name": "stdout", "text": "\x1b[1mforty-two\x1b[0m\n"},
        {"output_type": "stream", "name": "stderr", "text": "a warning\n"},
        {"output_type": "display_data", "data": {"image/png": PNG}, "metadata": {}},
    ]
    notebook.cells[1].outputs = [nbformat.from_dict(one) for one in outputs]
    jupytext.write(notebook, path)
    return path


def test_outputs_are_shown_where_they_are_of_this_text(tutorial, tmp_path):
    path = tmp_path / "one.py"
    path.write_text(SOURCE)
    text, pictures = tutorial(path, executed(tmp_path / "one.ipynb", SOURCE))
    assert "# A title\n" in text and "```python\nprint(6 * 7)\n```" in text
    assert "\n    forty-two\n" in text and "a warning" not in text
    ((name, picture),) = pictures.items()
    assert f"]({name})" in text and picture.startswith(b"\x89PNG") and name.startswith("one_")


@pytest.mark.parametrize("other", [None, SOURCE.replace("7", "8")])
def test_outputs_of_no_run_or_of_another_text_are_not(other, tutorial, tmp_path):
    path = tmp_path / "one.py"
    path.write_text(SOURCE)
    run = tmp_path / "one.ipynb"
    if other:
        executed(run, other)
    text, pictures = tutorial(path, run)
    assert "```python\nprint(6 * 7)\n```" in text
    assert "forty-two" not in text and not pictures
