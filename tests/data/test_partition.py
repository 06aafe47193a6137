"""Partitioners: exact, of the promised sizes, and as skewed as the distribution says."""

import io
import zipfile
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedexp.data import partition
from fedexp.errors import UserError

PARTITIONERS = {
    "iid": lambda num_clients, seed=0: partition.iid(num_clients, seed),
    "shards": lambda num_clients, seed=0: partition.shards(num_clients, 3, seed=seed),
    "dirichlet": lambda num_clients, seed=0: partition.dirichlet(num_clients, 0.3, seed=seed),
    "label_dirichlet": lambda num_clients, seed=0: partition.label_dirichlet(
        num_clients, 0.3, 1, seed=seed
    ),
    "pachinko": lambda num_clients, seed=0: partition.pachinko(num_clients, seed=seed),
    "quantiles": lambda num_clients, seed=0: partition.quantiles(num_clients, "y", seed=seed),
    "power_law": lambda num_clients, seed=0: partition.power_law(num_clients, 3.0, 2, seed),
}

# Of those whose clients have different sizes.
LEAST = {"power_law": 2, "label_dirichlet": 1}


def _examples(labels: np.ndarray) -> dict[str, np.ndarray]:
    labels = np.asarray(labels)
    return {"x": np.arange(len(labels)), "y": labels, "coarse": labels // 3}


@given(
    name=st.sampled_from(sorted(PARTITIONERS)),
    labels=st.lists(st.integers(-4, 11), min_size=12, max_size=80),
    num_clients=st.integers(1, 4),
    seed=st.integers(0, 3),
)
def test_every_example_is_given_once_and_sizes_are_as_promised(name, labels, num_clients, seed):
    rows = PARTITIONERS[name](num_clients, seed)(_examples(labels))
    assert len(rows) == num_clients
    np.testing.assert_array_equal(np.sort(np.concatenate(rows)), np.arange(len(labels)))
    sizes = [len(r) for r in rows]
    if name in LEAST:
        assert min(sizes) >= LEAST[name]
    else:
        assert np.ptp(sizes) <= (3 if name == "shards" else 1)


@pytest.mark.parametrize("name", PARTITIONERS)
def test_the_seed_decides(name):
    examples = _examples(np.arange(300) % 10)
    first, again, other = (PARTITIONERS[name](7, seed)(examples) for seed in (5, 5, 6))
    for mine, same in zip(first, again, strict=True):
        np.testing.assert_array_equal(mine, same)
    assert any(not np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_rows_keep_their_features_and_clients_their_number():
    examples = _examples(np.arange(60) % 5)
    dataset = partition.from_arrays(examples, partition.iid(12))
    assert dataset.client_ids.tolist() == [str(i) for i in range(12)]
    np.testing.assert_array_equal(dataset.features["y"], dataset.features["x"] % 5)
    assert not np.array_equal(dataset.features["x"], np.arange(60))


def test_power_law_has_lognormal_sizes():
    """Logarithms of sizes have the standard deviation sigma, once rounding is small."""
    examples = _examples(np.zeros(2_000_000, int))
    sizes = np.array([len(rows) for rows in partition.power_law(1000, 1.5)(examples)])
    logarithms = np.log(sizes)
    np.testing.assert_allclose(logarithms.std(), 1.5, rtol=0.07)
    np.testing.assert_allclose(np.mean((logarithms - logarithms.mean()) ** 3), 0, atol=0.6)
    even = [len(rows) for rows in partition.power_law(7, 0.0)(_examples(np.zeros(100, int)))]
    assert np.ptp(even) <= 1


def test_quantiles_are_of_one_number():
    x = np.random.default_rng(0).permutation(24).reshape(12, 2)
    rows = partition.quantiles(3, entry=1)({"x": x})
    ordered = np.sort(x[:, 1])
    for i, mine in enumerate(rows):
        assert sorted(x[mine, 1]) == ordered[4 * i : 4 * i + 4].tolist()


def test_shards_have_few_labels():
    """With as many examples a label as a shard has, or twice as many, a shard has one label."""
    examples = _examples(np.random.default_rng(0).permutation(np.repeat(np.arange(10), 60)))
    dataset = partition.from_arrays(examples, partition.shards(10, 2))
    labels = (dataset.label_histogram(10) > 0).sum(1)
    assert labels.max() == 2
    assert set(np.unique(dataset.label_histogram(10))) <= {0, 30, 60}


def _fractions(partitioner, labels: np.ndarray) -> np.ndarray:
    histogram = partition.from_arrays(_examples(labels), partitioner).label_histogram(
        labels.max() + 1
    )
    return histogram / histogram.sum(1, keepdims=True)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 10.0])
