from __future__ import annotations

import gin
import h5py
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from fedexp import config
from fedexp.algorithms import fedavg
from fedexp.data import ClientBatching, FederatedDataset, FederatedSplits, uniform
from fedexp.errors import UserError
from fedexp.models.emnist import EmnistAutoencoder
from fedexp.strategies import jit
from fedexp.tasks import handwriting, mean_loss, measures, reconstruction
from fedexp.trainer import train

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
    with pytest.raises(UserError, match=r"Dense maps x of shape \(2, 3\) to \(2, 4\)"):
        reconstruction(nn.Dense(4)).init(KEY, batch)
    with pytest.raises(UserError, match="keeps state .*batch_stats"):
        reconstruction(nn.BatchNorm(use_running_average=True)).init(KEY, batch)
    labels = FederatedDataset({"y": np.zeros(2)}, np.array([0, 2]), np.array(["a"]))
    with pytest.raises(UserError, match=r"needs the feature 'x', the data set has \['y'\]"):
        reconstruction(Linear()).check(labels)


def test_training_learns_alike_on_any_number_of_lanes():
    splits = FederatedSplits(writers(), writers(seed=1))

    def run(lanes):
        task = reconstruction(Linear(), handwriting)
        algorithm = fedavg(task, optax.sgd(1.0), optax.sgd(1.0))
        options = {"sampler": uniform(3), "batching": ClientBatching(4, local_epochs=3)}
        return train(splits, task, algorithm, 30, strategy=jit(lanes), quiet=True, **options)

    one, three = run(1), run(3)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        one.params,
        three.params,
    )
    ink = 1 - splits.test.features["x"] / 255.0
    assert one.metrics["test/loss"] < 0.1 * (ink**2).mean()
    assert jnp.isclose(one.metrics["test/loss"], three.metrics["test/loss"], rtol=1e-3)


@pytest.mark.slow
def test_the_published_experiment_runs_on_tffs_files(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDEXP_CACHE", str(tmp_path / "cache"))
    pixels = np.where(RNG.uniform(size=(1, 28, 28)) < 0.2, 0.1, 1).astype(np.float32)
    for split in ("train", "test"):
        with h5py.File(tmp_path / f"fed_emnist_{split}.h5", "w") as file:
            for number, size in enumerate((3, 5)):
                file[f"examples/f{number}/pixels"] = np.repeat(pixels, size, axis=0)
                file[f"examples/f{number}/label"] = np.zeros(size, np.int32)
    overrides = [
        f"emnist.data_dir = '{tmp_path}'",
        "train.num_rounds = 20",
        "uniform.cohort_size = 2",
        "auto.lanes = 2",
    ]
    gin.clear_config()
    try:
        config.load(["emnist_autoencoder_fedavg.gin"], overrides)
        result = train(overrides=overrides, quiet=True)
    finally:
        gin.clear_config()
    assert result.metrics["test/loss"] < 0.05  # It starts at 0.25, as for any picture.
