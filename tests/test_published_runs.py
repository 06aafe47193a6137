"""Published experiments, from TensorFlow Federated's files to a result."""

from __future__ import annotations

import gin
import h5py
import numpy as np
import pytest

from fedexp import config
from fedexp.trainer import Experiment


@pytest.mark.slow
def test_the_autoencoder_learns_to_draw(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDEXP_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    pixels = np.where(rng.uniform(size=(1, 28, 28)) < 0.2, 0.1, 1).astype(np.float32)
    for split in ("train", "test"):
        with h5py.File(tmp_path / f"fed_emnist_{split}.h5", "w") as file:
            for number, size in enumerate((3, 5)):
                file[f"examples/f{number}/pixels"] = np.repeat(pixels, size, axis=0)
                file[f"examples/f{number}/label"] = np.zeros(size, np.int32)
    overrides = [
        f"emnist.data_dir = '{tmp_path}'",
        "train.num_rounds = 20",
        "uniform.cohort_size = 2",
        "Packing.lanes = 2",
    ]
    gin.clear_config()
    try:
        config.load(["emnist_autoencoder_fedavg.gin"], overrides)
        result = Experiment(observers=[]).run(overrides=overrides)
    finally:
        gin.clear_config()
    assert result.metrics["test/loss"] < 0.05  # It starts at 0.25, as for any picture.
