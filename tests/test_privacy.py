"""Epsilon against closed forms, published values and dp-accounting itself; and in whole runs."""

from __future__ import annotations

import itertools
import json
import math

import jax
import numpy as np
import optax
import pytest
from scipy.optimize import brentq
from scipy.stats import norm as normal

from fedexp.aggregators import clip_by_norm, gaussian_noise, local_noise, mean, quantize, top_k
from fedexp.algorithms import fedavg, fednova, fedprox, hypcluster, mime, scaffold
from fedexp.checkpointing import CheckpointPlan
from fedexp.contracts import Mechanism, Release
from fedexp.data import ClientBatching, FederatedSplits, cyclic, fixed, hold_out, poisson, uniform
from fedexp.engine import Engine, debug, jit
from fedexp.errors import UserError
from fedexp.evaluation import Evaluate
from fedexp.privacy import (
    Account,
    Part,
    Privacy,
    Sampling,
    _sensitivity,
    calibrated,
    mechanisms_of,
    opened,
)
from fedexp.trainer import Experiment
from tests.support import linear

dp_accounting = pytest.importorskip("dp_accounting", reason="needs the extra 'privacy'")

ONCE = Sampling("cyclic", 10, 10_000)


def account(multiplier=1.0, sampling=ONCE, kind="independent", privacy=None, **more) -> Account:
    mechanism = Mechanism(multiplier, kind, **more)
    return Account(privacy or Privacy(delta=1e-5), [Part(0, (mechanism,), sampling)])


def gaussian_epsilon(multiplier: float, delta: float) -> float:
    """Of the Gaussian mechanism, exactly (Balle & Wang 2018, arXiv:1805.06530, Theorem 8)."""

    def excess(epsilon):
        a, b = 0.5 / multiplier, epsilon * multiplier
        return normal.cdf(a - b) - math.exp(epsilon) * normal.cdf(-a - b) - delta

    return brentq(excess, 0, 200)


@pytest.mark.parametrize("multiplier", [0.5, 1.0, 3.0])
def test_one_participation_is_the_gaussian_mechanism(multiplier):
    exact = gaussian_epsilon(multiplier, 1e-5)
    found = account(multiplier).epsilon(900)
    assert exact <= found < 1.003 * exact


def test_so_are_many_without_amplification():
    exact = gaussian_epsilon(4 / math.sqrt(25), 1e-5)
    unamplified = Privacy(delta=1e-5, amplified=False)
    found = account(4.0, Sampling("poisson", 1, 100), privacy=unamplified)
    assert exact <= found.epsilon(25) < 1.005 * exact
    # Every 10th round is the 3rd participation after 25.
    cyclic_ = account(4.0, Sampling("cyclic", 10, 100))
    exact = gaussian_epsilon(4 / math.sqrt(3), 1e-5)
    assert exact <= cyclic_.epsilon(25) < 1.005 * exact


def test_the_librarys_published_value():
    """`test_poisson_subsampled_gaussian` of dp-accounting: epsilon 1 at delta 0.15594, to 1e-3."""
    found = account(0.5, Sampling("poisson", 2, 10), privacy=Privacy(delta=0.15594))
    assert found.epsilon(3) == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize(
    ("accountant", "rounds", "probability", "delta", "expected"),
    [
        ("pld", 100, 0.01, 1e-5, 0.73671),
        ("pld", 1500, 0.001, 1e-6, 0.61615),
        ("rdp", 100, 0.01, 1e-5, 0.82688),
        ("rdp", 1500, 0.001, 1e-6, 0.71378),
    ],
)
def test_calibration_gives_pfls_noise(accountant, rounds, probability, delta, expected):
    """What pfl-research 0.6's PLD and RDP accountants find for epsilon 2."""
    privacy = Privacy(epsilon=2.0, delta=delta, accountant=accountant)
    sampling = Sampling("poisson", probability * 10_000, 10_000)
    found = calibrated(privacy, [Mechanism(1.0, open=True)], sampling, rounds)
    assert found == pytest.approx(expected, rel=3e-3)
    part = Part(0, (Mechanism(found),), sampling)
    assert 1.98 < Account(privacy, [part]).epsilon(rounds) <= 2


