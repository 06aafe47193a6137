"""FederatedDataset, against plain Python: {client id: {feature: array}} and lists of rows."""

import mmap

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from fedexp.data.dataset import FederatedDataset, FederatedSplits
from fedexp.errors import UserError

Clients = dict[str, dict[str, np.ndarray]]
SEEDS = st.integers(0, 2**32)


@st.composite
def clients_strategy(draw, min_size: int = 1) -> Clients:
    """Clients whose rows are all different, so that a misplaced one shows."""
    sizes = draw(st.lists(st.integers(min_size, 6), min_size=1, max_size=6))
    ids = draw(
        st.lists(
            st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=5),
            min_size=len(sizes),
            max_size=len(sizes),
            unique=True,
        )
    )
    rows = iter(np.arange(2 * sum(sizes), dtype=np.float32).reshape(-1, 2))
    return {
        client_id: {
            "x": np.array([next(rows) for _ in range(size)], np.float32).reshape(size, 2),
            "y": np.array([draw(st.integers(0, 4)) for _ in range(size)], np.int32),
        }
        for client_id, size in zip(ids, sizes, strict=True)
    }


def _assert_holds(dataset: FederatedDataset, clients: Clients) -> None:
    found = list(dataset.clients())
    assert [client_id for client_id, _ in found] == list(clients)
    for (_, examples), expected in zip(found, clients.values(), strict=True):
        assert set(examples) == set(expected)
        for name in expected:
            np.testing.assert_array_equal(examples[name], expected[name])
            assert examples[name].dtype == expected[name].dtype


def _rows(dataset: FederatedDataset) -> list[tuple]:
    return [(client_id, tuple(x)) for client_id, e in dataset.clients() for x in e["x"]]


@hypothesis.given(clients_strategy())
def test_holds_its_clients(clients):
    dataset = FederatedDataset.from_clients(clients)
    _assert_holds(dataset, clients)
    sizes = [len(examples["y"]) for examples in clients.values()]
    assert dataset.num_clients == len(clients)
    assert dataset.num_examples == sum(sizes)
    assert dataset.nbytes == sum(sizes) * (2 * 4 + 4)
    assert dataset.client_sizes.tolist() == sizes
    assert dataset.client_of_example.tolist() == [i for i, n in enumerate(sizes) for _ in range(n)]
    rows = np.arange(dataset.num_examples)
    np.testing.assert_array_equal(dataset.clients_of(rows), dataset.client_of_example)


@hypothesis.given(clients_strategy(min_size=0))
def test_empty_clients_are_refused_or_dropped(clients):
    full = {client_id: e for client_id, e in clients.items() if len(e["y"])}
    if full != clients:
        first = next(client_id for client_id in clients if client_id not in full)
        with pytest.raises(UserError) as error:
            FederatedDataset.from_clients(clients)
        assert f"client {first!r} has no examples" in str(error.value)
        assert f"({len(clients) - len(full)} of {len(clients)} clients are empty)" in str(
            error.value
        )
    if full:
        _assert_holds(FederatedDataset.from_clients(clients, drop_empty=True), full)
    else:
        with pytest.raises(UserError, match="at least one client"):
            FederatedDataset.from_clients(clients, drop_empty=True)


@hypothesis.given(clients_strategy())
def test_whose_a_row_is(clients):
    dataset = FederatedDataset.from_clients(clients)
    owners = [i for i, examples in enumerate(clients.values()) for _ in examples["y"]]
    assert dataset.client_of_example.tolist() == owners
    found = dataset.clients_of(np.arange(len(owners))[::-1])
    assert found.tolist() == owners[::-1]
    assert found.dtype == dataset.client_of_example.dtype == np.int32


