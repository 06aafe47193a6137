"""Jobs that share a sweep, by submitit's own local executor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedexp import sweep
from fedexp.errors import UserError
from fedexp.sweeps import cluster

REPOSITORY = Path(__file__).parent.parent.parent
PART = cluster.Part((), (), "a.gin", "runs", 1, 1, ".")


@pytest.mark.slow
def test_two_local_jobs_share_a_sweep(tmp_path, monkeypatch, capfd):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.chdir(REPOSITORY)
    folder, file = tmp_path / "runs", tmp_path / "a.gin"
    file.write_text(
        "sweep.axes = [@axis()]\nsweep.metric = 'test/mae'\nsweep.direction = 'minimize'\n"
        "axis.binding = 'server/adam.learning_rate'\naxis.values = [0.01, 0.1]\n"
    )
    command = ["--gin_file=tests/support/linear.gin", "--gin_param=train.num_rounds = 2"]
    command += [f"--sweep={file}", f"--workdir={folder}", "--jobs=2", "--cluster=local"]
    assert sweep.main(command) == 0, capfd.readouterr()
    found = json.loads((folder / "sweep.json").read_text())
    assert [trial["state"] for trial in found["trials"]] == ["finished", "finished"]
    logs = [path.read_text() for path in sorted((folder / "trials").rglob("log.txt"))]
    assert len(logs) == 2 and all(log.count("What was measured") == 1 for log in logs)  # Each once.
    assert len([*(folder / "jobs").glob("*_log.out")]) == 2


def test_a_parameter_is_read_as_python_would():
    assert cluster._parameter("timeout_min=60") == ("timeout_min", 60)
    assert cluster._parameter("slurm_partition=gpu") == ("slurm_partition", "gpu")
    with pytest.raises(UserError, match="must be as 'slurm_partition=gpu'"):
        cluster._parameter("gpu")


def test_what_submitit_refuses_is_one_line(tmp_path):
    pytest.importorskip("submitit")
    part = PART._replace(workdir=str(tmp_path))
    with pytest.raises(UserError) as caught:
        cluster.submit(part, 1, "local", ["colour=blue"])
    assert "colour" in str(caught.value) and "\n" not in str(caught.value)


def test_no_submitit(monkeypatch):
    monkeypatch.setattr(cluster, "HAS_SUBMITIT", False)
    with pytest.raises(UserError, match=r"pip install 'fedexp\[cluster\]'"):
        cluster.submit(PART, 1, None, [])


def test_flags_that_need_each_other(capsys):
    for flags in (["--cluster=local"], ["--jobs=0"], ["--jobs=1", "--dry_run"]):
        with pytest.raises(SystemExit) as ended:
            sweep.main(["--sweep=a.gin", "--workdir=runs", *flags])
        assert ended.value.code == 2 and "--jobs" in capsys.readouterr().err
