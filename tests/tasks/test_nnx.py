"""NNX models, beside linen ones of the same parameters."""

from __future__ import annotations

import functools
from pathlib import Path

import gin
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from fedexp import bindings, config
from fedexp.data import FederatedDataset, FederatedSplits
from fedexp.data.dataset import Batch
from fedexp.errors import UserError
from fedexp.tasks import classification, gradient, next_token
from fedexp.trainer import Experiment

LINEAR = str(Path(__file__).parents[1] / "support/linear.gin")
RNG = np.random.default_rng(0)
KEY = jax.random.key(0)
EXAMPLES = {
    "x": RNG.normal(1, 2, size=(6, 5)).astype(np.float32),
    "y": RNG.integers(0, 3, 6).astype(np.int32),
}
BATCH = Batch(EXAMPLES, np.array([1, 1, 0, 1, 1, 0], bool))


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool, mask=None):
        x = nn.Dense(4, name="first")(x)
        mask = None if mask is None else mask[:, None]
        x = nn.BatchNorm(use_running_average=not train, momentum=0.8, name="norm")(x, mask=mask)
        return nn.Dense(3, name="last")(nn.relu(x))


class Nnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(5, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.8, rngs=rngs)
        self.last = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x, mask=None):
        mask = None if mask is None else mask[:, None]
        return self.last(nnx.relu(self.norm(self.first(x), mask=mask)))


class Noisy(nnx.Module):
    """Ones, of which dropout takes half, twice and apart."""

    def __init__(self, rngs: nnx.Rngs):
        self.left, self.right = (nnx.Dropout(0.5, rngs=rngs) for _ in range(2))
        self.scale = nnx.Param(jnp.ones(()))

    def __call__(self, x):
        ones = self.scale * jnp.ones_like(x)
        return jnp.stack([self.left(ones), self.right(ones)], axis=-1).reshape(len(x), -1)


class Tied(nnx.Module):
    """A list of layers, of which the last is the first, and an activation that a call leaves."""

    def __init__(self, rngs: nnx.Rngs):
        layer = nnx.Linear(3, 3, rngs=rngs)
        self.layers = nnx.List([layer, nnx.Linear(3, 3, rngs=rngs), layer])

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.relu(layer(x))
        self.activation = nnx.Intermediate(x)
        return x


@gin.configurable
class Bound(nnx.Module):
    def __init__(self, width: int = 4, *, rngs: nnx.Rngs):
        self.only = nnx.Linear(5, width, rngs=rngs)


class Between(nnx.Module):
    """Logistic regression, whose number of classes a gin file says."""

    def __init__(self, num_classes: int, rngs: nnx.Rngs):
        self.layer = nnx.Linear(5, num_classes, rngs=rngs)

    def __call__(self, x):
        return self.layer(x)


def close(found, expected, tol=1e-5):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=tol, atol=tol), found, expected)


@pytest.mark.parametrize("compute_dtype", [None, "bfloat16"])
def test_the_loss_the_gradient_and_the_statistics_are_linens(compute_dtype):
    linen, found = (classification(m, 3, compute_dtype=compute_dtype) for m in (Linen(), Nnx))
    params = linen.init(KEY, EXAMPLES)
    assert jax.tree.map(jnp.shape, found.init(KEY, EXAMPLES)) == jax.tree.map(jnp.shape, params)
    lanes = jax.tree.map(lambda leaf: leaf + RNG.normal(size=(2, *leaf.shape)) ** 2 / 9, params)

    def measured(task, lanes):
        def of_lane(params):
            return gradient(task, params, BATCH, KEY), task.apply(params, EXAMPLES, None)

        return jax.jit(jax.vmap(of_lane))(lanes)

    (grads, sums), outputs = measured(found, lanes)
    close(((grads, sums), outputs), measured(linen, lanes), 1e-2 if compute_dtype else 1e-5)
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(grads["batch_stats"]))


