"""Language models: they map token ids to the logits of the token that follows each.

The LSTM keeps its states feature-major, (H, B): XLA's CPU backend multiplies a large matrix by a narrow
one faster than the transposed way round. `python -m benchmarks.lstm_in_loop` prints the
measurements behind every choice here.
"""

from __future__ import annotations

import math

import gin
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from fedexp.errors import UserError
from fedexp.models.layers import Dense, Dropout, multiply


@jax.custom_vjp
def lstm(inputs: jax.Array, kernel: jax.Array) -> jax.Array:
    """The recurrence of an LSTM (Hochreiter & Schmidhuber 1997), from zero states.

    The gradient of the kernel is one product over all steps, instead of a sum that every step adds to.

    Args:
      inputs: (T, 4 H, B), what the gates get besides the recurrence, bias included. The gates are
        input, forget, candidate and output, in this order.
      kernel: (H, 4 H), from the previous output to the gates.

    Returns:
      (T, H, B) outputs.
    """
    return _lstm_forward(inputs, kernel)[0]


def _lstm_forward(inputs, kernel):
    kernel_t = kernel.T
    zeros = jnp.zeros((kernel.shape[0], inputs.shape[2]), inputs.dtype)

    def step(state, x):
        output, cell = state
        i, f, g, o = (x + kernel_t @ output).reshape(4, *cell.shape)
        i, f, g, o = nn.sigmoid(i), nn.sigmoid(f), jnp.tanh(g), nn.sigmoid(o)
        cell = f * cell + i * g
        output = o * jnp.tanh(cell)
        return (output, cell), (output, cell, jnp.stack([i, f, g, o]))

    _, (outputs, cells, gates) = jax.lax.scan(step, (zeros, zeros), inputs)
    return outputs, (kernel, outputs, cells, gates)


def _lstm_backward(residuals, d_outputs):
    kernel, outputs, cells, gates = residuals

    def step(state, saved):
        d_output, d_cell = state
        d_above, before, cell, (i, f, g, o) = saved
        d_output += d_above
        squashed = jnp.tanh(cell)
        d_cell += d_output * o * (1 - squashed**2)
        d_gates = jnp.concatenate(
            [
                d_cell * g * i * (1 - i),
                d_cell * before * f * (1 - f),
                d_cell * i * (1 - g**2),
                d_output * squashed * o * (1 - o),
            ]
        )
        return (kernel @ d_gates, d_cell * f), d_gates

    zeros = jnp.zeros_like(cells[0])
    saved = (d_outputs, _delayed(cells), cells, gates)
    _, d_inputs = jax.lax.scan(step, (zeros, zeros), saved, reverse=True)
    return d_inputs, _rows(_delayed(outputs)).T @ _rows(d_inputs)


def _rows(states: jax.Array) -> jax.Array:
    """States (T, H, B) as a matrix (T B, H)."""
    return states.transpose(0, 2, 1).reshape(-1, states.shape[1])


def _delayed(states: jax.Array) -> jax.Array:
    """What each step finds: zeros, then the states (T, H, B) but the last."""
    return jnp.concatenate([jnp.zeros_like(states[:1]), states[:-1]])


lstm.defvjp(_lstm_forward, _lstm_backward)


