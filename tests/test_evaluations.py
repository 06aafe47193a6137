"""The list of evaluations of a run: on any split, of any clients, with parameters of their own."""

from __future__ import annotations

import dataclasses
import json
import logging

import jax
import numpy as np
import optax
import pytest

from fedexp.algorithms import apfl, ema, fedavg, fine_tuning
from fedexp.checkpointing import Checkpointer, CheckpointPlan
from fedexp.data import (
    ClientBatching,
    FederatedDataset,
    FederatedSplits,
    fixed,
    hold_out,
    split_validation,
    uniform,
)
from fedexp.engine import Packing, jit, mesh
from fedexp.errors import UserError
from fedexp.evaluation import Evaluate
from fedexp.session import Session
from fedexp.trainer import Experiment
from tests.support import linear
from tests.support.clients import batches, gradient, vector

RATE = 0.05
TEST = linear.dataset(seed=1)


def experiment(*evaluations: Evaluate, splits=None, algorithm=None, **options) -> Experiment:
    task = options.pop("task", linear.task())
    options = {"num_rounds": 4, "sampler": uniform(4), "observers": []} | options
    return Experiment(
        splits or FederatedSplits(linear.dataset(), TEST),
        task,
        algorithm or fedavg(task, optax.sgd(RATE), optax.sgd(1.0)),
        evaluations=list(evaluations),
        **options,
    )


def loss(theta: np.ndarray, dataset: FederatedDataset, clients) -> float:
    """The mean squared error over the examples of some clients."""
    squares = []
    for client in clients:
        data = dataset.client(client)
        x, y = data["x"], data["y"]
        squares.extend((np.column_stack([x, np.ones(len(y))]) @ theta - y) ** 2)
    return float(np.mean(squares))


def tuned(theta: np.ndarray, client: int) -> np.ndarray:
    theta = theta.copy()
    for x, y in batches(client):
        theta -= RATE * gradient(x, y, theta)
    return theta


FINE_TUNED = Evaluate(
    personalise=lambda task: fine_tuning(task, optax.sgd(RATE), ClientBatching(4, shuffle=False))
)


@pytest.mark.parametrize("strategy", [jit, lambda: jit(Packing(lanes=3))])
def test_fine_tuned_evaluation_equals_numpy(strategy):
    result = experiment(Evaluate(), FINE_TUNED, strategy=strategy()).run()
    theta = vector(result.params)
    personal = [(tuned(theta, client), client) for client in range(7)]
    sizes = TEST.client_sizes
    losses = [loss(own, TEST, [client]) for own, client in personal]
    assert result.metrics["test/loss"] == pytest.approx(loss(theta, TEST, range(7)), rel=1e-5)
    expected = np.average(losses, weights=sizes)
    assert result.metrics["test_personal/loss"] == pytest.approx(expected, rel=1e-4)
    assert expected < result.metrics["test/loss"]


def test_clients_are_joined_by_their_ids_not_their_rows():
    """The test split has other clients in another order, and lacks some."""
    ids = ["client5", "client2", "stranger", "client0"]
    parts = dict(TEST.clients()) | {"stranger": dict(TEST.client(6))}
    test = FederatedDataset.from_clients({cid: parts[cid] for cid in ids})
    splits = FederatedSplits(linear.dataset(), test)
    result = experiment(FINE_TUNED, splits=splits).run()
    theta = vector(result.params)
    squares = [
        (loss(tuned(theta, client), TEST, [client]), TEST.client_sizes[client])
        for client in (5, 2, 0)
    ]
    expected = np.average(*np.transpose(squares)[:1], weights=np.transpose(squares)[1])
    assert result.metrics["test_personal/loss"] == pytest.approx(expected, rel=1e-4)


def test_the_cohorts_own_clients():
    cohorts = [(0, 2, 3), (1, 4, 6)]
    setup = experiment(Evaluate(clients="cohort", every=1), sampler=fixed(cohorts), num_rounds=2)
    history = setup.run().history
    thetas = [vector(jax.device_get(round_.params)) for round_ in setup.rounds()]
    for row, theta, cohort in zip(history, thetas, cohorts, strict=True):
        assert row["test_cohort/loss"] == pytest.approx(loss(theta, TEST, cohort), rel=1e-5)


def test_clients_held_out_of_training_are_evaluated_apart():
    sampler = hold_out(uniform(3), 0.3)
    held_out = sampler.held_out(linear.dataset().client_ids)
    assert held_out.sum() == 2
    setup = experiment(
        Evaluate(clients="held_out"), Evaluate(clients="taking_part"), sampler=sampler, num_rounds=9
    )
    seen = set()
    for round_ in setup.rounds():
        seen |= set(round_.prepared.clients.tolist())
    assert seen == set(np.flatnonzero(~held_out).tolist())
    found, theta = round_.evaluate(), vector(round_.params)
    assert found["test_held_out/loss"] == pytest.approx(
        loss(theta, TEST, np.flatnonzero(held_out)), rel=1e-5
    )
    assert found["test_taking_part/loss"] == pytest.approx(
        loss(theta, TEST, np.flatnonzero(~held_out)), rel=1e-5
    )