def test_fixed_cohorts_hide_a_client_that_is_replaced():
    privacy = Privacy(delta=1e-5, accountant="rdp")
    found = account(2.0, Sampling("fixed_size", 10, 1000), privacy=privacy).epsilon(50)
    relation = dp_accounting.NeighboringRelation.REPLACE_ONE
    reference = dp_accounting.rdp.RdpAccountant(neighboring_relation=relation)
    # One client's update in place of another's: twice the norm.
    event = dp_accounting.GaussianDpEvent(2.0 / 2)
    reference.compose(dp_accounting.SampledWithoutReplacementDpEvent(1000, 10, event), 50)
    assert found == pytest.approx(reference.get_epsilon(1e-5))


def test_local_noise_hides_an_update_from_the_server():
    exact = gaussian_epsilon(6.0 / 2 / math.sqrt(4), 1e-5)
    found = account(6.0, Sampling("poisson", 1, 100), kind="local").epsilon(4)
    assert exact <= found < 1.005 * exact


def test_rounds_of_other_noise_compose():
    sampling = Sampling("poisson", 100, 10_000)
    parts = [Part(0, (Mechanism(1.0),), sampling), Part(30, (Mechanism(0.7),), sampling)]
    found = Account(Privacy(delta=1e-5), parts)
    reference = dp_accounting.pld.PLDAccountant()
    for multiplier, count in ((1.0, 30), (0.7, 50)):
        event = dp_accounting.GaussianDpEvent(multiplier)
        reference.compose(dp_accounting.PoissonSampledDpEvent(0.01, event), count)
    assert found.epsilon(80) == pytest.approx(reference.get_epsilon(1e-5), rel=3e-3)
    alone = Account(Privacy(delta=1e-5), parts[:1])
    assert found.epsilon(20) == alone.epsilon(20) < found.epsilon(30) == alone.epsilon(30)
    assert found.epsilon(0) == 0


def test_two_releases_of_the_same_clients_are_one_of_less_noise():
    sampling = Sampling("poisson", 100, 10_000)
    both = Account(Privacy(delta=1e-5), [Part(0, (Mechanism(2.0), Mechanism(2.0)), sampling)])
    alone = account(2 / math.sqrt(2), sampling)
    assert both.epsilon(40) == pytest.approx(alone.epsilon(40))


def test_a_simulated_deployment_has_its_own_numbers():
    pretended = Privacy(delta=1e-6, population=1_000_000)
    small, large = Sampling("poisson", 10, 300), Sampling("poisson", 1000, 1_000_000)
    found = account(0.7, small, privacy=pretended, cohort_size=1000)
    assert found.epsilon(100) == account(0.7, large, privacy=pretended).epsilon(100)
    with pytest.raises(UserError, match="1000 clients .* and there are 300.*privacy.population"):
        account(0.7, small, cohort_size=1000)


def patterns(rounds: int, apart: int):
    """All sets of rounds in which one client may take part."""
    for chosen in itertools.product([0, 1], repeat=rounds):
        where = np.flatnonzero(chosen)
        if len(where) and (len(where) == 1 or np.diff(where).min() >= apart):
            yield np.array(chosen)