def test_dirichlet_has_the_moments_of_its_distribution(alpha):
    """Fractions of multinomial draws with Dirichlet q: the variance is the sum of two."""
    prior, size, num_clients = np.array([0.5, 0.3, 0.2]), 200, 1500
    labels = np.repeat(np.arange(3), (prior * size * num_clients).astype(int))
    # The last clients take what is left, so look at the first.
    fractions = _fractions(partition.dirichlet(num_clients, alpha), labels)[:1000]
    np.testing.assert_allclose(fractions.mean(0), prior, atol=0.03)
    variance = prior * (1 - prior) * (1 / (alpha + 1) + alpha / (alpha + 1) / size)
    np.testing.assert_allclose(fractions.var(0), variance, rtol=0.12)


def test_dirichlet_of_a_large_alpha_is_iid_and_of_a_small_one_has_one_label():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(5), 4000))
    even = _fractions(partition.dirichlet(100, 1e9), labels)
    # A multinomial of 200 draws has the standard deviation 0.028.
    assert 0.02 < even.std() < 0.036
    single = _fractions(partition.dirichlet(100, 1e-9), labels)
    assert (single.max(1) == 1).all()


@pytest.mark.parametrize("alpha", [0.1, 2.0])
def test_label_dirichlet_shares_out_every_label(alpha):
    """By label, shares are draws of Dir(alpha, ..., alpha), whose moments are known."""
    num_labels, size, num_clients = 800, 200, 5
    labels = np.repeat(np.arange(num_labels), size)
    partitioner = partition.label_dirichlet(num_clients, alpha, self_balancing=False)
    histogram = partition.from_arrays(_examples(labels), partitioner).label_histogram(num_labels)
    shares, mean = histogram / size, 1 / num_clients
    variance = mean * (1 - mean) / (num_clients * alpha + 1)
    np.testing.assert_allclose(shares.mean(1), mean, atol=4 * np.sqrt(variance / num_labels))
    np.testing.assert_allclose(shares.var(1), variance, rtol=0.15)
    covariance = np.cov(shares)[~np.eye(num_clients, dtype=bool)]
    np.testing.assert_allclose(covariance / variance, -1 / (num_clients - 1), atol=0.15)


@settings(max_examples=40)
@given(
    labels=st.lists(st.integers(0, 6), min_size=30, max_size=90),
    num_clients=st.integers(1, 5),
    alpha=st.floats(0.2, 50),
    min_examples=st.integers(1, 3),
)
def test_label_dirichlet_stops_at_the_mean_size(labels, num_clients, alpha, min_examples):
    partitioner = partition.label_dirichlet(num_clients, alpha, min_examples)
    histogram = partition.from_arrays(_examples(labels), partitioner).label_histogram(7)
    assert histogram.sum(1).min() >= min_examples
    before = histogram.cumsum(1) - histogram
    assert (before[histogram > 0] < len(labels) / num_clients).all()


def test_label_dirichlet_of_a_tiny_alpha_and_of_too_many_clients():
    labels = np.arange(60) % 6
    rows = partition.label_dirichlet(3, 1e-4, 1)(_examples(labels))
    assert sorted(np.unique(labels[r]).size for r in rows) == [2, 2, 2]
    with pytest.raises(
        UserError, match="in each of 1000 draws a client had fewer than 20 examples"
    ):
        partition.label_dirichlet(3, 0.01, 20)(_examples(labels % 2))


