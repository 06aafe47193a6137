"""No two uses of a run draw from the same key, and no key that is drawn from is the parent of another."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import optax
import pytest

from fedexp.aggregators import chain, mean
from fedexp.algorithms import fine_tuning, scaffold
from fedexp.contracts import Aggregated, Aggregator, Sent
from fedexp.data import ClientBatching, FederatedSplits, hold_out, uniform
from fedexp.engine import debug
from fedexp.evaluation import Evaluate
from fedexp.trainer import Experiment
from tests.support import linear


class Recorder:
    """What was handed out, by who was given it."""

    def __init__(self):
        self.keys: list[tuple[str, tuple[int, ...]]] = []

    def note(self, user: str, key) -> None:
        if not isinstance(key, jax.core.Tracer):
            self.keys.append((user, tuple(np.asarray(jax.random.key_data(key)).tolist())))


def recorded_aggregator(recorder: Recorder, name: str) -> Aggregator:
    def client(state, update, client_state, key):
        recorder.note(f"{name} client", key)
        return Sent(update)

    def server(state, total, each, later, cohort, key):
        recorder.note(f"{name} server", key)
        return Aggregated(later, state)

    return Aggregator(client, server)


def experiment(recorder: Recorder) -> Experiment:
    plain = linear.task()

    def apply(params, batch, key):
        if key is not None:
            recorder.note("step", key)
        return plain.apply(params, batch, key)

    def init(key, batch):
        recorder.note("parameters", key)
        return plain.init(key, batch)

    task = dataclasses.replace(plain, apply=apply, init=init)
    links = [recorded_aggregator(recorder, name) for name in ("first", "second")]
    algorithm = scaffold(task, 0.05, aggregator=[*links, chain(links[0], mean())], option=1)

    def algorithm_init(params, key):
        recorder.note("server state", key)
        return algorithm.init(params, key)

    def round_(state, cohort, for_each_client):
        recorder.note("server", cohort.key)

        def watched(work, shared, cohort, pass_="train", counted=True):
            def work_init(shared, client):
                recorder.note("client", client.key)
                return work.init(shared, client)

            watched.calls = for_each_client.calls
            return for_each_client(work._replace(init=work_init), shared, cohort, pass_, counted)

        watched.calls, watched.traffic = 0, for_each_client.traffic
        return algorithm.round(state, cohort, watched)

    return Experiment(
        FederatedSplits(linear.dataset(), linear.dataset(seed=1)),
        task,
        dataclasses.replace(algorithm, init=algorithm_init, round=round_),
        num_rounds=3,
        sampler=hold_out(uniform(3), 0.2),
        batching=ClientBatching(4, local_epochs=2),
        strategy=debug(),
        evaluations=[
            Evaluate(every=1, clients=2),
            Evaluate(every=1, personalise=lambda task: fine_tuning(task, optax.sgd(0.1))),
            Evaluate(
                every=1,
                clients="cohort",
                personalise=lambda task: fine_tuning(task, optax.sgd(0.1)),
                prefix="own",
            ),
        ],
        observers=[],
        seed=0,
    )


@pytest.mark.slow
def test_no_two_uses_of_a_run_draw_the_same(monkeypatch):
    recorder, seeds = Recorder(), []
    default_rng = np.random.default_rng
    run = experiment(recorder)
    monkeypatch.setattr(
        np.random, "default_rng", lambda seed: seeds.append(seed) or default_rng(seed)
    )
    with jax.disable_jit():
        run.run()

    users = {user for user, _ in recorder.keys}
    assert users >= {
        "parameters",
        "server",
        "client",
        "step",
        *(f"{name} {half}" for name in ("first", "second") for half in ("client", "server")),
    }
    assert len(recorder.keys) > 100
    drawn_from = [data for _, data in recorder.keys]
    # Whoever is given a key may split it, or fold small numbers in.
    children = jax.vmap(lambda key: jax.vmap(lambda i: jax.random.fold_in(key, i))(np.arange(16)))
    keys = jax.random.wrap_key_data(np.array(drawn_from, np.uint32))
    below = np.asarray(jax.random.key_data(children(keys))).reshape(-1, 2)
    everything = [*drawn_from, *map(tuple, below.tolist())]
    assert len(set(everything)) == len(everything)

    states = [tuple(np.random.SeedSequence(seed).generate_state(4)) for seed in seeds]
    # Sampling, orders by client and pass, the evaluations' sample, who is held out.
    assert len({seed[0] for seed in seeds}) == 4
    repeated = {s for s in states if states.count(s) > 1}
    # A cohort is drawn once more, to refuse at the start what cannot be drawn.
    once_more = np.random.SeedSequence([2, 0, 0]).generate_state(4)
    assert repeated <= {tuple(once_more), tuple(np.random.SeedSequence([12, 0]).generate_state(4))}
