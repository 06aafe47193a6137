"""Standardised features, against NumPy's moments client by client."""

import numpy as np
import pytest

from fedexp.data import FederatedDataset, FederatedSplits, standardized_features
from fedexp.errors import UserError


def _clients(seed: int, ids: str, sizes: tuple[int, ...]) -> FederatedDataset:
    rng = np.random.default_rng(seed)
    return FederatedDataset.from_clients(
        {
            name: {"x": rng.normal(3, 5, (size, 2, 3)), "y": rng.integers(0, 9, size)}
            for name, size in zip(ids, sizes, strict=True)
        }
    )


SPLITS = FederatedSplits(_clients(0, "abc", (7, 1, 4)), _clients(1, "ca", (3, 2)))


def test_by_all_training_examples():
    found = standardized_features(SPLITS)
    x = SPLITS.train.features["x"]
    for part, raw in zip(found[:2], SPLITS[:2], strict=True):
        expected = (raw.features["x"] - x.mean(0)) / x.std(0, ddof=1)
        np.testing.assert_allclose(part.features["x"], expected, rtol=1e-5)
        assert part.features["x"].dtype == np.float32
        np.testing.assert_array_equal(part.features["y"], raw.features["y"])
    np.testing.assert_allclose(found.train.features["x"].std(0, ddof=1), 1, rtol=1e-5)


def test_by_each_client():
    found = standardized_features(SPLITS, by="client")
    own = {name: examples["x"] for name, examples in SPLITS.train.clients()}
    for part, raw in zip(found[:2], SPLITS[:2], strict=True):
        for (name, examples), (_, before) in zip(part.clients(), raw.clients(), strict=True):
            std = own[name].std(0, ddof=1) if len(own[name]) > 1 else 1
            expected = (before["x"] - own[name].mean(0)) / std
            np.testing.assert_allclose(examples["x"], expected, rtol=1e-4, atol=1e-6)


def test_what_does_not_vary_becomes_zero():
    one = FederatedDataset.from_clients({"a": {"x": np.array([[2, 5], [2, 7]])}})
    other = FederatedDataset.from_clients({"a": {"x": np.array([[3, 6]])}})
    train, test, _ = standardized_features(FederatedSplits(one, other))
    np.testing.assert_allclose(train.features["x"], [[0, -(0.5**0.5)], [0, 0.5**0.5]], rtol=1e-6)
    assert test.features["x"].tolist() == [[1, 0]]


def test_mistakes():
    with pytest.raises(UserError, match=r"no feature 'z'; there are \['x', 'y'\]"):
        standardized_features(SPLITS, ["z"])
    with pytest.raises(UserError, match="by must be 'all' or 'client', got 'me'"):
        standardized_features(SPLITS, test_by="me")  # pyright: ignore[reportArgumentType]
    swapped = FederatedSplits(SPLITS.test, SPLITS.train)
    with pytest.raises(UserError, match="client 'b' has no training examples to standardize by"):
        standardized_features(swapped, by="client")