def test_dropout_draws_by_the_steps_key_and_in_training_alone():
    task = classification(Noisy, 10)
    params = task.init(KEY, {**EXAMPLES})
    assert params == {"scale": 1}
    batch = {"x": np.ones((200, 5), np.float32)}
    apply = jax.jit(task.apply)
    first, again, other = (apply(params, batch, jax.random.key(i)) for i in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert set(np.unique(first)) == {0, 2}
    halves = np.asarray(first).reshape(-1, 2)
    for a, b in (halves.T, (first, other), (first, np.ones_like(first))):
        assert 0.4 < (a == b).mean() < 0.6 or (b == 1).all()  # Independent, or evaluation's.
    np.testing.assert_array_equal(task.apply(params, batch, None), np.ones_like(first))


def test_drawing_in_evaluation_is_an_error():
    class Always(nnx.Module):
        def __init__(self, rngs):
            self.rngs = rngs.fork()

        def __call__(self, x):
            return x + jax.random.normal(self.rngs.noise(), x.shape)

    with pytest.raises(UserError, match="Always draws at random in evaluation"):
        classification(Always, 5).init(KEY, EXAMPLES)


def test_a_class_starts_by_the_key_and_a_module_as_it_is():
    module = Between(3, rngs=nnx.Rngs(7))
    of_class = classification(functools.partial(Between, 3), 3)
    of_module = classification(module, 3)
    one, other = (of_class.init(jax.random.key(i), EXAMPLES) for i in (1, 2))
    assert not np.allclose(one["layer"]["kernel"], other["layer"]["kernel"])
    expected = {"layer": {"kernel": module.layer.kernel[...], "bias": module.layer.bias[...]}}
    close(of_module.init(KEY, EXAMPLES), expected)
    twice = jax.tree.map(lambda leaf: 2 * leaf, expected)
    close(of_module.apply(twice, EXAMPLES, KEY), 2 * module(EXAMPLES["x"]))


def test_lists_are_named_by_number_and_shared_layers_are_there_once():
    task = classification(Tied, 3)
    batch = {"x": np.ones((2, 3), np.float32), "y": np.zeros(2, np.int32)}
    params = task.init(KEY, batch)
    assert params.keys() == {"layers"}
    assert params["layers"].keys() == {"0", "1"}
    x = batch["x"]
    for name in "010":
        layer = params["layers"][name]
        x = np.maximum(x @ layer["kernel"] + layer["bias"], 0)
    close(task.apply(params, batch, KEY), x)


@pytest.mark.parametrize(
    "model, message",
    [
        (Between, r"rngs=.*Between.__init__\(\) missing .* argument: 'num_classes'"),
        (nn.Dense, r"rngs=.*Dense.__init__\(\) got an unexpected keyword argument 'rngs'"),
        (lambda rngs: 3, r"<lambda>\(rngs=...\) must make an NNX module, got"),
        ("Nnx", "the class of an NNX one, got 'Nnx'"),
    ],
)
def test_what_is_no_model_is_refused(model, message):
    with pytest.raises(UserError, match=message):
        classification(model, 3)


def test_a_class_bound_with_parentheses_is_told_how_it_is_meant():
    with pytest.raises(UserError, match=r"@Bound\(\) needs rngs; write @Bound$"):
        config.load([LINEAR], ["train.task = @classification()", "classification.model = @Bound()"])
        bindings.check_required()


def test_outputs_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"Nnx maps inputs of shape \(6, 5\) to \(6, 3\)"):
        classification(Nnx, 4).init(KEY, EXAMPLES)
    with pytest.raises(UserError, match=r"set next_token.vocab_size; Nnx has no such"):
        next_token(Nnx)


def test_gin_binds_a_class_and_its_arguments(tmp_path):
    gin.configurable(Between, module="of_this_test")
    clients = {str(i): {"x": EXAMPLES["x"], "y": EXAMPLES["y"]} for i in range(3)}
    dataset = FederatedDataset.from_clients(clients)
    gin.configurable("some_clients", module="of_this_test")(
        lambda: FederatedSplits(dataset, dataset)
    )
    bindings = """\
        train.dataset = @some_clients()
        train.task = @classification()
        classification.model = @Between
        classification.num_classes = 3
        Between.num_classes = 3
        train.algorithm = @fedavg
        fedavg.client_optimizer = @client/sgd()
        fedavg.server_optimizer = @server/sgd()
        client/sgd.learning_rate = 0.1
        server/sgd.learning_rate = 1.0
        uniform.cohort_size = 2
        train.sampler = @uniform()
        train.num_rounds = 2
        train.observers = []
    """
    config.load([], [line.strip() for line in bindings.splitlines()])
    first = Experiment().run(tmp_path)
    assert first.params["layer"]["kernel"].shape == (5, 3)
    resumed = Experiment(num_rounds=4).run(tmp_path)
    assert resumed.rounds == 4 and resumed.metrics["test/loss"] < first.metrics["test/loss"]
