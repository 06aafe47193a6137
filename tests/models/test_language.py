from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedexp.errors import UserError
from fedexp.models.language import LSTMLanguageModel, TransformerLanguageModel, lstm

KEY = jax.random.key(0)
TOKENS = np.random.default_rng(0).integers(1, 12, (3, 7)).astype(np.uint16)
MODELS = {
    "lstm": LSTMLanguageModel(12, 5, 6, num_layers=2, projection_size=4),
    "transformer": TransformerLanguageModel(12, 5, 8, 1, num_heads=2, feedforward_size=16),
}


@functools.cache
def variables_of(name):
    return jax.jit(MODELS[name].init)(KEY, TOKENS)


@functools.cache
def compiled(name):
    return jax.jit(MODELS[name].apply)


def num_parameters(model) -> int:
    shapes = jax.eval_shape(model.init, KEY, jnp.zeros((2, 20), jnp.uint16))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def test_parameter_counts():
    assert num_parameters(LSTMLanguageModel(projection_size=96)) == 4_050_748
    assert num_parameters(LSTMLanguageModel(90, 8, 256, num_layers=2)) == 820_522
    assert num_parameters(TransformerLanguageModel()) == 3_956_084


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def numpy_lstm(x, kernel, recurrent, bias):
    """x (L, D) to (L, H), one step and one sequence at a time, in float64."""
    output = cell = np.zeros(len(recurrent))
    outputs = []
    for x_t in x:
        i, f, g, o = np.split(x_t @ kernel + output @ recurrent + bias, 4)
        cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
        output = sigmoid(o) * np.tanh(cell)
        outputs.append(output)
    return np.array(outputs)


def test_lstm_against_numpy():
    rng = np.random.default_rng(0)
    params = variables_of("lstm")["params"]
    params = jax.tree.map(lambda p: np.asarray(p) + 0.5 * rng.normal(size=p.shape), params)
    found = compiled("lstm")({"params": params}, TOKENS)

    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    expected = []
    for sequence in TOKENS:
        x = p["Embed_0"]["embedding"][sequence]
        for layer in range(2):
            weights = p[f"LSTM_{layer}"]
            x = numpy_lstm(x, weights["kernel"], weights["recurrent_kernel"], weights["bias"])
            x = x @ p[f"Dense_{layer}"]["kernel"] + p[f"Dense_{layer}"]["bias"]
        expected.append(x @ p["Dense_2"]["kernel"] + p["Dense_2"]["bias"])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def differentiable_lstm(inputs, kernel):
    """`lstm`, left to JAX to differentiate."""

    def step(state, x):
        output, cell = state
        i, f, g, o = jnp.split(x + kernel.T @ output, 4)
        cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
        output = jax.nn.sigmoid(o) * jnp.tanh(cell)
        return (output, cell), output

    zeros = jnp.zeros((len(kernel), inputs.shape[-1]))
    return jax.lax.scan(step, (zeros, zeros), inputs)[1]


