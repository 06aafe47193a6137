"""The design's invariants of the round engine."""

from __future__ import annotations

import collections
import sys

import jax
import numpy as np
import optax
import pytest

from fedexp.algorithms import fedavg, scaffold
from fedexp.algorithms.base import Algorithm, ClientWork, RoundOutput
from fedexp.data import ClientBatching, FederatedDataset
from fedexp.errors import UserError
from fedexp.strategies import Runner, debug, jit, mesh, pmap
from fedexp.strategies.client_states import ClientStates
from fedexp.strategies.packed_tree import PackedTree
from tests.support import linear


def bind(strategy, algorithm=None, cohort_size=4, batching=None, dataset=None):
    task = linear.task()
    algorithm = algorithm or fedavg(task, optax.sgd(0.05), optax.sgd(1.0))
    params = task.init(jax.random.key(0), None)
    runner = Runner(
        strategy,
        algorithm,
        dataset or linear.dataset(),
        batching or ClientBatching(4),
        params=params,
        cohort_size=cohort_size,
        seed=0,
    )
    return runner, runner.start(params)


def test_many_cohorts_of_different_sizes_share_one_compilation():
    runner, state = bind(jit(2))
    rng = np.random.default_rng(0)
    for number in range(12):
        cohort = np.sort(rng.choice(len(linear.SIZES), rng.integers(1, 5), replace=False))
        state = runner.run(state, runner.prepare(number, cohort)).server_state
    assert runner.compilations == 1


@pytest.mark.parametrize("max_resident_bytes", [None, 1])
def test_hardly_any_cohort_of_unequal_clients_needs_shapes_of_its_own(max_resident_bytes):
    rng = np.random.default_rng(0)
    sizes = np.ceil(rng.lognormal(2.0, 1.0, 300)).astype(int)
    strategy = jit(1, max_resident_bytes=max_resident_bytes)
    runner, _ = bind(strategy, cohort_size=10, dataset=linear.dataset(tuple(sizes)))
    shapes = collections.Counter(
        (prepared.inputs.by_device.layout, len(prepared.examples["x"][0]))
        for number in range(1000)
        for prepared in [runner.prepare(number, rng.choice(300, 10, replace=False))]
    )
    assert shapes.most_common(1)[0][1] >= 998


def test_a_larger_cohort_takes_the_next_bucket():
    runner, state = bind(jit(1), cohort_size=2)
    for number, size in enumerate([2, 4, 3, 4, 1]):
        state = runner.run(state, runner.prepare(number, np.arange(size))).server_state
    assert runner.compilations == 2


def test_memory_is_given_back_after_compiling_and_not_otherwise(monkeypatch):
    rounds_done, released = [], []
    module = sys.modules[Runner.__module__]
    monkeypatch.setattr(module, "_LONG_COMPILATION", 0)
    monkeypatch.setattr(module, "release_memory", lambda: released.append(len(rounds_done)))
    runner, state = bind(jit(1), cohort_size=2)
    for number, size in enumerate([2, 2, 4, 4]):
        state = runner.run(state, runner.prepare(number, np.arange(size))).server_state
        rounds_done.append(number)
    assert released == [0, 2]


def test_a_round_is_one_dispatch():
    """No step is traced more than a handful of times, whatever the number of clients and steps."""
    traces = []

    def step(shared, carry, batch, key):
        traces.append(batch.mask.shape)
        return carry + batch.mask.sum()

    work = ClientWork(lambda shared, client: 0, step, lambda shared, carry, client: (carry, carry))

    def round_(state, cohort, for_each_client):
        total, each = for_each_client(work, None, cohort)
        return RoundOutput(state, {"examples": total, "clients/examples": each})

    runner, state = bind(jit(1), Algorithm(lambda params: params, round_))
    prepared = runner.prepare(0, np.array([1, 3, 4, 6]))
    metrics = runner.run(state, prepared).metrics
    assert metrics["examples"] == 9 + 14 + 7 + 11
    assert metrics["clients/examples"].tolist() == [9, 14, 7, 11]
    # Once to learn the carry's shape, once for the loop, once more where XLA wants stable types.
    assert len(traces) <= 3


