"""What a workdir keeps of what its run has run on."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import jax
import pytest

import fedexp
from fedexp import environment
from fedexp.errors import UserError


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=n", "-c", "user.email=e@example.com")
    command = ["git", *identity, *arguments]
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path) -> Path:
    git(tmp_path, "init", "-q")
    (tmp_path / "a.py").write_text("")
    git(tmp_path, "add", "a.py")
    git(tmp_path, "commit", "-q", "-m", "first")
    return tmp_path


def test_every_start_adds_an_entry(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    environment.note(tmp_path)
    first = json.loads((tmp_path / "environment.json").read_text())
    environment.note(tmp_path)
    both = json.loads((tmp_path / "environment.json").read_text())
    assert len(first) == 1 and len(both) == 2 and both[0] == first[0]
    assert first[0]["versions"] == {
        "python": platform.python_version(),
        "fedexp": fedexp.__version__,
        **{name: version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")},
    }
    assert first[0]["command"] == sys.orig_argv
    assert first[0]["folder"] == str(tmp_path) and first[0]["host"] == platform.node()
    assert (first[0]["processes"], sum(first[0]["devices"].values())) == (1, jax.device_count())


def test_a_commit_says_whether_tracked_files_have_changed(checkout):
    head = git(checkout, "rev-parse", "HEAD")
    assert environment.commit(checkout) == head
    git(checkout, "tag", "v1")
    (checkout / "untracked").write_text("")
    assert environment.commit(checkout) == head
    (checkout / "a.py").write_text("changed")
    assert environment.commit(checkout) == f"{head}-dirty"


def test_an_installed_fedexp_is_not_taken_for_the_checkout_around_it(checkout, monkeypatch):
    package = checkout / "site" / "fedexp"
    package.mkdir(parents=True)
    monkeypatch.setattr(fedexp, "__file__", str(package / "__init__.py"))
    monkeypatch.chdir(checkout)
    commits = environment.of_this_process()["commits"]
    assert commits == {"fedexp": None, "folder": git(checkout, "rev-parse", "HEAD")}


def test_without_git_or_a_checkout_there_is_no_commit(tmp_path, checkout, monkeypatch):
    outside = tmp_path.parent
    assert environment.commit(outside) is None
    monkeypatch.setenv("PATH", os.devnull)
    assert environment.commit(checkout) is None


def test_a_damaged_file_is_begun_anew_and_an_unwritable_folder_refused(tmp_path):
    (tmp_path / "environment.json").write_text("[{")
    environment.note(tmp_path)
    assert len(json.loads((tmp_path / "environment.json").read_text())) == 1
    with pytest.raises(UserError, match="cannot write to --workdir=.*gone"):
        environment.note(tmp_path / "gone")


@pytest.mark.parametrize("text", ["[1]", '[{"host": "a"}]', "{}", "no JSON"])
def test_what_somebody_else_has_left_tells_nothing(tmp_path, text):
    (tmp_path / environment.NAME).write_text(text)
    assert environment.line(environment.last(tmp_path)) == ""
