"""Client samplers."""

import gin
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from fedexp.data import samplers
from fedexp.errors import UserError

SEEDS = st.integers(0, 2**32)


def drawn(sampler: samplers.Sampler, *args) -> np.ndarray:
    return sampler.sample(*args).clients


def _ids(num_clients: int) -> np.ndarray:
    return np.array([f"c{i}" for i in range(num_clients)])


@hypothesis.given(st.data(), st.integers(1, 300), SEEDS, st.integers(0, 10**6))
def test_uniform_samples_distinct_clients(data, num_clients, seed, round_):
    cohort_size = data.draw(st.integers(1, num_clients))
    sampler = samplers.uniform(cohort_size)
    cohort = drawn(sampler, _ids(num_clients), seed, round_)
    assert sampler.cohort_size == cohort_size
    assert cohort.shape == (cohort_size,)
    assert cohort.dtype == np.int64
    assert len(set(cohort.tolist())) == cohort_size
    assert set(cohort.tolist()) <= set(range(num_clients))
    again = drawn(samplers.uniform(cohort_size), _ids(num_clients), seed, round_)
    np.testing.assert_array_equal(cohort, again)


@hypothesis.given(st.data(), st.integers(1, 300), SEEDS, st.integers(0, 10**6))
def test_poisson_samples_distinct_clients(data, num_clients, seed, round_):
    expected = data.draw(st.floats(0.01, num_clients))
    sampler = samplers.poisson(expected)
    cohort = drawn(sampler, _ids(num_clients), seed, round_)
    assert sampler.cohort_size == expected
    assert cohort.ndim == 1
    assert cohort.dtype == np.int64
    assert len(set(cohort.tolist())) == len(cohort)
    assert set(cohort.tolist()) <= set(range(num_clients))
    np.testing.assert_array_equal(cohort, drawn(sampler, _ids(num_clients), seed, round_))


@hypothesis.given(
    SEEDS, st.integers(0, 10**6), st.sampled_from([samplers.uniform, samplers.poisson])
)
def test_rounds_and_seeds_sample_different_cohorts(seed, round_, make):
    sampler, ids = make(50), _ids(1000)
    cohort = drawn(sampler, ids, seed, round_).tolist()
    assert cohort != drawn(sampler, ids, seed, round_ + 1).tolist()
    assert cohort != drawn(sampler, ids, seed + 1, round_).tolist()
    assert cohort != drawn(sampler, ids, seed + 1, round_ - 1 if round_ else 1).tolist()


@pytest.mark.parametrize("make", [samplers.uniform, samplers.poisson])
def test_every_client_is_as_likely(make):
    num_clients, cohort_size, rounds = 20, 5, 4000
    sampler, ids = make(cohort_size), _ids(num_clients)
    counts = np.bincount(np.concatenate([drawn(sampler, ids, 0, r) for r in range(rounds)]))
    p = cohort_size / num_clients
    # Binomial counts; a fixed cohort size takes one of 20 degrees of freedom, rescaling the rest.
    scale = (num_clients - 1) / num_clients if make is samplers.uniform else 1.0
    chi2 = scale * ((counts - rounds * p) ** 2).sum() / (rounds * p * (1 - p))
    low, high = (5.41, 43.82) if make is samplers.uniform else (5.92, 45.31)
    assert low < chi2 < high  # Quantiles 0.001 and 0.999.


def test_uniform_cohorts_of_pairs_are_as_likely():
    sampler, ids, rounds = samplers.uniform(2), _ids(6), 3000
    pairs, counts = np.unique(
        [drawn(sampler, ids, 1, r) for r in range(rounds)], axis=0, return_counts=True
    )
    assert len(pairs) == 15
    chi2 = ((counts - rounds / 15) ** 2).sum() / (rounds / 15)
    assert 3.04 < chi2 < 36.12  # 14 degrees of freedom, p = 0.999 and 0.001.


def test_poisson_sizes_are_binomial_and_inclusions_independent():
    num_clients, expected, rounds = 12, 3, 5000
    sampler, ids = samplers.poisson(expected), _ids(num_clients)
    included = np.zeros((rounds, num_clients))
    for r in range(rounds):
        included[r, drawn(sampler, ids, 2, r)] = 1
    sizes, p = included.sum(1), expected / num_clients
    assert sizes.mean() == pytest.approx(
        expected, abs=4 * (num_clients * p * (1 - p) / rounds) ** 0.5
    )
    assert sizes.var() == pytest.approx(num_clients * p * (1 - p), rel=0.1)
    correlation = np.corrcoef(included.T)[~np.eye(num_clients, dtype=bool)]
    assert np.abs(correlation).max() < 4.5 / rounds**0.5