@pytest.mark.parametrize("lanes", [None, 3])
def test_gradient_of_the_recurrence(lanes):
    shape = () if lanes is None else (lanes,)
    keys = jax.random.split(KEY, 3)
    inputs = jax.random.normal(keys[0], (*shape, 5, 16, 2))
    kernel = jax.random.normal(keys[1], (*shape, 4, 16))
    weights = jax.random.normal(keys[2], (5, 4, 2))

    def gradients(function):
        loss = jax.grad(lambda *args: (weights * function(*args)).sum(), argnums=(0, 1))
        return jax.jit(loss if lanes is None else jax.vmap(loss))(inputs, kernel)

    for found, expected in zip(gradients(lstm), gradients(differentiable_lstm), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_lstm_starts_like_keras():
    params = jax.jit(LSTMLanguageModel(50, 8, 16).init)(KEY, TOKENS)["params"]
    embedding = params["Embed_0"]["embedding"]
    assert -0.05 <= embedding.min() < -0.04 and 0.04 < embedding.max() <= 0.05
    layer = params["LSTM_0"]
    np.testing.assert_array_equal(layer["bias"], np.repeat([0, 1, 0, 0], 16))
    recurrent = layer["recurrent_kernel"]
    np.testing.assert_allclose(recurrent @ recurrent.T, np.eye(16), atol=1e-5)
    np.testing.assert_allclose(layer["kernel"].std(), np.sqrt(2 / 8), rtol=0.1)
    np.testing.assert_allclose(params["Dense_0"]["kernel"].std(), np.sqrt(2 / 66), rtol=0.1)


@pytest.mark.parametrize("name", MODELS)
def test_a_token_changes_nothing_before_it(name):
    """So padding, which only follows a sequence, changes nothing that counts."""
    variables, apply = variables_of(name), compiled(name)
    logits = apply(variables, TOKENS)
    assert logits.shape == (3, 7, 12)
    changed = TOKENS.copy()
    changed[:, 4:] = 0
    again = apply(variables, changed)
    np.testing.assert_allclose(again[:, :4], logits[:, :4], atol=1e-6)
    assert not np.isclose(again[:, 4:], logits[:, 4:], atol=1e-4).all(-1).any()
    # The whole past counts, not the last token alone.
    changed = TOKENS.copy()
    changed[:, 0] = TOKENS[:, 0] % 11 + 1
    again = apply(variables, changed)
    assert not np.isclose(again, logits, atol=1e-6).all(-1).any()


def test_transformer_tells_positions_apart():
    """Of equal tokens, each position gets logits of its own, beyond any length seen before."""
    logits = compiled("transformer")(variables_of("transformer"), np.full((1, 30), 3))[0]
    assert np.abs(np.diff(logits, axis=0)).max(-1).min() > 1e-4


def test_transformer_attends_like_numpy():
    model = TransformerLanguageModel(12, 4, 4, 1, num_heads=1, feedforward_size=4)
    variables = jax.jit(model.init)(KEY, TOKENS)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])

    def dense(name, x):
        return x @ p[name]["kernel"] + p[name]["bias"]

    def normalised(name, x):
        scaled = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return scaled * p[name]["scale"] + p[name]["bias"]

    x = dense("Dense_0", p["Embed_0"]["embedding"][TOKENS[0]] * 2)
    angles = np.arange(7)[:, None] / np.array([1, 100])
    x = x + np.concatenate([np.sin(angles), np.cos(angles)], 1)
    kernel, bias = p["DenseGeneral_0"]["kernel"], p["DenseGeneral_0"]["bias"]
    q, k, v = (normalised("LayerNorm_0", x) @ kernel[:, i, 0] + bias[i, 0] for i in range(3))
    odds = np.exp(q @ k.T / 2) * np.tri(7)
    attended = odds / odds.sum(1, keepdims=True) @ v
    x = x + attended @ p["DenseGeneral_1"]["kernel"][0] + p["DenseGeneral_1"]["bias"]
    hidden = dense("Dense_1", normalised("LayerNorm_1", x))
    hidden = hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3))) / 2
    x = x + dense("Dense_2", hidden)
    expected = dense("Dense_4", dense("Dense_3", normalised("LayerNorm_2", x)))
    found = jax.jit(model.apply)(variables, TOKENS)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_transformer_drops_out_in_training():
    model = TransformerLanguageModel(12, 4, 4, 1, 1, 4, dropout_rate=0.5)
    variables = jax.jit(model.init)(KEY, TOKENS)
    train = jax.jit(lambda key: model.apply(variables, TOKENS, train=True, rngs={"dropout": key}))
    still = jax.jit(model.apply)(variables, TOKENS)
    one, two = map(train, jax.random.split(KEY))
    assert not np.allclose(one, two) and not np.allclose(one, still)


def test_transformer_width_fits_the_heads():
    with pytest.raises(UserError, match="twice num_heads, got 10 and 4"):
        TransformerLanguageModel(width=10, num_heads=4).init(KEY, TOKENS)
