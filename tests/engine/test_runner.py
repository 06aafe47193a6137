from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax
import pytest

from fedexp.algorithms import fedavg
from fedexp.data import ClientBatching
from fedexp.engine import Engine, jit
from tests.support import linear


def bind(batching: ClientBatching) -> tuple[Engine, Any]:
    task = linear.task()
    params = task.init(jax.random.key(0), None)
    engine = Engine(
        jit(),
        fedavg(task, optax.sgd(0.05), optax.sgd(1.0)),
        linear.dataset(),
        batching,
        params=params,
        cohort_size=2,
        seed=0,
    )
    return engine, engine.start(params)


@pytest.mark.slow
def test_two_rounds_are_under_way_at_most(monkeypatch):
    """Of many, virtual CPU devices that wait for each other would starve each other of threads."""
    monkeypatch.setenv("XLA_FLAGS", "")  # Compiled as users do.
    # Dispatched in much less time than run.
    engine, state = bind(ClientBatching(4, local_steps=500_000))
    prepared = engine.prepare(0, np.arange(2))
    for _ in range(2):  # Compiles, which may take longer than a round.
        state = engine.run(state, prepared).state
    jax.block_until_ready(state)
    program, metrics, under_way = engine.runner._program, [], []

    def counting(*args):
        under_way.append(sum(not m.flat["float32"].is_ready() for m in metrics) + 1)
        return program(*args)

    engine.runner._program = counting
    for _ in range(6):
        output = engine.run(state, prepared)
        state = output.state
        metrics.append(output.metrics)
    assert under_way == [1, 2, 2, 2, 2, 2]


def test_a_round_s_program_can_be_read():
    engine, state = bind(ClientBatching(4))
    program = engine.runner.compiled(state, engine.prepare(0, np.arange(2)))
    assert "jit(_traced)" in program.as_text()
    assert engine.run(state, engine.prepare(0, np.arange(2))).state  # It has not been used up.
