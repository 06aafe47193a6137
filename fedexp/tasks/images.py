"""Decoding images, changing them at random in training, and telling which can be looked at."""

from __future__ import annotations

from collections.abc import Callable

import gin
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fedexp.errors import UserError
from fedexp.tasks.base import Features

Augment = Callable[[jax.Array, jax.Array | None], jax.Array]
Preprocess = Callable[[jax.Array], jax.Array]


def inputs(
    preprocess: Preprocess | None, augment: Augment | None
) -> Callable[[Features, jax.Array | None], tuple[jax.Array]]:
    """(batch, key) -> the model's only input: feature 'x', changed at random and then decoded."""

    def of(batch: Features, key: jax.Array | None) -> tuple[jax.Array]:
        x = jnp.asarray(batch["x"])
        x = x if augment is None else augment(x, key)
        return (x if preprocess is None else preprocess(x),)

    return of


@gin.configurable
def scale(x: jax.Array) -> jax.Array:
    """Decodes uint8 images to float32 in [0, 1], (B, H, W) to (B, H, W, 1); else returns x as is.

    Args:
      x: what the batch has, given by the task.
    """
    if x.dtype != jnp.uint8:
        return x
    x = x.astype(jnp.float32) / 255
    return x[..., None] if x.ndim == 3 else x


@gin.configurable
def handwriting(x: jax.Array) -> jax.Array:
    """Decodes dark ink on white paper (EMNIST) to float32: paper 0, ink 1.

    Args:
      x: (B, H, W) uint8, 255 = white.

    Returns:
      (B, H, W, 1) float32 in [0, 1].

    Raises:
      UserError: another dtype.
    """
    if x.dtype != jnp.uint8:
        raise UserError(
            f"handwriting decodes uint8 images, feature 'x' is {x.dtype}; use preprocess=scale"
        )
    return 1 - scale(x)


@gin.configurable
def standardize(x: jax.Array) -> jax.Array:
    """Shifts and scales each image to mean 0 and variance 1, as tf.image.per_image_standardization.

    The divisor is at least 1 / sqrt(pixels and channels), so that an image of one colour becomes zero.

    Args:
      x: (B, H, W, C), of any dtype.

    Returns:
      (B, H, W, C) float32.
    """
    x = x.astype(jnp.float32)
    x -= x.mean((1, 2, 3), keepdims=True)
    least = x[0].size ** -0.5
    return x / jnp.maximum(x.std((1, 2, 3), keepdims=True), least)


@gin.configurable
def crop_and_flip(size: int = 24) -> Augment:
    """In training crops images at random places and mirrors half of them; else crops the centre.

    With a threefry key an image's crop depends on nothing but the key and its place in the batch: not
    on vmap, the device, or how many images follow it.

    Args:
      size: height and width of the crop.

    Returns:
      Maps images (B, H, W, C), of any dtype, and a key to (B, size, size, C); with None for a key, as
      in evaluation, to the crops at the centre. UserError for images that are smaller, or no images.

    Raises:
      UserError: the size is below 1.
    """
    if size < 1:
        raise UserError(f"crop_and_flip.size must be at least 1, got {size}")

    def augment(x: jax.Array, key: jax.Array | None) -> jax.Array:
        if x.ndim != 4 or min(x.shape[1:3]) < size:
            raise UserError(
                f"crop_and_flip cuts {size} x {size} out of images (batch, height, width, channels), "
                f"feature 'x' has the shape {x.shape}; set crop_and_flip.size to fit"
            )
        rows, columns = x.shape[1] - size, x.shape[2] - size
        if key is None:
            top, left = rows // 2, columns // 2
            return x[:, top : top + size, left : left + size]
        # One draw for everything; the remainders are uniform to within 2**-32 times their number.
        bits = jax.random.bits(key, (len(x), 3), jnp.uint32)
        choices = jnp.array([rows + 1, columns + 1, 2], jnp.uint32)
        top, left, mirrored = (bits % choices).T.astype(jnp.int32)

        def crop(image, top, left, mirrored):
            image = lax.dynamic_slice(image, (top, left, 0), (size, size, image.shape[2]))
            return jnp.where(mirrored == 1, image[:, ::-1], image)

        return jax.vmap(crop)(x, top, left, mirrored)

    return augment


def pictures(batch: Features) -> np.ndarray | None:
    """Feature x as uint8 (B, H, W, C), or None where it holds no pictures."""
    x = np.asarray(batch["x"])
    x = x[..., None] if x.ndim == 3 else x
    return x if x.dtype == np.uint8 and x.ndim == 4 and x.shape[-1] in (1, 3, 4) else None
