"""The generated data set: published sizes, what makes it federated, and how hard it is."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys

import gin
import numpy as np
import pytest
from scipy import ndimage

from fedexp.errors import UserError

# The package exports the function under the module's name.
glyphs = importlib.import_module("fedexp.data.glyphs")

NUM_WRITERS = 48


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDEXP_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDEXP_CACHE", str(tmp_path_factory.mktemp("cache")))
        return glyphs.glyphs(NUM_WRITERS)


def label(character):
    return glyphs.CHARACTERS.index(character)


def assert_same(a, b):
    np.testing.assert_array_equal(a.offsets, b.offsets)
    np.testing.assert_array_equal(a.client_ids, b.client_ids)
    for name in ("x", "y"):
        np.testing.assert_array_equal(a.features[name], b.features[name])


def test_features_are_as_emnist_publishes_them(splits):
    for dataset in splits.present().values():
        x, y = dataset.features["x"], dataset.features["y"]
        assert x.shape == (dataset.num_examples, 28, 28) and x.dtype == np.uint8
        assert y.shape == (dataset.num_examples,) and y.dtype == np.int32
        assert y.min() >= 0 and y.max() < 62
        assert (np.median(x, axis=(1, 2)) == 255).all()  # the background is white
        assert x.reshape(len(x), -1).min(axis=1).max() < 200  # and every image has ink
    assert len(np.unique(splits.train.features["y"])) == 62
    np.testing.assert_array_equal(splits.train.client_ids, splits.test.client_ids)


def test_classes_are_ordered_as_in_emnist():
    characters = [chr(code) for code in (*range(48, 58), *range(65, 91), *range(97, 123))]
    assert list(glyphs.CHARACTERS) == characters


@pytest.mark.parametrize(
    ("character", "heavy"), [("L", "bottom"), ("L", "left"), ("J", "right"), ("7", "top")]
)
def test_characters_are_upright_and_not_mirrored(character, heavy):
    images = [glyphs.specimen(writer, [label(character)]) for writer in range(30)]
    ink = 255.0 - np.concatenate(images).mean(axis=0)
    halves = {"top": ink[:14], "bottom": ink[14:], "left": ink[:, :14], "right": ink[:, 14:]}
    opposite = {"top": "bottom", "bottom": "top", "left": "right", "right": "left"}[heavy]
    assert halves[heavy].sum() > 1.1 * halves[opposite].sum()


def test_same_arguments_same_bytes_another_seed_other_bytes(splits, cache):
    again = glyphs.glyphs(NUM_WRITERS)  # in another cache, so drawn anew
    assert_same(splits.train, again.train)
    assert_same(splits.test, again.test)
    other = glyphs.glyphs(2, seed=1)
    assert not np.array_equal(other.train.client(0)["y"], splits.train.client(0)["y"])
    assert len(list(cache.glob("packed/glyphs-*"))) == 2


def test_a_writer_does_not_depend_on_the_number_of_writers(splits):
    fewer = glyphs.glyphs(5)
    for few, many in zip(fewer[:2], splits[:2], strict=True):
        assert_same(few, many.select_clients(range(5)))


def test_sizes_follow_the_published_statistics():
    train, test = glyphs.example_counts(3400)
    assert train.min() >= 1 and test.min() >= 1
    # TFF: 671 585 training and 77 483 test examples; LEAF: a standard deviation of 88.94.
    assert train.sum() == pytest.approx(671_585, rel=0.02)
    assert test.sum() == pytest.approx(77_483, rel=0.02)
    assert (train + test).std() == pytest.approx(88.94, rel=0.04)


def test_sizes_are_those_of_the_data_set(splits):
    for dataset, sizes in zip(splits[:2], glyphs.example_counts(NUM_WRITERS), strict=True):
        np.testing.assert_array_equal(dataset.client_sizes, sizes)


def test_expected_class_frequencies():
    frequencies = glyphs.class_frequencies()
    assert frequencies.sum() == pytest.approx(1)
    assert frequencies[:10].sum() == pytest.approx(382_705 / 749_068)
    assert frequencies[label("e")] > frequencies[label("x")] > 0
    np.testing.assert_allclose(frequencies[10:36], frequencies[36:])


def test_label_skew_follows_its_concentration(splits):
    def distance_to_base(dataset):
        """Mean total variation between a client's and the expected class frequencies."""
        histogram = dataset.label_histogram(62)
        observed = histogram / histogram.sum(axis=1, keepdims=True)
        return np.abs(observed - glyphs.class_frequencies()).sum(axis=1).mean() / 2

    skewed, default, alike = (
        distance_to_base(glyphs.glyphs(16, label_concentration=c).train) for c in (2.0, 30.0, 1e6)
    )
    # Sampling alone: E|p_hat - p| is about sqrt(2 p (1 - p) / (pi n)), summed over classes and halved.
    p, n = glyphs.class_frequencies(), glyphs.example_counts(16)[0]
    by_chance = np.sqrt(2 * p * (1 - p) / (np.pi * n[:, None])).sum(axis=1).mean() / 2
    assert alike == pytest.approx(by_chance, rel=0.15)
    assert 1.3 * by_chance < default < 0.7 * skewed


