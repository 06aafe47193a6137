"""Reconstruction of feature 'x' by an autoencoder."""

from __future__ import annotations

import gin
import jax
import jax.numpy as jnp
from flax import linen as nn

from fedexp.compiling import run_once
from fedexp.data.dataset import FederatedDataset
from fedexp.errors import UserError
from fedexp.tasks.base import Features, Measure, PyTree, Task
from fedexp.tasks.classification import Preprocess, check_parameters_only, images, scale
from fedexp.tasks.precision import Precision, in_precision


@gin.configurable
def reconstruction(
    model: nn.Module,
    preprocess: Preprocess | None = scale,
    sum_loss: bool = False,
    compute_dtype: Precision = None,
) -> Task:
    """The task of giving feature 'x' back by minimising the mean squared error.

    An example's loss is the mean over its pixels, so that 'loss' is the mean over all of them. Labels,
    if the data has any, play no part.

    Args:
      model: maps x, preprocessed (B, ...), to its reconstruction, of the same shape.
      preprocess: runs on x on the device, before the model; None for none. What it returns is also
        what the reconstruction is compared with.
      sum_loss: minimise the sum over a batch's examples instead of their mean, as the code of Reddi et
        al. 2021 (arXiv:2003.00295) does; their learning rates are for that sum.
      compute_dtype: 'bfloat16' computes the model in that, for accelerators that are faster at it; what is
        trained stays float32. See `precision.in_precision`.

    Raises:
      UserError: the task's `init` raises for a model that returns another shape or keeps state besides
        its parameters; its `check` for a data set without x.
    """

    apply_model = in_precision(model, compute_dtype)

    def inputs(batch: Features) -> jax.Array:
        x = jnp.asarray(batch["x"])
        return x if preprocess is None else preprocess(x)

    def init(key: jax.Array, batch: Features) -> PyTree:
        x = jax.eval_shape(inputs, batch)
        outputs, variables = jax.eval_shape(model.init_with_output, key, x)
        _check_shape(model, getattr(outputs, "shape", None), x.shape)
        check_parameters_only(model, variables)
        return run_once(lambda key, batch: model.init(key, inputs(batch))["params"], key, batch)

    def apply(params: PyTree, batch: Features, key: jax.Array | None) -> jax.Array:
        del key
        return apply_model(params, inputs(batch))

    def squared_error(outputs: jax.Array, batch: Features) -> Measure:
        error = (outputs - inputs(batch)).astype(jnp.float32)
        means = (error.reshape(error.shape[0], -1) ** 2).mean(1)
        return Measure(means, jnp.ones_like(means))

    return Task(
        init=init,
        apply=apply,
        loss=squared_error,
        sum_loss=sum_loss,
        images=images,
        check=_check_dataset,
    )


def _check_shape(
    model: nn.Module, found: tuple[int, ...] | None, expected: tuple[int, ...]
) -> None:
    if found != expected:
        raise UserError(
            f"{type(model).__name__} maps x of shape {expected} to {found}, but a reconstruction has "
            "the shape of what it reconstructs; set the model's last layer"
        )


def _check_dataset(dataset: FederatedDataset) -> None:
    if "x" not in dataset.features:
        raise UserError(
            f"reconstruction needs the feature 'x', the data set has {sorted(dataset.features)}"
        )