@hypothesis.given(clients_strategy(), st.data())
def test_select_clients(clients, data):
    dataset, ids = FederatedDataset.from_clients(clients), list(clients)
    index = st.integers(0, len(ids) - 1)
    chosen = data.draw(st.lists(index, min_size=1, unique=True))
    expected = {ids[i]: clients[ids[i]] for i in chosen}
    _assert_holds(dataset.select_clients(chosen), expected)
    _assert_holds(dataset.select_clients([i - len(ids) for i in chosen]), expected)
    mask = np.isin(np.arange(len(ids)), chosen)
    _assert_holds(dataset.select_clients(mask), {ids[i]: clients[ids[i]] for i in sorted(chosen)})


@hypothesis.given(clients_strategy(), st.data())
def test_gather_and_slice(clients, data):
    dataset = FederatedDataset.from_clients(clients)
    x = [row.tolist() for e in clients.values() for row in e["x"]]
    rows = data.draw(st.lists(st.integers(0, len(x) - 1)))
    assert dataset.gather(np.array(rows, int))["x"].tolist() == [x[i] for i in rows]
    start, stop = data.draw(st.integers(0, len(x))), data.draw(st.integers(0, len(x)))
    assert dataset.slice(start, stop)["x"].tolist() == x[start:stop]


@hypothesis.given(clients_strategy(), st.floats(0.01, 0.99), SEEDS)
def test_split_examples(clients, fraction, seed):
    dataset = FederatedDataset.from_clients(clients)
    if max(dataset.client_sizes) == 1:
        with pytest.raises(UserError, match="at least two"):
            dataset.split_examples(fraction, seed=seed)
        return
    first, second = dataset.split_examples(fraction, seed=seed)
    assert sorted(_rows(first) + _rows(second)) == sorted(_rows(dataset))
    assert first.client_ids.tolist() == list(clients)
    assert second.client_ids.tolist() == [cid for cid, e in clients.items() if len(e["y"]) > 1]
    for (_, examples), e in zip(first.clients(), clients.values(), strict=True):
        size = len(e["y"])
        wanted = 1 if size == 1 else min(max(round(fraction * size), 1), size - 1)
        assert len(examples["y"]) == wanted
        assert (np.diff(examples["x"][:, 0]) > 0).all()  # The order is kept.
    again, _ = dataset.split_examples(fraction, seed=seed)
    assert _rows(again) == _rows(first)


def test_a_split_depends_on_the_seed():
    clients = {f"c{i}": {"x": np.arange(200.0).reshape(100, 2)} for i in range(50)}
    dataset = FederatedDataset.from_clients(clients)
    first, other = (dataset.split_examples(0.5, seed=seed)[0] for seed in (0, 1))
    assert _rows(first) != _rows(other)


@hypothesis.given(clients_strategy(), st.sampled_from([np.int32, np.uint8, np.uint64]))
def test_label_histogram(clients, dtype):
    clients = {cid: {"y": e["y"].astype(dtype)} for cid, e in clients.items()}
    histogram = FederatedDataset.from_clients(clients).label_histogram(6)
    assert histogram.dtype == np.int64
    assert histogram.tolist() == [
        [list(e["y"]).count(c) for c in range(6)] for e in clients.values()
    ]


@hypothesis.given(clients_strategy())
def test_client_index_is_a_sequence_index(clients):
    dataset, examples = FederatedDataset.from_clients(clients), list(clients.values())
    for index in range(-len(clients), len(clients)):
        assert dataset.client(index)["x"].tolist() == examples[index]["x"].tolist()
    for index in (len(clients), -len(clients) - 1):
        with pytest.raises(IndexError):
            dataset.client(index)


def _dataset(**changes) -> FederatedDataset:
    fields = {
        "features": {"x": np.arange(6), "y": np.arange(6)},
        "offsets": np.array([0, 2, 3, 6]),
        "client_ids": np.array(["a", "b", "c"]),
    }
    return FederatedDataset(**fields | changes)


