"""ClientBatching against the definition of an epoch."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedexp.data.batching import ClientBatching
from fedexp.errors import UserError

sizes = st.integers(1, 60)
batch_sizes = st.integers(1, 25)
batchings = st.builds(
    ClientBatching,
    batch_sizes,
    st.integers(1, 3),
    st.sampled_from([None, 1, 5]),
    remainder=st.sampled_from(["mask", "drop", "fill"]),
)


def draw(batching: ClientBatching, size: int) -> np.ndarray:
    return batching.order(np.array([size]), np.array([0]), [[0]])


@given(sizes, batch_sizes, st.integers(1, 3), st.booleans())
def test_every_epoch_visits_every_example_once(size, batch_size, epochs, shuffle):
    batching = ClientBatching(batch_size, local_epochs=epochs, shuffle=shuffle)
    batches = draw(batching, size)
    per_epoch = -(-size // batch_size)
    assert batches.shape == (epochs * per_epoch, batch_size)
    assert batching.num_steps(np.array([size])) == [len(batches)]
    for epoch in np.split(batches, epochs):
        real = epoch[epoch >= 0]
        assert sorted(real) == list(range(size))
        assert (epoch[:-1] >= 0).all(), "only an epoch's last batch is padded"


@given(sizes, batch_sizes, st.integers(1, 3))
def test_dropping_the_remainder_leaves_full_batches(size, batch_size, epochs):
    batching = ClientBatching(batch_size, local_epochs=epochs, remainder="drop")
    batches = draw(batching, size)
    assert batching.num_steps(np.array([size])) == [len(batches)]
    if size >= batch_size:
        assert (batches >= 0).all()
        assert len(batches) == epochs * (size // batch_size)
    else:
        assert len(batches) == epochs
        assert ((batches >= 0).sum(axis=1) == size).all()


@given(sizes, batch_sizes, st.integers(1, 7))
def test_local_steps_are_full_batches_of_whole_passes(size, batch_size, steps):
    batching = ClientBatching(batch_size, local_steps=steps)
    batches = draw(batching, size)
    assert batches.shape == (steps, batch_size)
    assert batching.num_steps(np.array([size])) == [steps]
    visits = np.bincount(batches.ravel(), minlength=size)
    assert visits.max() - visits.min() <= 1


@given(sizes, batch_sizes, st.integers(1, 3))
def test_filling_the_last_batch_visits_no_example_twice_more_than_another(size, batch_size, epochs):
    batching = ClientBatching(batch_size, local_epochs=epochs, remainder="fill")
    batches = draw(batching, size)
    assert len(batches) == -(-epochs * size // batch_size)
    assert batching.num_steps(np.array([size])) == [len(batches)]
    visits = np.bincount(batches.ravel(), minlength=size)
    assert epochs <= visits.min() and visits.max() - visits.min() <= 1


def test_an_unknown_remainder_is_refused():
    with pytest.raises(UserError, match="'mask', 'drop' or 'fill', got 'keep'"):
        ClientBatching(remainder="keep")


@given(sizes, batchings)
def test_num_examples_counts_what_is_not_padding(size, batching):
    real = (draw(batching, size) >= 0).sum()
    assert batching.num_examples(np.array([size])) == [real]


@given(st.lists(sizes, min_size=1, max_size=5), batchings)
def test_fill_counts_counts_real_examples_per_batch(sizes, batching):
    real = np.concatenate([(draw(batching, size) >= 0).sum(axis=1) for size in sizes])
    expected = np.bincount(real, minlength=batching.batch_size + 1)
    np.testing.assert_array_equal(batching.fill_counts(np.array(sizes)), expected)


@given(st.lists(sizes, max_size=5), batchings, st.booleans())
def test_a_cohort_is_its_clients_one_by_one(sizes, batching, shuffle):
    batching = dataclasses.replace(batching, shuffle=shuffle)
    sizes, firsts = np.array(sizes, np.int64), 1000 * np.arange(len(sizes))
    seeds = [[0, client] for client in range(len(sizes))]
    together = batching.order(sizes, firsts, seeds)
    assert len(together) == batching.num_steps(sizes).sum()
    begin = 0
    for client in range(len(sizes)):
        one = slice(client, client + 1)
        alone = batching.order(sizes[one], np.array([0]), seeds[one])
        shifted = np.where(alone >= 0, alone + 1000 * client, -1)
        np.testing.assert_array_equal(together[begin : begin + len(alone)], shifted)
        begin += len(alone)


def test_padding_comes_last():
    batches = draw(ClientBatching(4, local_epochs=3), 10)
    real = batches >= 0
    assert (real[:, :-1] >= real[:, 1:]).all()


def test_shuffling_differs_between_epochs():
    first, second = np.split(draw(ClientBatching(10, local_epochs=2), 50), 2)
    assert (first != second).any()


@pytest.mark.parametrize("field", ["batch_size", "local_epochs", "local_steps", "max_examples"])
def test_zero_is_refused_by_name(field):
    with pytest.raises(UserError, match=f"{field} must be from 1 .*, got 0"):
        ClientBatching(**{field: 0})


def test_places_that_no_client_fills_are_left_out():
    sizes = np.array([3, 7])
    assert ClientBatching(1_000_000).fitted(sizes).batch_size == 7
    assert ClientBatching(5).fitted(sizes) == ClientBatching(5)
    with pytest.raises(UserError, match="batch_size is 11, and all clients together have 10"):
        ClientBatching(11, remainder="fill").fitted(sizes)
    with pytest.raises(UserError, match="train on 7,000,000,000 examples a round"):
        ClientBatching(local_epochs=10**9).fitted(sizes)
