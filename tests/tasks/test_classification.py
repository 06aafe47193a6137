from __future__ import annotations

import gin
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from fedexp.data.dataset import FederatedDataset
from fedexp.errors import UserError
from fedexp.models.emnist import EmnistLogistic
from fedexp.streams import Stream, derive
from fedexp.tasks import (
    classification,
    handwriting,
    masked_sums,
    mean_loss,
    measures,
    top_k_accuracy,
)

RNG = np.random.default_rng(0)
IMAGES = {
    "x": RNG.integers(0, 256, (6, 28, 28)).astype(np.uint8),
    "y": RNG.integers(0, 62, 6).astype(np.int32),
}
VECTORS = {
    "x": RNG.normal(size=(6, 5)).astype(np.float32),
    "y": RNG.integers(0, 3, 6).astype(np.int32),
}
KEY = jax.random.key(0)


class Noisy(nn.Module):
    """A model with `train` and dropout."""

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(3)(x)


class Normalised(nn.Module):
    """A model that turns an example of zeros into NaN, in value and in gradient."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, use_bias=False)(x)
        return nn.Dense(3)(x / jnp.linalg.norm(x, axis=1, keepdims=True))


def test_logistic_regression_against_numpy():
    task = classification(EmnistLogistic(), preprocess=handwriting)
    params = task.init(KEY, IMAGES)
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(KEY, p.shape), params)
    (loss, sums), gradient = jax.value_and_grad(
        lambda p: mean_loss(task, p, IMAGES, np.ones(6, bool), KEY), has_aux=True
    )(params)

    x = 1 - IMAGES["x"].reshape(6, -1) / 255.0
    layer = jax.tree.map(lambda p: np.asarray(p, np.float64), params["Dense_0"])
    logits = x @ layer["kernel"] + layer["bias"]
    odds = np.exp(logits - logits.max(1, keepdims=True))
    probabilities = odds / odds.sum(1, keepdims=True)
    one_hot = np.eye(62)[IMAGES["y"]]
    losses = -np.log((probabilities * one_hot).sum(1))
    np.testing.assert_allclose(loss, losses.mean(), rtol=1e-5)
    np.testing.assert_allclose(sums["loss"].values, losses.sum(), rtol=1e-5)
    np.testing.assert_array_equal(sums["accuracy"].values, (logits.argmax(1) == IMAGES["y"]).sum())
    assert sums["loss"].weights == sums["accuracy"].weights == 6
    error = (probabilities - one_hot) / 6
    np.testing.assert_allclose(gradient["Dense_0"]["kernel"], x.T @ error, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(gradient["Dense_0"]["bias"], error.sum(0), rtol=1e-3, atol=1e-6)
    labels, predictions = task.predict(task.apply(params, IMAGES, None), IMAGES)
    np.testing.assert_array_equal(labels, IMAGES["y"])
    np.testing.assert_array_equal(predictions, logits.argmax(1))


def test_padding_never_counts():
    """Four real and two padded examples are the four alone, in loss, sums and gradient."""
    task = classification(Normalised(), num_classes=3)
    params = task.init(KEY, VECTORS)
    order = np.array([4, 0, 1, 5, 2, 3])  # The first row is padding, too.
    mask = order < 4
    padded = {name: array[order] for name, array in VECTORS.items()}
    padded["x"][~mask] = 7
    padded["y"][~mask] = 99
    real = {name: array[:4] for name, array in VECTORS.items()}

    def run(batch, mask):
        return jax.jit(
            jax.value_and_grad(lambda p: mean_loss(task, p, batch, mask, KEY), has_aux=True)
        )(params)

    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # noqa: E731
    jax.tree.map(close, run(padded, mask), run(real, np.ones(4, bool)))


def test_a_batch_of_padding_has_no_gradient():
    task = classification(Noisy(), num_classes=3)
    params = task.init(KEY, VECTORS)
    (loss, sums), gradient = jax.value_and_grad(
        lambda p: mean_loss(task, p, VECTORS, np.zeros(6, bool), KEY), has_aux=True
    )(params)
    assert loss == 0
    for leaf in jax.tree.leaves((sums, gradient)):
        np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))


def test_mean_loss_is_the_same_per_lane():
    task = classification(Noisy(), num_classes=3)
    params = task.init(KEY, VECTORS)
    keys = jax.random.split(KEY, 2)
    masks = np.array([[1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 1, 0]], bool)
    run = lambda mask, key: mean_loss(task, params, VECTORS, mask, key)[0]  # noqa: E731
    each = [run(mask, key) for mask, key in zip(masks, keys, strict=True)]
    np.testing.assert_allclose(jax.vmap(run)(masks, keys), each, rtol=1e-6)


def test_the_key_means_training():
    task = classification(Noisy(), num_classes=3)
    params = task.init(KEY, VECTORS)
    still = task.apply(params, VECTORS, None)
    np.testing.assert_allclose(
        still, nn.Dense(3).apply({"params": params["Dense_0"]}, VECTORS["x"]), rtol=1e-6
    )
    assert not np.allclose(task.apply(params, VECTORS, KEY), still)


def test_augmentation_comes_first_and_is_random_in_training_only():
    seen = []

    def roll(x, key):
        seen.append(x.dtype)
        return x if key is None else jnp.roll(x, jax.random.randint(key, (), 1, 28), axis=2)

    plain = classification(EmnistLogistic())
    task = classification(EmnistLogistic(), augment=roll)
    params = task.init(KEY, IMAGES)
    jax.tree.map(np.testing.assert_array_equal, params, plain.init(KEY, IMAGES))
    still = plain.apply(params, IMAGES, None)
    np.testing.assert_array_equal(task.apply(params, IMAGES, None), still)
    first, again, other = (task.apply(params, IMAGES, jax.random.key(s)) for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    rolled = [
        plain.apply(params, IMAGES | {"x": np.roll(IMAGES["x"], n, 2)}, None) for n in range(28)
    ]
    found = [min(range(28), key=lambda n: np.abs(rolled[n] - y).max()) for y in (first, other)]
    assert 0 not in found and found[0] != found[1]
    np.testing.assert_allclose(rolled[found[0]], first, atol=1e-6)
    assert set(seen) == {jnp.dtype(jnp.uint8)}


def test_augmentation_draws_nothing_from_dropout():
    draws = {}

    def note(x, key):
        draws["augment"] = key
        return x

    class Note(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool):
            draws["dropout"] = self.make_rng("dropout") if train else None
            return nn.Dense(3)(x)

    task = classification(Note(), num_classes=3, augment=note)
    plain = classification(Note(), num_classes=3)
    params = task.init(KEY, VECTORS)
    plain.apply(params, VECTORS, KEY)
    without = draws["dropout"]
    task.apply(params, VECTORS, KEY)
    assert draws["dropout"] == without
    assert draws["augment"] == derive(KEY, Stream.AUGMENT)
    rngs = {"dropout": derive(KEY, Stream.DROPOUT)}
    Note().apply({"params": params}, VECTORS["x"], train=True, rngs=rngs)
    assert draws["dropout"] == without


def test_any_module_will_do():
    task = classification(nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(3)]), num_classes=3)
    params = task.init(KEY, VECTORS)
    assert task.apply(params, VECTORS, KEY).shape == (6, 3)
    again = task.init(KEY, {name: array[:2] for name, array in VECTORS.items()})
    jax.tree.map(np.testing.assert_array_equal, params, again)


def test_measures_hold_the_loss_and_the_chosen_metrics():
    task = classification(nn.Dense(3), num_classes=3, metrics={"top_2": top_k_accuracy(2)})
    logits = task.apply(task.init(KEY, VECTORS), VECTORS, None)
    found = measures(task, logits, VECTORS)
    assert list(found) == ["loss", "top_2"]
    assert 0 <= masked_sums(found["top_2"], np.ones(6, bool)).values <= 6


def test_top_k_accuracies_by_their_numbers():
    task = classification(nn.Dense(3), num_classes=3, top_k=[1, 2])
    logits = np.array([[3, 2, 1], [1, 3, 2], [2, 1, 3]], np.float32)
    found = measures(task, logits, {"y": np.array([0, 2, 1], np.int32)})
    assert list(found) == ["loss", "accuracy", "top1_accuracy", "top2_accuracy"]
    for name, expected in (("accuracy", 1), ("top1_accuracy", 1), ("top2_accuracy", 2)):
        assert masked_sums(found[name], np.ones(3, bool)).values == expected


@pytest.mark.parametrize("k", [0, 4, 1.5])
def test_a_k_that_is_no_number_of_classes_is_refused(k):
    with pytest.raises(
        UserError, match=f"top_k has {k}, but k must be between 1 and the 3 classes"
    ):
        classification(nn.Dense(3), num_classes=3, top_k=(k,))


def test_init_names_the_shapes_of_a_model_that_does_not_fit():
    task = classification(EmnistLogistic(num_classes=10), num_classes=62)
    with pytest.raises(UserError, match=r"EmnistLogistic.*\(6, 28, 28, 1\).*\(6, 10\).*\(6, 62\)"):
        task.init(KEY, IMAGES)


def test_a_metric_must_not_hide_the_loss():
    with pytest.raises(UserError, match="'loss'"):
        classification(nn.Dense(3), num_classes=3, metrics={"loss": top_k_accuracy(2)})


def test_class_names_must_fit():
    with pytest.raises(UserError, match="3 classes need as many names, got 2"):
        classification(nn.Dense(3), num_classes=3, class_names=["a", "b"])
    assert classification(nn.Dense(2), 2, class_names=["a", "b"]).class_names == ("a", "b")


@pytest.mark.parametrize(
    "features, message",
    [
        ({"x": VECTORS["x"]}, r"lacks 'y' \(it has \['x'\]\)"),
        ({"image": VECTORS["x"], "y": VECTORS["y"]}, "lacks 'x'"),
        (
            VECTORS | {"y": np.array([0, 1, 2, 3, 0, 1])},
            r"'y' must have ids in \[0, 3\), got 0 to 3",
        ),
        (VECTORS | {"y": np.array([0, 1, -1, 2, 0, 1])}, "-1 to 2"),
        (VECTORS | {"y": np.zeros(6)}, "'y' must hold integers in 1 dim.*, got float64"),
        (VECTORS | {"y": np.zeros((6, 2), np.int32)}, r"shape \(6, 2\)"),
    ],
)
def test_check_refuses(features, message):
    dataset = FederatedDataset(features, np.array([0, 6]), np.array(["a"]))
    with pytest.raises(UserError, match=message):
        classification(nn.Dense(3), num_classes=3).check(dataset)


def test_check_accepts():
    dataset = FederatedDataset(VECTORS, np.array([0, 6]), np.array(["a"]))
    classification(nn.Dense(3), num_classes=3).check(dataset)


def test_gin_builds_a_task():
    gin.clear_config()
    try:
        gin.parse_config(
            """
            classification.model = @EmnistLogistic()
            classification.preprocess = @handwriting
            classification.metrics = {'accuracy': @accuracy(), 'top_5': @top_k_accuracy()}
            """
        )
        task = classification()
        assert list(task.metrics) == ["accuracy", "top_5"]
        assert task.apply(task.init(KEY, IMAGES), IMAGES, None).shape == (6, 62)
    finally:
        gin.clear_config()
