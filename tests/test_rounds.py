"""A loop of one's own, as docs/own_loop.md has it."""

from __future__ import annotations

import dataclasses
import threading

import jax
import numpy as np
import optax
import pytest

from fedexp.algorithms import fedavg, scaffold
from fedexp.data import ClientBatching, FederatedSplits, uniform
from fedexp.trainer import Experiment
from tests.support import linear


def experiment(algorithm=None, **options) -> Experiment:
    task = linear.task()
    server = optax.inject_hyperparams(optax.sgd)(learning_rate=1.0)
    algorithm = algorithm or fedavg(task, optax.sgd(0.05), server)
    options = {"num_rounds": 8, "sampler": uniform(4), "batching": ClientBatching(4)} | options
    splits = FederatedSplits(linear.dataset(), linear.dataset(seed=1))
    return Experiment(splits, task, algorithm, observers=[], **options)


def test_it_sees_what_a_run_sees():
    run = experiment().run()
    seen = list(experiment().rounds())
    assert [round_.number for round_ in seen] == list(range(1, 9))
    jax.tree.map(np.testing.assert_array_equal, seen[-1].params, run.params)
    assert seen[-1].evaluate() == {
        name: value for name, value in run.metrics.items() if name.startswith("test/")
    }
    assert seen[-1].metrics["train/loss"] == run.metrics["train/loss"]
    assert seen[-1].per_client["clients/loss"].shape == (4,)


def test_it_stops_and_goes_on_like_a_loop_that_has_not():
    for algorithm in (None, scaffold(linear.task(), 0.05)):
        whole = list(experiment(algorithm).rounds())
        setup = experiment(algorithm)
        for round_ in setup.rounds():
            if round_.number == 3:
                break
        rest = list(setup.rounds(after=round_))
        assert [round_.number for round_ in rest] == [4, 5, 6, 7, 8]
        jax.tree.map(np.testing.assert_array_equal, rest[-1].params, whole[-1].params)
        # Also in another experiment, which takes over states of clients as well.
        for round_ in setup.rounds():
            if round_.number == 3:
                break
        rest = list(experiment(algorithm).rounds(after=round_))
        jax.tree.map(np.testing.assert_array_equal, rest[-1].params, whole[-1].params)


def test_it_changes_a_learning_rate_without_compiling_again():
    def last(change: bool):
        for round_ in experiment().rounds():
            if change and round_.number == 3:
                round_.state.opt_state.hyperparams["learning_rate"] *= 0.5
        return round_

    def reference():
        task = linear.task()
        schedule = optax.piecewise_constant_schedule(1.0, {3: 0.5})
        algorithm = fedavg(task, optax.sgd(0.05), optax.sgd(schedule))
        return list(experiment(algorithm).rounds())[-1]

    changed = last(change=True)
    np.testing.assert_allclose(changed.params["w"], reference().params["w"], rtol=1e-6)
    assert np.abs(changed.params["w"] - last(change=False).params["w"]).max() > 1e-3
    assert changed.session.engine.runner.compilations == 1


def test_it_goes_on_with_another_algorithm_where_the_state_fits():
    first = experiment()
    for round_ in first.rounds():
        if round_.number == 4:
            break
    task = linear.task()
    slower = fedavg(task, optax.sgd(0.0), optax.inject_hyperparams(optax.sgd)(learning_rate=1.0))
    before = jax.device_get(round_.params)
    for later in dataclasses.replace(first, algorithm=slower).rounds(after=round_):
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(later.params), before)
    assert later.number == 8


def test_parameters_can_be_put_in_place():
    still = fedavg(linear.task(), optax.sgd(0.0), optax.sgd(1.0))
    for round_ in experiment(still, num_rounds=3).rounds():
        if round_.number == 1:
            zeros = jax.tree.map(jax.numpy.zeros_like, round_.params)
            round_.state = round_.state._replace(params=zeros)
    np.testing.assert_array_equal(round_.params["w"], np.zeros(3))


@pytest.mark.parametrize("number", [1, 5])
def test_leaving_the_loop_leaves_no_thread(number):
    for round_ in experiment().rounds():
        if round_.number == number:
            break
    assert not [t for t in threading.enumerate() if t.name.startswith("prepare")]
