"""Who attacks, and labels that attackers have changed."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import gin
import numpy as np

from fedexp.data.dataset import FederatedSplits
from fedexp.errors import check
from fedexp.streams import Stream, derive

if TYPE_CHECKING:
    import jax


def is_attacker(client: jax.Array, fraction: float, seed: int) -> jax.Array:
    """() bool, whether a client, by its row in the data set, attacks; independent of all others."""
    import jax  # Not above: processes that convert data do without.

    key = derive(jax.random.key(seed), Stream.ATTACKERS)
    return jax.random.bernoulli(jax.random.fold_in(key, client), fraction)


@gin.configurable
def flipped_labels(
    splits: FederatedSplits = gin.REQUIRED,
    fraction: float = gin.REQUIRED,
    num_classes: int = gin.REQUIRED,
    label: str = "y",
    seed: int = 0,
) -> FederatedSplits:
    """Attackers train on the labels num_classes - 1 - y (Fung et al. 2018, arXiv:1808.04866).

    Those of `attacked` with the same fraction and seed. Other partitions stay as they are.

    Args:
      splits: the data set.
      fraction: of the clients, on average.
      num_classes: of the label.
      label: the feature that holds it.
      seed: of who attacks.

    Raises:
      UserError: a fraction outside [0, 1], or a feature that there is not.
    """
    check(0 <= fraction <= 1, f"flipped_labels.fraction must be in [0, 1], got {fraction}")
    import jax

    train = splits.train
    check(label in train.features, f"flipped_labels.label: there is no feature {label!r}")
    attacks = jax.vmap(lambda client: is_attacker(client, fraction, seed))
    theirs = np.asarray(attacks(np.arange(train.num_clients)))[train.client_of_example]
    labels = np.asarray(train.features[label])
    flipped = np.where(theirs, num_classes - 1 - labels, labels).astype(labels.dtype)
    features = {**train.features, label: flipped}
    return splits._replace(train=dataclasses.replace(train, features=features))