def test_is_immutable_and_copies_nothing():
    x = np.arange(6)
    dataset = _dataset(features={"x": x})
    for array in (dataset.features["x"], dataset.offsets, dataset.client_ids, dataset.client_sizes):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = array[1]
    with pytest.raises(ValueError, match="read-only"):
        dataset.client(0)["x"][0] = 1
    assert x.flags.writeable
    assert np.shares_memory(dataset.features["x"], x)
    assert np.shares_memory(dataset.client(1)["x"], x)
    assert np.shares_memory(dataset.select_clients([1, 2]).features["x"], x)
    assert not np.shares_memory(dataset.select_clients([2, 1]).features["x"], x)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": {}}, "at least one feature"),
        ({"offsets": [0, 6]}, "3 client ids need 4 offsets .* got 2 offsets"),
        ({"offsets": [0], "client_ids": []}, "at least one client"),
        ({"offsets": [1, 2, 3, 6]}, "start at 0, got 1"),
        ({"offsets": [0, 2, 3, 7]}, r"feature 'x' has the shape \(6,\), .* 7"),
        ({"features": {"x": np.arange(6), "y": np.array(6)}}, r"feature 'y' has the shape \(\)"),
        ({"offsets": [0, 2, 2, 6]}, r"client 'b' has no examples \(1 of 3 .*drop_empty=True"),
        ({"offsets": [0, 4, 3, 6]}, "client 'b' has no examples"),
        ({"client_ids": ["a", "b", "a"]}, "client id 'a' occurs more than once"),
    ],
)
def test_refuses_what_is_no_partition(changes, message):
    with pytest.raises(UserError, match=message):
        _dataset(**changes)


@pytest.mark.parametrize(
    ("clients", "message"),
    [
        ({}, "at least one client"),
        ({"a": {}}, "client 'a' has no examples"),
        ({"a": {"x": []}, "b": {"x": [1]}}, "client 'a' has no examples"),
        ({"a": {"x": 1}}, "'a' has features of different lengths, or of none"),
        ({"a": {"x": [1], "y": [1, 2]}}, "'a' has features of different lengths"),
        ({"a": {"x": [1]}, "b": {"y": [1]}}, "'b' has features .* but client 'a' has"),
        ({"a": {"x": [1]}, "b": {"x": [1.0]}}, "'b' has features .* but client 'a' has"),
        ({"a": {"x": [1]}, "b": {"x": [[1]]}}, "'b' has features .* but client 'a' has"),
    ],
)
def test_from_clients_refuses_what_does_not_fit(clients, message):
    with pytest.raises(UserError, match=message):
        FederatedDataset.from_clients(clients)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda d: d.select_clients([]), "none was selected"),
        (lambda d: d.select_clients([3]), r"in \[-3, 3\), got 3 to 3"),
        (lambda d: d.select_clients([0, -4]), "got -4 to 0"),
        (lambda d: d.select_clients([True, False]), r"mask of 3 clients .* \(2,\)"),
        (lambda d: d.select_clients([0, -3]), "'a' occurs more than once"),
        (lambda d: d.split_examples(1.0), "between 0 and 1, got 1.0"),
        (lambda d: d.label_histogram(6, label="z"), r"no feature 'z'; there are \['x', 'y'\]"),
        (lambda d: d.label_histogram(5), r"in \[0, 5\), got 0 to 5"),
        (lambda d: _dataset(features={"y": -np.arange(6)}).label_histogram(5), "got -5 to 0"),
        (lambda d: _dataset(features={"y": np.ones(6)}).label_histogram(5), "dtype float64"),
        (
            lambda d: _dataset(features={"y": np.ones((6, 1), int)}).label_histogram(5),
            r"shape \(6, 1\)",
        ),
    ],
)
def test_refuses_bad_arguments(use, message):
    with pytest.raises(UserError, match=message):
        use(_dataset())


class RecordedMap(mmap.mmap):
    """Notes which bytes it is asked to read."""

    def __init__(self, *args):
        self.advice = []

    def madvise(self, advice, start, length):
        super().madvise(advice, start, length)
        assert start % mmap.PAGESIZE == 0
        self.advice.append((start, start + length))


