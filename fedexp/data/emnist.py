"""Federated EMNIST: handwritten characters, partitioned by who wrote them."""

from __future__ import annotations

import gin
import numpy as np

from fedexp.data import tff_hdf5
from fedexp.data.dataset import FederatedSplits
from fedexp.data.features import Feature
from fedexp.errors import UserError

# As published in TensorFlow Federated's simulation/datasets/emnist.py.
_SHA256 = {
    "fed_emnist": "fe1ed5a502cea3a952eb105920bff8cffb32836b5173cb18a57a32c3606f3ea0",
    "fed_emnist_digitsonly": "55333deb8546765427c385710ca5e7301e16f4ed8b60c1dc5ae224b42bd5b14b",
}


@gin.configurable
def emnist(
    only_digits: bool = False, data_dir: str | None = None, drop_empty: bool = False
) -> FederatedSplits:
    """Federated EMNIST as TensorFlow Federated publishes it (Caldas et al., LEAF, 2018).

    Every writer is a client in both partitions. With 62 classes there are 3,400 clients, 671,585
    training and 77,483 test examples; with digits only 3,383 clients, 341,873 and 40,832 examples.

    Features: `x` (28, 28) uint8, 255 is the white background and 0 the ink, as published;
    `y` int32, 0 to 9 are digits, 10 to 35 upper-case letters, 36 to 61 lower-case letters.

    The first call packs the files into the cache; later ones memory-map the result.

    Args:
      only_digits: 10 classes instead of 62.
      data_dir: folder with fed_emnist_train.h5 and fed_emnist_test.h5, or with only_digits
        fed_emnist_digitsonly_train.h5 and fed_emnist_digitsonly_test.h5; None downloads them.
      drop_empty: leave clients without examples out instead of raising.

    Raises:
      UserError: the files are not there, cannot be downloaded, or are not Federated EMNIST.
    """
    name = "fed_emnist_digitsonly" if only_digits else "fed_emnist"
    num_classes = 10 if only_digits else 62
    features = {
        "x": Feature("pixels", (28, 28), np.float32, _to_uint8),
        "y": Feature("label", (), np.integer, lambda rows: _to_label(rows, num_classes)),
    }
    return tff_hdf5.load_splits(
        name, features, version=1, sha256=_SHA256[name], data_dir=data_dir, drop_empty=drop_empty
    )


def _to_uint8(pixels: np.ndarray) -> np.ndarray:
    # Written so that NaN, which compares false, is refused too.
    if not (pixels.min() >= 0 and pixels.max() <= 1):
        raise UserError(f"pixels must be in [0, 1], got {pixels.min()} to {pixels.max()}")
    return np.rint(pixels * 255).astype(np.uint8)


def _to_label(labels: np.ndarray, num_classes: int) -> np.ndarray:
    if labels.min() < 0 or labels.max() >= num_classes:
        raise UserError(
            f"labels must be in [0, {num_classes}), got {labels.min()} to {labels.max()}; "
            "do the files fit only_digits?"
        )
    return labels.astype(np.int32)
