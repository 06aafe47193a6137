"""Federated CIFAR-100: photographs, partitioned by Pachinko allocation over their labels."""

from __future__ import annotations

import gin
import numpy as np

from fedexp.data import tff_hdf5
from fedexp.data.dataset import FederatedSplits
from fedexp.data.features import Feature
from fedexp.errors import UserError

# As published in TensorFlow Federated's simulation/datasets/cifar100.py.
_SHA256 = "e8575e22c038ecef1ce6c7d492d7abee7da13b1e1ba9b70a7fc18531ba7590de"


@gin.configurable
def cifar100(data_dir: str | None = None) -> FederatedSplits:
    """Federated CIFAR-100 as TensorFlow Federated publishes it (Reddi et al. 2021, arXiv:2003.00295).

    500 training and 100 test clients of 100 examples each; the test clients are others than the
    training clients, whatever their ids. A client's labels are drawn from its own mixture of the 20
    coarse labels and, within each, of its 5 fine ones.

    Features: `x` (32, 32, 3) uint8; `y` int32, the fine label, 0 to 99 in alphabetical order.

    The first call packs the files into the cache; later ones memory-map the result.

    Args:
      data_dir: folder with fed_cifar100_train.h5 and fed_cifar100_test.h5; None downloads them.

    Raises:
      UserError: the files are not there, cannot be downloaded, or are not Federated CIFAR-100.
    """
    features = {
        "x": Feature("image", (32, 32, 3), np.uint8),
        "y": Feature("label", (), np.integer, _to_label),
    }
    return tff_hdf5.load_splits(
        "fed_cifar100", features, version=1, sha256=_SHA256, data_dir=data_dir
    )


def _to_label(labels: np.ndarray) -> np.ndarray:
    if labels.min() < 0 or labels.max() >= 100:
        raise UserError(f"labels must be in [0, 100), got {labels.min()} to {labels.max()}")
    return labels.astype(np.int32)
