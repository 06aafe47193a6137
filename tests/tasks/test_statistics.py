from __future__ import annotations

import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from fedexp.data.dataset import Batch, FederatedDataset
from fedexp.errors import UserError
from fedexp.tasks import (
    carrying_statistics,
    classification,
    gradient,
    mean_loss,
    reconstruction,
    split_statistics,
)
from tests.support.local import in_lanes_and_alone

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)
EXAMPLES = {
    "x": RNG.normal(1, 2, size=(6, 5)).astype(np.float32),
    "y": RNG.integers(0, 3, 6).astype(np.int32),
}
MASK = np.array([1, 1, 0, 1, 1, 0], bool)
BATCH = Batch(EXAMPLES, MASK)


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool, mask=None):
        x = nn.Dense(4)(x)
        mask = None if mask is None else mask[:, None]
        x = nn.BatchNorm(use_running_average=not train, momentum=0.8)(x, mask=mask)
        return nn.Dense(3)(nn.relu(x))


class Unmasked(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        return nn.BatchNorm(use_running_average=not train, momentum=0.8)(nn.Dense(3)(x))


class Counting(nn.Module):
    """Keeps a whole number, and grows a collection if it is told to."""

    grow: bool = False

    @nn.compact
    def __call__(self, x, train: bool):
        steps = self.variable("cache", "steps", lambda: jnp.zeros((), jnp.int32))
        if train:
            steps.value += 1
            if self.grow:
                self.variable("cache", "more", lambda: jnp.zeros(()))
        return nn.Dense(3)(x)


TASK = classification(Normalised(), 3, preprocess=None)
PARAMS = TASK.init(KEY, EXAMPLES)


def numpy_statistics(task, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Running mean and variance after one step from 0 and 1, momentum 0.8, over the given rows."""
    layer = task.init(KEY, EXAMPLES)["params"]["Dense_0"]
    hidden = EXAMPLES["x"][rows].astype(float) @ layer["kernel"] + layer["bias"]
    return 0.2 * hidden.mean(0), 0.8 + 0.2 * hidden.var(0)


def new_statistics(task, batch) -> tuple[np.ndarray, np.ndarray]:
    """Running mean and variance after one local step."""
    params = task.init(KEY, EXAMPLES)
    grads, _ = jax.jit(lambda batch: gradient(task, params, batch, KEY))(batch)
    new = jax.tree.map(operator.sub, params["batch_stats"], grads["batch_stats"])["BatchNorm_0"]
    return new["mean"], new["var"]


def test_parameters_are_all_variables_of_a_model_with_statistics():
    assert PARAMS.keys() == {"params", "batch_stats"}
    assert classification(nn.Dense(3), 3).init(KEY, EXAMPLES).keys() == {"kernel", "bias"}
    without = nn.BatchNorm(use_running_average=True, use_bias=False, use_scale=False)
    assert reconstruction(without).init(KEY, EXAMPLES).keys() == {"params", "batch_stats"}


def test_a_step_renews_statistics_from_the_examples_that_are_real():
    np.testing.assert_allclose(new_statistics(TASK, BATCH), numpy_statistics(TASK, MASK), rtol=1e-5)


def test_padding_counts_in_a_model_that_takes_no_mask():
    task = classification(Unmasked(), 3)
    everything = np.ones(6, bool)
    np.testing.assert_allclose(
        new_statistics(task, BATCH), numpy_statistics(task, everything), rtol=1e-5
    )


@pytest.mark.slow
def test_the_gradient_of_what_is_trained_is_that_of_the_loss():
    real = Batch({name: array[MASK] for name, array in EXAMPLES.items()}, np.ones(4, bool))

    def loss(trained, batch):
        return mean_loss(TASK, {**PARAMS, "params": trained}, *batch, KEY)

    expected, sums = jax.grad(loss, has_aux=True)(PARAMS["params"], real)
    found, found_sums = gradient(TASK, PARAMS, BATCH, KEY)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)  # noqa: E731
    jax.tree.map(close, (found["params"], found_sums), (expected, sums))
    # Batch statistics depend on parameters: with constants in their place the gradient is another.
    frozen, _ = jax.grad(
        lambda trained: mean_loss(TASK, {**PARAMS, "params": trained}, *real, None), has_aux=True
    )(PARAMS["params"])
    assert not np.allclose(frozen["Dense_0"]["kernel"], expected["Dense_0"]["kernel"], rtol=0.1)


def test_a_batch_of_padding_changes_nothing():
    grads, sums = gradient(TASK, PARAMS, Batch(EXAMPLES, np.zeros(6, bool)), KEY)
    for leaf in jax.tree.leaves((grads, sums)):
        np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))


def test_evaluation_reads_running_statistics_and_renews_none():
    shifted = jax.tree.map(lambda leaf: leaf + 1, PARAMS["batch_stats"])
    params = {**PARAMS, "batch_stats": shifted}
    one_by_one = [
        TASK.apply(params, {"x": x[None], "y": EXAMPLES["y"][:1]}, None)[0] for x in EXAMPLES["x"]
    ]
    outputs = TASK.apply(params, EXAMPLES, None)
    np.testing.assert_allclose(outputs, np.stack(one_by_one), rtol=1e-4, atol=1e-6)
    assert not np.allclose(outputs, TASK.apply(PARAMS, EXAMPLES, None))
    # In training the batch's own take their place.
    trained = [TASK.apply(p, EXAMPLES, KEY) for p in (params, PARAMS)]
    np.testing.assert_array_equal(*trained)
    grads, _ = gradient(TASK, params, BATCH, None)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads["batch_stats"]))


def test_an_optimizer_leaves_statistics_to_sgd():
    optimizer, inner = carrying_statistics(optax.adam(0.1)), optax.adam(0.1)
    grads, _ = gradient(TASK, PARAMS, BATCH, KEY)
    state = optimizer.init(PARAMS)
    jax.tree.map(np.testing.assert_array_equal, state, inner.init(PARAMS["params"]))
    updates, state = optimizer.update(grads, state, PARAMS)
    new = optax.apply_updates(PARAMS, updates)
    expected, inner_state = inner.update(grads["params"], inner.init(PARAMS["params"]))
    jax.tree.map(np.testing.assert_array_equal, updates["params"], expected)
    jax.tree.map(np.testing.assert_array_equal, state, inner_state)
    found = new["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(
        (found["mean"], found["var"]), numpy_statistics(TASK, MASK), rtol=1e-5
    )


def test_the_servers_statistics_become_the_clients_mean():
    clients = [jax.tree.map(lambda p, by=by: p + by, PARAMS) for by in (1.0, 3.0)]
    update = jax.tree.map(lambda p, *y: sum(y) / 2 - p, PARAMS, *clients)
    optimizer = carrying_statistics(optax.adam(0.1))
    negated = jax.tree.map(jnp.negative, update)
    updates, _ = optimizer.update(negated, optimizer.init(PARAMS), PARAMS)
    new = split_statistics(optax.apply_updates(PARAMS, updates))[1]
    expected = jax.tree.map(lambda p: p + 2, PARAMS["batch_stats"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), new["batch_stats"], expected
    )


@pytest.mark.parametrize("params", [{"kernel": np.ones(3)}, {"params": np.ones(3)}, [np.ones(3)]])
def test_a_tree_without_statistics_has_the_optimizer_itself(params):
    bare = optax.adamw(0.1)
    carrying = carrying_statistics(bare)
    state, expected_state = carrying.init(params), bare.init(params)
    assert jax.tree.structure(state) == jax.tree.structure(expected_state)
    grads = jax.tree.map(np.sin, params)
    assert str(jax.make_jaxpr(carrying.update)(grads, state, params)) == str(
        jax.make_jaxpr(bare.update)(grads, state, params)
    )
    stateless, _ = carrying_statistics(optax.sgd(0.1)).update(grads, optax.sgd(0.1).init(params))
    assert jax.tree.structure(stateless) == jax.tree.structure(params)


def test_extra_arguments_reach_the_optimizer():
    optimizer = carrying_statistics(optax.contrib.reduce_on_plateau(patience=1))
    updates, _ = optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS, value=1.0)
    assert updates.keys() == PARAMS.keys()
    carrying_statistics(optax.sgd(0.1)).update(PARAMS, optax.sgd(0.1).init({}), value=1.0)


def test_padded_lanes_learn_as_clients_alone():
    sizes, clients = (5, 9, 1, 12), {}
    for number, size in enumerate(sizes):
        y = RNG.integers(0, 3, size).astype(np.int32)
        clients[f"client{number}"] = {
            "x": RNG.normal(y[:, None], 0.3, (size, 5)).astype(np.float32),
            "y": y,
        }
    dataset = FederatedDataset.from_clients(clients)
    params, losses = in_lanes_and_alone(TASK, dataset, optax.sgd(0.1), 20)
    assert losses[3, -1] < 0.5 * losses[3, 0]
    means = params["batch_stats"]["BatchNorm_0"]["mean"]
    assert np.abs(means[0] - means[1]).max() > 0.01  # Each lane has its own.


def test_statistics_stay_in_float32_when_the_model_is_computed_in_fewer_bits():
    task = classification(Normalised(), 3, preprocess=None, compute_dtype="bfloat16")
    # Near 256, where bfloat16 counts in twos, a step moves the mean by less than one.
    params = jax.tree.map(lambda p: p, PARAMS)
    params["batch_stats"]["BatchNorm_0"]["mean"] = jnp.full(4, 256.0)
    new = task.apply_and_update(params, EXAMPLES, MASK, KEY)[1]["batch_stats"]["BatchNorm_0"]
    batch_mean = numpy_statistics(TASK, MASK)[0] / 0.2
    assert new["mean"].dtype == new["var"].dtype == jnp.float32
    np.testing.assert_allclose(new["mean"], 0.8 * 256 + 0.2 * batch_mean, atol=0.02)


def test_other_collections_are_carried_alike():
    task = classification(Counting(), 3)
    params = task.init(KEY, EXAMPLES)
    optimizer = carrying_statistics(optax.sgd(0.1))
    grads, _ = gradient(task, params, BATCH, KEY)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    new = optax.apply_updates(params, updates)
    assert new["cache"]["steps"] == 1
    assert new["cache"]["steps"].dtype == jnp.int32


def test_what_cannot_be_carried_is_refused():
    task = classification(Counting(grow=True), 3)
    with pytest.raises(UserError, match="changes the structure of cache"):
        gradient(task, task.init(KEY, EXAMPLES), BATCH, KEY)
    linear = classification(nn.Dense(3), 3)
    params = {"params": linear.init(KEY, EXAMPLES), "extra": {}}
    without = type(linear)(linear.init, linear.apply, linear.loss)
    with pytest.raises(UserError, match="with extra besides params needs a task with apply_and_up"):
        gradient(without, params, BATCH, KEY)
