"""Clients whose features are noisy to different degrees."""

from __future__ import annotations

import dataclasses

import gin
import numpy as np

from fedexp.data.dataset import FederatedSplits
from fedexp.errors import UserError, check


@gin.configurable
def noisy_features(
    splits: FederatedSplits, variance: float = 0.1, feature: str = "x", seed: int = 0
) -> FederatedSplits:
    """Gives each client's training examples Gaussian noise of its own level (NIID-Bench, arXiv:2102.02079).

    Of N clients number i = 1, ..., N has the variance i / N times `variance`. Other partitions stay as they
    are. In a gin file: `train.dataset = @noisy_features()`, `noisy_features.splits = @emnist()`.

    Args:
      splits: the data set.
      variance: of the last client's noise. NIID-Bench takes 0.1.
      feature: what becomes noisy: floating numbers, or uint8 images, in which 255 counts as 1 and which are
        rounded, and cut off at black and white.
      seed: of the noise.

    Raises:
      UserError: a negative variance, no such feature, or one of other integers.
    """
    check(
        0 <= variance < np.inf,
        f"noisy_features.variance must be 0 or above, and finite, got {variance}",
    )
    train = splits.train
    check(
        feature in train.features,
        f"noisy_features.feature: no feature {feature!r}; there are {sorted(train.features)}",
    )
    x = np.asarray(train.features[feature])
    if x.dtype.kind != "f" and x.dtype != np.uint8:
        raise UserError(
            f"noisy_features.feature: {feature!r} is {x.dtype}, neither floating nor uint8"
        )
    level = np.sqrt(variance * (train.client_of_example + 1) / train.num_clients)
    noise = np.random.default_rng(seed).standard_normal(x.shape, np.float32)
    noise *= level.reshape(-1, *[1] * (x.ndim - 1))
    noisy = np.rint(x + 255 * noise).clip(0, 255) if x.dtype == np.uint8 else x + noise
    features = {**train.features, feature: noisy.astype(x.dtype)}
    return splits._replace(train=dataclasses.replace(train, features=features, checked=False))
