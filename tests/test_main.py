"""The command line, in processes of its own."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
LINEAR = f"--gin_file={REPOSITORY}/tests/support/linear.gin"


# `python -m fedexp.main`, which says when it takes over.
BEGUN = """
import runpy, signal
watched = signal.signal

def set_handler(*args):
    signal.signal = watched
    watched(*args)
    print("begun", flush=True)

signal.signal = set_handler
runpy.run_module("fedexp.main", run_name="__main__", alter_sys=True)
"""


def fedexp(*arguments, cwd=REPOSITORY):
    return subprocess.run(
        [sys.executable, "-m", "fedexp.main", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
    )


def refusal(*arguments) -> str:
    """The one line on stderr of a run that must be refused."""
    done = fedexp(*arguments)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    return answer(done.stderr)


def answer(errors: str) -> str:
    """What is on stderr but for absl's INFO lines, which begin with the letter and the date."""
    return "\n".join(line for line in errors.splitlines() if not re.match(r"I\d{4} ", line))


def test_help_names_the_flags_and_imports_neither_jax_nor_gin():
    done = fedexp("--help")
    for flag in ("--gin_file", "--gin_param", "--workdir"):
        assert flag in done.stdout
    code = "import sys, fedexp.main; print({'jax', 'gin', 'tensorflow'} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert loaded.stdout.strip() == "set()", loaded.stderr


def command(*arguments, cwd=REPOSITORY):
    """The same by the command that is installed."""
    script = Path(sys.executable).parent / "fedexp"
    return subprocess.run([script, *arguments], cwd=cwd, capture_output=True, text=True)


def test_the_installed_command_is_the_same():
    for flag in ("--gin_file", "--gin_param", "--workdir"):
        assert flag in command("--help").stdout
    # Its modules are found in the current folder, as with -m.
    example = REPOSITORY / "docs" / "examples"
    done = command("--gin_file=my_experiment.gin", "--gin_param=train.num_rounds = 1", cwd=example)
    assert done.returncode == 0, done.stderr


def test_without_a_gin_file_the_shipped_ones_are_listed():
    assert "emnist_fedadam.gin" in refusal()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--work_dir=x", "Unknown command line flag 'work_dir'. Did you mean: workdir"),
        ("train.seed=1", "unexpected argument 'train.seed=1'; bindings are given as --gin_param"),
    ],
)
def test_a_mistake_in_the_command_line_is_one_line(argument, message):
    refused = refusal(LINEAR, argument)
    assert refused.startswith("error: ") and message in refused and refused.count("\n") == 0


def test_gin_bindings_is_an_alias_of_gin_param(tmp_path):
    done = fedexp(LINEAR, "--gin_bindings=train.num_rounds = 2", f"--workdir={tmp_path}/run")
    assert done.returncode == 0, done.stderr
    assert "round 2/2" in done.stderr
    start = done.stdout.splitlines()[-1]
    assert start.endswith(f"tensorboard --logdir {tmp_path}/run")
    assert shutil.which(start.split()[0]) or (REPOSITORY / start.split()[0]).exists()
    assert "train.num_rounds = 2" in (tmp_path / "run" / "config.gin").read_text()


def test_a_shipped_config_is_found_from_any_folder_and_its_data_is_missed_by_name(tmp_path):
    done = fedexp(
        "--gin_file=emnist_digits_fedadam.gin",
        f"--gin_param=emnist.data_dir = '{tmp_path}/nowhere'",
        cwd=REPOSITORY,
    )
    assert done.returncode == 2
    assert "error: " in done.stderr
    assert f"{tmp_path}/nowhere" in done.stderr


@pytest.mark.parametrize(
    ("param", "message"),
    [
        ("train.num_runds = 3", "Did you mean 'num_rounds'?"),
        ("uniform.cohort_size = 8", "a cohort of 8 clients cannot be sampled from 7"),
        ("client/sgd.learning_rate = -1.0", "client/sgd.learning_rate must not be negative"),
        ("client/adam.learning_rate = 0.5", "has no effect"),
    ],
)
def test_bad_bindings_are_refused_in_one_line(param, message):
    line = refusal(LINEAR, f"--gin_param={param}")
    assert line.startswith("error: ")
    assert message in line
    assert len(line.splitlines()) == 1


@pytest.mark.parametrize("seconds", [0.0, 0.5])
def test_an_early_ctrl_c_is_one_line(seconds):
    """Here before and while JAX and the data are loaded; both before a round."""
    command = [sys.executable, "-c", BEGUN, LINEAR, "--gin_param=train.num_rounds = 100000"]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert answer(errors) == "interrupted" and output == ""


def test_an_unwritable_workdir_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot write to --workdir" in refusal(LINEAR, f"--workdir={tmp_path}/file/run")
