from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from fedexp.models import layers
from fedexp.models.emnist import EmnistCNN
from fedexp.models.layers import Conv, Dropout, convolve, dropout, max_pool_2x2, multiply

CASES = [
    # (height, width, channels), features, kernel, strides, padding
    ((10, 10, 8), 6, (3, 3), (1, 1), "VALID"),  # Winograd, whole tiles
    ((9, 8, 8), 6, (3, 3), (1, 1), "VALID"),  # Winograd, part of a tile
    ((7, 9, 12), 5, (3, 3), (1, 1), "SAME"),
    ((8, 9, 8), 5, (3, 5), (1, 2), "SAME"),  # Winograd, other columns
    ((6, 4, 8), 5, (3, 1), (1, 1), "VALID"),  # Winograd, a single tile
    ((3, 4, 8), 5, (3, 1), (1, 1), "VALID"),
    ((9, 9, 1), 4, (3, 3), (1, 1), "VALID"),
    ((9, 10, 8), 4, (5, 5), (1, 1), "SAME"),
    ((9, 10, 8), 4, (3, 3), (2, 2), "SAME"),
    ((10, 9, 2), 4, (2, 3), (2, 3), "VALID"),
    ((6, 5, 8), 4, (1, 1), (1, 1), "VALID"),
]


@pytest.fixture(autouse=True)
def winograd_for_small_images(monkeypatch):
    monkeypatch.setattr(layers, "_WINOGRAD_MIN_OUTPUTS", 1)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("shape, features, kernel, strides, padding", CASES)
def test_conv_is_nn_conv(shape, features, kernel, strides, padding):
    ours = Conv(features, kernel, strides, padding)
    theirs = nn.Conv(features, kernel, strides, padding)
    x = normal(0, 3, *shape)
    shapes = jax.eval_shape(theirs.init, jax.random.key(1), x)
    assert jax.eval_shape(ours.init, jax.random.key(1), x) == shapes
    variables = jax.tree.map(lambda p: normal(2, *p.shape), shapes)

    @functools.partial(jax.jit, static_argnums=0)
    def outcome(module):
        value, pullback = jax.vjp(module.apply, variables, x)
        return value, pullback(normal(3, *value.shape))

    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)  # noqa: E731
    jax.tree.map(close, outcome(ours), outcome(theirs))


def test_conv_starts_as_nn_conv():
    x, key = normal(0, 1, 6, 6, 8), jax.random.key(1)
    ours, theirs = Conv(4, (3, 3)).init(key, x), nn.Conv(4, (3, 3)).init(key, x)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_conv_without_bias_and_in_bfloat16():
    x = normal(0, 2, 6, 6, 8)
    module = Conv(4, (3, 3), use_bias=False, dtype=jnp.bfloat16)
    variables = module.init(jax.random.key(1), x)
    assert set(variables["params"]) == {"kernel"}
    assert variables["params"]["kernel"].dtype == jnp.float32
    y = module.apply(variables, x)
    assert y.dtype == jnp.bfloat16
    expected = nn.Conv(4, (3, 3), use_bias=False).apply(variables, x)
    np.testing.assert_allclose(y.astype(jnp.float32), expected, atol=0.05)


@pytest.mark.parametrize(
    ("strides", "padding", "width", "features", "kernel_width"),
    [
        ((1, 1), "VALID", 8, 4, 3),  # Pairs of columns.
        ((1, 1), "VALID", 8, 4, 1),
        ((1, 1), "VALID", 8, 4, 2),
        ((1, 1), "VALID", 9, 4, 3),
        ((1, 1), "VALID", 8, 65, 3),
        ((2, 1), "SAME", 8, 4, 3),
    ],
)
def test_on_tpu_a_convolution_is_xlas_own(
    monkeypatch, strides, padding, width, features, kernel_width
):
    x, kernel = normal(0, 2, 9, width, 3), normal(1, 3, kernel_width, 3, features)
    plain = nn.Conv(features, (3, kernel_width), strides, padding, use_bias=False)

    def run(x, kernel):
        return convolve(x, kernel, strides=strides, padding=padding)

    expected, pull_expected = jax.vjp(
        lambda x, kernel: plain.apply({"params": {"kernel": kernel}}, x), x, kernel
    )
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert "dot_general" not in (program := jax.jit(run).lower(x, kernel).as_text())
    paired = (width, features, kernel_width, padding) in ((8, 4, 3, "VALID"), (8, 4, 1, "VALID"))
    assert (f"x{2 * features}xf32" in program) == paired
    y, pull = jax.vjp(run, x, kernel)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    close(y, expected)
    g = normal(2, *y.shape)
    jax.tree.map(close, pull(g), pull_expected(g))


