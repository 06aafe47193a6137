"""Classification of one label per example by any Flax module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import gin

from fedexp.data.dataset import FederatedDataset
from fedexp.errors import UserError
from fedexp.tasks.base import Metric, Task
from fedexp.tasks.checks import check_features, check_ids
from fedexp.tasks.flax_task import Precision, flax_task
from fedexp.tasks.images import Augment, Preprocess, inputs, pictures, scale
from fedexp.tasks.metrics import accuracy, cross_entropy, top_k_accuracy
from fedexp.tasks.nnx_functions import Model


@gin.configurable
def classification(
    model: Model,
    num_classes: int = 62,
    metrics: Mapping[str, Metric] | None = None,
    preprocess: Preprocess | None = scale,
    class_names: Sequence[str] | None = None,
    augment: Augment | None = None,
    compute_dtype: Precision = None,
    top_k: Sequence[int] = (),
) -> Task:
    """The task of predicting feature 'y' (B,) from feature 'x' by minimising the cross-entropy.

    Args:
      model: maps (x) to logits (B, num_classes); see `flax_task` for dropout and batch statistics.
      num_classes: number of classes.
      metrics: name -> metric, reported beside the loss; by default the accuracy.
      preprocess: runs on x on the device, before the model; None for none.
      class_names: one name per class, for the confusion matrix.
      augment: runs on x as it is stored, before `preprocess`: with a key in training, with None in
        evaluation. Random without touching what dropout draws.
      compute_dtype: 'bfloat16' computes the model in that, for accelerators that are faster at it; what is
        trained stays float32. See `flax_task`.
      top_k: numbers k for which the share of labels among the k highest logits is reported, too, as
        'top5_accuracy'.

    Raises:
      UserError: names that do not fit num_classes, or a k that is no number of classes. The task's `init`
        raises for a model whose logits do not fit; its `check` for a data set without x or y, or with labels
        that are not integers in [0, num_classes).
    """
    if class_names is not None and len(class_names) != num_classes:
        raise UserError(f"{num_classes} classes need as many names, got {len(class_names)}")

    for k in top_k:
        if not isinstance(k, int) or not 1 <= k <= num_classes:
            raise UserError(
                f"classification.top_k has {k!r}, but k must be between 1 and the {num_classes} classes"
            )
    measured = {"accuracy": accuracy()} if metrics is None else dict(metrics)
    measured |= {f"top{k}_accuracy": top_k_accuracy(k) for k in top_k}

    def check(dataset: FederatedDataset) -> None:
        check_features("classification", dataset, {"x": None, "y": 1})
        remedy = "set classification.num_classes (and the model's) to fit"
        check_ids("y", dataset.features["y"], 0, num_classes, remedy)

    return flax_task(
        "classification",
        model,
        inputs(preprocess, augment),
        output_shape=lambda x: (x.shape[0], num_classes),
        remedy="set the model's last layer or classification.num_classes",
        compute_dtype=compute_dtype,
        loss=cross_entropy(),
        metrics=measured,
        num_classes=num_classes,
        class_names=None if class_names is None else tuple(class_names),
        predict=lambda logits, batch: (batch["y"], logits.argmax(-1)),
        images=pictures,
        check=check,
    )
