"""Runs whose clients have states, killed, resumed and moved: they end like one that nothing happened to."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
import uuid
from pathlib import Path

import jax
import numpy as np
import pytest

from fedexp.algorithms import scaffold
from fedexp.checkpointing import Checkpointer, CheckpointPlan
from fedexp.engine.client_states import ClientStates
from fedexp.errors import UserError
from fedexp.evaluation import Evaluate
from fedexp.trainer import TrainResult
from tests.support import linear
from tests.test_trainer import run

REPOSITORY = Path(__file__).parent.parent
# The first evaluation's loss is the largest, so that the best checkpoint is an old one.
PLAN = CheckpointPlan(every=3, keep=2, best_metric="test/loss", best_mode="max")


def go(workdir, num_rounds=12, **options):
    task = linear.task(noise=0.1)
    options = {"checkpoints": PLAN, "observers": [], "evaluations": [Evaluate(every=3)]} | options
    return run(workdir, algorithm=scaffold(task, 0.05), task=task, num_rounds=num_rounds, **options)


def states(workdir: Path) -> tuple[list[int], list[bytes]]:
    """Of the clients after the last round, as files."""
    first = jax.device_get(linear.task().init(jax.random.key(0), None))
    found = ClientStates(first, range(len(linear.SIZES)))
    (store,) = (workdir / "client_states").iterdir()
    found.restore(workdir / "client_states", store.name, 12, [12])
    saved = found.save()
    return saved["clients"].tolist(), [row.tobytes() for row in saved["rows"]]


def assert_same(workdir: Path, result: TrainResult, whole: tuple[Path, TrainResult]) -> None:
    jax.tree.map(np.testing.assert_array_equal, result.params, whole[1].params)
    assert states(workdir) == states(whole[0])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, go(workdir)


@pytest.mark.parametrize("back_to", ["latest but one", "best"])
def test_every_kept_checkpoint_can_be_gone_on_from_also_in_a_moved_workdir(
    tmp_path, whole, back_to
):
    shutil.copytree(whole[0], tmp_path / "moved")
    checkpoints = tmp_path / "moved" / "checkpoints"
    kept = sorted(int(folder.name) for folder in checkpoints.iterdir())
    assert kept == [3, 9, 12]
    for later in kept[1 if back_to == "best" else 2 :]:
        shutil.rmtree(checkpoints / str(later))
    assert_same(tmp_path / "moved", go(tmp_path / "moved"), whole)


def test_a_run_killed_after_later_rounds_have_written_states(tmp_path, whole):
    """With SIGKILL in round 9, whose client states are already in the files, as are those of 7 and 8."""
    code = f"""
        import os, signal
        from fedexp.engine.client_states import ClientStates
        from tests.test_client_states import go

        scatter, calls = ClientStates.scatter, []

        def killing(self, *args):
            scatter(self, *args)
            calls.append(args)
            if len(calls) == 9:
                os.kill(os.getpid(), signal.SIGKILL)

        ClientStates.scatter = killing
        go({str(tmp_path)!r})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=REPOSITORY)
    assert done.returncode == -9
    assert not (tmp_path / "checkpoints" / "9").exists()
    assert_same(tmp_path, go(tmp_path), whole)


def test_a_checkpoint_that_holds_the_states_itself_is_gone_on_from(tmp_path, monkeypatch, whole):
    """As all did once, and as those in buckets do."""
    with monkeypatch.context() as patch:
        patch.setattr(ClientStates, "commit", lambda self, *_: (self.save(), None, None))
        go(tmp_path, num_rounds=6)
    shutil.rmtree(tmp_path / "client_states")
    assert_same(tmp_path, go(tmp_path), whole)


def test_states_without_their_checkpoints_files(tmp_path, whole):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    (rows,) = tmp_path.glob("client_states/*/0.rows")
    rows.write_bytes(rows.read_bytes()[:-1])
    message = r"checkpoints/12 is damaged: .*0\.rows is cut short\. Delete that folder to go on from round 9"
    with pytest.raises(UserError, match=message):
        go(tmp_path, num_rounds=15)
    shutil.rmtree(tmp_path / "client_states")
    with pytest.raises(UserError, match=r"checkpoints/12 is damaged: .*0\.(rows|index)"):
        go(tmp_path, num_rounds=15)


def test_checkpoints_of_a_store_are_of_no_use_in_a_bucket(monkeypatch):
    restore = Checkpointer.restore

    def as_if_copied_there(self, *args):
        saved, metadata = restore(self, *args)
        return saved, metadata | {"client_states": "0-1"}

    bucket = f"memory://{uuid.uuid4().hex}"
    go(bucket, num_rounds=3)
    go(bucket, num_rounds=4)
    monkeypatch.setattr(Checkpointer, "restore", as_if_copied_there)
    with pytest.raises(UserError, match="copy the workdir to this machine and go on there"):
        go(bucket, num_rounds=6)
