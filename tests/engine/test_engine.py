"""The design's invariants of the round engine."""

from __future__ import annotations

import collections
import re
import sys

import jax
import numpy as np
import optax
import pytest

from fedexp.aggregators import coordinate_median, top_k
from fedexp.algorithms import fedavg, mime, scaffold
from fedexp.contracts import Algorithm, ClientWork, RoundOutput
from fedexp.data import ClientBatching, FederatedDataset
from fedexp.engine import Engine, Packing, debug, jit, mesh, pmap
from fedexp.engine.client_states import ClientStates
from fedexp.engine.packed_tree import PackedTree
from fedexp.engine.runner import Runner
from fedexp.errors import UserError
from tests.support import linear
from tests.support.measured import numbers


def bind(strategy, algorithm=None, cohort_size=4, batching=None, dataset=None):
    task = linear.task()
    algorithm = algorithm or fedavg(task, optax.sgd(0.05), optax.sgd(1.0))
    params = task.init(jax.random.key(0), None)
    engine = Engine(
        strategy,
        algorithm,
        dataset or linear.dataset(),
        batching or ClientBatching(4),
        params=params,
        cohort_size=cohort_size,
        seed=0,
    )
    return engine, engine.start(params)


@pytest.mark.parametrize(("backend", "lanes"), [("cpu", 1), ("tpu", 1), ("gpu", 10)])
def test_lanes_are_chosen_by_backend(monkeypatch, backend, lanes):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert jit().num_lanes(10) == lanes and jit(Packing(lanes=3)).num_lanes(10) == 3


def test_many_cohorts_of_different_sizes_share_one_compilation():
    engine, state = bind(jit(Packing(lanes=2)))
    rng = np.random.default_rng(0)
    for number in range(12):
        cohort = np.sort(rng.choice(len(linear.SIZES), rng.integers(1, 5), replace=False))
        state = engine.run(state, engine.prepare(number, cohort)).state
    assert engine.runner.compilations == 1


@pytest.mark.parametrize("max_resident_bytes", [None, 1])
def test_hardly_any_cohort_of_unequal_clients_needs_shapes_of_its_own(max_resident_bytes):
    rng = np.random.default_rng(0)
    sizes = np.ceil(rng.lognormal(2.0, 1.0, 300)).astype(int)
    strategy = jit(Packing(lanes=1, max_resident_bytes=max_resident_bytes))
    engine, _ = bind(strategy, cohort_size=10, dataset=linear.dataset(tuple(sizes)))
    shapes = collections.Counter(
        (prepared.by_device.layout, len(prepared.examples["train"]["x"][0]))
        for number in range(1000)
        for prepared in [engine.prepare(number, rng.choice(300, 10, replace=False))]
    )
    assert shapes.most_common(1)[0][1] >= 998


def test_a_larger_cohort_takes_the_next_bucket():
    engine, state = bind(jit(Packing(lanes=1)), cohort_size=2)
    for number, size in enumerate([2, 4, 3, 4, 1]):
        state = engine.run(state, engine.prepare(number, np.arange(size))).state
    assert engine.runner.compilations == 2


def test_compilations_are_what_jax_tells():
    """Not what is traced: a state that lies elsewhere is compiled for anew, without another trace."""
    told = []

    def note(event, duration, **about):
        if event == "/jax/core/compile/backend_compile_duration":
            told.append(about["fun_name"])

    engine, state = bind(jit(), cohort_size=2)
    move = {3: jax.device_get, 4: lambda state: jax.device_put(state, jax.devices()[0])}
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        for number, size in enumerate([2, 4, 3, 2, 1]):
            if number in move:
                state = move[number](jax.device_get(state))
            state = engine.run(state, engine.prepare(number, np.arange(size))).state
            assert engine.runner.compilations == len(told)
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert told == ["jit(_traced)"] * 4


def test_memory_is_given_back_after_compiling_and_not_otherwise(monkeypatch):
    rounds_done, released = [], []
    module = sys.modules[Runner.__module__]
    monkeypatch.setattr(module, "_LONG_COMPILATION", 0)
    monkeypatch.setattr(module, "release_memory", lambda: released.append(len(rounds_done)))
    engine, state = bind(jit(Packing(lanes=1)), cohort_size=2)
    for number, size in enumerate([2, 2, 4, 4]):
        state = engine.run(state, engine.prepare(number, np.arange(size))).state
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
        return RoundOutput(state, {"examples": total}, {"clients/examples": each})

    engine, state = bind(jit(Packing(lanes=1)), Algorithm(lambda params, key: params, round_))
    prepared = engine.prepare(0, np.array([1, 3, 4, 6]))
    metrics = numbers(engine.run(state, prepared), prepared)
    assert metrics["examples"] == 9 + 14 + 7 + 11
    assert metrics["clients/examples"].tolist() == [9, 14, 7, 11]
    # Once to learn the carry's shape, once for the loop, once more where XLA wants stable types.
    assert len(traces) <= 3


