"""Noise by client, against its distribution."""

import numpy as np
import pytest

from fedexp.data import FederatedDataset, FederatedSplits, noisy_features
from fedexp.errors import UserError


def _splits(x: np.ndarray) -> FederatedSplits:
    part = FederatedDataset({"x": x, "y": np.arange(len(x))}, [0, 1000, 3000, 4000], [*"abc"])
    return FederatedSplits(part, part)


def test_client_i_of_n_has_the_variance_i_by_n():
    before = _splits(np.ones((4000, 5, 2), np.float32))
    after = noisy_features(before, 0.6)
    for i, (_, examples) in enumerate(after.train.clients(), start=1):
        noise = examples["x"] - 1
        np.testing.assert_allclose(noise.var(), 0.6 * i / 3, rtol=0.06)
        np.testing.assert_allclose(noise.mean(), 0, atol=0.03)
    np.testing.assert_array_equal(after.train.features["y"], before.train.features["y"])
    assert after.test is before.test
    again, other = (noisy_features(before, 0.6, seed=seed) for seed in (0, 1))
    np.testing.assert_array_equal(after.train.features["x"], again.train.features["x"])
    assert not np.array_equal(after.train.features["x"], other.train.features["x"])


def test_images_stay_uint8():
    after = noisy_features(_splits(np.full((4000, 8, 8), 128, np.uint8)), 0.01).train
    assert after.features["x"].dtype == np.uint8
    spread = [examples["x"].std() / 255 for _, examples in after.clients()]
    np.testing.assert_allclose(spread, np.sqrt(0.01 * np.arange(1, 4) / 3), rtol=0.03)
    white = noisy_features(_splits(np.full((4000, 2), 255, np.uint8)), 1.0).train.features["x"]
    assert 0.45 < (white == 255).mean() < 0.55  # Cut off, and never round about.


def test_mistakes():
    splits = _splits(np.ones((4000, 2), np.float32))
    with pytest.raises(UserError, match="variance must be 0 or above, and finite, got -1"):
        noisy_features(splits, -1)
    with pytest.raises(UserError, match=r"no feature 'z'; there are \['x', 'y'\]"):
        noisy_features(splits, feature="z")
    with pytest.raises(UserError, match="'y' is int64, neither floating nor uint8"):
        noisy_features(splits, feature="y")
