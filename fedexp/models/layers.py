"""Layers that stay fast inside a compiled loop with one set of parameters per lane.

XLA's CPU backend runs a convolution inside a loop an order of magnitude slower than outside, and one
with per-lane kernels slower still. A matrix product suffers from neither, so `Conv` is built of
those, but for TPUs, whose compiler does better with a convolution (docs/accelerators.md).
`python -m benchmarks.convolution_in_loop` prints the measurements behind every other choice here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jax import lax

# Lavin & Gray 2016 (arXiv:1509.09308), F(4, 3): four outputs of a 3-tap filter, six products.
_FROM_INPUT = np.array(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
)
_FROM_KERNEL = np.array(
    [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]
) / np.array([[24]])
_TO_OUTPUT = np.array(
    [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]
)
# Where the transforms cost more than the products they save: few channels, few outputs a channel
# (the kernels are the larger part then), or many rows of the last tile in excess.
_WINOGRAD_MIN_CHANNELS = 8
_WINOGRAD_MIN_OUTPUTS = 256
_WINOGRAD_MAX_PRODUCTS = 0.6  # Of those of patches times kernel.
_TPU_LANES = 128  # Channels that a TPU's memory and matrix unit take at once; fewer cost as much.


def multiply(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Maps x (..., K) by a kernel (K, N) to (..., N).

    As one product of two matrices, for whose gradients XLA's CPU backend transposes less.
    """
    rows = x.reshape(-1, x.shape[-1])
    if kernel.shape[1] < len(rows):
        kernel = _with_gradient_by_columns(kernel)
    return (rows @ kernel).reshape(*x.shape[:-1], -1)


@jax.custom_jvp
def _with_gradient_by_columns(kernel: jax.Array) -> jax.Array:
    """The kernel, whose gradient is made as (N, K) and then transposed.

    For that, XLA's CPU backend transposes the cotangents (B, N) instead of the inputs (B, K).
    """
    return kernel


@_with_gradient_by_columns.defjvp
def _with_gradient_by_columns_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]):
    (kernel,), (tangent,) = primals, tangents
    return kernel, lax.optimization_barrier(tangent.T).T


def _dot_general(x: jax.Array, kernel: jax.Array, *_: object, **__: object) -> jax.Array:
    return multiply(x, kernel)


class Dense(nn.Dense):
    """`nn.Dense` by `multiply`: the same parameters, whose gradients take less time."""

    dot_general: Callable[..., jax.Array] | None = _dot_general


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: tuple[int, int] = (1, 1),
    padding: str = "VALID",
) -> jax.Array:
    """A two-dimensional convolution: XLA's own on TPU, elsewhere made of slices and matrix products.

    On TPU, neighbouring columns of an image with few channels are convolved as one with twice as many, where
    that comes out even (see `_paired`).

    On CPU, float32 kernels of three rows that move one row at a time over enough of an image use
    Winograd's minimal filtering along the rows, which saves half of the arithmetic and has errors of
    about 2e-6 of the largest output, three times those of a direct convolution. All others multiply
    patches by the kernel: where products are rounded to fewer bits, as by default on GPU,
    Winograd's algorithm would multiply the errors.

    Args:
      x: (B, H, W, C_in).
      kernel: (kh, kw, C_in, C_out), of the same dtype.
      strides: rows and columns from one output to the next.
      padding: 'VALID' or 'SAME', as in `jax.lax.conv_general_dilated`.

    Returns:
      (B, H_out, W_out, C_out).
    """
    if on_tpu():
        return _convolve_tpu(x, kernel, strides, padding)
    pads = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
    if any(map(any, pads)):
        x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    if _winograd_pays(x, kernel, strides):
        return _convolve_winograd(x, kernel, strides[1])
    return _convolve_patches(x, kernel, strides)


def on_tpu() -> bool:
    """Whether what is traced now is compiled for a TPU."""
    return jax.default_backend() == "tpu"


