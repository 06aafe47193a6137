"""What the contracts promise to those who build on them."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedexp.aggregators import clip_by_norm, gaussian_noise, mean
from fedexp.algorithms import apfl, fedavg, fedprox, optimizers, scaffold
from fedexp.contracts import (
    Aggregated,
    Algorithm,
    ClientWork,
    Pass,
    RoundOutput,
    Sent,
    full_pass,
)
from fedexp.data import ClientBatching, FederatedDataset, FederatedSplits, Sample, Sampler
from fedexp.engine import Engine, Packing, debug, jit, mesh
from fedexp.errors import UserError
from fedexp.trainer import Experiment
from tests.support import linear
from tests.support.clients import run, vector

TASK = linear.task()


class Params(NamedTuple):
    """A server state of parameters alone."""

    params: Any


TRIALS = {
    "fedavg": lambda rate: fedavg(TASK, optax.sgd(rate), optimizers.adam(rate)),
    "fedprox": lambda rate: fedprox(TASK, rate, optax.sgd(rate), optax.sgd(1.0)),
    "scaffold": lambda rate: scaffold(TASK, rate),
    "apfl": lambda rate: apfl(TASK, optax.sgd(rate), optax.sgd(1.0), rate, rate),
    "private": lambda rate: fedavg(
        TASK,
        optax.sgd(0.05),
        optax.sgd(1.0),
        aggregator=[clip_by_norm(rate), gaussian_noise(rate, rate), mean()],
    ),
}


@pytest.mark.parametrize("name", TRIALS)
def test_trials_of_other_hyperparameters_can_be_vmapped_in_one_program(name):
    """Hyperparameters are tracers; every trial has the numbers that it has alone."""
    rates = np.array([0.02, 0.05, 0.08], np.float32)
    params = TASK.init(jax.random.key(0), None)

    def engine(rate):
        algorithm = TRIALS[name](rate)
        batching = ClientBatching(4)
        return Engine(
            jit(), algorithm, linear.dataset(), batching, params=params, cohort_size=3, seed=0
        ), algorithm

    bound, _ = engine(0.05)
    prepared = bound.prepare(0, np.array([0, 3, 5]))
    states = bound.client_states
    if states is not None:
        states = bound.client_states.gather(prepared.clients, prepared.slots, (1, 3))

    def one_round(rate):
        runner, algorithm = bound.runner, TRIALS[name](rate)
        runner._round = algorithm.round
        state = algorithm.init(params, jax.random.key(1))
        root = jax.random.key_data(jax.random.key(0))
        output, _ = runner.body(
            state,
            None,
            root,
            prepared.by_device,
            prepared.examples,
            states,
            None,
        )
        return output.state.params

    together = jax.jit(jax.vmap(one_round))(rates)
    for i, rate in enumerate(rates):
        alone = jax.jit(one_round)(float(rate))
        np.testing.assert_allclose(
            vector(jax.tree.map(lambda p, i=i: p[i], together)), vector(alone), rtol=1e-5
        )
    assert np.ptp(together["w"], axis=0).min() > 1e-5


def test_bad_numbers_are_refused_all_the_same():
    with pytest.raises(UserError, match="fedprox.mu must not be negative, got -1.0"):
        fedprox(TASK, -1.0, optax.sgd(0.1), optax.sgd(1.0))


def counting(pass_: str, passes: dict[str, Pass]) -> Algorithm:
    """What a pass goes through: examples, steps, and what `client` says of them."""

    def init(shared, client):
        return jnp.zeros(3)

    def step(shared, carry, batch, key):
        return carry + jnp.array([batch.mask.sum(), 1, (batch.examples["y"] * batch.mask).sum()])

    def finish(shared, carry, client):
        return carry, (carry, client.num_examples, client.num_steps)

    def round_(state, cohort, for_each_client):
        total, (each, examples, steps) = for_each_client(
            ClientWork(init, step, finish), None, cohort, pass_
        )
        found = {"total": total}
        return RoundOutput(state, found, {"each": each, "examples": examples, "steps": steps})

    return Algorithm(lambda params, key: params, round_, passes=passes)


@pytest.mark.parametrize("strategy", [debug, jit, lambda: jit(Packing(lanes=3)), mesh])
@pytest.mark.parametrize("max_resident_bytes", [None, 0])
def test_a_pass_has_batches_of_its_own_on_its_split(strategy, max_resident_bytes):
    """The test split lacks client3 and has its clients in another order."""
    whole = dict(linear.dataset(seed=1).clients())
    names = ["client5", "client0", "client6"]
    test = FederatedDataset.from_clients({name: whole[name] for name in names})
    strategy = strategy()
    packing = dataclasses.replace(strategy.packing, max_resident_bytes=max_resident_bytes)
    passes = {
        "full": full_pass(6),
        "tested": Pass(ClientBatching(5, local_epochs=2), "test"),
        "unused": full_pass(2),
    }
    cohort = np.array([0, 3, 5])
    for pass_, source, batch_size, epochs in (
        ("train", linear.dataset(), 4, 3),
        ("full", linear.dataset(), 6, 1),
        ("tested", test, 5, 2),
    ):
        engine = Engine(
            dataclasses.replace(strategy, packing=packing),
            counting(pass_, passes),
            {"train": linear.dataset(), "test": test},
            ClientBatching(4, local_epochs=3),
            params={"w": np.zeros(1, np.float32)},
            cohort_size=3,
            seed=0,
        )
        prepared = engine.prepare(0, cohort)
        output = engine.run(engine.start({"w": np.zeros(1, np.float32)}), prepared)
        each = np.asarray(output.per_client["each"])[prepared.slots]
        first, sizes = source.rows_of(linear.dataset().client_ids[cohort])
        steps = epochs * -(-sizes // batch_size)
        sums = [
            epochs * source.features["y"][f : f + n].sum()
            for f, n in zip(first, sizes, strict=True)
        ]
        np.testing.assert_allclose(each, np.stack([epochs * sizes, steps, sums], axis=1), rtol=1e-5)
        np.testing.assert_allclose(output.metrics["total"], each.sum(axis=0), rtol=1e-5)
        assert np.asarray(output.per_client["examples"])[prepared.slots].tolist() == sizes.tolist()
        assert np.asarray(output.per_client["steps"])[prepared.slots].tolist() == steps.tolist()


def test_a_full_pass_looks_at_no_more_examples_than_training_does():
    engine = Engine(
        jit(),
        counting("full", {"full": full_pass()}),
        linear.dataset(),
        ClientBatching(4, max_examples=6),
        params={"w": np.zeros(1, np.float32)},
        cohort_size=2,
        seed=0,
    )
    prepared = engine.prepare(0, np.array([1, 2]))
    output = engine.run(engine.start({"w": np.zeros(1, np.float32)}), prepared)
    assert np.asarray(output.metrics["total"])[0] == 6 + 5


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ({"train": full_pass()}, "passes may not be called 'train'"),
        (
            {"valid": full_pass(split="validation")},
            "split 'validation', the data have \\['train'\\]",
        ),
    ],
)
def test_passes_that_cannot_be_are_refused(passes, message):
    with pytest.raises(UserError, match=message):
        run(counting("train", passes))
    with pytest.raises(UserError, match="there is no pass 'fulll', only"):
        run(counting("fulll", {"full": full_pass()}))


@pytest.mark.parametrize("strategy", [debug, jit, lambda: jit(Packing(lanes=3)), mesh])
def test_what_the_sampler_says_of_a_client_reaches_it(strategy):
    """Staleness as a float, a domain as an int, a vector; and infos reach the metrics."""

    def sample(client_ids, seed, round):
        clients = np.array([1, 4, 6])
        inputs = {
            "staleness": (clients / 2).astype(np.float32) + round,
            "domain": clients.astype(np.int32),
            "pair": np.stack([clients, -clients], axis=1).astype(np.float32),
            "fast": clients > 3,
        }
        return Sample(clients, inputs, {"time/simulated_seconds": 10.0 * round})

    def finish(shared, carry, client):
        return client.inputs["staleness"], dict(client.inputs)

    work = ClientWork(lambda s, c: 0, lambda s, carry, b, k: carry, finish)

    def round_(state, cohort, for_each_client):
        total, each = for_each_client(work, None, cohort)
        return RoundOutput(state, {"staleness": total}, each)

    splits = FederatedSplits(linear.dataset(), linear.dataset(seed=1))
    algorithm = Algorithm(lambda params, key: Params(params), round_)
    setup = Experiment(
        splits, TASK, algorithm, 2, Sampler(3, sample), strategy=strategy(), observers=[]
    )
    *_, round_ = setup.rounds()
    traffic = {"traffic/bits_up": 3 * 32, "traffic/bits_down": 0}
    told = {"staleness": 5.5 + 3, "time/simulated_seconds": 10.0}
    assert round_.metrics == {**traffic, **told}
    assert round_.per_client["staleness"].tolist() == [1.5, 3.0, 4.0]
    assert round_.per_client["domain"].tolist() == [1, 4, 6]
    assert round_.per_client["pair"].tolist() == [[1, -1], [4, -4], [6, -6]]
    assert round_.per_client["fast"].tolist() == [False, True, True]


def test_a_key_in_a_clients_state_is_refused_in_words():
    algorithm = dataclasses.replace(
        fedavg(TASK, optax.sgd(0.1), optax.sgd(1.0)), init_client=lambda params: jax.random.key(0)
    )
    with pytest.raises(UserError, match="a client's state holds a PRNG key"):
        run(algorithm)


def broken(part: str) -> Algorithm:
    """FedSGD of the linear task, but for one mistake."""

    def client_init(params, client):
        return jax.tree.map(jnp.zeros_like, params)

    def step(params, carry, batch, key):
        grads = jax.grad(lambda p: jnp.mean(TASK.apply(p, batch.examples, None) ** 2))(params)
        carry = jax.tree.map(jnp.add, carry, grads)
        if part == "bug":
            return carry["c"]
        return {
            "carry's structure": (carry, 1),
            "carry's shape": carry | {"b": carry["b"][None]},
            "carry's dtype": carry | {"b": carry["b"].astype(jnp.bfloat16)},
            "no carry": None,
        }.get(part, carry)

    def finish(params, carry, client):
        return carry if part == "finish" else (carry, jnp.float32(1))

    def init(params, key):
        return Params(params)

    def round_(state, cohort, for_each_client):
        work = ClientWork(client_init, step, finish)
        total, each = for_each_client(work, state.params, cohort)
        params = jax.tree.map(lambda p, t: p - 0.1 * t, state.params, total)
        if part == "state":
            params = params | {"b": params["b"][None]}
        output = RoundOutput(Params(params), {"norm": jnp.float32(0)}, {"one": each})
        return {
            "tuple": tuple(output),
            "None": None,
            "metrics": output._replace(metrics=[1.0]),
            "metric of a client": output._replace(per_client={"one": each.sum()}),
            "unasked states": output._replace(client_states=each),
            "states' shape": output._replace(client_states=each.sum()),
        }.get(part, output)

    has_states = part in ("forgotten state", "states' shape")
    return Algorithm(init, round_, (lambda params: jnp.float32(0)) if has_states else None)


@pytest.mark.parametrize("strategy", [debug, jit, lambda: jit(Packing(lanes=3))])
@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("carry's structure", r"step \(.*:\d+\), must return a carry .*\['b'\] must be float32\[\], got"),
        ("carry's shape", r"step, broken.* a carry .*: \['b'\] must be float32\[\], got float32\[1\]"),
        ("carry's dtype", r"\['b'\] must be float32\[\], got bfloat16\[\]; the first .*client_init"),
        ("no carry", r"ClientWork.step, broken.*must be float32\[\], got nothing"),
        ("finish", r"ClientWork.finish, broken.*must return \(total, each\), got a dict of 2"),
        ("state", r"Algorithm.round, broken.* a state .*\.params\['b'\] must be float32\[\], got fl"),
        ("tuple", "Algorithm.round, broken.* must return a RoundOutput, got a tuple of 4"),
        ("None", "must return a RoundOutput, got None"),
        ("metrics", "must return metrics by name, got a list of 1"),
        ("metric of a client", r"of all \d client slots: \['one'\] must be \[\d,\.\.\.\], got float32"),
        ("unasked states", "no client_states: the algorithm has no init_client"),
        ("forgotten state", "has an init_client, got None; .* return cohort.clients.state"),
        ("states' shape", r"client_states like those it is given: must be float32\[\d\], got float32"),
    ],
)  # fmt: skip
def test_a_broken_contract_is_named_with_its_function(strategy, part, message):
    with pytest.raises(UserError, match=message):
        run(broken(part), strategy=strategy())


def link(**parts) -> Any:
    return dataclasses.replace(mean(), **parts)


@pytest.mark.parametrize(
    ("aggregator", "message"),
    [
        (link(client=lambda *_: (1, 2)), r"Aggregator.client, <lambda>.* a Sent, got a tuple of 2"),
        (link(server=lambda *_: None), "Aggregator.server, <lambda>.* an Aggregated, got None"),
        (
            link(server=lambda state, total, *_: Aggregated(total[0], 7)),
            r"Aggregator.server, .* a state like the one it is given: must be nothing, got int32\[\]",
        ),
        (
            link(server=lambda *_: Aggregated({"w": jnp.zeros(3)})),
            r"must return an update like a client's: \['b'\] must be float32\[\], got nothing",
        ),
        (
            [link(client=lambda *_: Sent(), reduces=False), mean()],
            "must return a Sent with an Update, got None",
        ),
    ],
)
def test_an_aggregators_broken_contract_is_named(aggregator, message):
    with pytest.raises(UserError, match=message):
        run(fedavg(TASK, optax.sgd(0.1), optax.sgd(1.0), aggregator))


def test_a_bug_of_ones_own_keeps_its_traceback_and_says_where_it_was_called():
    with pytest.raises(KeyError, match="c") as caught:
        run(broken("bug"))
    notes = "\n".join(caught.value.__notes__)
    assert "calling ClientWork.step, which is broken.<locals>.step (" in notes
    assert "calling Algorithm.round, which is broken.<locals>.round_ (" in notes
