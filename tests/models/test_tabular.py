from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from fedexp.models import BinaryLogistic, DenseClassifier
from fedexp.tasks import cross_entropy

X = np.random.default_rng(0).normal(size=(5, 13)).astype(np.float32)


def test_two_logits_are_one_sigmoid():
    model = BinaryLogistic()
    variables = model.init(jax.random.key(0), X)
    (layer,) = variables["params"].values()
    z = X @ layer["kernel"][:, 0] + layer["bias"]
    y = np.array([0, 1, 1, 0, 1])
    loss = cross_entropy()(model.apply(variables, X), {"y": jnp.asarray(y)}).values
    p = 1 / (1 + np.exp(-np.asarray(z, np.float64)))
    np.testing.assert_allclose(loss, -(y * np.log(p) + (1 - y) * np.log(1 - p)), rtol=1e-5)


def test_it_starts_as_in_pytorch():
    params = BinaryLogistic().init(jax.random.key(1), np.zeros((1, 20_000)))["params"]["Dense_0"]
    bound = 20_000**-0.5
    assert 0.999 * bound < np.abs(params["kernel"]).max() <= bound
    np.testing.assert_allclose(params["kernel"].var(), bound**2 / 3, rtol=0.05)
    assert 0 < abs(params["bias"][0]) <= bound


def test_dense_layers_in_numpy():
    model = DenseClassifier(3, [4, 6])
    variables = model.init(jax.random.key(0), X)
    h = X
    for name in ("Dense_0", "Dense_1", "Dense_2"):
        layer = variables["params"][name]
        h = h @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])
        h = np.maximum(h, 0) if name != "Dense_2" else h
    np.testing.assert_allclose(model.apply(variables, X.reshape(5, 13, 1)), h, rtol=1e-4, atol=1e-5)
    assert DenseClassifier(3).init(jax.random.key(0), X)["params"].keys() == {"Dense_0"}