def test_pachinko_follows_both_levels():
    """CIFAR-100's: 20 coarse labels of 5 fine ones, 500 clients of 100."""
    labels = np.repeat(np.arange(100), 500)
    examples = {"y": labels, "coarse": labels // 5}
    dataset = partition.from_arrays(examples, partition.pachinko(500, 100))
    assert (dataset.client_sizes == 100).all()
    histogram = dataset.label_histogram(100)
    np.testing.assert_array_equal(histogram.sum(0), 500)
    coarse = histogram.reshape(500, 20, 5).sum(2)[:250] / 100
    q = 1 / 20
    variance = q * (1 - q) * (1 / 3 + 2 / 3 / 100)  # 20 x 0.1 = 2 is the concentration.
    np.testing.assert_allclose(coarse.var(0).mean(), variance, rtol=0.15)
    # Fine labels within a coarse one that has many examples: a concentration of 5 x 10.
    groups = histogram.reshape(500, 20, 5)[:250].reshape(-1, 5)
    groups = groups[groups.sum(1) >= 30]
    sizes = groups.sum(1)
    expected = (0.2 * 0.8 * (1 / 51 + 50 / 51 / sizes)).mean()
    found = ((groups / sizes[:, None] - 0.2) ** 2).mean()
    np.testing.assert_allclose(found, expected, rtol=0.15)


def test_pachinko_of_a_size_leaves_the_rest_out():
    rows = partition.pachinko(4, 10)(_examples(np.arange(90) % 9))
    assert [len(r) for r in rows] == [10] * 4
    assert len(np.unique(np.concatenate(rows))) == 40


def test_draws_stop_at_what_is_left():
    """Against the definition, one draw at a time: the same distribution of counts."""
    q, left, size, trials = np.array([0.7, 0.2, 0.1]), np.array([3, 4, 6]), 8, 2000
    rng = np.random.default_rng(0)
    ours = np.array([partition._draw(rng, size, q, left) for _ in range(trials)])
    slow = np.zeros((trials, 3), int)
    for counts in slow:
        for _ in range(size):
            weights = np.where(counts < left, q, 0)
            counts[rng.choice(3, p=weights / weights.sum())] += 1
    assert (ours <= left).all()
    assert (ours.sum(1) == size).all()
    np.testing.assert_allclose(ours.mean(0), slow.mean(0), atol=0.08)
    np.testing.assert_allclose(np.cov(ours.T), np.cov(slow.T), atol=0.08)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: partition.iid(0), "num_clients must be a whole number above 0, got 0"),
        (lambda: partition.iid(2.5), "num_clients must be a whole number above 0, got 2.5"),
        (lambda: partition.iid(9), "8 examples are too few for 9 clients"),
        (lambda: partition.shards(3, 3), "8 examples are too few for 9 shards"),
        (lambda: partition.power_law(3, 1.0, 3), "8 examples are too few for 9 examples"),
        (lambda: partition.power_law(3, -1.0), "power_law.sigma must be 0 or above, and finite"),
        (lambda: partition.quantiles(2, "z"), r"no feature 'z' .*'x', 'y'"),
        (lambda: partition.quantiles(2, "image", 2), "entry is 2, but feature 'image' has 2 num"),
        (lambda: partition.dirichlet(2, 0.0), "alpha must be above 0 and finite, got 0.0"),
        (lambda: partition.dirichlet(2, np.nan), "alpha must be above 0"),
        (lambda: partition.dirichlet(2, 1.0, label="z"), r"no feature 'z' .*'x', 'y'"),
        (lambda: partition.dirichlet(2, 1.0, label="image"), r"'image' it must be one integer"),
        (lambda: partition.label_dirichlet(2, 0.0), "alpha must be above 0 and finite, got 0.0"),
        (lambda: partition.label_dirichlet(2, 1.0, 0), "min_examples must be a whole number above"),
        (lambda: partition.label_dirichlet(3, 1.0, 3), "8 examples are too few for 9 examples"),
        (lambda: partition.pachinko(3, 3), "8 examples are too few for 9 examples"),
        (
            lambda: partition.pachinko(2, coarse_label="x"),
            "the fine label 0 has several coarse labels, as 4 and 0",
        ),
    ],
)
def test_what_cannot_be_partitioned(make, message):
    examples = _examples(np.arange(8) % 4) | {"image": np.zeros((8, 2))}
    with pytest.raises(UserError, match=message):
        partition.from_arrays(examples, make())


def test_a_partition_of_ones_own_is_checked():
    examples = _examples(np.arange(6))
    with pytest.raises(UserError, match="an example to a client twice, or to two clients"):
        partition.from_arrays(examples, lambda _: [np.array([0, 1]), np.array([1])])
    with pytest.raises(UserError, match="client '1' has no examples"):
        partition.from_arrays(examples, lambda _: [np.array([0, 1]), np.array([], int)])
    with pytest.raises(UserError, match=r"one row an example each, their shapes are .*'z': \(5,\)"):
        partition.from_arrays(examples | {"z": np.zeros(5)}, partition.iid(2))


