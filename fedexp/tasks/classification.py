"""Classification of one label per example by any Flax (linen) module."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence

import gin
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from fedexp.compiling import run_once
from fedexp.data.dataset import FederatedDataset
from fedexp.errors import UserError
from fedexp.tasks.augment import Augment
from fedexp.tasks.base import Features, Metric, PyTree, Task
from fedexp.tasks.metrics import accuracy, cross_entropy
from fedexp.tasks.precision import Precision, in_precision

Preprocess = Callable[[jax.Array], jax.Array]
_AUGMENT_STREAM = 1  # Flax folds hashes into the same key for dropout.


@gin.configurable
def scale(x: jax.Array) -> jax.Array:
    """Decodes uint8 images to float32 in [0, 1], (B, H, W) to (B, H, W, 1); else returns x as is."""
    if x.dtype != jnp.uint8:
        return x
    x = x.astype(jnp.float32) / 255
    return x[..., None] if x.ndim == 3 else x


@gin.configurable
def handwriting(x: jax.Array) -> jax.Array:
    """Decodes dark ink on white paper (EMNIST) to float32: paper 0, ink 1.

    Args:
      x: (B, H, W) uint8, 255 = white.

    Returns:
      (B, H, W, 1) float32 in [0, 1].

    Raises:
      UserError: another dtype.
    """
    if x.dtype != jnp.uint8:
        raise UserError(
            f"handwriting decodes uint8 images, feature 'x' is {x.dtype}; use preprocess=scale"
        )
    return 1 - scale(x)


@gin.configurable
def classification(
    model: nn.Module,
    num_classes: int = 62,
    metrics: Mapping[str, Metric] | None = None,
    preprocess: Preprocess | None = scale,
    class_names: Sequence[str] | None = None,
    augment: Augment | None = None,
    compute_dtype: Precision = None,
) -> Task:
    """The task of predicting feature 'y' (B,) from feature 'x' by minimising the cross-entropy.

    Args:
      model: maps (x) or (x, train: bool) to logits (B, num_classes). Random layers may use the rng
        'dropout' in training. State besides the parameters, such as batch statistics, is refused.
      num_classes: number of classes.
      metrics: name -> metric, reported beside the loss; by default the accuracy.
      preprocess: runs on x on the device, before the model; None for none.
      class_names: one name per class, for the confusion matrix.
      augment: runs on x as it is stored, before `preprocess`: with a key in training, with None in
        evaluation. Random without touching what dropout draws.
      compute_dtype: 'bfloat16' computes the model in that, for accelerators that are faster at it; what is
        trained stays float32. See `precision.in_precision`.

    Raises:
      UserError: names that do not fit num_classes. The task's `init` raises for a model whose
        logits do not, or that keeps state; its `check` for a data set without x or y, or with
        labels that are not integers in [0, num_classes).
    """
    if class_names is not None and len(class_names) != num_classes:
        raise UserError(f"{num_classes} classes need as many names, got {len(class_names)}")
    takes_train = "train" in inspect.signature(type(model).__call__).parameters
    apply_model = in_precision(model, compute_dtype)

    def inputs(batch: Features, key: jax.Array | None) -> tuple[tuple[jax.Array], dict[str, bool]]:
        x = jnp.asarray(batch["x"])
        if augment is not None:
            x = augment(x, None if key is None else jax.random.fold_in(key, _AUGMENT_STREAM))
        x = x if preprocess is None else preprocess(x)
        return (x,), {"train": key is not None} if takes_train else {}

    def forward(key: jax.Array, batch: Features) -> tuple[jax.Array, PyTree]:
        args, kwargs = inputs(batch, None)
        return model.init_with_output(key, *args, **kwargs)

    def init(key: jax.Array, batch: Features) -> PyTree:
        logits, variables = jax.eval_shape(forward, key, batch)
        _check_model(model, logits, variables, np.shape(batch["x"]), num_classes)
        return run_once(lambda key, batch: forward(key, batch)[1]["params"], key, batch)

    def apply(params: PyTree, batch: Features, key: jax.Array | None) -> jax.Array:
        args, kwargs = inputs(batch, key)
        rngs = None if key is None else {"dropout": key}
        return apply_model(params, *args, rngs=rngs, **kwargs)

    return Task(
        init=init,
        apply=apply,
        loss=cross_entropy(),
        metrics={"accuracy": accuracy()} if metrics is None else dict(metrics),
        num_classes=num_classes,
        class_names=None if class_names is None else tuple(class_names),
        predict=lambda logits, batch: (batch["y"], logits.argmax(-1)),
        images=images,
        check=lambda dataset: _check_dataset(dataset, num_classes),
    )


def images(batch: Features) -> np.ndarray | None:
    """Feature x as uint8 (B, H, W, C), or None where it holds no pictures."""
    x = np.asarray(batch["x"])
    x = x[..., None] if x.ndim == 3 else x
    return x if x.dtype == np.uint8 and x.ndim == 4 and x.shape[-1] in (1, 3, 4) else None


def _check_model(
    model: nn.Module,
    logits: jax.ShapeDtypeStruct,
    variables: Mapping[str, PyTree],
    x_shape: tuple[int, ...],
    num_classes: int,
) -> None:
    name = type(model).__name__
    expected = (x_shape[0], num_classes)
    if getattr(logits, "shape", None) != expected:
        raise UserError(
            f"{name} maps x of shape {x_shape} to {getattr(logits, 'shape', type(logits))}, but "
            f"{num_classes} classes need logits of shape {expected}; set the model's last layer or "
            "classification.num_classes"
        )
    check_parameters_only(model, variables)


def check_parameters_only(model: nn.Module, variables: Mapping[str, PyTree]) -> None:
    """Raises UserError for a model whose variables are more than its parameters."""
    state = sorted(set(variables) - {"params"})
    if state:
        raise UserError(
            f"{type(model).__name__} keeps state besides its parameters: {', '.join(state)}; clients "
            "do not share such state, so use a layer without it (GroupNorm or LayerNorm for BatchNorm)"
        )


def _check_dataset(dataset: FederatedDataset, num_classes: int) -> None:
    missing = sorted({"x", "y"} - set(dataset.features))
    if missing:
        raise UserError(
            f"classification needs the features 'x' and 'y', the data set lacks "
            f"{', '.join(map(repr, missing))} (it has {sorted(dataset.features)})"
        )
    labels = dataset.features["y"]
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"feature 'y' must hold one integer per example, got {labels.dtype} of shape "
            f"{labels.shape}"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise UserError(
            f"labels must be in [0, {num_classes}), feature 'y' has {low} to {high}; set "
            "classification.num_classes (and the model's) to fit"
        )
