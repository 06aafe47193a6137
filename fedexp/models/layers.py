"""Layers that stay fast inside a compiled loop with one set of parameters per lane.

XLA's CPU backend runs a convolution inside a loop an order of magnitude slower than outside, and one
with per-lane kernels slower still. A matrix product suffers from neither, so `Conv` is built of
those. `python -m benchmarks.convolution_in_loop` prints the measurements behind every choice here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jax import lax

# Lavin & Gray 2016 (arXiv:1509.09308), F(2, 3): two outputs of a 3-tap filter, four products.
_FROM_INPUT = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]])
_FROM_KERNEL = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
_TO_OUTPUT = np.array([[1, 1, 1, 0], [0, 1, -1, -1]])
# Below this many input channels the transforms cost more than the products they save.
_WINOGRAD_MIN_CHANNELS = 8
# Nor below this many outputs per channel, where the kernels are the larger part.
_WINOGRAD_MIN_OUTPUTS = 512


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: tuple[int, int] = (1, 1),
    padding: str = "VALID",
) -> jax.Array:
    """A two-dimensional convolution made of slices and matrix products.

    Float32 kernels of three rows that move one row at a time over enough of an image use Winograd's
    minimal filtering along the rows, which saves a third of the arithmetic at the same accuracy (about
    3e-7 of the largest output); all others multiply patches by the kernel.

    Args:
      x: (B, H, W, C_in).
      kernel: (kh, kw, C_in, C_out), of the same dtype.
      strides: rows and columns from one output to the next.
      padding: 'VALID' or 'SAME', as in `jax.lax.conv_general_dilated`.

    Returns:
      (B, H_out, W_out, C_out).
    """
    pads = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
    if any(map(any, pads)):
        x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    fits = kernel.shape[0] == 3 and strides[0] == 1 and x.dtype == jnp.float32
    outputs = len(x) * (x.shape[1] - 2) * ((x.shape[2] - kernel.shape[1]) // strides[1] + 1)
    if fits and x.shape[3] >= _WINOGRAD_MIN_CHANNELS and outputs >= _WINOGRAD_MIN_OUTPUTS:
        return _convolve_winograd(x, kernel, strides[1])
    return _convolve_patches(x, kernel, strides)


def _convolve_patches(x: jax.Array, kernel: jax.Array, strides: tuple[int, int]) -> jax.Array:
    kh, kw, _, features = kernel.shape
    patches = jnp.concatenate(
        [
            column
            for row in _shifts(x, size=kh, stride=strides[0], axis=1)
            for column in _shifts(row, size=kw, stride=strides[1], axis=2)
        ],
        axis=3,
    )
    return jnp.tensordot(patches, kernel.reshape(-1, features), axes=1)


def _convolve_winograd(x: jax.Array, kernel: jax.Array, column_stride: int) -> jax.Array:
    height = x.shape[1] - 2
    if height % 2:
        x = jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0)))
    inputs = _combine(_FROM_INPUT, _shifts(x, size=4, stride=2, axis=1))
    kernels = _combine(_FROM_KERNEL, list(kernel))
    # Contracting over (kw, C_in) unmerged leaves XLA the faster kernel gradient of the two.
    products = [
        jnp.tensordot(
            jnp.stack(_shifts(rows, size=kernel.shape[1], stride=column_stride, axis=2), 3), taps, 2
        )
        for rows, taps in zip(inputs, kernels, strict=True)
    ]
    y = jnp.stack(_combine(_TO_OUTPUT, products), 2)
    return y.reshape(y.shape[0], -1, *y.shape[3:])[:, :height]


def _shifts(x: jax.Array, *, size: int, stride: int, axis: int) -> list[jax.Array]:
    """What each of a window's `size` positions sees along `axis`, as the window moves over x."""
    span = (x.shape[axis] - size) // stride * stride + 1
    return [lax.slice_in_dim(x, i, i + span, stride, axis) for i in range(size)]


def _combine(matrix: np.ndarray, terms: Sequence[jax.Array]) -> list[jax.Array]:
    return [
        sum(float(weight) * term for weight, term in zip(row, terms, strict=True) if weight)
        for row in matrix
    ]


class Conv(nn.Module):
    """A drop-in for the two-dimensional `nn.Conv`, made of matrix products (see `convolve`).

    Parameters are named and shaped like nn.Conv's: kernel (kh, kw, C_in, C_out), bias (C_out,).

    Attributes:
      features: C_out.
      kernel_size: (kh, kw).
      strides: one number, or one for rows and one for columns.
      padding: 'VALID' or 'SAME'.
      use_bias: whether to add a bias.
      dtype: what to compute in; by default what the input and the parameters promote to.
      kernel_init: initialiser of the kernel.
      bias_init: initialiser of the bias.
    """

    features: int
    kernel_size: Sequence[int]
    strides: int | Sequence[int] = 1
    padding: str = "SAME"
    use_bias: bool = True
    dtype: jax.typing.DTypeLike | None = None
    kernel_init: Callable[..., jax.Array] = nn.initializers.lecun_normal()
    bias_init: Callable[..., jax.Array] = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (B, H, W, C_in) to (B, H_out, W_out, features)."""
        shape = (*self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        bias = self.param("bias", self.bias_init, (self.features,)) if self.use_bias else None
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        rows, columns = np.broadcast_to(self.strides, 2).tolist()
        y = convolve(x, kernel, strides=(rows, columns), padding=self.padding)
        return y if bias is None else y + bias


def max_pool_2x2(x: jax.Array) -> jax.Array:
    """The maximum of every 2 x 2 square; an odd last row or column is dropped.

    Where several of the four share the maximum, they share its gradient equally (`nn.max_pool` gives
    it to the first).

    Args:
      x: (B, H, W, C).

    Returns:
      (B, H // 2, W // 2, C).
    """
    batch, height, width, channels = x.shape
    height, width = height // 2, width // 2
    x = x[:, : 2 * height, : 2 * width]
    return x.reshape(batch, height, 2, width, 2, channels).max((2, 4))


def dropout(key: jax.Array, x: jax.Array, rate: float) -> jax.Array:
    """Zeroes each element of x with probability `rate` and scales the others to keep the mean.

    A decision takes 8 random bits, so four share one random word and the rate is rounded to a
    multiple of 1/256, exactly so for 0.25 and 0.5; the scale is that of the rounded rate. With a
    threefry key an example's mask depends on nothing but the key, its place in the batch and its
    shape: not on vmap, the device, or how many examples follow it.

    Args:
      key: a PRNG key.
      x: (B, ...) floating.
      rate: between 0 (x unchanged) and 1 (all zeros).
    """
    dropped = round(256 * rate)
    if dropped == 0:
        return x
    if dropped == 256:
        return jnp.zeros_like(x)
    size = math.prod(x.shape[1:])
    words = jax.random.bits(key, (len(x), -(-size // 4)), jnp.uint32)
    octets = jnp.concatenate([words >> shift & 255 for shift in (0, 8, 16, 24)], axis=1)
    keep = octets[:, :size].reshape(x.shape) >= dropped
    return jnp.where(keep, x * (256 / (256 - dropped)), 0).astype(x.dtype)


class Dropout(nn.Module):
    """`nn.Dropout` with cheaper random bits (see `dropout`), from the rng collection 'dropout'.

    Attributes:
      rate: the probability of dropping an element.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool) -> jax.Array:
        """Drops elements of x, of any shape, unless `deterministic`."""
        if deterministic or self.rate == 0:
            return x
        return dropout(self.make_rng("dropout"), x, self.rate)
