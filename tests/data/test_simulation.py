"""The simulated clock, and samplers on it."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from fedexp.data import SECONDS, Clock, Sampler, asynchronous, hold_out, synchronous
from fedexp.data.clock import between, exponential, half_normal, lognormal
from fedexp.errors import UserError

SEEDS = st.integers(0, 2**32)


def ids(num_clients: int) -> np.ndarray:
    return np.array([f"c{i}" for i in range(num_clients)])


def bound(sampler: Sampler, num_clients: int) -> Sampler:
    return sampler.bound_to(1 + np.arange(num_clients))


def rounds(sampler: Sampler, num_clients: int, seed: int, count: int) -> list:
    sampler = bound(sampler, num_clients)
    return [sampler.sample(ids(num_clients), seed, number) for number in range(count)]


def same(found, expected) -> None:
    np.testing.assert_array_equal(found.clients, expected.clients)
    np.testing.assert_equal(dict(found.inputs), dict(expected.inputs))
    assert found.infos == expected.infos


CLOCKS = st.builds(
    Clock,
    seconds_per_example=st.sampled_from([0.0, 0.3, lognormal(0.1, 1.0)]),
    seconds=st.sampled_from([1.0, exponential(2.0), between(0.5, 3.0)]),
    variation=st.sampled_from([1.0, half_normal(1.0)]),
    drop_out=st.sampled_from([0.0, 0.4]),
    available_from=st.sampled_from([0.0, between(0.0, 50.0)]),
    available_for=st.sampled_from([None, 5.0]),
    period=st.just(20.0),
)


@hypothesis.given(st.data(), CLOCKS, st.integers(1, 30), SEEDS)
def test_a_round_does_not_depend_on_what_was_asked_before(data, clock, num_clients, seed):
    """So that a resumed run is the one that was not interrupted, of either sampler."""
    numbers = st.integers(1, num_clients)
    make = data.draw(
        st.one_of(
            st.builds(asynchronous, st.just(clock), numbers, numbers),
            st.builds(
                lambda sizes, deadline: synchronous(clock, *sorted(sizes), deadline),
                st.tuples(numbers, numbers),
                st.sampled_from([None, 60.0]),
            ),
        )
    )
    expected = rounds(make, num_clients, seed, 8)
    sampler = bound(make, num_clients)
    for number in data.draw(st.lists(st.integers(0, 7), min_size=1, max_size=4)):
        same(sampler.sample(ids(num_clients), seed, number), expected[number])
    sampler.sample(ids(num_clients), seed + 1, 7)  # Another run's, which changes nothing.
    same(sampler.sample(ids(num_clients), seed, 7), expected[7])


@hypothesis.given(st.data(), CLOCKS, st.integers(1, 30), SEEDS)
def test_arrivals(data, clock, num_clients, seed):
    numbers = st.integers(1, num_clients)
    concurrency, per_step = data.draw(numbers), data.draw(numbers)
    found = rounds(asynchronous(clock, concurrency, per_step), num_clients, seed, 8)
    now = 0.0
    for version, sample in enumerate(found):
        assert len(set(sample.clients.tolist())) == len(sample.clients) == per_step
        staleness = sample.inputs["staleness"]
        assert (staleness >= 0).all() and (staleness <= version).all()
        assert sample.infos[SECONDS] >= now
        now = sample.infos[SECONDS]
        assert sample.infos["simulated/lost"] >= 0


@hypothesis.given(st.data(), st.integers(1, 30), SEEDS)
def test_staleness_counts_the_steps_while_a_client_was_at_work(data, num_clients, seed):
    """With one arrival to a step, all that happens can be seen."""
    concurrency = data.draw(st.integers(1, num_clients))
    draw = st.floats(0.5, 10.0)
    per_example = data.draw(draw)
    clock = Clock(seconds_per_example=per_example, seconds=data.draw(draw))
    found = rounds(asynchronous(clock, concurrency, 1), num_clients, seed, 40)
    ends = np.array([sample.infos[SECONDS] for sample in found])
    clients = np.array([sample.clients[0] for sample in found])
    begins = ends - (clock.seconds + per_example * (1 + clients))
    for number, sample in enumerate(found):
        fetched = number - sample.inputs["staleness"][0]
        # It set out at the very step whose parameters it has fetched, or at the beginning.
        assert begins[number] == pytest.approx(ends[fetched - 1] if fetched else 0.0, abs=1e-9)
    middles = (begins + ends) / 2
    for middle in middles:
        at_work = (begins < middle - 1e-9) & (middle + 1e-9 < ends)
        assert at_work.sum() <= concurrency
        assert len(set(clients[at_work])) == at_work.sum()
    assert np.sum(begins < 1e-9) <= concurrency


def test_places_of_clients_that_have_reported_are_taken_at_once():
    """Of ten at work for a second each, ten arrive every second."""
    found = rounds(asynchronous(Clock(), 10, 5), 40, 0, 20)
    assert [sample.infos[SECONDS] for sample in found] == np.repeat(np.arange(10) + 1, 2).tolist()
    # Four of the first five of a second are replaced before their step, and the fifth after it.
    staleness = [sample.inputs["staleness"].tolist() for sample in found]
    assert staleness == [[0] * 5, [1] * 5, *[[2, 2, 2, 2, 1]] * 18]


def test_a_client_whose_report_waits_is_not_asked_again():
    """Of five clients, four wait for the fifth, which is ten times as slow as any of them."""
    clock = Clock(seconds_per_example=1.0, seconds=0.0)
    sampler = asynchronous(clock, 5, 5).bound_to(np.array([1, 1, 1, 1, 10]))
    found = [sampler.sample(ids(5), 0, number) for number in range(3)]
    assert [sample.infos[SECONDS] for sample in found] == [10.0, 20.0, 30.0]
    assert not np.any([sample.inputs["staleness"] for sample in found])


@pytest.mark.parametrize("make", [synchronous, asynchronous])
def test_every_client_is_as_likely_and_as_likely_to_drop_out(make):
    found = rounds(make(Clock(drop_out=0.25), 10, 10), 20, 0, 1000)
    asked = 10_000 if make is synchronous else 10_000 / 0.75
    lost = sum(sample.infos["simulated/lost"] for sample in found)
    assert lost / asked == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / asked) ** 0.5)
    counts = np.bincount(np.concatenate([sample.clients for sample in found]))
    share = counts / counts.sum()
    np.testing.assert_allclose(share, 1 / 20, atol=4 * (0.05 * 0.95 / counts.sum()) ** 0.5)


@hypothesis.given(st.data(), st.integers(2, 30), SEEDS)
def test_synchronous_rounds_end_with_their_slowest_client_or_the_deadline(data, num_clients, seed):
    cohort_size = data.draw(st.integers(1, num_clients))
    asked = data.draw(st.integers(cohort_size, num_clients))
    deadline = data.draw(st.floats(3.0, 2.0 * num_clients))
    clock = Clock(seconds_per_example=1.0, drop_out=data.draw(st.sampled_from([0.0, 0.3])))
    now = 0.0
    for sample in rounds(synchronous(clock, cohort_size, asked, deadline), num_clients, seed, 5):
        seconds = 2.0 + sample.clients  # One of its own, and one for each of its examples.
        now, before = sample.infos[SECONDS], now
        assert len(sample.clients) == asked - sample.infos["simulated/lost"] <= cohort_size
        assert np.all(np.diff(sample.clients) > 0) and np.all(seconds <= deadline)
        full = len(sample.clients) == cohort_size
        assert now - before == pytest.approx(seconds.max() if full else deadline)


def test_over_selection_keeps_the_fastest():
    clock = Clock(seconds_per_example=1.0, seconds=0.0)
    found = rounds(synchronous(clock, 3, 8), 8, 0, 2)
    assert [sample.clients.tolist() for sample in found] == [[0, 1, 2]] * 2
    assert [sample.infos[SECONDS] for sample in found] == [3.0, 6.0]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        # Client 0 can be asked in [0, 3), client 1 in [10, 13), and so on every 20 seconds.
        (lambda clock: synchronous(clock, 1), [(0, 2), (0, 4), (1, 12), (1, 14), (0, 22)]),
        (lambda clock: asynchronous(clock, 2, 1), [(0, 2), (0, 4), (1, 12), (1, 14), (0, 22)]),
    ],
)
def test_clients_are_asked_when_they_can_be(make, expected, tmp_path):
    path = tmp_path / "clock.csv"
    path.write_text("client,seconds,available_from,available_for\nc1,2,10,3\nc0,2,0,3\n")
    found = rounds(make(Clock(table=str(path), period=20.0)), 2, 0, 5)
    assert [(int(s.clients[0]), s.infos[SECONDS]) for s in found] == expected
    with pytest.raises(UserError, match="no client can be asked any more after 14 simulated"):
        rounds(make(Clock(table=str(path))), 2, 0, 5)


def test_devices_follow_from_the_seed_alone():
    clock = Clock(seconds_per_example=lognormal(0.1), drop_out=between(0.0, 0.5))
    examples = np.full(4000, 10)
    first, again, other = (clock.devices(ids(4000), examples, seed) for seed in (0, 0, 1))
    np.testing.assert_equal(first, again)
    assert np.all(first.seconds != other.seconds) and np.all(first.drop_out != other.drop_out)
    assert np.median(first.seconds) == pytest.approx(2.0, rel=0.1)
    assert np.log(first.seconds - 1.0).std() == pytest.approx(1.0, rel=0.1)
    assert first.drop_out.mean() == pytest.approx(0.25, rel=0.1)


def test_clients_that_are_held_out_are_never_asked():
    sampler = hold_out(asynchronous(Clock(seconds_per_example=1.0, seconds=0.0), 4, 1), 0.5)
    taking_part = np.flatnonzero(~sampler.held_out(ids(8)))
    found = rounds(sampler, 8, 0, 40)
    assert {int(sample.clients[0]) for sample in found} == set(taking_part.tolist())
    assert found[0].infos[SECONDS] == 1 + taking_part[0]  # The fastest of those.


TABLE = "client,seconds\nc0,1\nc1,2\n"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Clock(seconds=-1.0), "clock.seconds must be finite and not negative, got -1.0"),
        (lambda: Clock(seconds_per_example=float("nan")), "not negative, got nan"),
        (lambda: Clock(drop_out=1.0), r"clock.drop_out must be a probability in \[0, 1\), got 1.0"),
        (lambda: Clock(available_for=0.0), "clock.available_for must be positive, got 0.0"),
        (lambda: Clock(period=0.0), "clock.period must be positive and finite, got 0.0"),
        (lambda: lognormal(-1.0), "lognormal.median must be finite and not negative"),
        (lambda: between(2.0, 1.0), "between.high must be finite and at least low = 2.0, got 1.0"),
        (lambda: synchronous(Clock(), 5, 3), "cohort_size=5, asked=3"),
        (lambda: synchronous(Clock(), deadline=0.0), "deadline must be positive, got 0.0"),
        (lambda: asynchronous(Clock(), 0), "asynchronous.concurrency must be at least 1, got 0"),
        (lambda: synchronous(Clock(), 1).sample(ids(2), 0, 0), "sampler.bound_to"),
        (
            lambda: rounds(asynchronous(Clock(), 3, 1), 2, 0, 1),
            "asynchronous.concurrency is 3, and there are 2 clients; lower it",
        ),
        (
            lambda: rounds(asynchronous(Clock(), 2, 3), 2, 0, 1),
            "asynchronous.arrivals is 3, and there are 2 clients; lower it",
        ),
        (
            lambda: rounds(synchronous(Clock(), 3), 2, 0, 1),
            "synchronous.asked is 3, and there are 2 clients; lower it",
        ),
        (
            lambda: rounds(synchronous(Clock(seconds=5.0), 1, deadline=4.0), 2, 0, 1),
            "nobody meets synchronous.deadline = 4.0: tried once, the fastest of 2 clients takes 5 ",
        ),
        (
            lambda: rounds(synchronous(Clock(drop_out=lognormal(2.0, 0.0)), 1), 2, 0, 1),
            "clock.drop_out must be a probability .* draws 2.0",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read: No such file or directory"),
        ("seconds\n1\n", "needs a header with client and any of .* it has seconds"),
        ("client,speed\nc0,1\n", "needs a header .* it has client, speed"),
        ("client,seconds\nc0,1\nc2,1\n", "lacks 1 of 2 clients, the first of them 'c1'"),
        (TABLE + "c0,3\n", "line 4: the client 'c0' stands there twice"),
        ("client,seconds\nc0,fast\n", "line 2: seconds must be numbers"),
        ("client,seconds\nc0,1\nc1\n", "line 3: seconds must be numbers"),
        ("client,seconds\nc0,-1\n", "line 2: clock.seconds must be finite and not negative"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(text, message, tmp_path):
    path = tmp_path / "clock.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message) as refused:
        rounds(synchronous(Clock(table=str(path)), 1), 2, 0, 1)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)
