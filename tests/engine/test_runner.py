from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
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


def under_way() -> list[int]:
    """How many rounds are, with the one that begins, when each of six begins."""
    # XLA:CPU waits for programs of less than 1000 FLOPs, loop bodies counted once; batches of 4 are that.
    engine, state = bind(ClientBatching(50, local_steps=30_000))
    prepared = engine.prepare(0, np.arange(2))
    for _ in range(2):  # Compiles, which may take longer than a round.
        state = engine.run(state, prepared).state
    jax.block_until_ready(state)
    program, metrics, found = engine.runner._program, [], []

    def counting(*args):
        found.append(sum(not m.flat["float32"].is_ready() for m in metrics) + 1)
        return program(*args)

    engine.runner._program = counting
    for _ in range(6):
        output = engine.run(state, prepared)
        state = output.state
        metrics.append(output.metrics)
    return found


@pytest.mark.slow
def test_two_rounds_are_under_way_at_most():
    """Of many, virtual CPU devices that wait for each other would starve each other of threads."""
    # In a process of its own: among other tests, calls once returned only after their rounds.
    code = "from tests.engine.test_runner import under_way; print(under_way())"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert done.stdout == "[1, 2, 2, 2, 2, 2]\n"


def test_a_round_s_program_can_be_read():
    engine, state = bind(ClientBatching(4))
    program = engine.runner.compiled(state, engine.prepare(0, np.arange(2)))
    assert "jit(_traced)" in program.as_text()
    assert engine.run(state, engine.prepare(0, np.arange(2))).state  # It has not been used up.