@pytest.mark.skipif(not hasattr(mmap, "MADV_WILLNEED"), reason="the system takes no advice")
def test_prefetch_asks_for_the_pages_of_the_clients():
    row_bytes, sizes = 1000, [3, 5, 1, 7, 9, 2]
    memory = RecordedMap(-1, row_bytes * sum(sizes))
    mapped = np.ndarray((sum(sizes), row_bytes), np.uint8, buffer=memory)
    ids = np.array([f"c{i}" for i in range(len(sizes))])
    dataset = FederatedDataset(
        {"x": mapped, "y": np.arange(sum(sizes))}, np.cumsum([0, *sizes]), ids
    )
    dataset.prefetch([5, 1])
    wanted = [(25_000, 27_000), (3_000, 8_000)]
    expected = [(begin - begin % mmap.PAGESIZE, end) for begin, end in wanted]
    assert memory.advice == expected
    memory.advice.clear()
    dataset.select_clients([1, 2, 3, 4, 5]).prefetch(np.array([4, 0]))  # A view of the same map.
    assert memory.advice == expected
    memory.advice.clear()
    FederatedDataset({"x": mapped[:, ::2]}, dataset.offsets, ids).prefetch([0])
    assert memory.advice == []


@hypothesis.given(clients_strategy(), st.randoms())
def test_rows_of_clients_of_another_data_set(clients, random):
    dataset = FederatedDataset.from_clients(clients)
    for wanted in (
        list(clients),
        random.sample([*clients, "of another", "zzzzzzzzzz"], random.randint(0, len(clients))),
        [*clients, *clients, "of another", ""],
    ):
        starts, sizes = dataset.rows_of(wanted)
        assert starts.dtype == sizes.dtype == np.int64
        assert starts.shape == sizes.shape == (len(wanted),)
        for client_id, start, size in zip(wanted, starts, sizes, strict=True):
            if client_id not in clients:
                assert (start, size) == (0, 0)
                continue
            np.testing.assert_array_equal(
                dataset.slice(start, start + size)["x"], clients[client_id]["x"]
            )


def _small(x=((0.0,), (1.0,), (2.0,)), ids=("a", "b"), offsets=(0, 1, 3), name="x"):
    return FederatedDataset({name: np.array(x, np.float32)}, offsets, np.array(ids))


def test_fingerprint_is_of_clients_and_layout():
    found = _small().fingerprint()
    assert (
        found == "e75f07b0da340b9d345ca3873842755c"
    )  # Also in another process, and in later versions.
    assert found == _small(x=((5.0,), (6.0,), (7.0,))).fingerprint()
    others = [
        _small(ids=("a", "c")),
        _small(ids=("b", "a")),
        _small(offsets=(0, 2, 3)),
        _small(name="y"),
        _small(x=((0.0, 0.0), (1.0, 0.0), (2.0, 0.0))),
        FederatedDataset({"x": np.zeros((3, 1))}, [0, 1, 3], np.array(["a", "b"])),
    ]
    assert len({found, *(other.fingerprint() for other in others)}) == 7


def test_fingerprint_of_a_selection_is_that_of_the_same_clients():
    dataset = _small(
        x=((0.0,), (1.0,), (2.0,), (3.0,)), ids=("a", "b", "of a long name"), offsets=(0, 1, 3, 4)
    )
    selection = dataset.select_clients([0, 1])
    assert selection.client_ids.dtype != _small().client_ids.dtype
    assert selection.fingerprint() == _small().fingerprint()


def test_partitions_that_are_there():
    splits = FederatedSplits(_small(), _small())
    assert splits.validation is None
    assert list(splits.present()) == ["train", "test"]
    assert list(splits._replace(validation=_small()).present()) == ["train", "test", "validation"]


def _one(*rows: object, dtype: object = None, name: str = "x") -> FederatedDataset:
    """The clients 'a' with the first row and 'b' with the others."""
    return FederatedDataset({name: np.array(rows, dtype)}, [0, 1, len(rows)], np.array(["a", "b"]))


