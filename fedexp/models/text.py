"""Models of short texts."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import gin
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from fedexp.data import features as features_lib
from fedexp.errors import UserError, check
from fedexp.models.language import LSTM
from fedexp.models.layers import Dense

Initializer = Callable[..., jax.Array]


@gin.configurable
class LSTMClassifier(nn.Module):
    """LEAF's model for Sent140 (Caldas et al. 2018, arXiv:1812.01097, its code).

    Embeddings, two layers of LSTM, of the last output two dense layers without a nonlinearity between:
    1 174 386 parameters for 10 004 ids. LEAF's file of word vectors tells it the words; it learns embeddings
    of its own. Two things differ: LEAF pads with the id of unknown words and reads on to the end, where this
    model takes the output after the last word; and the LSTM starts as Keras' does.

    Attributes:
      num_classes: number of logits.
      vocab_size: number of ids; 0 is padding, which only follows a text.
      embedding_size: width of the embeddings.
      hidden_size: width of each LSTM layer.
      num_layers: number of LSTM layers.
      dense_size: width of the layer before the logits.
      embedding_init: initialiser of the embeddings, as @word_vectors().
    """

    num_classes: int = 2
    vocab_size: int = 10_004
    embedding_size: int = 100
    hidden_size: int = 100
    num_layers: int = 2
    dense_size: int = 128
    embedding_init: Initializer = nn.initializers.glorot_uniform()

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps ids (B, L), of any integer dtype, to logits (B, num_classes)."""
        embed = nn.Embed(self.vocab_size, self.embedding_size, embedding_init=self.embedding_init)
        x = embed(tokens.T)
        for _ in range(self.num_layers):
            x = LSTM(self.hidden_size)(x)
        last = jnp.maximum((tokens != 0).sum(1) - 1, 0)
        x = jnp.take_along_axis(x, last[None, :, None], 0)[0]
        dense_init = nn.initializers.glorot_uniform()
        x = Dense(self.dense_size, kernel_init=dense_init)(x)
        return Dense(self.num_classes, kernel_init=dense_init)(x)


@gin.configurable
def word_vectors(path: str) -> Initializer:
    """An initialiser for embeddings: the vectors of a file such as GloVe's, a word and its numbers a line.

    The ids must be those of `word_ids` with the same file as its `vocabulary`. Padding, unknown words, begin
    and end have zeros, as LEAF's unknown words do.

    Args:
      path: the file, as glove.6B.300d.txt.

    Raises:
      UserError: no such file; from the initialiser, one with too few lines, or vectors of another size.
    """
    file = features_lib.existing(path)

    def init(
        key: jax.Array, shape: tuple[int, int], dtype: jax.typing.DTypeLike = jnp.float32
    ) -> jax.Array:
        table, num_words = np.zeros(shape, np.float32), shape[0] - 4
        with file.open(encoding="utf-8", errors="replace") as lines:
            rows = [line.split()[1:] for line in itertools.islice(lines, num_words)]
        check(
            len(rows) == num_words,
            f"{file} has {len(rows)} words, but the model's vocab_size asks for {num_words}; lower it",
        )
        for number, row in enumerate(rows, start=1):
            try:
                table[number] = np.array(row, np.float32).reshape(shape[1])
            except ValueError as error:
                raise UserError(
                    f"{file}, line {number}: {len(row)} fields follow the word, expected {shape[1]} numbers; "
                    "bind the model's embedding_size to fit, or correct the path"
                ) from error
        return jnp.asarray(table, dtype)

    return init