def test_resident_and_streamed_examples_give_the_same_round():
    cohort = np.array([0, 3, 6])
    results = []
    for strategy in (jit(2), jit(2, max_resident_bytes=1)):
        runner, state = bind(strategy)
        prepared = runner.prepare(0, cohort)
        results.append(runner.run(state, prepared).server_state.params)
    np.testing.assert_array_equal(results[0]["w"], results[1]["w"])


@pytest.mark.parametrize("strategy", [debug, lambda: jit(1), lambda: jit(3), lambda: mesh(2)])
def test_what_other_clients_hold_never_counts(strategy):
    """Padding and idle lanes have to be filled with something: never with NaN of other clients."""
    cohort, results = np.array([3, 4, 6]), []
    for fill in (0, np.nan):
        clients = dict(linear.dataset().clients())
        for number, examples in enumerate(clients.values()):
            if number not in cohort:
                examples["x"] = np.full_like(examples["x"], fill)
        runner, state = bind(strategy(), dataset=FederatedDataset.from_clients(clients))
        for number in range(2):
            output = runner.run(state, runner.prepare(number, cohort))
            state = output.server_state
        results.append((state.params, output.metrics))
    assert np.isfinite(results[0][0]["w"]).all()
    jax.tree.map(np.testing.assert_array_equal, *results)


@pytest.mark.parametrize("max_resident_bytes", [None, 1])
def test_max_examples_is_as_if_clients_had_only_their_first_ones(max_resident_bytes):
    """Unshuffled, because a permutation of fewer examples draws other numbers."""
    whole = linear.dataset()
    clients = {cid: {k: v[:6] for k, v in examples.items()} for cid, examples in whole.clients()}
    truncated = FederatedDataset.from_clients(clients)
    results = []
    for dataset, limit in ((whole, 6), (truncated, None)):
        batching = ClientBatching(4, shuffle=False, max_examples=limit)
        strategy = jit(1, max_resident_bytes=max_resident_bytes)
        runner, state = bind(strategy, batching=batching, dataset=dataset)
        prepared = runner.prepare(0, np.array([0, 3, 6]))
        assert prepared.num_examples == 3 + 6 + 6
        results.append(runner.run(state, prepared).server_state.params["w"])
    np.testing.assert_array_equal(*results)


def test_resident_rounds_transfer_no_examples():
    runner, _ = bind(jit(1))
    first, second = runner.prepare(0, np.arange(4)), runner.prepare(1, np.arange(4))
    assert first.examples is second.examples


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_utilisation_is_real_over_computed_examples(lanes):
    runner, _ = bind(jit(lanes, batch_sizes=1))
    cohort = np.array([0, 3, 6])  # 3, 14 and 11 examples: 1, 4 and 3 batches of 4.
    longest = {1: 8, 2: 4, 3: 4}[lanes]
    assert runner.prepare(0, cohort).utilisation == pytest.approx(28 / (longest * lanes * 4))


def test_a_second_batch_size_saves_padding_and_changes_no_number():
    # Batches of 4 leave 3, 1, 1, 2, 3, 2 and 3 examples: half of these fit into batches of 2.
    cohort = np.arange(len(linear.SIZES))
    results = []
    for batch_sizes, computed in ((1, 64), (2, 64 - 4 * 2)):
        runner, state = bind(jit(1, batch_sizes=batch_sizes), cohort_size=len(cohort))
        prepared = runner.prepare(0, cohort)
        assert prepared.utilisation == pytest.approx(sum(linear.SIZES) / computed)
        results.append(runner.run(state, prepared).server_state.params["w"])
        assert runner.compilations == 1
    np.testing.assert_allclose(*results, rtol=1e-6)


def test_a_packed_tree_comes_back_as_it_was():
    tree = {
        "a": np.arange(12, dtype=np.int32).reshape(2, 3, 2),
        "b": (np.array([True, False]), np.zeros((2, 0), np.int32)),
    }
    packed = PackedTree.of([jax.tree.map(lambda leaf, i=i: leaf[i], tree) for i in range(2)])
    back = jax.jit(lambda packed: packed.unpack())(packed)
    assert packed.flat.shape == (2, 7)
    jax.tree.map(np.testing.assert_array_equal, back, tree)
    assert jax.tree.map(lambda leaf: leaf.dtype, back) == jax.tree.map(lambda a: a.dtype, tree)