def test_resident_and_streamed_examples_give_the_same_round():
    cohort = np.array([0, 3, 6])
    results = []
    for strategy in (jit(Packing(lanes=2)), jit(Packing(lanes=2, max_resident_bytes=1))):
        engine, state = bind(strategy)
        prepared = engine.prepare(0, cohort)
        results.append(engine.run(state, prepared).state.params)
    np.testing.assert_array_equal(results[0]["w"], results[1]["w"])


@pytest.mark.parametrize(
    "strategy",
    [
        debug,
        lambda: jit(Packing(lanes=1)),
        lambda: jit(Packing(lanes=3)),
        lambda: mesh(Packing(lanes=2)),
    ],
)
def test_what_other_clients_hold_never_counts(strategy):
    """Padding and idle lanes have to be filled with something: never with NaN of other clients."""
    cohort, results = np.array([3, 4, 6]), []
    for fill in (0, np.nan):
        clients = dict(linear.dataset().clients())
        for number, examples in enumerate(clients.values()):
            if number not in cohort:
                examples["x"] = np.full_like(examples["x"], fill)
        engine, state = bind(strategy(), dataset=FederatedDataset.from_clients(clients))
        for number in range(2):
            output = engine.run(state, engine.prepare(number, cohort))
            state = output.state
        results.append((state.params, dict(output.metrics), dict(output.per_client)))
    assert np.isfinite(results[0][0]["w"]).all()
    jax.tree.map(np.testing.assert_array_equal, *results)


def with_empty_cohort(name, strategy):
    """The states after a cohort, an empty one and another, and the metrics of the empty one."""
    task, momentum = linear.task(), optax.sgd(1.0, momentum=0.9)
    algorithm = {
        "fedavg": lambda: fedavg(task, optax.sgd(0.05), momentum),
        "chain": lambda: fedavg(
            task, optax.sgd(0.05), momentum, aggregator=[top_k(0.5), coordinate_median()]
        ),
        "scaffold": lambda: scaffold(task, 0.05, momentum, option=1),
    }[name]()
    engine, state = bind(strategy, algorithm)
    states = []
    for number, cohort in enumerate(([0, 3, 6], [], [1, 3])):
        prepared = engine.prepare(number, np.array(cohort, np.int64))
        output = engine.run(state, prepared)
        state = output.state
        states.append(jax.device_get(state))
        if not cohort:
            metrics = numbers(output, prepared)
    return states, metrics


@pytest.mark.parametrize("name", ["fedavg", "chain", "scaffold"])
def test_an_empty_cohort_is_a_round_under_every_strategy(name):
    expected, metrics = with_empty_cohort(name, debug())
    first, empty, _ = (state.params["w"] for state in expected)
    start = linear.task().init(jax.random.key(0), None)["w"]
    np.testing.assert_allclose(empty - first, 0.9 * (first - start), rtol=1e-4)
    assert metrics["train/update_norm"] == 0 and np.isnan(metrics["train/loss"])
    streamed = Packing(lanes=3, max_resident_bytes=1)
    for strategy in (jit(Packing(lanes=1)), jit(streamed), mesh(Packing(lanes=3))):
        states, found = with_empty_cohort(name, strategy)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), states, expected
        )
        assert found.keys() == metrics.keys()
        for key, value in metrics.items():
            np.testing.assert_array_equal(found[key], value)


@pytest.mark.parametrize("max_resident_bytes", [None, 1])
def test_max_examples_is_as_if_clients_had_only_their_first_ones(max_resident_bytes):
    """Unshuffled, because a permutation of fewer examples draws other numbers."""
    whole = linear.dataset()
    clients = {cid: {k: v[:6] for k, v in examples.items()} for cid, examples in whole.clients()}
    truncated = FederatedDataset.from_clients(clients)
    results = []
    for dataset, limit in ((whole, 6), (truncated, None)):
        batching = ClientBatching(4, shuffle=False, max_examples=limit)
        strategy = jit(Packing(lanes=1, max_resident_bytes=max_resident_bytes))
        engine, state = bind(strategy, batching=batching, dataset=dataset)
        prepared = engine.prepare(0, np.array([0, 3, 6]))
        assert prepared.num_examples == 3 + 6 + 6
        results.append(engine.run(state, prepared).state.params["w"])
    np.testing.assert_array_equal(*results)


def test_resident_rounds_transfer_no_examples():
    engine, _ = bind(jit(Packing(lanes=1)))
    first, second = engine.prepare(0, np.arange(4)), engine.prepare(1, np.arange(4))
    assert first.examples["train"] is second.examples["train"]


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_utilisation_is_real_over_computed_examples(lanes):
    engine, _ = bind(jit(Packing(lanes=lanes, batch_sizes=1)))
    cohort = np.array([0, 3, 6])  # 3, 14 and 11 examples: 1, 4 and 3 batches of 4.
    longest = {1: 8, 2: 4, 3: 4}[lanes]
    assert engine.prepare(0, cohort).utilisation == pytest.approx(28 / (longest * lanes * 4))


