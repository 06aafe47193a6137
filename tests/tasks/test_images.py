from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from fedexp.data.dataset import FederatedDataset
from fedexp.errors import UserError
from fedexp.tasks import classification, crop_and_flip, handwriting, scale, standardize
from fedexp.tasks.images import pictures
from tests.support.local import in_lanes_and_alone

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (20, 9, 8, 3)).astype(np.uint8)
KEY = jax.random.key(0)


def test_handwriting_and_scale():
    x = jnp.array([0, 51, 255], jnp.uint8).reshape(1, 1, 3)
    np.testing.assert_allclose(handwriting(x)[0, 0, :, 0], [1, 0.8, 0], atol=1e-7)
    np.testing.assert_allclose(scale(x)[0, 0, :, 0], [0, 0.2, 1], atol=1e-7)
    assert handwriting(x).dtype == scale(x).dtype == jnp.float32
    assert scale(jnp.zeros((2, 8, 8, 3), jnp.uint8)).shape == (2, 8, 8, 3)
    floats = jnp.asarray(RNG.normal(size=(6, 5)), jnp.float32)
    assert scale(floats) is floats
    with pytest.raises(UserError, match="float32"):
        handwriting(floats)


def places(key: jax.Array, number: int) -> np.ndarray:
    """What `number` images become under 3 x 3 crops of 6 x 5: (number, 3) top, left and mirrored."""
    coordinates = np.stack(np.meshgrid(np.arange(6), np.arange(5), indexing="ij"), -1)
    images = jnp.broadcast_to(jnp.asarray(coordinates, jnp.uint8), (number, 6, 5, 2))
    crops = np.asarray(jax.jit(crop_and_flip(3))(images, key)).astype(int)
    mirrored = crops[:, 0, 0, 1] > crops[:, 0, 1, 1]
    unmirrored = np.where(mirrored[:, None, None, None], crops[:, :, ::-1], crops)
    np.testing.assert_array_equal(  # Each is one of the crops there are, and nothing else.
        unmirrored - unmirrored[:, :1, :1],
        np.broadcast_to(coordinates[:3, :3], unmirrored.shape),
    )
    return np.concatenate([unmirrored[:, 0, 0], mirrored[:, None]], axis=1)


def test_every_place_and_mirroring_is_equally_likely_and_independent_of_the_others():
    number, cells = 24_000, 4 * 3 * 2
    found = places(KEY, number)
    assert found.min(0).tolist() == [0, 0, 0]
    assert found.max(0).tolist() == [3, 2, 1]
    counts = np.bincount(np.ravel_multi_index(found.T, (4, 3, 2)), minlength=cells)
    chi_square = ((counts - number / cells) ** 2 / (number / cells)).sum()
    assert chi_square < 49.73  # The quantile 0.999 of 23 degrees of freedom.


def test_neighbours_in_a_batch_and_steps_draw_independently():
    number, cells = 24_000, 24
    cell = np.ravel_multi_index(places(KEY, number).T, (4, 3, 2))
    other_step = np.ravel_multi_index(places(jax.random.fold_in(KEY, 1), number).T, (4, 3, 2))
    for agreeing in (cell[1:] == cell[:-1], cell == other_step):
        deviation = np.sqrt(1 / cells * (1 - 1 / cells) / number)
        assert abs(agreeing.mean() - 1 / cells) < 4 * deviation


def test_evaluation_crops_the_centre():
    np.testing.assert_array_equal(crop_and_flip(4)(IMAGES, None), IMAGES[:, 2:6, 2:6])
    np.testing.assert_array_equal(crop_and_flip(8)(IMAGES, None), IMAGES[:, :8])
    cifar = RNG.integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    np.testing.assert_array_equal(crop_and_flip()(cifar, None), cifar[:, 4:28, 4:28])


def test_a_key_gives_the_same_crops_under_vmap_and_jit_and_in_narrower_batches():
    augment, keys = crop_and_flip(5), jax.random.split(KEY, 3)
    each = np.stack([augment(jnp.asarray(IMAGES), key) for key in keys])
    lanes = jax.jit(jax.vmap(augment, in_axes=(None, 0)))(jnp.asarray(IMAGES), keys)
    np.testing.assert_array_equal(lanes, each)
    np.testing.assert_array_equal(augment(jnp.asarray(IMAGES[:7]), keys[0]), each[0, :7])
    assert not np.array_equal(each[0], each[1])
    assert each.dtype == np.uint8  # As it is stored.


def test_a_crop_of_the_whole_image_only_mirrors():
    square = jnp.asarray(IMAGES[:, :8])
    crops = np.asarray(crop_and_flip(8)(square, KEY))
    mirrored = (crops != square).any((1, 2, 3))
    assert 0 < mirrored.sum() < 20
    np.testing.assert_array_equal(crops[mirrored], square[mirrored, :, ::-1])


@pytest.mark.parametrize("shape", [(2, 4, 9, 3), (2, 9, 4, 3), (2, 9, 9)])
def test_what_cannot_be_cropped_is_refused(shape):
    with pytest.raises(UserError, match=r"crop_and_flip cuts 5 x 5 .*\(2, .*crop_and_flip\.size"):
        crop_and_flip(5)(jnp.zeros(shape, jnp.uint8), None)
    with pytest.raises(UserError, match="size must be at least 1, got 0"):
        crop_and_flip(0)


def test_standardize_is_the_definition_of_tensorflow():
    """(x - mean) / max(standard deviation, 1 / sqrt(number of values)), as tf.image documents it."""
    x = IMAGES.astype(np.float64)
    mean, deviation = x.mean((1, 2, 3), keepdims=True), x.std((1, 2, 3), keepdims=True)
    expected = (x - mean) / np.maximum(deviation, 1 / np.sqrt(9 * 8 * 3))
    found = standardize(jnp.asarray(IMAGES))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_standardize_bounds_the_contrast_of_plain_images():
    plain = np.full((1, 4, 4, 3), 200, np.float32)
    np.testing.assert_array_equal(standardize(jnp.asarray(plain)), np.zeros_like(plain))
    nearly = plain.copy()
    nearly[0, 0, 0, 0] += 0.01
    np.testing.assert_allclose(
        standardize(jnp.asarray(nearly)), (nearly - nearly.mean()) * np.sqrt(48), atol=1e-3
    )


def test_a_clients_crops_are_the_same_in_a_lane_as_alone():
    sizes = np.array([3, 5, 2, 4])
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    images = RNG.integers(0, 256, (14, 9, 8, 3)).astype(np.uint8)
    features = {"x": images, "y": RNG.integers(0, 2, 14)}
    dataset = FederatedDataset(features, offsets, np.array(list("abcd")))
    model = nn.Sequential([lambda x: x.reshape(len(x), -1), nn.Dense(2)])
    task = classification(model, 2, preprocess=standardize, augment=crop_and_flip(6))
    in_lanes_and_alone(task, dataset, optax.sgd(0.1), 4)


def test_pictures_are_those_with_grey_levels_or_colours():
    grey = IMAGES[..., 0]
    np.testing.assert_array_equal(pictures({"x": grey}), grey[..., None])
    assert pictures({"x": IMAGES}) is IMAGES
    for x in (np.zeros((2, 8, 8, 5), np.uint8), np.zeros((2, 8)), np.zeros((2, 8, 8), np.float32)):
        assert pictures({"x": x}) is None