def _convolve_tpu(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: str
) -> jax.Array:
    batch, height, width, channels = x.shape
    features = kernel.shape[3]
    if (
        (strides, padding) == ((1, 1), "VALID")
        and (width % 2, kernel.shape[1] % 2) == (0, 1)
        and 2 * features <= _TPU_LANES
    ):
        x, kernel = x.reshape(batch, height, width // 2, 2 * channels), _paired(kernel)
    numbers = ("NHWC", "HWIO", "NHWC")
    y = lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=numbers)
    return y.reshape(batch, y.shape[1], -1, features)


def _paired(kernel: jax.Array) -> jax.Array:
    """The kernel (kh, kw, C_in, C_out), kw odd, for pairs of columns: (kh, (kw + 1) / 2, 2 C_in, 2 C_out).

    A pair of outputs sees kw + 1 columns, so kw + 1 products are made where kw would do, by twice the
    channels. XLA moves the images' reshapes past elementwise operations, and drops those that meet.
    """
    kh, kw, channels, features = kernel.shape
    even, odd = (jnp.pad(kernel, ((0, 0), pad, (0, 0), (0, 0))) for pad in ((0, 1), (1, 0)))
    return jnp.stack([even, odd], 3).reshape(kh, (kw + 1) // 2, 2 * channels, 2 * features)


def _winograd_pays(x: jax.Array, kernel: jax.Array, strides: tuple[int, int]) -> bool:
    if kernel.shape[0] != 3 or strides[0] != 1 or x.dtype != jnp.float32:
        return False
    batch, height, width, channels = x.shape
    height, width = height - 2, (width - kernel.shape[1]) // strides[1] + 1
    return (
        jax.default_backend() == "cpu"
        and channels >= _WINOGRAD_MIN_CHANNELS
        and batch * height * width >= _WINOGRAD_MIN_OUTPUTS
        and len(_FROM_INPUT) * _num_tiles(height) <= _WINOGRAD_MAX_PRODUCTS * 3 * height
    )


def _num_tiles(height: int) -> int:
    return -(-height // len(_TO_OUTPUT))


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
    return multiply(patches, kernel.reshape(-1, features))


def _convolve_winograd(x: jax.Array, kernel: jax.Array, column_stride: int) -> jax.Array:
    _, kw, channels, features = kernel.shape
    products = []
    # Made before they are shifted, and so their gradients: half the kernels to compile, and faster.
    inputs = lax.optimization_barrier(_combine(_FROM_INPUT, _row_tiles(x)))
    for rows, taps in zip(inputs, _combine(_FROM_KERNEL, list(kernel)), strict=True):
        patches = jnp.concatenate(_shifts(rows, size=kw, stride=column_stride, axis=2), 3)
        products.append(multiply(patches, taps.reshape(kw * channels, features)))
    y = jnp.stack(_combine(_TO_OUTPUT, products), 2)
    return y.reshape(y.shape[0], -1, *y.shape[3:])[:, : x.shape[1] - 2]


def _row_tiles(x: jax.Array) -> list[jax.Array]:
    """Row i of every tile of six rows, which begins four rows after the one before.

    Not `_shifts`: slices without a stride have a gradient that XLA fuses better.
    """
    batch, height, *others = x.shape
    tiles, size = _num_tiles(height - 2), len(_TO_OUTPUT)
    x = jnp.pad(x, ((0, 0), (0, (tiles + 1) * size - height), (0, 0), (0, 0)))
    x = x.reshape(batch, tiles + 1, size, *others)
    return [x[:, :-1, i] for i in range(size)] + [x[:, 1:, i] for i in range(2)]


def _shifts(x: jax.Array, *, size: int, stride: int, axis: int) -> list[jax.Array]:
    """What each of a window's `size` positions sees along `axis`, as the window moves over x."""
    span = (x.shape[axis] - size) // stride * stride + 1
    return [lax.slice_in_dim(x, i, i + span, stride, axis) for i in range(size)]


def _combine(matrix: np.ndarray, terms: Sequence[jax.Array]) -> list[jax.Array]:
    return [
        functools.reduce(
            jnp.add,
            [float(weight) * term for weight, term in zip(row, terms, strict=True) if weight],
        )
        for row in matrix
    ]


class Conv(nn.Module):
    """A drop-in for the two-dimensional `nn.Conv`, written as suits the backend (see `convolve`).

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

    Where several of the four share the maximum, they share its gradient equally; on TPU it goes to one of
    them, as in `nn.max_pool`. To the parameters of convolutions that comes to the same where the four see the
    same pixels, as on a blank background, and where a ReLU cuts all of them off.

    Args:
      x: (B, H, W, C).

    Returns:
      (B, H // 2, W // 2, C).
    """
    return _max_pool_tpu(x) if on_tpu() else _max_pool_sharing(x)


def _max_pool_tpu(x: jax.Array) -> jax.Array:
    """Of pairs of rows, then of pairs of columns, which lie side by side as `_convolve_tpu` leaves them."""
    batch, height, width, channels = x.shape
    height, width = height // 2, width // 2
    x = x[:, : 2 * height, : 2 * width].reshape(batch, 2 * height, width, 2 * channels)
    x = _larger(x[:, ::2], x[:, 1::2])
    return _larger(x[..., :channels], x[..., channels:])


def _larger(a: jax.Array, b: jax.Array) -> jax.Array:
    """Not `jnp.maximum`, whose gradient divides that of ties; and NaN stays NaN."""
    return jnp.where((a >= b) | jnp.isnan(a), a, b)


@jax.custom_jvp
def _max_pool_sharing(x: jax.Array) -> jax.Array:
    return _squares(x).max((2, 4))


@_max_pool_sharing.defjvp
def _max_pool_sharing_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]):
    """As JAX would have it, but for one pass over x less: the maxima are counted a corner at a time."""
    (x,), (dx,) = primals, tangents
    y, squares = _max_pool_sharing(x), _squares(x)
    corners = [squares[:, :, row, :, column] for row in (0, 1) for column in (0, 1)]
    count = sum((corner == y).astype(x.dtype) for corner in corners)
    is_max = squares == y[:, :, None, :, None]
    return y, jnp.where(is_max, _squares(dx), 0).sum((2, 4)) / count


