"""CelebA in LEAF's layout: names of image files by celebrity, from files of the test's own to a round."""

import json

import gin
import numpy as np
import pytest
from PIL import Image

from fedexp import config
from fedexp.data import image_files, leaf
from fedexp.errors import UserError
from fedexp.trainer import Experiment


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDEXP_CACHE", str(tmp_path / "cache"))
    images = tmp_path / "images"
    images.mkdir()
    for number in range(8):
        colour = np.full((218, 178, 3), 30 * number, np.uint8)
        Image.fromarray(colour).save(images / f"{number:06}.jpg")
    for split, first in (("train", 0), ("test", 2)):
        (tmp_path / split).mkdir()
        users = {user: [f"{4 * user + first + i:06}.jpg" for i in range(2)] for user in range(2)}
        shard = {
            "users": [str(user) for user in users],
            "num_samples": [2, 2],
            # LEAF writes the labels as floats.
            "user_data": {
                str(user): {"x": names, "y": [0.0, 1.0]} for user, names in users.items()
            },
        }
        (tmp_path / split / "all_data.json").write_text(json.dumps(shard))
    return tmp_path


def test_a_round_on_celebrities(folder):
    overrides = [
        f"leaf.train_dir = '{folder}/train'",
        f"leaf.test_dir = '{folder}/test'",
        f"image_files.folder = '{folder}/images'",
        "image_files.size = 20",
        "train.num_rounds = 1",
    ]
    gin.clear_config()
    try:
        config.load(["celeba_fedavg.gin"], overrides)
        result = Experiment(observers=[]).run(overrides=overrides)
        train = leaf().train
    finally:
        gin.clear_config()
    assert 0 < result.metrics["test/loss"] < 10
    assert train.client_ids.tolist() == ["0", "1"]
    assert train.features["x"].shape == (4, 20, 20, 3) and train.features["x"].dtype == np.uint8
    np.testing.assert_allclose(train.features["x"].mean((1, 2, 3)), [0, 30, 120, 150], atol=2)
    assert train.features["y"].tolist() == [0, 1, 0, 1]


def test_files_that_are_no_images(folder):
    convert = image_files(f"{folder}/images", 3)
    with pytest.raises(
        UserError, match=r"gone\.jpg is no image \(FileNotFoundError\); correct image"
    ):
        convert(np.array(["000001.jpg", "gone.jpg"], object))
    (folder / "images" / "text.jpg").write_text("no")
    with pytest.raises(UserError, match=r"text\.jpg is no image \(UnidentifiedImageError\)"):
        convert(np.array(["text.jpg"], object))
    with pytest.raises(UserError, match="size must be at least 1, got 0"):
        image_files("images", 0)
