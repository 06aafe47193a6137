"""A validation partition for data sets that are published without one."""

from __future__ import annotations

import gin

from fedexp.data.dataset import FederatedSplits
from fedexp.errors import UserError


@gin.configurable
def split_validation(
    splits: FederatedSplits, fraction: float = 0.1, seed: int = 0
) -> FederatedSplits:
    """Sets a part of every client's training examples aside, to choose by without looking at the test.

    In a gin file: `train.dataset = @split_validation()`, `split_validation.splits = @emnist()`. Both
    parts are copies, in memory: at the largest sizes give the data set a validation partition itself.

    Args:
      splits: a data set without a validation partition.
      fraction: of each client's training examples, rounded, but at least one and not all of them. A
        client with a single example keeps it for training, and is not in the validation partition.
      seed: which examples.

    Returns:
      The same test partition, and the training examples in two.

    Raises:
      UserError: `splits` has a validation partition, a fraction that is not between 0 and 1, or
        training clients of one example only.
    """
    if splits.validation is not None:
        raise UserError("the data set has a validation partition; leave split_validation out")
    if not 0 < fraction < 1:
        raise UserError(f"split_validation.fraction must be between 0 and 1, got {fraction}")
    train, validation = splits.train.split_examples(1 - fraction, seed=seed)
    return FederatedSplits(train, splits.test, validation)