def test_the_best_checkpoint_is_chosen_on_the_validation_split(tmp_path):
    splits = split_validation(FederatedSplits(linear.dataset(), TEST), 0.3)
    result = experiment(
        Evaluate(every=2),
        Evaluate("validation", every=2),
        splits=splits,
        num_rounds=12,
        algorithm=fedavg(linear.task(), optax.sgd(RATE), optax.adam(0.5)),
        checkpoints=CheckpointPlan(every=100),
    ).run(tmp_path)
    best = min(result.history, key=lambda row: row["validation/loss"])
    checkpointer = Checkpointer(
        tmp_path / "checkpoints", best_metric="validation/loss", best_mode="min"
    )
    assert checkpointer.best() == best["round"]
    checkpointer.close()


def test_the_best_checkpoint_is_chosen_among_the_same_clients(tmp_path):
    """The last evaluation is of all clients; its sample decides, as on the way."""
    plan = Evaluate(every=2, clients=1)
    setup = experiment(plan, num_rounds=6, checkpoints=CheckpointPlan(every=1, keep=9))
    result = setup.run(tmp_path)
    losses = {}
    for round_ in setup.rounds():
        if plan.is_due(round_.number):
            session = round_.session
            losses[round_.number] = session.evaluate(round_, [0], full=False)["test"].metrics[
                "loss"
            ]
    assert result.metrics["test/loss"] != pytest.approx(losses[6], rel=1e-3)
    checkpointer = Checkpointer(tmp_path / "checkpoints", best_metric="test/loss", best_mode="min")
    assert checkpointer.best() == min(losses, key=losses.get)
    checkpointer.close()


def test_every_evaluation_has_its_own_rhythm():
    history = experiment(Evaluate(every=2), Evaluate("train", every=3), num_rounds=7).run().history
    assert [row["round"] for row in history] == [2, 3, 4, 6, 7]
    groups = [{name.partition("/")[0] for name in row} - {"round", "traffic"} for row in history]
    assert groups[0] == groups[2] == {"train", "test"}
    assert groups[1] == {"train", "train_split"}
    assert groups[3] == groups[4] == {"train", "train_split", "test"}


def test_what_the_algorithm_reports_is_part_of_every_evaluation(tmp_path):
    algorithm = fedavg(linear.task(), optax.sgd(RATE), optax.sgd(1.0))
    reporting = dataclasses.replace(
        algorithm, report=lambda state, rounds: {"privacy/epsilon": 0.1 * rounds}
    )
    result = experiment(Evaluate(every=2), algorithm=reporting).run(tmp_path)
    assert [row["privacy/epsilon"] for row in result.history] == pytest.approx([0.2, 0.4])
    final = json.loads((tmp_path / "final.json").read_text())
    assert final["metrics"]["privacy/epsilon"] == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Evaluate(every=-1), "every=-1"),
        (lambda: Evaluate(batch_size=0), "batch_size=0"),
        (lambda: Evaluate(clients=0), "clients=0"),
        (lambda: Evaluate(clients="cohrt"), "clients='cohrt'"),
        (lambda: Evaluate("tset"), "evaluate.split must be one of"),
        (lambda: experiment(Evaluate("validation")).run(), "the data have none"),
        (
            lambda: experiment(Evaluate(), Evaluate(every=3)).run(),
            "two evaluations are called 'test'",
        ),
        (lambda: experiment(Evaluate(personalise=True)).run(), "one model for all clients"),
        (lambda: experiment(Evaluate(clients="held_out")).run(), "there is no such client"),
    ],
)
def test_evaluations_that_cannot_be_are_refused(build, message):
    with pytest.raises(UserError, match=message):
        build()


def test_client_states_are_read_and_left_alone():
    """Personal evaluation of every round must not change how APFL goes on."""

    def last(*evaluations):
        algorithm = apfl(linear.task(), optax.sgd(RATE), optax.sgd(1.0))
        return experiment(*evaluations, algorithm=algorithm).run()

    watched = last(Evaluate(every=1, personalise=True))
    alone = last(Evaluate(every=0, personalise=True))
    jax.tree.map(np.testing.assert_array_equal, watched.params, alone.params)
    assert watched.metrics == alone.metrics