def _squares(x: jax.Array) -> jax.Array:
    batch, height, width, channels = x.shape
    height, width = height // 2, width // 2
    x = x[:, : 2 * height, : 2 * width]
    return x.reshape(batch, height, 2, width, 2, channels)


def dropout(key: jax.Array, x: jax.Array, rate: float) -> jax.Array:
    """Zeroes each element of x with probability `rate` and scales the others to keep the mean.

    The rate is rounded to a multiple of 1/256, and the scale is that of the rounded rate. A decision
    takes as few of 1, 2, 4 or 8 random bits as that multiple needs (1 for a rate of 0.5, 2 for 0.25), so
    up to 32 share one random word. With a threefry key an example's mask depends on nothing but the
    key, its place in the batch and its shape: not on vmap, the device, or how many examples follow it.

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
    bits = next(bits for bits in (1, 2, 4, 8) if dropped << bits & 255 == 0)
    levels, dropped = 1 << bits, dropped >> 8 - bits
    size = math.prod(x.shape[1:])
    words = _random_words(key, (len(x), 1, -(-size * bits // 32)))
    draws = words >> jnp.arange(0, 32, bits, jnp.uint32)[:, None] & levels - 1
    keep = draws.reshape(len(x), -1)[:, :size].reshape(x.shape) >= dropped
    return jnp.where(keep, x * (levels / (levels - dropped)), 0).astype(x.dtype)


def _random_words(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Random uint32 words; on TPU the same are drawn as one row.

    Threefry numbers words of several axes by 64-bit products, for which a TPU, that has none, runs three
    kernels more.
    """
    drawn = (math.prod(shape),) if on_tpu() else shape
    return jax.random.bits(key, drawn, jnp.uint32).reshape(shape)


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
