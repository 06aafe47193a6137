"""Another learning rate is another argument of the same program."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest

from fedexp import algorithms, evaluation
from fedexp.algorithms.fine_tuning import fine_tuning
from fedexp.algorithms.optimizers import adam, sgd_at
from fedexp.data import ClientBatching, FederatedSplits, fixed
from fedexp.evaluation import ClientEvaluator, Evaluate
from fedexp.rates import Rate, found, given
from fedexp.session import Session, Setup
from tests.support import linear
from tests.support.clients import COHORTS


def sgd(rate):
    return sgd_at(Rate(rate))


ALGORITHMS = {
    "fedavg": lambda task, rate: algorithms.fedavg(task, sgd(rate), adam(rate)),
    "fednova": lambda task, rate: algorithms.fednova(task, rate, server_optimizer=sgd(1.0)),
    "scaffold": lambda task, rate: algorithms.scaffold(task, rate),
    "q_fedavg": lambda task, rate: algorithms.q_fedavg(task, 1.0, rate),
    "mime": lambda task, rate: algorithms.mime(task, adam(rate)),
    "pfedme": lambda task, rate: algorithms.pfedme(task, 15.0, sgd(rate), rate, sgd(1.0)),
    "per_fedavg": lambda task, rate: algorithms.per_fedavg(task, rate, sgd(rate), sgd(1.0)),
    "apfl": lambda task, rate: algorithms.apfl(task, sgd(rate), sgd(1.0), alpha_rate=rate),
}


def session(algorithm, **fields):
    data = FederatedSplits(linear.dataset(), linear.dataset(seed=1))
    batching, sampler = ClientBatching(4), fixed(COHORTS)
    return Session(Setup(data, linear.task(), algorithm, 2, sampler, batching, None, **fields))


def program(one):
    return lowered(one.engine.runner, one.first.state, one.engine.prepare(0, one.sample(0)))


def lowered(runner, state, prepared):
    return runner._program.lower(*runner._arguments(state, prepared)).as_text()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_round_is_the_same_program_at_any_rate(name):
    of = [session(lambda task, rate=rate: ALGORITHMS[name](task, rate)) for rate in (0.1, 0.02)]
    assert program(of[0]) == program(of[1])


def test_an_evaluation_is_too(monkeypatch):
    monkeypatch.setattr(
        evaluation, "ClientEvaluator", lambda *of: made.append(ClientEvaluator(*of)) or made[-1]
    )
    made, texts = [], []
    for rate in (0.1, 0.02):
        plan = Evaluate(
            personalise=lambda task, rate=rate: fine_tuning(task, sgd(rate), ClientBatching(4))
        )
        one = session(lambda task: algorithms.fedavg(task, sgd(0.1), adam(0.1)), evaluations=[plan])
        prepared, runner = made[-1]._preparer.prepare(0, one.sample(0)), made[-1]._runner
        texts.append(lowered(runner, one.first.state, prepared))
    assert texts[0] == texts[1]


def test_training_is_what_it_is_with_the_rates_in_the_program():
    lifted = session(lambda task: algorithms.fedavg(task, sgd(0.1), sgd_at(Rate(0.5), 0.9)))
    plain = algorithms.fedavg(linear.task(), optax.sgd(0.1), optax.sgd(0.5, 0.9))
    trained = [
        jax.device_get([*one.rounds(one.first)][-1].params) for one in (lifted, session(plain))
    ]
    jax.tree.map(np.testing.assert_array_equal, *trained)


def test_a_rate_is_what_is_given_and_then_itself_again():
    with found() as rates:
        first, second = Rate(0.1), Rate(2)
    Rate(3)
    assert rates == [first, second]
    with given(rates, np.array([0.3, 0.4])):
        assert (first(), second()) == (0.3, 0.4)
    assert (first(), second()) == (0.1, 2)