def test_a_second_batch_size_saves_padding_and_changes_no_number():
    # Batches of 4 leave 3, 1, 1, 2, 3, 2 and 3 examples: half of these fit into batches of 2.
    cohort = np.arange(len(linear.SIZES))
    results = []
    for batch_sizes, computed in ((1, 64), (2, 64 - 4 * 2)):
        strategy = jit(Packing(lanes=1, batch_sizes=batch_sizes))
        engine, state = bind(strategy, cohort_size=len(cohort))
        prepared = engine.prepare(0, cohort)
        assert prepared.utilisation == pytest.approx(sum(linear.SIZES) / computed)
        results.append(engine.run(state, prepared).state.params["w"])
        assert engine.runner.compilations == 1
    np.testing.assert_allclose(*results, rtol=1e-6)


def test_a_packed_tree_comes_back_as_it_was():
    tree = {
        "a": np.arange(12, dtype=np.int32).reshape(2, 3, 2),
        "b": (np.array([True, False]), np.zeros((2, 0), np.int32)),
        "c": np.array([[0.1, -0.0], [np.nan, 1e-42]], np.float32),
    }
    packed = PackedTree.of([jax.tree.map(lambda leaf, i=i: leaf[i], tree) for i in range(2)])
    back = jax.device_get(jax.jit(lambda packed: packed.unpack())(packed))
    assert packed.flat.shape == (2, 9)
    assert jax.tree.map(lambda leaf: leaf.dtype, back) == jax.tree.map(lambda a: a.dtype, tree)
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.tobytes(), b.tobytes()), back, tree)


def test_cohort_batches_depend_on_seed_round_and_client_alone():
    engine, _ = bind(jit(Packing(lanes=1)))
    again, _ = bind(jit(Packing(lanes=1)))
    few, many = engine.prepare(3, np.array([3])), again.prepare(3, np.array([1, 3, 6]))

    def batches(prepared):
        rows = np.asarray(prepared.by_device.unpack().passes["train"].schedule.rows)
        return {tuple(row) for row in rows.reshape(-1, 4) if (row >= 0).any()}

    assert batches(few) <= batches(many)


def test_debug_names_the_client_and_the_step():
    def step(shared, carry, batch, key):
        if batch.mask.sum() < 4:
            raise ZeroDivisionError("boom")
        return carry

    work = ClientWork(lambda s, c: 0, step, lambda s, carry, c: (carry, carry))
    algorithm = Algorithm(
        lambda params, key: params, lambda state, cohort, for_each: for_each(work, None, cohort)
    )
    engine, state = bind(debug(), algorithm)
    with pytest.raises(ZeroDivisionError) as caught:
        engine.run(state, engine.prepare(5, np.array([3])))
    notes = [note for note in caught.value.__notes__ if not note.startswith("fedexp was calling")]
    assert notes == [
        "at local step 3",
        "at client 3 of the data set",
        "in round 5, whose clients are {3: 'client3'}",
    ]


def test_debug_stops_at_the_step_that_diverges():
    task = linear.task()
    engine, state = bind(debug(), fedavg(task, optax.sgd(1e30), optax.sgd(1.0)))
    with pytest.raises(FloatingPointError, match="not finite") as caught:
        engine.run(state, engine.prepare(0, np.array([3])))
    assert any("client3" in note for note in caught.value.__notes__)


@pytest.mark.parametrize("lanes", [0, -1, 1.5, "all"])
def test_bad_lanes_are_refused(lanes):
    with pytest.raises(UserError, match="lanes must be 'auto' or a number from 1"):
        Packing(lanes=lanes)


def test_no_batch_size_is_refused():
    with pytest.raises(UserError, match="batch_sizes must be at least 1, got 0"):
        Packing(batch_sizes=0)


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


@pytest.mark.parametrize("strategy", [jit, pmap, mesh])
def test_devices_do_not_ask_each_other_for_what_all_of_them_know(strategy):
    placement = strategy().placement
    rows = placement.split(np.full((placement.num_devices, 3), 7, np.int32))
    program = jax.jit(lambda rows: placement.keep_replicated(placement.any_row(rows)))
    assert program(rows).tolist() == [7, 7, 7]
    text = program.lower(rows).compile().as_text()
    assert not re.search("all-|collective|broadcast-", text)


@pytest.mark.parametrize("strategy", [pmap, mesh])
@pytest.mark.parametrize(
    ("algorithm", "sums"),
    [
        (lambda task: scaffold(task, 0.05, option=1), 1),  # Full gradients stay with their clients.
        (lambda task: scaffold(task, 0.05, option=2), 1),
        (lambda task: mime(task, optax.sgd(0.05), full_batch_size=5), 2),
    ],
)
def test_one_collective_per_for_each_client_and_none_in_the_loop(strategy, algorithm, sums):
    """For what a call adds up; one that adds up nothing needs none."""
    engine, state = bind(strategy(), algorithm(linear.task()))
    prepared = engine.prepare(0, np.array([0, 3]))
    shape = (engine.placement.num_devices, prepared.num_slots)
    states = engine.client_states and engine.client_states.gather(
        prepared.clients, prepared.slots, shape
    )
    root = np.asarray(jax.random.key_data(engine.root))
    arguments = (None, root, prepared.by_device, prepared.examples, states, None)
    program = jax.make_jaxpr(engine.runner.body)(state, *arguments)
    assert collectives(program.jaxpr) == [False] * sums
