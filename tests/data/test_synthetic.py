"""synthetic(alpha, beta), against another version in NumPy by moments, and its definition."""

import numpy as np
import pytest

from fedexp.data import synthetic
from fedexp.errors import UserError


def _reference(alpha: float, beta: float, num_clients: int) -> tuple[list, list]:
    """As the paper tells it, client by client and example by example: features and labels."""
    rng, xs, ys = np.random.default_rng(99), [], []
    for _ in range(num_clients):
        size = int(rng.lognormal(4, 2)) + 50
        u, mean_of_means = alpha * rng.normal(), beta * rng.normal()
        w, b = u + rng.normal(size=(10, 60)), u + rng.normal(size=10)
        v = mean_of_means + rng.normal(size=60)
        covariance = np.diag([float(j) ** -1.2 for j in range(1, 61)])
        x = rng.multivariate_normal(v, covariance, min(size, 400))
        logits = [w @ one + b for one in x]
        xs.append(x)
        ys.append(np.array([np.argmax(one) for one in logits]))
    return xs, ys


def _moments(xs: list, ys: list) -> dict[str, float]:
    means = np.array([x.mean(0) for x in xs])
    centred = np.concatenate([x - x.mean(0) for x in xs])
    shares = np.array([np.bincount(y, minlength=10) / len(y) for y in ys])
    return {
        "mean of a client's mean": means.mean(),
        "spread of clients' levels": means.mean(1).std(),
        "spread within a client's mean": (means - means.mean(1, keepdims=True)).std(),
        "first feature": centred[:, 0].std(),
        "last feature": centred[:, -1].std(),
        "the largest share of a label": shares.max(1).mean(),
    }


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.0), (1.0, 0.5)])
def test_moments_are_those_of_the_definition(alpha, beta):
    dataset = synthetic(alpha, beta, num_clients=400).train
    clients = [examples for _, examples in dataset.clients()]
    found = _moments([e["x"] for e in clients], [e["y"] for e in clients])
    expected = _moments(*_reference(alpha, beta, 400))
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0.1, atol=0.08, err_msg=name)
    np.testing.assert_allclose(found["last feature"], 60**-0.6, rtol=0.02)
    np.testing.assert_allclose(found["first feature"], 1, rtol=0.02)


def test_sizes_are_lognormal_beyond_fifty():
    splits = synthetic(num_clients=2000)
    sizes = splits.train.client_sizes + splits.test.client_sizes
    assert sizes.min() >= 50
    logarithms = np.log(sizes - 50 + 0.5)
    np.testing.assert_allclose([np.median(logarithms), logarithms.std()], [4, 2], rtol=0.06)
    np.testing.assert_allclose(splits.test.num_examples / sizes.sum(), 0.1, rtol=0.01)


def _transfer(**arguments) -> float:
    """How often a linear model of 20 clients is right on 20 others."""
    clients = [e for _, e in synthetic(num_clients=40, **arguments).train.clients()]
    (x, y), (other_x, other_y) = (
        (
            np.concatenate([np.c_[e["x"], np.ones(len(e["y"]))] for e in half]),
            np.concatenate([e["y"] for e in half]),
        )
        for half in (clients[:20], clients[20:])
    )
    weights, *_ = np.linalg.lstsq(x, np.eye(10)[y], rcond=None)
    return ((other_x @ weights).argmax(1) == other_y).mean()


def test_iid_clients_share_model_and_features():
    x = synthetic(iid=True, num_clients=40).train.features["x"]
    np.testing.assert_allclose(x.mean(0), 0, atol=0.05)
    assert _transfer(iid=True) > 0.65
    assert _transfer(alpha=0.0, beta=0.0) < 0.3


def test_the_seed_decides():
    first, again, other = (synthetic(num_clients=3, seed=seed).train for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.features["x"], again.features["x"])
    assert first.num_examples != other.num_examples
    assert (first.features["x"].dtype, first.features["y"].dtype) == (np.float32, np.int32)


def test_mistakes():
    with pytest.raises(UserError, match=r"synthetic\.alpha must be 0 or above, and finite, got -1"):
        synthetic(alpha=-1)
    with pytest.raises(UserError, match=r"synthetic\.num_clients must be at least 1, got 0"):
        synthetic(num_clients=0)
