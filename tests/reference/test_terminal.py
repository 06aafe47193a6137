"""`fedexp list` and `fedexp describe`, as a shell sees them."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from fedexp.__main__ import COMMANDS
from fedexp.reference import terminal
from fedexp.reference.catalogue import config_files, entries


def said(capsys, *arguments: str) -> list[str]:
    assert terminal.main(arguments) == 0
    return capsys.readouterr().out.splitlines()


def test_the_list_has_a_line_for_every_name(capsys):
    lines = said(capsys, "list")
    assert set(entries()) <= {line.split()[0] for line in lines if line.startswith("  ")}
    assert not any(line != line.rstrip() or "\x1b" in line for line in lines)


def test_a_list_is_of_a_group_or_of_what_has_a_text(capsys):
    names = {line.split()[0] for line in said(capsys, "list", "strategies") if line[:2] == "  "}
    assert names == {"auto", "debug", "jit", "mesh", "pmap", "Packing"}
    assert any(line.startswith("  fedprox ") for line in said(capsys, "list", "PROX"))


def test_gin_files_are_listed_and_printed(capsys):
    lines = said(capsys, "list", "configs")
    assert {line.split()[0] for line in lines if line[:2] == "  "} == set(config_files())
    printed = said(capsys, "describe", "parts/clock.gin")
    assert printed == config_files()["parts/clock.gin"].text.splitlines()


def test_a_description_has_parameters_paper_and_gin_files(capsys):
    lines = said(capsys, "describe", "@fedprox")
    assert "  mu  float, required" in lines
    assert "  mu_patience = 5  int" in lines
    assert "https://arxiv.org/abs/1812.06127" in lines
    assert any(line.startswith("Gin files: emnist_fedprox.gin") for line in lines)
    assert max(map(len, lines)) <= 110


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["describe", "fedprx"], "Did you mean 'fedprox'?"),
        (["describe", "emnist_fedprx.gin"], "Did you mean 'emnist_fedprox.gin'?"),
        (["list", "algorithm", "zzz"], "nothing has 'algorithm' and 'zzz'"),
    ],
)
def test_an_unknown_name_is_told_in_one_line(capsys, arguments, meant):
    assert terminal.main(arguments) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and meant in err and err.count("\n") == 1


def test_the_command_lists_and_can_be_cut():
    command = f"{sys.executable} -W error::UserWarning:fedexp -m fedexp list | head -2"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout.splitlines()[1] == "The experiment (experiment)"
    assert "Traceback" not in done.stderr and "Broken" not in done.stderr


def test_every_command_is_a_module():
    assert all(importlib.util.find_spec(module) for module, *_ in COMMANDS.values())


@pytest.mark.parametrize(
    ("word", "meant"),
    [("lst", "Did you mean 'list'?"), ("quickstart.gin", "is given as --gin_file=...")],
)
def test_an_unknown_command_is_told_in_one_line(word, meant):
    done = subprocess.run([sys.executable, "-m", "fedexp", word], capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith(f"error: fedexp has no command '{word}'")
    assert done.stderr.endswith(f"{meant}\n") and done.stderr.count("\n") == 1
