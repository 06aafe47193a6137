"""How a machine is divided."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from unittest import mock

import pytest

from fedexp.sweeps.running import Loop
from fedexp.sweeps.trials import Folders, Run
from fedexp.sweeps.workers import Batches, cut_short, places, prune, start


def test_one_place_has_everything_as_a_run_by_hand_has():
    (place,) = places(1, [0, 1, 2], ["0", "1"])
    assert place.cores is None and not place.environment


def test_cores_and_gpus_are_divided():
    found = places(3, list(range(8)), ["4", "5", "6"])
    assert [sorted(place.cores) for place in found] == [[0, 1], [2, 3, 4], [5, 6, 7]]
    assert [dict(place.environment) for place in found] == [
        {"PJRT_NPROC": str(cores), "CUDA_VISIBLE_DEVICES": gpu}
        for cores, gpu in ((2, "4"), (3, "5"), (3, "6"))
    ]
    assert [p.environment["CUDA_VISIBLE_DEVICES"] for p in places(2, [0], list("0123"))] == [
        "0,1",
        "2,3",
    ]


def test_more_places_than_gpus_share_their_memory(monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    found = [place.environment for place in places(4, [0, 1], ["7"])]
    assert [e["CUDA_VISIBLE_DEVICES"] for e in found] == ["7"] * 4
    assert [e["XLA_PYTHON_CLIENT_MEM_FRACTION"] for e in found] == ["0.225"] * 4
    assert [e["PJRT_NPROC"] for e in found] == ["1"] * 4


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system gives no cores")
def test_a_run_has_the_cores_of_its_place(tmp_path, monkeypatch):
    code = "import os; print(sorted(os.sched_getaffinity(0)), os.environ['PJRT_NPROC'])"
    monkeypatch.setattr(Run, "command", [sys.executable, "-c", code])
    mine = sorted(os.sched_getaffinity(0))
    place = places(2, [mine[0], mine[-1]], [])[1]
    worker = start([Run(0, tmp_path / "run", None, ())], place, tmp_path)
    assert worker.child.wait() == 0
    assert (tmp_path / "run" / "log.txt").read_text() == f"[{mine[-1]}] 1\n"
    assert sorted(os.sched_getaffinity(0)) == mine


def runs(folder, seeds, count=3):
    return [Run(i, folder / str(i) / f"seed_{s}", s, ()) for i in range(count) for s in seeds]


def test_other_seeds_come_whole_or_not_at_all(tmp_path):
    waiting = runs(tmp_path, (0, 1, 2))
    first = [run for run in waiting if run.seed == 0]
    rest = [run for run in waiting if run.seed != 0]
    for most, seeds in {3: [], 5: [], 6: [1], 8: [1], 9: [1, 2], 16: [1, 2]}.items():
        found = Batches(most).other_seeds(first, rest)
        assert [(run.seed, run.trial) for run in found] == [(s, i) for s in seeds for i in range(3)]
    assert not Batches(9, ["train.seed"]).other_seeds(first, rest)
    without = [run for run in rest if (run.seed, run.trial) != (1, 2)]
    assert {run.seed for run in Batches(9).other_seeds(first, without)} == {2}


def test_a_program_that_was_cut_short_is_known_by_what_is_left_of_it(tmp_path, monkeypatch):
    own = runs(tmp_path / "trials", (0,))
    monkeypatch.setattr(sys, "executable", "true")
    (place,) = places(1, [0], [])
    worker = start(own, place, tmp_path)
    program = worker.log.parent
    assert worker.is_together and worker.child.wait() == 0
    assert cut_short(tmp_path, own[0]) == (program, {run.folder for run in own})
    prune(worker, 1)
    assert cut_short(tmp_path, own[0]) == (program, {own[0].folder, own[2].folder})
    again = start([own[0], own[2]], place, tmp_path)
    assert again.log.parent == program and again.child.wait() == 0
    described = json.loads((program / "runs.json").read_text())["runs"]
    assert [one["workdir"] for one in described] == [str(run.folder) for run in own]
    apart = start([own[0]], place, tmp_path)
    assert not apart.is_together and apart.child.wait() == 0
    own[2].folder.mkdir(parents=True)
    (own[2].folder / "final.json").write_text("{}")  # Then all have come to their end.
    assert cut_short(tmp_path, own[0]) == (None, set())


@pytest.mark.parametrize(("others", "together"), [([1, 2, 3], [0, 1]), ([2, 3, 4, 5], [])])
def test_a_program_goes_on_whole_or_not_at_all(tmp_path, others, together):
    folders = Folders(tmp_path, ["a.gin"], [], [0])
    trials = [folders.trial(number, {}) for number in range(6)]
    program = tmp_path / "together" / "cut"
    program.mkdir(parents=True)
    described = {"runs": [{"workdir": str(trials[i].runs[0].folder)} for i in (0, 1)]}
    (program / "runs.json").write_text(json.dumps(described))
    coming = iter([trials[0], *(trials[i] for i in others)])
    source = mock.Mock(next=lambda: next(coming, None))
    loop = Loop(mock.Mock(metric="test/loss"), source, folders, [], None, Batches(2))
    runs = loop._next()
    assert [run.trial for run in runs] == together or [0, others[0]]
    # No more trials are taken than it needs, for others may want them.
    assert next(coming).number == others[1]


def test_what_is_printed_runs_by_hand(tmp_path, monkeypatch):
    run = Run(0, tmp_path / "a b", None, ("--gin_param=a.x = 'it''s $HOME'",))
    shown = run.shown({"PJRT_NPROC": "2"})
    code = "import os, sys; print(sys.argv[1:], os.environ['PJRT_NPROC'])"
    shown = shown.replace("-m fedexp.main", f'-c "{code}"')
    done = subprocess.run(["sh", "-c", shown], capture_output=True, text=True)
    assert done.stdout.strip() == f"{[*run.arguments, f'--workdir={tmp_path}/a b']} 2", done.stderr