@pytest.mark.parametrize(("rounds", "apart"), [(1, 1), (5, 1), (8, 3), (11, 4), (12, 20)])
def test_what_a_client_changes_in_a_tree(rounds, apart):
    """The bound holds for every way of taking part, and is exact for a single time."""
    nodes = [
        np.arange(rounds) // 2**level == place
        for level in range(rounds.bit_length())
        for place in range(rounds // 2**level)
    ]
    tree = np.array(nodes, float)
    worst = max(float(np.sum((tree @ p) ** 2)) for p in patterns(rounds, apart))
    bound = _sensitivity(Mechanism(1.0, "tree"), rounds, apart)
    assert worst <= bound <= 1.25 * worst
    if apart >= rounds:
        assert bound == worst == rounds.bit_length()


@pytest.mark.parametrize(("rounds", "apart"), [(5, 1), (9, 3), (12, 4), (12, 20)])
def test_what_a_client_changes_in_a_banded_matrix(rounds, apart):
    coefficients = (0.8, 0.5, 0.3, 0.1)
    matrix = np.zeros((rounds, rounds))
    for diagonal, value in enumerate(coefficients):
        matrix += value * np.eye(rounds, k=-diagonal)
    worst = max(float(np.sum((matrix @ p) ** 2)) for p in patterns(rounds, apart))
    mechanism = Mechanism(1.0, "toeplitz", coefficients)
    assert _sensitivity(mechanism, rounds, apart) == pytest.approx(worst)


def test_the_tree_of_a_published_model():
    """Gboard's Spanish model, by the notebook that accompanies the announcement: zCDP 0.81.

    dp_ftrl/blogpost_supplemental_privacy_accounting.ipynb of github.com/google-research/federated has noise
    multiplier 7, 313 rounds between participations and at most six of them, for which 1884 rounds are
    enough; epsilon is 8.90 at delta 1e-10 by RDP.
    """
    rho = _sensitivity(Mechanism(7.0, "tree"), 6 * 314, 314) / (2 * 7.0**2)
    assert round(rho, 2) == 0.81
    sampling = Sampling("cyclic", 1, 314)
    for accountant, low, high in (("rdp", 8.85, 8.95), ("pld", 8.0, 8.9)):
        privacy = Privacy(delta=1e-10, accountant=accountant)
        found = account(7.0, sampling, "tree", privacy, num_rounds=2000)
        assert low < found.epsilon(6 * 314) < high


def test_a_tree_costs_a_gaussian_mechanism_per_level():
    exact = gaussian_epsilon(4 / math.sqrt(7), 1e-5)
    found = account(4.0, kind="tree", num_rounds=100).epsilon(100)
    assert exact <= found < 1.005 * exact


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Privacy(epsilon=0.0), "privacy.epsilon must be positive"),
        (lambda: Privacy(delta=1.0), "privacy.delta must be between 0 and 1"),
        (lambda: Privacy(accountant="prv"), "accountant must be 'pld' or 'rdp', got 'prv'"),
        (lambda: Privacy(population=0), "privacy.population must be at least 1"),
        (lambda: account(1.0, Sampling("fixed_size", 1, 9)), "PLD .* @poisson.*accountant = 'rdp'"),
        (lambda: account(1.0, Sampling(None, 1, 9)), "no accountant knows how this sampler draws"),
        (
            lambda: account(1.0, Sampling("poisson", 1, 9), kind="tree"),
            "correlated over rounds .*@cyclic",
        ),
        (lambda: account(1.0, kind="tree", num_rounds=8).epsilon(9), "good for 8 rounds"),
        (
            lambda: calibrated(Privacy(epsilon=1.0), [Mechanism(1.0)], ONCE, 10),
            "no noise is left open",
        ),
        (
            lambda: calibrated(
                Privacy(epsilon=1e-9, delta=1e-12), [Mechanism(1.0, open=True)], ONCE, 10
            ),
            "no noise multiplier up to 1e.06 reaches privacy.epsilon = 1e-09",
        ),
        (
            lambda: mechanisms_of([Release("updates", Mechanism(1.0)), Release("losses")]),
            "is also told losses, without any",
        ),
    ],
)
def test_what_has_no_epsilon_is_refused(build, message):
    with pytest.raises(UserError, match=message):
        build()


def test_only_some_rounds_with_noise_have_no_epsilon():
    noisy, bare = [Release("updates", Mechanism(1.0))], [Release("updates")]
    earlier = [Part(0, (Mechanism(1.0),), ONCE)]
    privacy = Privacy(delta=1e-5)
    assert opened(privacy, lambda _: bare, ONCE, 9, 3, []) == (None, None)
    with pytest.raises(UserError, match="the first 3 rounds have no noise"):
        opened(privacy, lambda _: noisy, ONCE, 9, 3, [])
    with pytest.raises(UserError, match="the rounds from here on have no noise"):
        opened(privacy, lambda _: bare, ONCE, 9, 3, earlier)
    going_on, _ = opened(privacy, lambda _: noisy, ONCE, 9, 3, earlier)
    assert going_on is not None and going_on.parts == tuple(earlier)


def test_a_large_delta_is_warned_of():
    sampling = Sampling("cyclic", 1, 100)
    assert "WARNING: a delta of 1 / 100" in account(
        1.0, sampling, privacy=Privacy(delta=0.01)
    ).saying(9)
    by_default = account(1.0, sampling, privacy=Privacy())
    assert by_default.delta == pytest.approx(100**-1.1) and "WARNING" not in by_default.saying(9)