def test_winograd_is_nearly_as_accurate_as_a_direct_convolution():
    x, kernel = normal(0, 4, 26, 26, 32), normal(1, 3, 3, 32, 64)
    patches = np.lib.stride_tricks.sliding_window_view(np.asarray(x, np.float64), (3, 3), (1, 2))
    exact = np.einsum("bhwcij,ijco->bhwo", patches, np.asarray(kernel, np.float64), optimize=True)
    error = np.abs(convolve(x, kernel) - exact).max() / np.abs(exact).max()
    assert error < 2e-6


def test_conv_trains_per_lane_kernels_in_a_loop():
    """Lanes under vmap inside a fori_loop equal nn.Conv trained in Python, a lane at a time."""
    lanes, steps = 3, 4
    x, target = normal(0, lanes, 2, 8, 8, 8), normal(1, lanes, 2, 6, 6, 4)
    ours, theirs = Conv(4, (3, 3), padding="VALID"), nn.Conv(4, (3, 3), padding="VALID")
    params = jax.vmap(lambda key, x: theirs.init(key, x))(jax.random.split(jax.random.key(2), 3), x)

    @functools.partial(jax.jit, static_argnums=0)
    def step(module, params, x, target):
        loss = lambda p: jnp.mean((module.apply(p, x) - target) ** 2)  # noqa: E731
        return jax.tree.map(lambda p, g: p - 0.5 * g, params, jax.grad(loss)(params))

    @jax.jit
    def loop(params):
        body = jax.vmap(lambda p, x, t: step(ours, p, x, t))
        return lax.fori_loop(0, steps, lambda _, p: body(p, x, target), params)

    trained = loop(params)
    for lane in range(lanes):
        expected = jax.tree.map(lambda p, lane=lane: p[lane], params)
        for _ in range(steps):
            expected = step(theirs, expected, x[lane], target[lane])
        jax.tree.map(
            lambda a, b, lane=lane: np.testing.assert_allclose(a[lane], b, rtol=1e-4, atol=1e-5),
            trained,
            expected,
        )


def test_unused_input_gradient_costs_nothing():
    """XLA drops the first layer's input gradient: a training step has no more products for it."""
    x, kernel = normal(0, 2, 8, 8, 8), normal(1, 3, 3, 8, 4)
    loss = lambda kernel, x: jnp.sum(convolve(x, kernel) ** 2)  # noqa: E731

    def flops(argnums):
        compiled = jax.jit(jax.grad(loss, argnums)).lower(kernel, x).compile()
        return compiled.cost_analysis()["flops"]

    assert flops(0) < 0.75 * flops((0, 1))


@pytest.mark.parametrize("backend", ["cpu", "tpu"])
@pytest.mark.parametrize("shape", [(2, 6, 8, 3), (2, 7, 5, 3)])
def test_max_pool_is_nn_max_pool(monkeypatch, shape, backend):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    x = normal(0, *shape)
    pool = lambda x: nn.max_pool(x, (2, 2), (2, 2))  # noqa: E731
    y, pullback = jax.vjp(max_pool_2x2, x)
    expected, expected_pullback = jax.vjp(pool, x)
    np.testing.assert_array_equal(y, expected)
    g = normal(1, *y.shape)
    np.testing.assert_array_equal(pullback(g)[0], expected_pullback(g)[0])


@pytest.mark.parametrize("features", [2, 9])
def test_multiply_and_its_derivatives(features):
    """More rows than features, and fewer: two ways to make the kernel's gradient."""
    x, kernel, weights = normal(0, 2, 3, 5), normal(1, 5, features), normal(2, 2, 3, features)
    loss = lambda x, kernel: (weights * multiply(x, kernel) ** 2).sum()  # noqa: E731
    exact_x, exact_kernel = (np.asarray(a, np.float64) for a in (x.reshape(6, 5), kernel))
    error = 2 * weights.reshape(6, features) * (exact_x @ exact_kernel)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    close(multiply(x, kernel), (exact_x @ exact_kernel).reshape(2, 3, features))
    for gradient in (jax.grad, jax.jacfwd):
        by_x, by_kernel = gradient(loss, argnums=(0, 1))(x, kernel)
        close(by_x.reshape(6, 5), error @ exact_kernel.T)
        close(by_kernel, exact_x.T @ error)
    lanes = jax.vmap(jax.grad(loss, argnums=1))(jnp.stack([x, x]), jnp.stack([kernel, -kernel]))
    close(lanes, [exact_x.T @ error, -(exact_x.T @ error)])


def test_max_pool_ties_share_the_gradient():
    x = jnp.array([[1.0, 1.0], [0.0, 1.0]]).reshape(1, 2, 2, 1)
    (gradient,) = jax.vjp(max_pool_2x2, x)[1](jnp.full((1, 1, 1, 1), 6.0))
    np.testing.assert_array_equal(gradient[0, :, :, 0], [[2, 2], [0, 2]])
    direction = jnp.array([[3.0, 6.0], [5.0, 9.0]]).reshape(1, 2, 2, 1)
    np.testing.assert_allclose(jax.jvp(max_pool_2x2, (x,), (direction,))[1].item(), 6, rtol=1e-6)


