"""The examples of the documentation, run as a reader would run them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
EXAMPLES = REPOSITORY / "docs" / "examples"


def run(*command: str) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=EXAMPLES,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_plain_python():
    accuracy = float(run("plain_python.py").stdout.split("test accuracy ")[1].strip().rstrip("%"))
    assert 80 < accuracy < 95, (
        "three overlapping classes: chance is 33 %, the Bayes rate is below 95 %"
    )


def test_an_experiment_of_ones_own_is_bound_from_a_gin_file_outside_fedexp(tmp_path):
    run(
        "-m",
        "fedexp.main",
        "--gin_file=my_experiment.gin",
        "--gin_param=train.num_rounds = 50",
        "--gin_param=train.seed = 3",  # After 50 rounds seeds differ by 20 percentage points.
        f"--workdir={tmp_path}",
    )
    operative = (tmp_path / "operative_config.gin").read_text()
    assert "import my_experiment" in operative
    assert "RingNet.width = 64" in operative
    assert '"test/accuracy": 0.9' in (tmp_path / "final.json").read_text()


def test_a_loop_of_ones_own_stops_and_goes_on():
    lines = [line.split() for line in run("own_loop.py").stdout.splitlines()]
    watched = [line for line in lines if len(line) == 3 and line[0].isdigit()]
    later = [line for line in lines if len(line) == 2]
    assert [int(number) for number, *_ in watched] == list(range(1, len(watched) + 1))
    assert float(watched[-1][1]) < 0.5 <= float(watched[-2][1])
    assert [int(number) for number, _ in later] == [10, 20, 30, 40, 50]
    assert float(later[-1][1]) > 0.8
    code = (EXAMPLES / "own_loop.py").read_text()
    assert code[code.index("server = ") :] in (REPOSITORY / "docs" / "own_loop.md").read_text()


def test_the_documentation_shows_the_examples_as_they_are():
    plain = (EXAMPLES / "plain_python.py").read_text()
    assert plain in (REPOSITORY / "docs" / "own_loop.md").read_text()
    own = (EXAMPLES / "my_experiment.py").read_text()
    algorithm = own[own.index("class ServerState") :]
    assert algorithm in (REPOSITORY / "docs" / "algorithms.md").read_text()