# --- Whole runs ---------------------------------------------------------------------------------

TASK = linear.task()


def experiment(links, sampler=None, algorithm=None, **more) -> Experiment:
    if algorithm is None:
        algorithm = fedavg(TASK, optax.sgd(0.05), optax.sgd(1.0), aggregator=links)
    given = {
        "num_rounds": 4,
        "sampler": sampler or poisson(3),
        "batching": ClientBatching(4),
        "strategy": jit(),
        "evaluations": [Evaluate(every=2)],
        "checkpoints": CheckpointPlan(every=2),
        "observers": [],
        **more,
    }
    splits = FederatedSplits(linear.dataset(), linear.dataset(seed=1))
    return Experiment(splits, TASK, algorithm, **given)


def links(multiplier, norm=0.5):
    return [clip_by_norm(norm), gaussian_noise(multiplier, norm), mean()]


def expected(multiplier, rounds, delta=7**-1.1):
    reference = dp_accounting.pld.PLDAccountant()
    event = dp_accounting.GaussianDpEvent(multiplier)
    reference.compose(dp_accounting.PoissonSampledDpEvent(3 / 7, event), rounds)
    return reference.get_epsilon(delta)


def test_epsilon_is_at_every_evaluation_and_survives_a_resume(tmp_path):
    whole = experiment(links(2.0)).run(tmp_path / "whole")
    assert [row["round"] for row in whole.history] == [2, 4]
    for row in whole.history:
        rounds = int(row["round"])
        assert row["privacy/epsilon"] == pytest.approx(expected(2.0, rounds), rel=3e-3)
    experiment(links(2.0), num_rounds=2).run(tmp_path / "parts")
    parts = experiment(links(2.0)).run(tmp_path / "parts")
    assert parts.history == whole.history
    final = json.loads((tmp_path / "parts" / "final.json").read_text())
    assert final["privacy"]["epsilon"] == whole.metrics["privacy/epsilon"]
    assert final["privacy"]["hides"] == "one client more or less"
    assert final["privacy"]["sampling"] == {
        "scheme": "poisson",
        "cohort_size": 3,
        "population": 7,
    }
    # From here on with less noise: what the first four rounds had told counts still.
    more = experiment(links(1.0), num_rounds=6).run(tmp_path / "parts")
    reference = dp_accounting.pld.PLDAccountant()
    for multiplier, count in ((2.0, 4), (1.0, 2)):
        event = dp_accounting.GaussianDpEvent(multiplier)
        reference.compose(dp_accounting.PoissonSampledDpEvent(3 / 7, event), count)
    assert more.metrics["privacy/epsilon"] == pytest.approx(
        reference.get_epsilon(7**-1.1), rel=3e-3
    )
    with pytest.raises(UserError, match="rounds from here on have no noise"):
        experiment([mean()], num_rounds=8).run(tmp_path / "parts")


@pytest.mark.slow
def test_a_loop_of_ones_own_has_it_and_a_target_is_met():
    privacy = Privacy(epsilon=3.0, delta=1e-2)
    *_, last = experiment(links(None), privacy=privacy, strategy=debug()).rounds()
    assert 2.97 < last.epsilon <= 3
    noise = last.session.engine.runner.noise_multiplier
    assert last.metrics["aggregate/noise_std"] == pytest.approx(noise * 0.5 / 3)
    *_, bare = experiment(links(0.0), num_rounds=1).rounds()
    assert bare.epsilon is None


def test_clients_that_are_held_out_are_not_among_the_population():
    session = next(iter(experiment(links(1.0), hold_out(poisson(3), 0.3)).rounds())).session
    assert session.account.parts[0].sampling.population == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampler": uniform(3)}, "PLD accountant does not know cohorts of a fixed size"),
        ({"sampler": fixed([[0, 1]])}, "no accountant knows how this sampler draws"),
        ({"links": links(None)}, "gaussian_noise.noise_multiplier is None.*privacy.epsilon"),
        ({"privacy": Privacy(epsilon=1.0)}, "no noise is left open"),
        (
            {
                "algorithm": fedprox(
                    TASK, 0.1, optax.sgd(0.1), optax.sgd(1.0), links(1.0), mu_step=0.1
                )
            },
            "also told the loss that mu follows",
        ),
        (
            {"algorithm": mime(TASK, optax.sgd(0.1), aggregator=links(1.0), full_batch_size=5)},
            "updates have noise, but the server is also told what .*finish.* adds up",
        ),
    ],
)
def test_a_run_without_epsilon_is_refused_before_a_round(change, message, tmp_path):
    given = {"links": links(1.0), **change}
    with pytest.raises(UserError, match=message):
        experiment(**given).run(tmp_path)
    experiment(**{**given, "links": links(1.0), "privacy": None, "num_rounds": 1})