class LSTM(nn.Module):
    """A layer of Keras' LSTM: one bias, and a forget gate that starts open (its bias at 1).

    Attributes:
      hidden_size: H.
    """

    hidden_size: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (T, B, D) to (T, B, H)."""
        features, size = x.shape[-1], self.hidden_size

        def open_forget_gate(key, shape):
            return jnp.zeros(shape).at[size : 2 * size].set(1)

        kernel = self.param("kernel", nn.initializers.he_normal(), (features, 4 * size))
        recurrent = self.param("recurrent_kernel", nn.initializers.orthogonal(), (size, 4 * size))
        bias = self.param("bias", open_forget_gate, (4 * size,))
        inputs = (multiply(x, kernel) + bias).transpose(0, 2, 1)
        return lstm(inputs, recurrent).transpose(0, 2, 1)


@gin.configurable
class LSTMLanguageModel(nn.Module):
    """The recurrent models of Reddi et al. 2021 (arXiv:2003.00295), for words and for characters.

    Next words of Stack Overflow (their table 9): 96 embeddings, one layer of 670, projected to 96, so
    4 050 748 parameters for 10 004 ids. Next characters of Shakespeare (table 8), with
    embedding_size=8, hidden_size=256, num_layers=2: 820 522 for 90 ids.

    Laid out and initialised like the authors' Keras code: embeddings uniform in +-0.05, kernels
    He-normal, recurrent kernels orthogonal, forget biases 1, dense kernels Glorot-normal. (FedJAX's
    models of the same size squash each layer's output by a further tanh.) Keras holds the state still
    at padding; as padding only follows a sequence, no logit that counts depends on that.

    Attributes:
      vocab_size: V, number of ids, special ones included.
      embedding_size: width of the embeddings.
      hidden_size: width of each layer's state.
      num_layers: number of LSTM layers.
      projection_size: width of the dense layer after each LSTM layer; None for none. 96 for Stack
        Overflow.
    """

    vocab_size: int = 10_004
    embedding_size: int = 96
    hidden_size: int = 670
    num_layers: int = 1
    projection_size: int | None = None

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps ids (B, L), of any integer dtype, to logits (B, L, V)."""
        x = nn.Embed(self.vocab_size, self.embedding_size, embedding_init=_uniform)(tokens.T)
        dense_init = nn.initializers.glorot_normal()
        for _ in range(self.num_layers):
            x = LSTM(self.hidden_size)(x)
            if self.projection_size is not None:
                x = Dense(self.projection_size, kernel_init=dense_init)(x)
        return Dense(self.vocab_size, kernel_init=dense_init)(x.swapaxes(0, 1))


def _uniform(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    return jax.random.uniform(key, shape, dtype, -0.05, 0.05)


@gin.configurable
class TransformerLanguageModel(nn.Module):
    """A causal Transformer (Vaswani et al. 2017), normalised before each sublayer (Xiong et al. 2020).

    3 956 084 parameters by default, about those of the LSTM for Stack Overflow. Positions are
    sinusoids, so it can be evaluated on longer sequences than it was trained on. A position sees itself
    and those before it; padding only follows a sequence, so nothing that counts ever sees it.

    Attributes:
      vocab_size: V, number of ids, special ones included.
      embedding_size: width of the embeddings, in and out.
      width: of the residual stream, a multiple of num_heads.
      num_layers: number of blocks.
      num_heads: of the attention.
      feedforward_size: width of each block's hidden layer.
      dropout_rate: on the embeddings and each sublayer's output; needs the rng 'dropout' in training.

    Raises:
      UserError: a width that does not fit the heads.
    """

    vocab_size: int = 10_004
    embedding_size: int = 96
    width: int = 256
    num_layers: int = 3
    num_heads: int = 8
    feedforward_size: int = 768
    dropout_rate: float = 0.0

    @nn.compact
    def __call__(self, tokens: jax.Array, train: bool = False) -> jax.Array:
        """Maps ids (B, L), of any integer dtype, to logits (B, L, V); `train` switches dropout on."""
        if self.width % (2 * self.num_heads):
            raise UserError(
                "TransformerLanguageModel.width must be a multiple of twice num_heads, got "
                f"{self.width} and {self.num_heads}"
            )

        def dropped(x):
            return Dropout(self.dropout_rate)(x, deterministic=not train)

        x = nn.Embed(self.vocab_size, self.embedding_size)(tokens)
        x = nn.Dense(self.width)(x * math.sqrt(self.embedding_size))
        x = dropped(x + _sinusoids(tokens.shape[1], self.width).astype(x.dtype))
        for _ in range(self.num_layers):
            heads = (3, self.num_heads, self.width // self.num_heads)
            q, k, v = jnp.moveaxis(nn.DenseGeneral(heads)(nn.LayerNorm()(x)), 2, 0)
            attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
            x += dropped(nn.DenseGeneral(self.width, axis=(-2, -1))(attended))
            hidden = nn.gelu(nn.Dense(self.feedforward_size)(nn.LayerNorm()(x)))
            x += dropped(nn.Dense(self.width)(hidden))
        x = nn.Dense(self.embedding_size)(nn.LayerNorm()(x))
        return nn.Dense(self.vocab_size)(x)


def _sinusoids(length: int, width: int) -> np.ndarray:
    """Position encodings (length, width) of Vaswani et al. 2017, the sines before the cosines."""
    frequencies = 10_000 ** (-2 * np.arange(width // 2) / width)
    angles = np.arange(length)[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
