"""Whether a data set has the features that a task needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from fedexp.data.dataset import FederatedDataset
from fedexp.errors import UserError

# Looking at all of 135 million rows on disk would take minutes.
CHECKED_ROWS = 4096


def check_features(task: str, dataset: FederatedDataset, wanted: Mapping[str, int | None]) -> None:
    """Raises UserError unless there are features of these names, with integers in so many dimensions.

    Args:
      task: its name, for the message.
      dataset: what is looked at, without reading values.
      wanted: name -> number of dimensions, that of examples included; None for a feature of any kind.
    """
    if missing := sorted(set(wanted) - set(dataset.features)):
        raise UserError(
            f"{task} needs the features {_quoted(wanted)}, the data set lacks {_quoted(missing)} (it has "
            f"{sorted(dataset.features)})"
        )
    for name, ndim in wanted.items():
        feature = dataset.features[name]
        if ndim and (feature.ndim != ndim or not np.issubdtype(feature.dtype, np.integer)):
            raise UserError(
                f"feature {name!r} must hold integers in {ndim} dimensions, got {feature.dtype} of "
                f"shape {feature.shape}"
            )


def check_ids(name: str, ids: np.ndarray, low: int, high: int, remedy: str) -> None:
    """Raises UserError for ids of a feature outside [low, high)."""
    if ids.size and (ids.min() < low or ids.max() >= high):
        raise UserError(
            f"feature {name!r} must have ids in [{low}, {high}), got {ids.min()} to {ids.max()}; {remedy}"
        )


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