def test_on_tpu_a_nan_stays_and_one_of_a_tie_has_its_gradient(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    for place in np.ndindex(2, 2):
        x = jnp.zeros((1, 2, 2, 1)).at[0, *place, 0].set(jnp.nan)
        assert np.isnan(max_pool_2x2(x)).item()
    (gradient,) = jax.vjp(max_pool_2x2, jnp.ones((1, 2, 2, 1)))[1](jnp.full((1, 1, 1, 1), 6.0))
    assert sorted(gradient.ravel().tolist()) == [0, 0, 0, 6]


def test_on_tpu_ties_on_a_blank_background_train_the_cnn_alike(monkeypatch):
    """Squares that see the same pixels tie; which of them has the gradient is all one to the parameters."""
    pixels = np.ones((4, 28, 28, 1), np.float32)
    pixels[:, 9:17, 6:20] = np.random.default_rng(0).random((4, 8, 14, 1))
    model = EmnistCNN(10)
    params = model.init(jax.random.key(0), pixels)

    def gradients(backend):
        monkeypatch.setattr(jax, "default_backend", lambda: backend)
        loss = lambda p: jax.nn.logsumexp(jnp.asarray(model.apply(p, pixels)) ** 2)  # noqa: E731
        return jax.jit(jax.grad(loss))(params)

    def compare(ours, expected):
        np.testing.assert_allclose(ours, expected, atol=1e-5 * np.abs(expected).max())

    jax.tree.map(compare, gradients("tpu"), gradients("gpu"))


@pytest.mark.parametrize("rate, kept", [(0.25, 0.75), (0.5, 0.5), (0.1, 230 / 256)])
def test_dropout_rate_and_scale(rate, kept):
    x = jnp.ones((401, 999))  # Not a multiple of the four decisions in a word.
    y = np.asarray(dropout(jax.random.key(0), x, rate))
    np.testing.assert_allclose(np.unique(y), [0, 1 / kept], rtol=1e-6)
    deviation = np.sqrt(kept * (1 - kept) / x.size)
    assert abs((y != 0).mean() - kept) < 4 * deviation
    for axis in (0, 1):  # Neighbours decide independently, also across words.
        kept_pairs = np.mean(np.take(y, range(400), axis) * np.take(y, range(1, 401), axis) > 0)
        assert abs(kept_pairs - kept**2) < 0.01


def test_dropout_extremes():
    x = normal(0, 5)
    np.testing.assert_array_equal(dropout(jax.random.key(0), x, 0.0), x)
    np.testing.assert_array_equal(dropout(jax.random.key(0), x, 1.0), np.zeros(5))


def test_dropout_gradient_is_its_mask():
    x, key = normal(0, 50), jax.random.key(1)
    gradient = jax.grad(lambda x: dropout(key, x, 0.5).sum())(x)
    np.testing.assert_allclose(dropout(key, x, 0.5), gradient * x, rtol=1e-6)


def test_dropout_is_the_same_under_vmap_and_jit():
    x, keys = normal(0, 3, 7, 9), jax.random.split(jax.random.key(1), 3)
    module = Dropout(0.25)

    def drop(key, x):
        return module.apply({}, x, deterministic=False, rngs={"dropout": key})

    each = np.stack([drop(key, row) for key, row in zip(keys, x, strict=True)])
    np.testing.assert_array_equal(jax.vmap(drop)(keys, x), each)
    np.testing.assert_array_equal(jax.jit(jax.vmap(drop))(keys, x), each)
    assert (each[0] != 0).tolist() != (each[1] != 0).tolist()


def test_an_examples_mask_does_not_depend_on_the_examples_after_it():
    x = normal(0, 5, 3, 7)
    few = dropout(jax.random.key(1), x[:2], 0.5)
    np.testing.assert_array_equal(dropout(jax.random.key(1), x, 0.5)[:2], few)


def test_on_tpu_the_same_mask_comes_of_words_in_one_row(monkeypatch):
    key, x = jax.random.key(1), normal(0, 5, 3, 7)
    masks = []
    for backend, words in (("cpu", "(5, 1, 2)"), ("tpu", "(10,)")):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        assert f"shape={words}" in str(jax.make_jaxpr(lambda: dropout(key, x, 0.25))())
        masks.append(dropout(key, x, 0.25) != 0)
    np.testing.assert_array_equal(*masks)


def test_dropout_module_does_nothing_in_evaluation():
    x = normal(0, 4)
    np.testing.assert_array_equal(Dropout(0.5).apply({}, x, deterministic=True), x)