@pytest.mark.parametrize("clients", [None, "cohort"])
def test_an_evaluation_that_cannot_be_is_told_before_training(clients, monkeypatch):
    """The test split has inputs of four numbers, and the model takes three."""
    test = {
        name: {**examples, "x": np.pad(examples["x"], ((0, 0), (0, 1)))}
        for name, examples in TEST.clients()
    }
    splits = FederatedSplits(linear.dataset(), FederatedDataset.from_clients(test))
    rounds = []
    monkeypatch.setattr(Session, "rounds", lambda *args: rounds.append(args))
    with pytest.raises(
        UserError, match=r"'test\w*' cannot be: .*\(4,\).*in the split 'test'.*\(3,\)"
    ):
        experiment(Evaluate(clients=clients), splits=splits).run()
    task = linear.task()
    task = dataclasses.replace(task, metrics={"bug": lambda outputs, batch: batch["z"]})
    with pytest.raises(KeyError, match="z") as caught:
        experiment(
            Evaluate(clients=clients),
            algorithm=fedavg(linear.task(), optax.sgd(RATE), optax.sgd(1.0)),
            task=task,
        ).run()
    assert "tracing the evaluation 'test" in caught.value.__notes__[-1]
    assert not rounds


def in_domains(seed: int) -> FederatedDataset:
    """The linear problem, each example in one of the domains 0, 1 and 3."""
    rng = np.random.default_rng(seed)
    clients = linear.dataset(seed=seed).clients()
    return FederatedDataset.from_clients(
        {
            name: {**data, "domain": rng.choice([0, 1, 3], len(data["y"])).astype(np.int32)}
            for name, data in clients
        }
    )


DOMAINS = {"domain": "domain", "num_domains": 5}


@pytest.mark.parametrize("strategy", [jit, lambda: jit(Packing(lanes=3)), mesh])
def test_gains_percentiles_and_domains_equal_numpy(strategy):
    test = in_domains(1)
    tuned_too = dataclasses.replace(FINE_TUNED, gain=True, percentiles=(10, 50), **DOMAINS)
    setup = experiment(
        Evaluate(percentiles=[90], **DOMAINS),
        tuned_too,
        splits=FederatedSplits(in_domains(0), test),
        strategy=strategy(),
    )
    *_, round_ = setup.rounds()
    theta = vector(jax.device_get(round_.params))
    found = round_.evaluate()
    own = [tuned(theta, client) for client in range(7)]
    before = np.array([loss(theta, test, [c]) for c in range(7)])
    after = np.array([loss(own[c], test, [c]) for c in range(7)])
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4)  # noqa: E731
    close(found["test/loss/p90"], np.percentile(before, 90))
    close(found["test_personal/loss/before"], found["test/loss"])
    close(found["test_personal/loss/gain"], found["test_personal/loss"] - found["test/loss"])
    for p in (10, 50):
        close(found[f"test_personal/loss/p{p}"], np.percentile(after, p))
        close(found[f"test_personal/loss/before/p{p}"], np.percentile(before, p))
        close(found[f"test_personal/loss/gain/p{p}"], np.percentile(after - before, p))
    squares = {"test": {0: [], 1: [], 3: []}, "test_personal": {0: [], 1: [], 3: []}}
    for client, (_, data) in enumerate(test.clients()):
        for group, params in (("test", theta), ("test_personal", own[client])):
            errors = (data["x"] @ params[:3] + params[3] - data["y"]) ** 2
            for domain, error in zip(data["domain"].tolist(), errors, strict=True):
                squares[group][domain].append(error)
    for group, by_domain in squares.items():
        for domain, errors in by_domain.items():
            close(found[f"{group}/loss/domain{domain}"], np.mean(errors))
        assert not any(name.startswith(f"{group}/loss/domain{d}") for name in found for d in (2, 4))
    result = round_.session.evaluate(round_, [1], full=True)["test_personal"]
    np.testing.assert_allclose(result.per_client["loss/gain"], after - before, rtol=1e-3, atol=1e-5)
    assert set(found) <= {
        f"{group}/{name}"
        for group, names in round_.session.metric_names().items()
        for name in names
    }