@pytest.mark.parametrize("option", [1, 2])
def test_scaffolds_two_changes_have_one_noise(option):
    """The full gradient of option 1 stays with its client."""
    algorithm = scaffold(TASK, 0.05, option=option, aggregator=links(1.0))
    session = next(iter(experiment(None, algorithm=algorithm, num_rounds=1).rounds())).session
    assert session.account.parts[0].mechanisms == (Mechanism(1.0),)


def test_what_the_server_knows_of_a_cohort_is_its_expected_size():
    """SCAFFOLD's control variate moves by the sum of changes over the population, whoever took part."""
    states = {}
    for hidden in (False, True):
        chosen = [clip_by_norm(1e6), gaussian_noise(0.0, 1e6), mean()] if hidden else [mean()]
        algorithm = scaffold(TASK, 0.05, aggregator=chosen)
        params = TASK.init(jax.random.key(0), None)
        engine = Engine(
            *(jit(), algorithm, linear.dataset(), ClientBatching(4)),
            params=params,
            cohort_size=4,
            seed=0,
        )
        output = engine.run(engine.start(params), engine.prepare(0, np.array([0, 3])))
        states[hidden] = output.state
    np.testing.assert_allclose(states[True].control["w"], states[False].control["w"], rtol=1e-5)
    change = states[False].params["w"] - params["w"]
    np.testing.assert_allclose(states[True].params["w"] - params["w"], change / 2, rtol=1e-4)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (
            lambda chosen: hypcluster(TASK, 2, optax.sgd(0.1), optax.sgd(1.0), aggregator=chosen),
            "how many examples each cluster",
        ),
        (
            lambda chosen: fednova(TASK, 0.1, optax.sgd(1.0), aggregator=chosen),
            "how many steps the clients make",
        ),
    ],
)
def test_numbers_of_clients_that_the_server_uses_are_releases(make, told):
    with pytest.raises(UserError, match=f"also told {told}"):
        next(iter(experiment(None, algorithm=make(links(1.0))).rounds()))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([gaussian_noise(1.0, 0.5), mean()], r"put clip_by_norm\(0.5\) right before it"),
        ([clip_by_norm(1.0), gaussian_noise(1.0, 0.5), mean()], "norm 1.0 through.* for 0.5"),
        ([clip_by_norm(0.5), quantize(16), gaussian_noise(1.0, 0.5), mean()], "right before it"),
        (
            [clip_by_norm(0.5), gaussian_noise(1.0, 0.5), top_k(0.5), mean()],
            r"put mean\(\) right after it",
        ),
        ([local_noise(1.0, 0.5), mean()], "right before it"),
    ],
)
def test_noise_that_hides_nobody_is_refused(bad, message):
    with pytest.raises(UserError, match=message):
        fedavg(TASK, optax.sgd(0.05), optax.sgd(1.0), aggregator=bad)


def test_cyclic_takes_clients_apart():
    sampler, ids = cyclic(3), [str(i) for i in range(11)]
    rounds = [sampler.sample(ids, seed=4, round=number).clients for number in range(30)]
    for client in range(11):
        present = np.flatnonzero([client in cohort for cohort in rounds])
        assert np.diff(present).min() >= 11 // 3 and len(present) >= 30 * 3 // 11
    assert all(len(set(cohort.tolist())) == 3 for cohort in rounds)
    other = sampler.sample(ids, seed=5, round=0).clients
    assert not np.array_equal(other, rounds[0])
    with pytest.raises(UserError, match="lower cyclic.cohort_size"):
        sampler.sample(ids[:2], 0, 0)
