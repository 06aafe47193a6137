"""Features of mean 0 and variance 1, by the moments of the training examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import gin
import numpy as np

from fedexp.data.dataset import FederatedDataset, FederatedSplits
from fedexp.errors import UserError, check

By = Literal["all", "client"]


@gin.configurable
def standardized_features(
    splits: FederatedSplits,
    features: Sequence[str] = ("x",),
    by: By = "all",
    test_by: By | None = None,
) -> FederatedSplits:
    """Shifts and scales features to mean 0 and variance 1 in the training examples, each entry of its own.

    In a gin file: `train.dataset = @standardized_features()`, `standardized_features.splits = @csv()`. Other
    partitions are scaled by the training's moments, too. The result is in memory, as float32. What does not
    vary becomes 0 in the training examples, and is not scaled elsewhere.

    Args:
      splits: the data set.
      features: names of features (num_examples, ...).
      by: whose moments: of 'all' training examples together, which a federation comes to by sums, or those of
        each 'client' by itself.
      test_by: the same for the other partitions, if it differs.

    Raises:
      UserError: a feature that there is not, another `by`, or a client without training examples.
    """
    by_of = {"train": by} | dict.fromkeys(
        ("test", "validation"), by if test_by is None else test_by
    )
    for value in by_of.values():
        check(
            value in ("all", "client"),
            f"standardized_features.by must be 'all' or 'client', got {value!r}",
        )
    for name in features:
        check(
            name in splits.train.features,
            f"standardized_features.features: no feature {name!r}; there are {sorted(splits.train.features)}",
        )
    changed = {
        split: dataclasses.replace(
            part,
            features={
                **part.features,
                **{
                    name: _standardized(name, splits.train, part, by_of[split]) for name in features
                },
            },
            checked=False,
        )
        for split, part in splits.present().items()
    }
    return splits._replace(**changed)


def _standardized(
    name: str, train: FederatedDataset, part: FederatedDataset, by: str
) -> np.ndarray:
    """The feature of one partition, by the moments of `train`."""
    x, offsets = np.asarray(train.features[name], np.float64), train.offsets
    if by == "all":
        offsets, rows = offsets[[0, -1]], np.zeros(part.num_examples, np.int64)
    else:
        starts, sizes = train.rows_of(part.client_ids)
        if not sizes.all():
            unseen = str(part.client_ids[np.argmin(sizes)])
            raise UserError(
                f"client {unseen!r} has no training examples to standardize by; bind "
                "standardized_features.test_by = 'all'"
            )
        rows = np.repeat(train.clients_of(starts), part.client_sizes)
    sizes = np.diff(offsets).reshape(-1, *[1] * (x.ndim - 1))
    mean = np.add.reduceat(x, offsets[:-1]) / sizes
    squares = (x - np.repeat(mean, np.diff(offsets), axis=0)) ** 2
    std = np.sqrt(np.add.reduceat(squares, offsets[:-1]) / np.maximum(sizes - 1, 1))
    std[std == 0] = 1
    return ((np.asarray(part.features[name], np.float64) - mean[rows]) / std[rows]).astype(
        np.float32
    )
