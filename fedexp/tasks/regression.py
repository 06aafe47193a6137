"""Regression of numbers by any Flax module."""

from __future__ import annotations

from collections.abc import Mapping

import gin
import jax
import jax.numpy as jnp
import numpy as np

from fedexp.data.dataset import FederatedDataset
from fedexp.errors import UserError, check
from fedexp.tasks.base import Features, Measure, Metric, Task
from fedexp.tasks.checks import check_features
from fedexp.tasks.flax_task import Precision, flax_task
from fedexp.tasks.images import Augment, Preprocess, inputs, pictures, scale
from fedexp.tasks.nnx_functions import Model


@gin.configurable
def squared_error() -> Metric:
    """The squared error of feature 'y', the mean over an example's targets."""
    return lambda outputs, batch: _mean_over_targets(jnp.square(_error(outputs, batch)))


@gin.configurable
def absolute_error() -> Metric:
    """The absolute error of feature 'y', the mean over an example's targets."""
    return lambda outputs, batch: _mean_over_targets(jnp.abs(_error(outputs, batch)))


@gin.configurable
def regression(
    model: Model,
    num_targets: int = 1,
    metrics: Mapping[str, Metric] | None = None,
    preprocess: Preprocess | None = scale,
    augment: Augment | None = None,
    compute_dtype: Precision = None,
) -> Task:
    """The task of predicting the numbers of feature 'y' from feature 'x' by least squares.

    y is (B,) for one target, or (B, num_targets). The loss is the mean squared error over targets and
    examples; 'rmse', its square root, is in y's units, as 'mae' is, the mean absolute error. Of targets that
    are standardised over the examples measured the coefficient of determination, R^2, is 1 - loss.

    Args:
      model: maps (x) to (B, num_targets); see `flax_task` for dropout and batch statistics.
      num_targets: numbers to predict for an example.
      metrics: name -> metric, reported beside the loss and 'rmse'; by default 'mae'.
      preprocess: runs on x on the device, before the model; None for none. By default what decodes images,
        and leaves numbers as they are.
      augment: runs on x as it is stored, before `preprocess`: with a key in training, with None in
        evaluation.
      compute_dtype: 'bfloat16' computes the model in that, for accelerators that are faster at it; what is
        trained stays float32. See `flax_task`.

    Raises:
      UserError: num_targets below 1. The task's `init` raises for a model whose outputs do not fit; its
        `check` for a data set without x or y, or with another number of targets.
    """
    check(num_targets >= 1, f"regression.num_targets must be at least 1, got {num_targets}")

    def check_targets(dataset: FederatedDataset) -> None:
        check_features("regression", dataset, {"x": None, "y": None})
        y = dataset.features["y"]
        shapes = [(num_targets,)] + [()] * (num_targets == 1)
        if y.shape[1:] not in shapes or not np.issubdtype(y.dtype, np.number):
            raise UserError(
                f"feature 'y' must hold {num_targets} number(s) for each example, got {y.dtype} of shape "
                f"{y.shape}; set regression.num_targets (and the model's outputs) to fit"
            )

    return flax_task(
        "regression",
        model,
        inputs(preprocess, augment),
        output_shape=lambda x: (x.shape[0], num_targets),
        remedy="set the model's last layer or regression.num_targets",
        compute_dtype=compute_dtype,
        loss=squared_error(),
        metrics={"mae": absolute_error()} if metrics is None else dict(metrics),
        derived={"rmse": lambda means: jnp.sqrt(means["loss"])},
        images=pictures,
        check=check_targets,
    )


def _error(outputs: jax.Array, batch: Features) -> jax.Array:
    """(B, targets) float32."""
    return outputs.astype(jnp.float32) - jnp.asarray(batch["y"], jnp.float32).reshape(outputs.shape)


def _mean_over_targets(values: jax.Array) -> Measure:
    return Measure(values.mean(1), jnp.ones(len(values)))
