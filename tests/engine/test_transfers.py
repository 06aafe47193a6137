"""What goes to the device for a round, once the data are there."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest

from fedexp.algorithms import fedavg
from fedexp.data import ClientBatching
from fedexp.engine import Engine, jit
from tests.support import linear


def test_a_round_takes_one_small_array_to_the_device_and_nothing_else(monkeypatch):
    task, dataset = linear.task(), linear.dataset()
    params = task.init(jax.random.key(0), None)
    engine = Engine(
        jit(),
        fedavg(task, optax.sgd(0.1), optax.sgd(1.0)),
        dataset,
        ClientBatching(4),
        params=params,
        cohort_size=3,
        seed=0,
    )
    state, call, sent = engine.start(params), engine.runner.call, []

    def guarded(program, *args):
        sent.append([leaf for leaf in jax.tree.leaves(args) if not isinstance(leaf, jax.Array)])
        with (
            jax.transfer_guard_host_to_device("disallow"),
            pytest.raises(Exception, match="isallow"),
        ):
            call(program, *args)
        args = jax.device_put(args)
        with jax.transfer_guard_host_to_device("disallow"):
            return call(program, *args)

    for round_ in range(3):
        if round_ == 1:  # The first one compiles, which takes constants there.
            monkeypatch.setattr(engine.runner, "call", guarded)
        prepared = engine.prepare(round_, np.array([0, 1, 2]))
        state = engine.run(state, prepared).state

    # The round's number, clients, batches and schedule, packed.
    for arrays in sent:
        assert [(array.dtype, array.shape) for array in arrays] == [
            (np.int32, prepared.by_device.flat.shape)
        ]
    assert engine.runner.compilations == 1
