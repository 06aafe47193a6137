from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedexp.errors import UserError
from fedexp.models import LSTMClassifier, word_vectors
from tests.models.test_language import numpy_lstm

TOKENS = np.array([[3, 1, 4, 0, 0], [1, 5, 9, 2, 6], [0, 0, 0, 0, 0]], np.uint16)


def test_the_parameter_count_is_that_of_leaf():
    """Its code has 400 001 ids, GloVe's words and one for all others."""
    shapes = jax.eval_shape(LSTMClassifier(vocab_size=400_001).init, jax.random.key(0), TOKENS)
    lstm = 2 * (200 * 400 + 400)
    expected = 400_001 * 100 + lstm + 100 * 128 + 128 + 128 * 2 + 2
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == expected


def test_the_last_word_decides():
    """Against NumPy, which is not shown the padding."""
    model = LSTMClassifier(3, 10, 4, 5, 2, 6)
    variables = jax.jit(model.init)(jax.random.key(1), TOKENS)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    expected = []
    for row, length in zip(TOKENS, (3, 5, 1), strict=True):
        x = p["Embed_0"]["embedding"][row[:length]]
        for layer in ("LSTM_0", "LSTM_1"):
            weights = p[layer]
            x = numpy_lstm(x, weights["kernel"], weights["recurrent_kernel"], weights["bias"])
        x = x[-1]
        for layer in ("Dense_0", "Dense_1"):
            x = x @ p[layer]["kernel"] + p[layer]["bias"]
        expected.append(x)
    found = jax.jit(model.apply)(variables, TOKENS)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_embeddings_from_a_file(tmp_path):
    path = tmp_path / "vectors.txt"
    path.write_text("the 1 2.5\nof -1e-2 0\nand 7 8\n")
    model = LSTMClassifier(2, 6, 2, 3, embedding_init=word_vectors(str(path)))
    variables = jax.jit(model.init)(jax.random.key(0), TOKENS % 6)
    embedding = variables["params"]["Embed_0"]["embedding"]
    expected = np.zeros((6, 2))
    expected[1:3] = [1, 2.5], [-0.01, 0]
    np.testing.assert_array_equal(embedding, jnp.asarray(expected, jnp.float32))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((8, 2), "vectors.txt has 3 words, but the model's vocab_size asks for 4; lower it"),
        (
            (6, 3),
            "vectors.txt, line 1: 2 fields follow the word, expected 3 numbers; bind the model",
        ),
        ((7, 2), "vectors.txt, line 3: 2 fields follow the word"),
    ],
)
def test_files_that_do_not_fit(tmp_path, shape, message):
    path = tmp_path / "vectors.txt"
    path.write_text("the 1 2.5\nof -1e-2 0\nand 7 many\n")
    with pytest.raises(UserError, match=message):
        word_vectors(str(path))(jax.random.key(0), shape)
    with pytest.raises(UserError, match="no file gone; correct the path"):
        word_vectors("gone")
