from __future__ import annotations

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn

from fedexp.data.dataset import FederatedDataset
from fedexp.errors import UserError
from fedexp.models.emnist import EmnistAutoencoder
from fedexp.tasks import handwriting, mean_loss, measures, reconstruction
from tests.support.local import in_lanes_and_alone

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)


class Linear(nn.Module):
    """A linear code of two numbers, as principal component analysis has it."""

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(2, use_bias=False)(x.reshape(x.shape[0], -1))
        return nn.Dense(x[0].size, use_bias=False)(y).reshape(x.shape)


def writers(sizes: tuple[int, ...] = (5, 8, 3, 6), seed: int = 0) -> FederatedDataset:
    """Dark strokes of two kinds, in many strengths, on white paper, (4, 4) uint8; no labels."""
    rng = np.random.default_rng(seed)
    strokes = np.stack([np.eye(4), np.eye(4)[::-1]])
    return FederatedDataset.from_clients(
        {
            f"f{number}": {
                "x": (255 - 255 * np.einsum("nk,kij->nij", rng.uniform(0, 0.9, (size, 2)), strokes))
                .clip(0, 255)
                .astype(np.uint8)
            }
            for number, size in enumerate(sizes)
        }
    )


def test_the_loss_is_the_mean_squared_error_of_the_ink():
    task = reconstruction(Linear(), handwriting)
    batch = {"x": RNG.integers(0, 256, (6, 4, 4)).astype(np.uint8)}
    params = task.init(KEY, batch)
    mask = np.array([1, 1, 0, 1, 1, 1], bool)
    loss, sums = mean_loss(task, params, batch, mask, KEY)
    x = 1 - batch["x"][mask].reshape(5, 16) / 255.0
    code, decode = (
        np.asarray(params[name]["kernel"], np.float64) for name in ("Dense_0", "Dense_1")
    )
    errors = (x @ code @ decode - x) ** 2
    np.testing.assert_allclose(loss, errors.mean(), rtol=1e-5)
    np.testing.assert_allclose(sums["loss"].values, errors.mean(1).sum(), rtol=1e-5)
    assert sums["loss"].weights == 5
    assert list(measures(task, task.apply(params, batch, None), batch)) == ["loss"]


def test_floats_are_taken_as_they_are():
    task = reconstruction(nn.Dense(3, kernel_init=nn.initializers.zeros_init()))
    batch = {"x": RNG.normal(size=(4, 3)).astype(np.float32)}
    outputs = task.apply(task.init(KEY, batch), batch, None)
    values, weights = task.loss(outputs, batch)
    np.testing.assert_allclose(values, (batch["x"] ** 2).mean(1), rtol=1e-6)
    np.testing.assert_array_equal(weights, np.ones(4))


def test_there_are_pictures_but_no_classes():
    task, batch = reconstruction(EmnistAutoencoder(), handwriting), writers().slice(0, 3)
    np.testing.assert_array_equal(task.images(batch), batch["x"][..., None])
    assert task.num_classes is task.predict is None


def test_models_and_data_that_do_not_fit_are_refused():
    batch = {"x": np.zeros((2, 3), np.float32)}
    with pytest.raises(UserError, match=r"Dense maps inputs of shape \(2, 3\) to \(2, 4\)"):
        reconstruction(nn.Dense(4)).init(KEY, batch)
    labels = FederatedDataset({"y": np.zeros(2)}, np.array([0, 2]), np.array(["a"]))
    with pytest.raises(UserError, match=r"lacks 'x' \(it has \['y'\]\)"):
        reconstruction(Linear()).check(labels)


def test_padded_lanes_learn_as_clients_alone():
    task = reconstruction(Linear(), handwriting)
    _, losses = in_lanes_and_alone(task, writers(), optax.sgd(1.0), 150)
    assert (losses[:, -1] < 0.1 * losses[:, 0]).all()