def test_what_was_measured_is_said_in_words_and_numbers(tmp_path):
    sampler = hold_out(uniform(3), 0.3)
    held_out = sampler.held_out(linear.dataset().client_ids)
    task = linear.task()
    setup = experiment(
        Evaluate(clients=2),
        Evaluate(clients="held_out"),
        Evaluate(clients="cohort", prefix="seen"),
        FINE_TUNED,
        Evaluate("train", prefix="own", personalise=lambda task: fine_tuning(task, optax.sgd(0.1))),
        sampler=sampler,
        algorithm=ema(task, fedavg(task, optax.sgd(RATE), optax.sgd(1.0)), 0.5),
    )
    result = setup.run(tmp_path)
    sizes = TEST.client_sizes
    about = {one.name: one for one in result.about}
    average = "server's, averaged (EMA 0.5)"
    assert about["test"] == ("test", "test", "all", average, 7, sizes.sum())
    kept = (held_out.sum(), sizes[held_out].sum())
    assert about["test_held_out"] == (
        *("test_held_out", "test", "held out of training", average),
        *kept,
    )
    cohort = [*setup.rounds()][-1].prepared.clients
    assert about["seen"] == ("seen", "test", "the cohort", average, 3, sizes[cohort].sum())
    assert about["own"].split == "train"
    assert about["own"].num_examples == linear.dataset().num_examples
    assert about["own"].parameters == "each client's"
    final = json.loads((tmp_path / "final.json").read_text())
    assert [one["name"] for one in final["evaluations"]] == [*about]


def few_test_clients(*ids: str) -> FederatedSplits:
    parts = dict(TEST.clients())
    clients = {cid: parts.get(cid, TEST.client(0)) for cid in ids}
    return FederatedSplits(linear.dataset(), FederatedDataset.from_clients(clients))


def test_clients_without_test_examples_are_said_to_be_left_out(caplog):
    with caplog.at_level(logging.INFO, "absl"):
        experiment(FINE_TUNED, splits=few_test_clients("client1", "client5", "stranger")).run()
    assert "'test_personal' leaves out 5 clients of the training split" in caplog.text
    assert "and 1 of the latter's that do not train" in caplog.text


def test_some_clients_on_the_way_are_some_that_can_be_measured():
    strangers = [f"stranger{number}" for number in range(50)]
    plan = dataclasses.replace(FINE_TUNED, every=1, clients=1)
    setup = experiment(plan, splits=few_test_clients("client1", *strangers), num_rounds=2)
    assert "test_personal/loss" in setup.run().history[0]


HOLDING_OUT = hold_out(uniform(3), 0.3)
OUT = HOLDING_OUT.held_out(TEST.client_ids)


def of_clients(who: str, tested: np.ndarray, personalise=None) -> Experiment:
    plan = Evaluate(clients=who, personalise=personalise)
    splits = few_test_clients("stranger", *map(str, tested))
    return experiment(plan, splits=splits, sampler=HOLDING_OUT)


def late_domain() -> FederatedDataset:
    """Of 5000 examples the last one is in domain 3."""
    size = 5000
    x, y = np.zeros((size, linear.DIMENSION), np.float32), np.zeros(size, np.float32)
    domain = np.where(np.arange(size) < size - 1, 0, 3).astype(np.int32)
    return FederatedDataset.from_clients({"client0": {"x": x, "y": y, "domain": domain}})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Evaluate(gain=True), "evaluate.gain compares personal parameters"),
        (lambda: Evaluate(percentiles=[101]), "evaluate.percentiles must be between 0 and 100"),
        (lambda: Evaluate(domain="y"), "evaluate.domain needs evaluate.num_domains"),
        (lambda: Evaluate(num_domains=3), "evaluate.domain needs evaluate.num_domains"),
        (lambda: Evaluate(domain="y", num_domains=0), "at least 1"),
        (
            lambda: experiment(Evaluate(domain="z", num_domains=2)).run(),
            r"evaluate.domain is 'z', but the test split has the features \['x', 'y'\]",
        ),
        (
            lambda: experiment(Evaluate(domain="y", num_domains=2)).run(),
            "feature 'y' must hold integers in 1 dimension",
        ),
        (
            lambda: experiment(
                Evaluate(domain="domain", num_domains=3),
                splits=FederatedSplits(in_domains(0), in_domains(1)),
            ).run(),
            r"'domain' must have ids in \[0, 3\), got 0 to 3; bind evaluate.num_domains",
        ),
        (
            lambda: experiment(
                Evaluate(domain="domain", num_domains=3),
                splits=FederatedSplits(late_domain(), late_domain()),
                sampler=uniform(1),
            ).run(),
            r"'domain' must have ids in \[0, 3\), got 0 to 3; bind evaluate.num_domains",
        ),
        (
            lambda: of_clients("held_out", TEST.client_ids[~OUT], FINE_TUNED.personalise).run(),
            r"\(held out of training\), none of which has examples in the test split; @split",
        ),
        (
            lambda: of_clients("cohort", TEST.client_ids[OUT]).run(),
            r"\(the cohort\), none of which has examples in the test split; @split_validation",
        ),
        (
            lambda: experiment(FINE_TUNED, splits=few_test_clients("stranger")).run(),
            "none of which has examples in the test split; @split_validation",
        ),
    ],
)
def test_details_that_cannot_be_are_refused(build, message):
    with pytest.raises(UserError, match=message):
        build()
