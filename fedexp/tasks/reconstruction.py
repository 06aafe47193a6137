"""Reconstruction of feature 'x' by an autoencoder."""

from __future__ import annotations

import gin
import jax
import jax.numpy as jnp

from fedexp.tasks.base import Features, Measure, Task
from fedexp.tasks.checks import check_features
from fedexp.tasks.flax_task import Precision, flax_task
from fedexp.tasks.images import Preprocess, pictures, scale
from fedexp.tasks.nnx_functions import Model


@gin.configurable
def reconstruction(
    model: Model,
    preprocess: Preprocess | None = scale,
    sum_loss: bool = False,
    compute_dtype: Precision = None,
) -> Task:
    """The task of giving feature 'x' back by minimising the mean squared error.

    An example's loss is the mean over its pixels, so that 'loss' is the mean over all of them. Labels,
    if the data has any, play no part.

    Args:
      model: maps x, preprocessed (B, ...), to its reconstruction, of the same shape; see `flax_task`.
      preprocess: runs on x on the device, before the model; None for none. What it returns is also
        what the reconstruction is compared with.
      sum_loss: minimise the sum over a batch's examples instead of their mean, as the code of Reddi et
        al. 2021 (arXiv:2003.00295) does; their learning rates are for that sum.
      compute_dtype: 'bfloat16' computes the model in that, for accelerators that are faster at it; what is
        trained stays float32. See `flax_task`.

    Raises:
      UserError: the task's `init` raises for a model that returns another shape; its `check` for a data
        set without x.
    """

    def decoded(batch: Features) -> jax.Array:
        x = jnp.asarray(batch["x"])
        return x if preprocess is None else preprocess(x)

    def squared_error(outputs: jax.Array, batch: Features) -> Measure:
        error = (outputs - decoded(batch)).astype(jnp.float32)
        means = (error.reshape(error.shape[0], -1) ** 2).mean(1)
        return Measure(means, jnp.ones_like(means))

    return flax_task(
        "reconstruction",
        model,
        inputs=lambda batch, key: (decoded(batch),),
        output_shape=lambda x: x.shape,
        remedy="set the model's last layer",
        compute_dtype=compute_dtype,
        loss=squared_error,
        sum_loss=sum_loss,
        images=pictures,
        check=lambda dataset: check_features("reconstruction", dataset, {"x": None}),
    )