@pytest.mark.parametrize(
    ("test", "message"),
    [
        (_one(0, 1, name="y"), r"'test' has the features 'y' \(.* but 'train' has 'x' \("),
        (
            _one(0, 1, dtype=np.float32),
            r"'test' has .* \(float32, 0 axes .*'train' has .*\(uint8, 0",
        ),
        (
            _one([0], [1], dtype=np.uint8),
            r"'test' has .*\(uint8, 1 axes an .*'train' has .*, 0 axes",
        ),
        (None, "'test' must be a FederatedDataset, got NoneType"),
        ({"x": 1}, "'test' must be a FederatedDataset, got dict"),
    ],
)
def test_partitions_that_do_not_fit_each_other(test, message):
    train = _one(0, 1, dtype=np.uint8)
    with pytest.raises(UserError, match=message):
        FederatedSplits(train, test)
    with pytest.raises(UserError, match=message):
        FederatedSplits(train, train)._replace(test=test)


def test_partitions_may_differ_in_what_no_device_sees():
    FederatedSplits(_one(0, 1, dtype=np.int64), _one(0, 1, dtype=np.int32))
    FederatedSplits(_one([0], [1]), _one([0, 1], [1, 0]))  # Longer sentences.


@pytest.mark.parametrize(
    ("rows", "dtype", "message"),
    [
        (
            (0, 1, 4294967303),
            np.int64,
            "client 'b', feature 'x': the value 4294967303 does not fit int32",
        ),
        ((-(2**31) - 1, 1), np.int64, "client 'a', .* -2147483649 does not fit int32"),
        ((2**32, 1), np.uint64, "client 'a', .* 4294967296 does not fit uint32"),
        ((0.0, 1.0, np.nan), np.float32, "client 'b', .* nan is not finite"),
        (([0.0, -np.inf], [1.0, 0.0]), np.float64, "client 'a', .* -inf is not finite"),
        ((1.0, 1e300), np.float64, r"client 'b', .* 1e\+300 does not fit float32"),
        ((1.0, np.inf), np.float16, "client 'b', .* inf is not finite"),
        ((1.0, np.nan), jnp.bfloat16, "client 'b', .* nan is not finite"),
        (("ü", "w"), None, "client 'a', .* dtype is <U1"),
        ((b"u", "w"), object, "client 'a', .* dtype is object"),
    ],
)
def test_values_that_no_device_holds(rows, dtype, message):
    good = _one(*rows[:1] * 2, dtype=dtype) if message.startswith("client 'b'") else None
    bad = _one(*rows, dtype=dtype)
    with pytest.raises(UserError, match=f"'train', {message}"):
        FederatedSplits(bad, bad)
    if good is not None:
        with pytest.raises(UserError, match=f"'test', {message}"):
            FederatedSplits(good, bad)


@pytest.mark.parametrize(
    ("rows", "dtype"),
    [
        ((2**31 - 1, -(2**31)), np.int64),
        ((2**32 - 1, 0), np.uint64),
        ((2**32 - 1, 0), np.uint32),
        ((3.4e38, -3.4e38), np.float64),
        ((1.5, 0.0), jnp.bfloat16),
        ((True, False), bool),
        (([], []), np.float32),
    ],
)
def test_values_that_devices_hold(rows, dtype):
    assert FederatedSplits(_one(*rows, dtype=dtype), _one(*rows, dtype=dtype)).train.checked


def test_the_culprit_is_found_in_any_block():
    x = np.zeros((5, 300_000), np.float32)  # A row is larger than a block.
    x[3, -1] = np.nan
    with pytest.raises(UserError, match="client 'd'"):
        FederatedDataset({"x": x}, np.arange(6), np.array([*"abcde"])).check()
    x = np.zeros(10**6, np.float32)
    x[700_000] = np.inf
    with pytest.raises(UserError, match="client 'd'"):
        FederatedDataset({"x": x}, np.arange(6) * 200_000, np.array([*"abcde"])).check()


def test_values_are_checked_once():
    dataset = _small()
    dataset.check()
    selection = dataset.select_clients([1])
    assert selection.checked and all(half.checked for half in selection.split_examples(0.5))