def test_cohort_batches_depend_on_seed_round_and_client_alone():
    runner, _ = bind(jit(1))
    again, _ = bind(jit(1))
    few, many = runner.prepare(3, np.array([3])), again.prepare(3, np.array([1, 3, 6]))
    rows_of = lambda prepared: [  # noqa: E731
        row
        for row in np.asarray(prepared.inputs.by_device.unpack().schedule.rows).reshape(-1, 4)
        if (row >= 0).any()
    ]
    expected = {tuple(row) for row in rows_of(few)}
    assert expected <= {tuple(row) for row in rows_of(many)}


def test_debug_names_the_client_and_the_step():
    def step(shared, carry, batch, key):
        if batch.mask.sum() < 4:
            raise ZeroDivisionError("boom")
        return carry

    work = ClientWork(lambda s, c: 0, step, lambda s, carry, c: (carry, carry))
    algorithm = Algorithm(
        lambda params: params, lambda state, cohort, for_each: for_each(work, None, cohort)
    )
    runner, state = bind(debug(), algorithm)
    with pytest.raises(ZeroDivisionError) as caught:
        runner.run(state, runner.prepare(5, np.array([3])))
    assert caught.value.__notes__ == [
        "at local step 3",
        "at client 3 of the data set",
        "in round 5, whose clients are {3: 'client3'}",
    ]


def test_debug_stops_at_the_step_that_diverges():
    task = linear.task()
    runner, state = bind(debug(), fedavg(task, optax.sgd(1e30), optax.sgd(1.0)))
    with pytest.raises(FloatingPointError, match="not finite") as caught:
        runner.run(state, runner.prepare(0, np.array([3])))
    assert any("client3" in note for note in caught.value.__notes__)


@pytest.mark.parametrize("lanes", [0, -1, 1.5, "all"])
def test_bad_lanes_are_refused(lanes):
    with pytest.raises(UserError, match="lanes must be 'auto' or a number from 1"):
        jit(lanes)


def test_no_batch_size_is_refused():
    with pytest.raises(UserError, match="batch_sizes must be at least 1, got 0"):
        jit(batch_sizes=0)


def test_client_states_return_what_was_stored_and_survive_a_checkpoint():
    states = ClientStates({"c": np.zeros(2, np.float32)}, range(8))
    table = {"c": np.array([[1, 2], [9, 9], [3, 4]], np.float32)}
    states.scatter(np.array([5, 2]), np.array([0, 2]), table)
    gathered = states.gather(np.array([2, 7, 5]), np.array([0, 1, 3]), (2, 2))
    assert gathered["c"].tolist() == [[[3, 4], [0, 0]], [[0, 0], [1, 2]]]
    restored = ClientStates({"c": np.zeros(2, np.float32)}, range(8))
    restored.load(states.save())
    gathered = restored.gather(np.array([2, 5]), np.array([0, 1]), (2,))
    assert gathered["c"].tolist() == [[3, 4], [1, 2]]


def test_a_process_takes_over_the_states_of_its_own_clients_only():
    everything = ClientStates({"c": np.zeros(1, np.float32)}, range(8))
    everything.scatter(np.array([1, 6]), np.array([0, 1]), {"c": np.array([[1], [6]], np.float32)})
    own = ClientStates({"c": np.zeros(1, np.float32)}, range(4, 8))
    own.load(everything.save())
    assert own.save()["clients"].tolist() == [6]


def collectives(jaxpr, in_loop: bool = False) -> list[bool]:
    """One entry per collective of a program: whether it is inside a loop."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name.startswith(("psum", "all_gather", "all_reduce", "ppermute")):
            found.append(in_loop)
        inside = in_loop or equation.primitive.name in ("while", "scan")
        for part in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(part, "jaxpr", part)
            if hasattr(inner, "eqns"):
                found += collectives(inner, inside)
    return found


@pytest.mark.parametrize("strategy", [pmap, mesh])
@pytest.mark.parametrize(("option", "calls"), [(1, 2), (2, 1)])
def test_one_collective_per_for_each_client_and_none_in_the_loop(strategy, option, calls):
    runner, state = bind(strategy(), scaffold(linear.task(), 0.05, option=option))
    prepared = runner.prepare(0, np.array([0, 3]))
    states = runner.client_states.gather(
        prepared.clients, prepared.slots, (runner.placement.num_devices, prepared.num_slots)
    )
    program = jax.make_jaxpr(runner._body)(state, prepared.inputs, prepared.examples, states)
    assert collectives(program.jaxpr) == [False] * calls
