from __future__ import annotations

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

from fedexp.algorithms import fedavg
from fedexp.data import FederatedDataset, FederatedSplits, uniform
from fedexp.errors import UserError
from fedexp.evaluation import Evaluate
from fedexp.tasks import absolute_error, mean_loss, regression
from fedexp.trainer import Experiment

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
MASK = np.array([1, 1, 0, 1, 1, 1], bool)


def numbers(*shape: int) -> dict[str, np.ndarray]:
    return {
        "x": RNG.normal(size=(6, 4)).astype(np.float32),
        "y": RNG.normal(3, 2, size=(6, *shape)).astype(np.float32),
    }


@pytest.mark.parametrize("shape, targets", [((), 1), ((3,), 3)])
def test_the_loss_is_the_mean_squared_error(shape, targets):
    task, batch = regression(nn.Dense(targets), targets), numbers(*shape)
    params = task.init(KEY, batch)
    measured = lambda params: mean_loss(task, params, batch, MASK, KEY)  # noqa: E731
    (loss, sums), grads = jax.jit(jax.value_and_grad(measured, has_aux=True))(params)
    x, y = batch["x"][MASK].astype(float), batch["y"][MASK].reshape(5, targets)
    error = x @ np.asarray(params["kernel"]) + params["bias"] - y
    np.testing.assert_allclose(loss, (error**2).mean(), rtol=1e-5)
    np.testing.assert_allclose(sums["mae"].values, np.abs(error).mean(1).sum(), rtol=1e-5)
    assert sums["mae"].weights == 5
    np.testing.assert_allclose(grads["kernel"], 2 * x.T @ error / error.size, rtol=1e-4, atol=1e-6)
    assert task.derived["rmse"]({"loss": 9.0}) == 3


def test_a_federation_finds_the_least_squares_of_all_examples():
    rng, clients = np.random.default_rng(1), {}
    for number in range(5):
        x = rng.normal(number, 1, size=(20, 2)).astype(np.float32)
        y = x @ [2, -1] + 5 + rng.normal(0, 0.5, size=20)
        clients[str(number)] = {"x": x / 4, "y": y.astype(np.float32)}
    dataset = FederatedDataset.from_clients(clients)
    task = regression(nn.Dense(1))
    experiment = Experiment(
        FederatedSplits(dataset, dataset),
        task,
        fedavg(task, optax.sgd(0.01), optax.adam(0.5)),
        num_rounds=100,
        sampler=uniform(5),
        evaluations=[Evaluate(every=0, percentiles=(50,))],
        observers=[],
    )
    metrics = experiment.run().metrics
    x = np.column_stack([dataset.features["x"], np.ones(100)])
    y = np.asarray(dataset.features["y"], float)
    error = x @ np.linalg.lstsq(x, y)[0] - y
    assert error @ error / 100 <= metrics["test/loss"] < 1.1 * error @ error / 100
    np.testing.assert_allclose(metrics["test/mae"], np.abs(error).mean(), rtol=0.1)
    np.testing.assert_allclose(metrics["test/rmse"] ** 2, metrics["test/loss"], rtol=1e-4)
    assert metrics["test/rmse/p50"] < 1.3 * metrics["test/rmse"]


def test_metrics_may_be_others_and_the_model_one_of_nnx():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.layer = nnx.Linear(4, 1, rngs=rngs)

        def __call__(self, x):
            return self.layer(x)

    task = regression(Net, metrics={"off": absolute_error()})
    assert list(task.metrics) == ["off"]
    assert task.init(KEY, numbers())["layer"].keys() == {"kernel", "bias"}


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="num_targets must be at least 1, got 0"):
        regression(nn.Dense(1), 0)
    with pytest.raises(
        UserError, match=r"to \(6, 2\), but regression needs outputs of shape \(6, 1\)"
    ):
        regression(nn.Dense(2)).init(KEY, numbers())
    check = regression(nn.Dense(2), 2).check
    for shape in ((), (3,), (2, 2)):
        with pytest.raises(UserError, match="'y' must hold 2 number"):
            check(FederatedDataset.from_clients({"a": numbers(*shape)}))
    check(FederatedDataset.from_clients({"a": numbers(2)}))
    with pytest.raises(UserError, match="lacks 'y'"):
        check(FederatedDataset.from_clients({"a": {"x": np.zeros((3, 2), np.float32)}}))