def test_arrays_splits_every_client_or_reads_a_second_file(tmp_path):
    train, test = _examples(np.arange(200) % 4), _examples(np.arange(50) % 4)
    np.savez(tmp_path / "train.npz", **train)
    np.savez(tmp_path / "test.npz", **test)
    path = str(tmp_path / "train.npz")
    splits = partition.arrays(path, partition.iid(10), test_fraction=0.25)
    assert splits.train.client_sizes.tolist() == [15] * 10
    assert splits.test.client_sizes.tolist() == [5] * 10
    both = np.concatenate([split.features["x"] for split in splits.present().values()])
    np.testing.assert_array_equal(np.sort(both), np.arange(200))
    arguments = {"test_path": str(tmp_path / "test.npz"), "test_partition": partition.iid(5)}
    splits = partition.arrays(path, partition.iid(10), **arguments)
    assert splits.train.num_examples == 200
    assert splits.test.client_sizes.tolist() == [10] * 5


def test_arrays_that_say_whose_they_are(tmp_path):
    train = _examples(np.arange(5)) | {"user": np.array(["b", "a", "b", "c", "a"])}
    test = _examples(np.arange(3)) | {"user": np.array([2, 10, 2])}
    np.savez(tmp_path / "train.npz", **train)
    np.savez(tmp_path / "test.npz", **test)
    paths = [str(tmp_path / name) for name in ("train.npz", "test.npz")]
    splits = partition.arrays(paths[0], client="user", test_path=paths[1])
    assert splits.train.client_ids.tolist() == ["a", "b", "c"]
    assert splits.train.features["x"].tolist() == [1, 4, 0, 2, 3]
    assert splits.train.features.keys() == {"x", "y", "coarse"}
    assert splits.test.client_ids.tolist() == ["10", "2"]
    assert splits.test.features["x"].tolist() == [1, 0, 2]
    with pytest.raises(UserError, match=r"train.npz has no array 'who' .*; there are \['coarse', "):
        partition.arrays(paths[0], client="who")
    with pytest.raises(UserError, match="arrays needs one of `client`, .* and `partition`"):
        partition.arrays(paths[0])
    with pytest.raises(UserError, match="feature 'x' has 5 rows for 2 clients' names"):
        partition.by_client({"x": np.arange(5)}, np.array(["a", "b"]))


def test_arrays_from_a_wrong_file(tmp_path):
    with pytest.raises(UserError, match=r"no file .*gone\.npz"):
        partition.arrays(str(tmp_path / "gone.npz"), partition.iid(2))
    (tmp_path / "text.npz").write_text("PK no")
    np.savez(tmp_path / "objects.npz", x=np.array([{}, {}]))
    np.save(tmp_path / "one.npy", np.zeros(3))
    for name in ("text.npz", "objects.npz", "one.npy"):
        with pytest.raises(UserError, match=rf"{name} is not an .npz file of numbers"):
            partition.arrays(str(tmp_path / name), partition.iid(2))


def _listed_as(offset: int, value: int) -> Callable[[bytes], bytes]:
    """Another byte in what the archive's list says of its first file."""

    def damage(content: bytes) -> bytes:
        place = content.index(b"PK\x01\x02") + offset
        return content[:place] + bytes([value]) + content[place + 1 :]

    return damage


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:60] + b"\xff" * 20 + content[80:],
        lambda content: content[: len(content) // 2],
        lambda content: content.replace(b"x.npy", b"y.npy", 1),
        _listed_as(8, 1),  # Encrypted.
        _listed_as(10, 99),  # A compression that there is not.
        _listed_as(16, 7),  # Another checksum.
    ],
)
def test_damaged_archives(tmp_path, compression, damage):
    path = tmp_path / "a.npz"
    buffer = io.BytesIO()
    np.save(buffer, np.arange(100.0))
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("x.npy", buffer.getvalue())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"a\.npz is not an \.npz file of numbers, or is damaged"):
        partition.arrays(str(path), partition.iid(2))


@pytest.mark.parametrize("header", ["(10**12,)", "(3", "(-1,)", "('a',)"])
def test_arrays_of_an_impossible_size(tmp_path, header):
    text = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {header}, }}".ljust(117) + "\n"
    content = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", content.replace(b"10**12", b"10000000000000"))
    with pytest.raises(UserError, match=r"a\.npz is not an \.npz file of numbers, or is damaged"):
        partition.arrays(str(tmp_path / "a.npz"), partition.iid(2))


def test_a_string_feature_beside_others(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((4, 2)), name=np.array([*"abcd"]))
    with pytest.raises(UserError, match="'train', client '0', feature 'name': the dtype is <U1"):
        partition.arrays(str(tmp_path / "a.npz"), partition.iid(2))