def test_poisson_cohorts_may_be_empty_or_everyone():
    assert drawn(samplers.poisson(1e-9), _ids(10), 0, 0).tolist() == []
    assert drawn(samplers.poisson(10), _ids(10), 0, 0).tolist() == list(range(10))


def test_uniform_does_not_touch_the_population():
    class Population:
        def __len__(self):
            return 10**12

        def __getitem__(self, index):
            raise AssertionError("the population was read")

    cohort = drawn(samplers.uniform(100), Population(), 0, 0)
    assert len(np.unique(cohort)) == 100


def test_fixed_cycles_over_indices_and_ids():
    sampler = samplers.fixed([[2, 0], ["c1"], ["c3", 1, "c0"]])
    assert sampler.cohort_size == 2
    found = [drawn(sampler, _ids(4), seed, round_).tolist() for seed, round_ in enumerate(range(6))]
    assert found == [[2, 0], [1], [3, 1, 0]] * 2
    assert drawn(sampler, list(_ids(4)), 0, 1).tolist() == [1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: samplers.uniform(0), "cohort_size must be positive, got 0"),
        (lambda: samplers.poisson(-1.0), "expected_cohort_size must be positive, got -1.0"),
        (lambda: samplers.fixed([]), "needs one cohort or more"),
        (lambda: samplers.fixed([[1], []]), "none of them empty"),
        (lambda: drawn(samplers.uniform(11), _ids(10), 0, 0), "11 clients .* from 10; lower"),
        (lambda: drawn(samplers.poisson(10.5), _ids(10), 0, 0), "10.5 clients .* from 10; lower"),
        (lambda: drawn(samplers.fixed([[0], [1, 4]]), _ids(4), 0, 1), r"cohorts\[1\] .* client 4"),
        (lambda: drawn(samplers.fixed([[-1]]), _ids(4), 0, 0), "client -1"),
        (lambda: drawn(samplers.fixed([["c9"]]), _ids(4), 0, 0), "client 'c9', .* 'c0'"),
        (lambda: drawn(samplers.fixed([["c1", 1]]), _ids(4), 0, 0), "more than once"),
    ],
)
def test_impossible_cohorts(make, message):
    with pytest.raises(UserError, match=message):
        make()


@hypothesis.given(st.integers(2, 200), st.floats(0.01, 0.9), SEEDS, st.integers(0, 100))
def test_held_out_clients_never_take_part(num_clients, fraction, seed, round_):
    sampler, ids = samplers.hold_out(samplers.uniform(1), fraction, seed=3), _ids(num_clients)
    held_out = sampler.held_out(ids)
    assert held_out.sum() == max(1, int(fraction * num_clients))
    assert not held_out[drawn(sampler, ids, seed, round_)].any()
    again = samplers.hold_out(samplers.uniform(1), fraction, seed=3)
    np.testing.assert_array_equal(again.held_out(ids), held_out)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5])
def test_nobody_or_everybody_cannot_be_held_out(fraction):
    with pytest.raises(UserError, match="hold_out.fraction must be between 0 and 1"):
        samplers.hold_out(samplers.uniform(1), fraction)


def test_what_a_sampler_says_of_clients_passes_through_holding_out():
    def sample(client_ids, seed, round_):
        index = np.arange(len(client_ids))
        return samplers.Sample(index, {"number": index}, {"time/hours": 2.0})

    sampler = samplers.hold_out(samplers.Sampler(8, sample), 0.2)
    found = sampler.sample(_ids(10), 0, 0)
    assert found.clients.tolist() == np.flatnonzero(~sampler.held_out(_ids(10))).tolist()
    assert found.inputs["number"].tolist() == list(range(8))
    assert found.infos == {"time/hours": 2.0}


def test_configured_by_gin():
    with gin.unlock_config():
        gin.parse_config("uniform.cohort_size = 3")
    try:
        assert drawn(samplers.uniform(), _ids(5), 0, 0).shape == (3,)
    finally:
        gin.clear_config()
