"""Bits of all rounds so far, in the history of a run."""

from __future__ import annotations

import json
from itertools import accumulate

import numpy as np
import optax
import pytest

from fedexp.aggregators import mean, top_k
from fedexp.algorithms import fedavg
from fedexp.checkpointing import CheckpointPlan
from fedexp.data import Sample, Sampler
from fedexp.evaluation import Evaluate
from fedexp.reporting import JsonLines
from fedexp.trainer import Experiment
from tests.support import linear

SIZES = (3, 1, 2, 3, 1)  # Of the cohorts.


def run(workdir, num_rounds: int):
    task = linear.task()
    links = [top_k(0.5, error_feedback=False), mean()]
    experiment = Experiment(
        linear.splits(),
        task,
        fedavg(task, optax.sgd(0.05), optax.sgd(1.0), aggregator=links),
        num_rounds,
        sampler=Sampler(3, lambda client_ids, seed, round: Sample(np.arange(SIZES[round]))),
        evaluations=[Evaluate(every=2)],
        observers=[JsonLines()],
        checkpoints=CheckpointPlan(every=1),
    )
    return experiment.run(workdir)


def test_totals_are_exact_and_go_on_after_a_resume(tmp_path):
    whole = run(tmp_path / "whole", 5)
    clients = list(accumulate(SIZES))
    for row, count in zip(whole.history, (clients[1], clients[3], clients[4]), strict=True):
        assert row["traffic/total_bits_up"] == count * 2 * (32 + 2)
        assert row["traffic/total_bits_down"] == count * 4 * 32
    run(tmp_path / "parts", 3)
    parts = run(tmp_path / "parts", 5)
    assert parts.history[-1] == whole.history[-1]
    final = json.loads((tmp_path / "parts" / "final.json").read_text())
    assert final["metrics"]["traffic/total_bits_up"] == pytest.approx(clients[4] * 68, rel=0)
    lines = map(json.loads, (tmp_path / "parts" / "rounds.jsonl").read_text().splitlines())
    of_rounds = {
        line["round"]: line["traffic/bits_up"] for line in lines if "traffic/bits_up" in line
    }
    assert sum(of_rounds.values()) == clients[4] * 68
