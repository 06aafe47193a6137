from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from fedexp.data.dataset import Batch, FederatedDataset
from fedexp.errors import UserError
from fedexp.models import (
    CelebaCNN,
    EmnistAutoencoder,
    EmnistCNN,
    LSTMLanguageModel,
    ResNet18GroupNorm,
    TagLogistic,
    TransformerLanguageModel,
)
from fedexp.tasks import (
    classification,
    gradient,
    mean_loss,
    next_token,
    reconstruction,
    tag_prediction,
)
from tests.support.local import in_lanes_and_alone

KEY, DROPOUT = jax.random.key(0), jax.random.key(1)
RNG = np.random.default_rng(0)
IMAGES = {
    "x": RNG.integers(0, 256, (8, 28, 28)).astype(np.uint8),
    "y": RNG.integers(0, 10, 8).astype(np.int32),
}
TEXT = {"tokens": RNG.integers(1, 30, (4, 9)).astype(np.uint16)}
POSTS = {
    "words": RNG.integers(1, 40, (5, 6)).astype(np.uint16),
    "num_words": np.full(5, 6, np.uint16),
    "tags": RNG.integers(0, 7, (5, 2)).astype(np.int16),
}
TASKS = {
    "classification": (classification, EmnistCNN(10), {"num_classes": 10}, IMAGES),
    "next_token": (next_token, LSTMLanguageModel(30, 8, 16, 2), {}, TEXT),
    "reconstruction": (reconstruction, EmnistAutoencoder(), {}, IMAGES),
    "tag_prediction": (tag_prediction, TagLogistic(40, 7), {}, POSTS),
}

PICTURES = {"x": RNG.integers(0, 256, (2, 16, 16, 3)).astype(np.uint8), "y": IMAGES["y"][:2]}
MORE_MODELS = {
    "transformer": (next_token, TransformerLanguageModel(30, 4, 8, 1, 2, 8), {}, TEXT),
    "resnet": (
        classification,
        ResNet18GroupNorm(10, stages=(1,), strides=(1,), width=4),
        {"num_classes": 10},
        PICTURES,
    ),
    "batch statistics": (classification, CelebaCNN(10), {"num_classes": 10}, PICTURES),
}


def dtypes_of_products(jaxpr) -> list[str]:
    """The operands' dtypes of every matrix product and convolution of a program."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            found += [str(operand.aval.dtype) for operand in equation.invars]
        for part in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(part, "jaxpr", part)
            if hasattr(inner, "eqns"):
                found += dtypes_of_products(inner)
    return found


@pytest.mark.parametrize("name", [*TASKS, *MORE_MODELS])
def test_all_products_are_of_bfloat16_in_training_and_evaluation(name, monkeypatch):
    monkeypatch.setattr(
        sys.modules["fedexp.tasks.flax_task"], "run_once", lambda function, *args: function(*args)
    )
    build, model, options, batch = (TASKS | MORE_MODELS)[name]
    task = build(model, **options, compute_dtype="bfloat16")
    mask = np.ones(len(next(iter(batch.values()))), bool)
    params = jax.eval_shape(task.init, KEY, batch)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {"float32"}

    step = jax.make_jaxpr(lambda params: gradient(task, params, Batch(batch, mask), DROPOUT))
    evaluate = jax.make_jaxpr(lambda params: mean_loss(task, params, batch, mask, None))
    for program in (step(params), evaluate(params)):
        products = set(dtypes_of_products(program.jaxpr))
        if name == "transformer" and len(products) > 1:  # JAX's attention has float32 logits.
            products.remove("float32")
        assert products == (set() if name == "tag_prediction" else {"bfloat16"})  # It adds rows up.
        assert {str(out.dtype) for out in program.out_avals} == {"float32"}


@pytest.mark.parametrize("name", TASKS)
def test_a_task_in_bfloat16_is_nearly_the_same_and_trains_float32(name):
    build, model, options, batch = TASKS[name]
    mask = np.ones(len(next(iter(batch.values()))), bool)
    whole, half = build(model, **options), build(model, **options, compute_dtype="bfloat16")
    params = whole.init(KEY, batch)
    jax.tree.map(np.testing.assert_array_equal, params, half.init(KEY, batch))

    def value_and_gradient(task):
        loss = lambda params: mean_loss(task, params, batch, mask, DROPOUT)  # noqa: E731
        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    (loss, _), gradient = value_and_gradient(whole)
    (half_loss, sums), half_gradient = value_and_gradient(half)
    for leaf in jax.tree.leaves((half_loss, sums, half_gradient)):
        assert leaf.dtype == jnp.float32
    np.testing.assert_allclose(half_loss, loss, rtol=0.02)
    error = optax.tree.norm(jax.tree.map(jnp.subtract, half_gradient, gradient))
    # Bfloat16 has 8 bits, an error of 0.4 % in every number; with some draws maxima of a pool
    # change places as well, which makes it up to 14 % in all.
    assert 1e-4 < error / optax.tree.norm(gradient) < 0.1


def test_parameters_and_inputs_are_rounded_alike():
    seen = []

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            kernel = self.param("kernel", nn.initializers.ones, (3, 2))
            seen.append((x.dtype, kernel.dtype))
            return x @ kernel

    batch = {"x": np.full((1, 3), 1.001, np.float32), "y": np.zeros(1, np.int32)}
    task = classification(Model(), 2, preprocess=None, compute_dtype="bfloat16")
    params = task.init(KEY, batch)
    logits = task.apply(params, batch, None)
    assert seen[-1] == (jnp.bfloat16, jnp.bfloat16)
    assert logits.dtype == jnp.float32
    np.testing.assert_array_equal(logits, [[3, 3]])  # 1.001 is 1 in bfloat16.


def test_lanes_in_bfloat16_learn():
    labels = RNG.integers(0, 2, 60).astype(np.int32)
    x = (RNG.normal(size=(60, 3)) + 3 * labels[:, None]).astype(np.float32)
    dataset = FederatedDataset(
        {"x": x, "y": labels}, np.array([0, 20, 45, 60]), np.array(["a", "b", "c"])
    )
    task = classification(nn.Dense(2), 2, preprocess=None, compute_dtype="bfloat16")
    params, losses = in_lanes_and_alone(task, dataset, optax.sgd(0.1), 30)
    assert (losses[:, -1] < losses[:, 0] / 2).all()
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}


@pytest.mark.parametrize("name", TASKS)
def test_other_dtypes_are_refused(name):
    build, model, options, _ = TASKS[name]
    message = f"{build.__name__}.compute_dtype must be 'bfloat16' or None, got 'float16'"
    with pytest.raises(UserError, match=message):
        build(model, **options, compute_dtype="float16")
