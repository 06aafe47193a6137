"""The tutorials: notebooks in jupytext's percent format, executed as a reader would."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import jupytext
import pytest

REPOSITORY = Path(__file__).parent.parent
TUTORIALS = sorted((REPOSITORY / "docs" / "tutorials").glob("*.py"))
# Where the documentation takes what they print and draw.
EXECUTED = REPOSITORY / "build" / "tutorials"
# Machine paths, and what would have a reader download something.
FORBIDDEN = ("/work", "/home", "http://", "https://", "download=True")

each = pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)


def cells(path: Path, kind: str) -> list[str]:
    return [cell.source for cell in jupytext.read(path).cells if cell.cell_type == kind]


def test_there_are_six():
    assert [path.stem[0] for path in TUTORIALS] == list("123456")


@each
def test_a_tutorial_has_a_title_checks_and_a_way_on(path):
    prose, code = cells(path, "markdown"), cells(path, "code")
    assert prose[0].startswith(f"# {path.stem[0]} · ")
    assert "## What you have learnt, and where next" in prose[-1]
    following = TUTORIALS[(TUTORIALS.index(path) + 1) % len(TUTORIALS)]
    assert f"]({following.name})" in prose[-1]
    for name in re.findall(r"\]\(([^)#]+)", "\n".join(prose)):
        assert (path.parent / name).exists(), name
    assert sum("assert" in cell for cell in code) >= 3
    assert not [word for word in FORBIDDEN if word in path.read_text()]


@pytest.mark.slow
@each
def test_a_tutorial_runs(path, tmp_path, monkeypatch):
    from nbclient import NotebookClient

    # Not the programs of tests, which are optimised less than a reader's.
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv(
        "PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    )
    notebook = jupytext.read(path)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=180, kernel_name="python3", resources=resources).execute()
    EXECUTED.mkdir(parents=True, exist_ok=True)
    jupytext.write(notebook, EXECUTED / f"{path.stem}.ipynb")
