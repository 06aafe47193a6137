from __future__ import annotations

import itertools

import gin
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from fedexp.models.emnist import EmnistAutoencoder, EmnistCNN, EmnistDense, EmnistLogistic

X = jax.random.uniform(jax.random.key(0), (2, 28, 28, 1))


@pytest.mark.parametrize(
    "model, num_classes, published",
    [
        (EmnistCNN, 62, 1_206_590),
        (EmnistCNN, 10, 1_199_882),
        (EmnistDense, 62, 209_662),
        (EmnistDense, 10, 199_210),
        (EmnistLogistic, 62, 48_670),
        (EmnistLogistic, 10, 7_850),
    ],
)
def test_parameter_counts(model, num_classes, published):
    params = jax.eval_shape(model(num_classes).init, jax.random.key(0), X)["params"]
    assert sum(p.size for p in jax.tree.leaves(params)) == published


def test_cnn_layer_shapes():
    params = jax.eval_shape(EmnistCNN().init, jax.random.key(0), X)["params"]
    assert {name: layer["kernel"].shape for name, layer in params.items()} == {
        "Conv_0": (3, 3, 1, 32),
        "Conv_1": (3, 3, 32, 64),
        "Dense_0": (9216, 128),
        "Dense_1": (128, 62),
    }


def test_cnn_is_the_same_network_in_plain_flax():
    variables = EmnistCNN().init(jax.random.key(1), X)
    p = variables["params"]
    x = X
    for name, features in (("Conv_0", 32), ("Conv_1", 64)):
        x = nn.relu(nn.Conv(features, (3, 3), padding="VALID").apply({"params": p[name]}, x))
    x = nn.max_pool(x, (2, 2), (2, 2)).reshape(2, -1)
    x = nn.relu(x @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"])
    x = x @ p["Dense_1"]["kernel"] + p["Dense_1"]["bias"]
    np.testing.assert_allclose(EmnistCNN().apply(variables, X), x, rtol=1e-4, atol=1e-5)


def test_cnn_dropout_follows_train_and_key():
    model = EmnistCNN()
    variables = model.init(jax.random.key(1), X)
    still = model.apply(variables, X)
    first, again, other = (
        model.apply(variables, X, train=True, rngs={"dropout": jax.random.key(seed)})
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    assert not np.allclose(first, still)


@pytest.mark.parametrize("model", [EmnistCNN, EmnistDense, EmnistLogistic])
def test_initial_kernels_are_lecun_normal_and_biases_zero(model):
    params = model().init(jax.random.key(2), X)["params"]
    for layer in params.values():
        kernel = np.asarray(layer["kernel"])
        fan_in = np.prod(kernel.shape[:-1])
        assert kernel.std() == pytest.approx(np.sqrt(1 / fan_in), rel=0.1)
        # A normal cut at two standard deviations has 0.8796 of the spread it was cut from.
        assert np.abs(kernel).max() <= 2 / 0.8796 * np.sqrt(1 / fan_in)
        assert not np.any(layer["bias"])


@pytest.mark.parametrize("name", ["EmnistCNN", "EmnistDense", "EmnistLogistic"])
def test_gin_sets_the_classes(name):
    gin.clear_config()
    try:
        gin.parse_config(f"{name}.num_classes = 47")
        model = gin.get_configurable(name)()
        logits = jax.eval_shape(model.init_with_output, jax.random.key(0), X)[0]
        assert logits.shape == (2, 47)
        assert logits.dtype == jnp.float32
    finally:
        gin.clear_config()


def test_autoencoder_has_the_published_layers():
    """google-research/federated, utils/models/emnist_ae_models.py, and its test's parameter count."""
    params = jax.eval_shape(EmnistAutoencoder().init, jax.random.key(0), X)["params"]
    widths = [784, 1000, 500, 250, 30, 250, 500, 1000, 784]
    shapes = [layer["kernel"].shape for layer in params.values()]
    assert shapes == list(itertools.pairwise(widths))
    assert sum(p.size for p in jax.tree.leaves(params)) == 2_837_314


def test_autoencoder_is_sigmoid_layers_around_a_linear_code():
    model = EmnistAutoencoder(code_size=3)
    variables = jax.jit(model.init)(jax.random.key(1), X)
    y = np.asarray(X, np.float64).reshape(2, -1)
    for number in range(8):
        layer = jax.tree.map(
            lambda p: np.asarray(p, np.float64), variables["params"][f"Dense_{number}"]
        )
        y = y @ layer["kernel"] + layer["bias"]
        y = y if number == 3 else 1 / (1 + np.exp(-y))
    found = jax.jit(model.apply)(variables, X)
    assert found.shape == X.shape
    np.testing.assert_allclose(found.reshape(2, -1), y, rtol=1e-4, atol=1e-5)
    kernel = np.asarray(variables["params"]["Dense_0"]["kernel"])
    limit = np.sqrt(6 / (784 + 1000))
    assert np.abs(kernel).max() <= limit
    assert kernel.std() == pytest.approx(limit / np.sqrt(3), rel=0.01)