def test_writers_differ_more_than_a_writers_own_examples():
    for character in "2AkR":
        images = np.stack(
            [glyphs.specimen(writer, [label(character)] * 12) for writer in range(24)]
        ).astype(float)
        means = images.mean(axis=1)
        within = ((images - means[:, None]) ** 2).mean() * 12 / 11
        between = ((means - means.mean(axis=0)) ** 2).mean() * 24 / 23 - within / 12
        assert 0.1 * between < within < between


def test_a_linear_classifier_learns_but_is_not_enough(splits):
    def inputs(dataset):
        flat = 1 - dataset.features["x"].reshape(dataset.num_examples, -1) / 255
        return np.hstack([flat, np.ones((len(flat), 1))])

    x, y = inputs(splits.train), splits.train.features["y"]
    weights = np.linalg.solve(x.T @ x + 20 * np.eye(785), x.T @ np.eye(62)[y])
    predicted = (inputs(splits.test) @ weights).argmax(axis=1)
    accuracy = (predicted == splits.test.features["y"]).mean()
    assert 0.35 < accuracy < 0.7


def test_the_second_call_opens_the_cache(monkeypatch):
    first = glyphs.glyphs(2)
    monkeypatch.setattr(glyphs, "_draw_images", pytest.fail)
    monkeypatch.setattr(glyphs, "_strokes", pytest.fail)
    second = glyphs.glyphs(2)
    assert_same(first.train, second.train)
    assert isinstance(second.train.features["x"].base, np.memmap)


def test_gin_configures_it():
    with gin.unlock_config():
        gin.parse_config("glyphs.num_writers = 3")
    try:
        assert glyphs.glyphs().train.num_clients == 3
    finally:
        gin.clear_config()


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        ({"num_writers": 0}, "num_writers"),
        ({"num_writers": 2.5}, "num_writers"),
        ({"seed": -1}, "seed"),
        ({"seed": None}, "seed"),
        ({"label_concentration": 0.0}, "label_concentration"),
        ({"label_concentration": float("inf")}, "label_concentration"),
        ({"label_concentration": "30"}, "label_concentration"),
    ],
)
def test_bad_arguments(arguments, culprit):
    with pytest.raises(UserError, match=f"glyphs.{culprit} must be"):
        glyphs.glyphs(**arguments)


def test_missing_fonts(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(glyphs, "_strokes", glyphs._strokes.__wrapped__)
    with pytest.raises(UserError, match="pip install matplotlib"):
        glyphs.glyphs(2)


def test_heavy_libraries_are_not_imported():
    code = (
        "import sys; from fedexp.data.glyphs import specimen; at_import = set(sys.modules); "
        "specimen(0, [0]); "
        "sys.exit(bool({'PIL', 'scipy', 'rich'} & at_import or 'matplotlib' in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("face", [0, 5, 9, 13])
def test_thinning_keeps_a_shape_connected_and_inside(face):
    rng = np.random.default_rng(face)
    image = ndimage.gaussian_filter(rng.normal(size=(64, 64)), 3) > 0.02
    skeleton = glyphs.thin(image)
    eight = np.ones((3, 3))
    assert not (skeleton & ~image).any()
    assert ndimage.label(skeleton, eight)[1] == ndimage.label(image, eight)[1]
    blocks = np.lib.stride_tricks.sliding_window_view(skeleton, (3, 3))
    assert not blocks.all(axis=(2, 3)).any()


def test_thinning_a_bar_leaves_its_middle_line():
    image = np.zeros((20, 40), bool)
    image[6:13, 5:35] = True
    rows, columns = np.nonzero(glyphs.thin(image))
    assert set(rows) == {9}
    assert columns.min() <= 10 and columns.max() >= 29
    assert len(columns) == columns.max() - columns.min() + 1
