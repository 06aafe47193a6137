"""What a task is, and the masked reductions that training and evaluation share."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedexp import shown
from fedexp.data.dataset import Batch, FederatedDataset
from fedexp.errors import UserError
from fedexp.tasks.statistics import join_statistics, split_statistics

PyTree = Any
Features = Mapping[str, Any]  # Arrays of NumPy or JAX.


class Measure(NamedTuple):
    """A weighted quantity per example, or sums of it; its mean is values.sum() / weights.sum().

    Sums add up over batches, clients and devices; means do not.

    Attributes:
      values: (B,) float32, already multiplied by the weights; a scalar or (segments,) once summed.
      weights: as values; for instance 1 for an example, or its number of tokens.
    """

    values: jax.Array
    weights: jax.Array


# (outputs, batch) -> Measure; one that compares examples takes their mask (B,), too, as `mask`.
Metric = Callable[..., Measure]
Derived = Callable[[Mapping[str, jax.Array]], jax.Array]


@dataclasses.dataclass(frozen=True, repr=False)
class Task:
    """A model, a loss and metrics, as pure functions of a batch of features as they are stored.

    A batch maps feature names to arrays (B, ...), for instance x (B, 28, 28) uint8 and y (B,) int32.

    Attributes:
      init: (key, batch) -> params. Only the shapes and dtypes of the batch matter.
      apply: (params, batch, key) -> outputs, for instance logits (B, K). A key means training, and
        seeds dropout; None means evaluation.
      loss: (outputs, batch) -> Measure, what training minimises. One that compares examples, as a ranking
        does, takes `mask` (B,) bool, too, and leaves out rows with False, which are copies of real ones.
      metrics: name -> likewise. The loss is reported as 'loss' without being here.
      derived: name -> function of the means of the loss and the metrics, by name, for what is reported
        like a metric but is no mean itself, as a perplexity.
      sum_loss: whether training minimises the sum over a batch's examples instead of the mean.
      num_classes: K, or None where the outputs are no classes.
      class_names: the K names, or None.
      predict: (outputs, batch) -> (labels (B,) int, predictions (B,) int), or None where there is no
        confusion matrix to draw.
      images: batch -> uint8 (B, H, W) or (B, H, W, C) to look at, or None if it has no pictures.
      check: raises UserError for a data set that does not fit, in milliseconds and on the host.
      apply_and_update: (params, batch, mask, key) -> (outputs, statistics), needed where params hold
        statistics (see `fedexp.tasks.statistics`): what apply returns, and the statistics after a batch
        of which the rows with mask (B,) True are real.

    Raises:
      UserError: a metric called 'loss', or two of the same name.
    """

    init: Callable[[jax.Array, Features], PyTree]
    apply: Callable[[PyTree, Features, jax.Array | None], Any]
    loss: Metric
    metrics: Mapping[str, Metric] = dataclasses.field(default_factory=dict)
    derived: Mapping[str, Derived] = dataclasses.field(default_factory=dict)
    sum_loss: bool = False
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    predict: Callable[[Any, Features], tuple[jax.Array, jax.Array]] | None = None
    images: Callable[[Features], np.ndarray | None] | None = None
    check: Callable[[FederatedDataset], None] = lambda dataset: None
    apply_and_update: Callable[..., tuple[Any, dict[str, PyTree]]] | None = None
    __repr__ = shown.fields

    def __post_init__(self) -> None:
        if "loss" in {*self.metrics, *self.derived}:
            raise UserError("a metric called 'loss' would hide the task's loss; rename it")
        if twice := sorted(set(self.metrics) & set(self.derived)):
            raise UserError(f"two metrics are called {twice[0]!r}; rename one")


def reparametrised(task: Task, model: Callable[[PyTree], PyTree]) -> Task:
    """The task of other parameters, of which `model` makes the model's.

    Args:
      task: of the model's parameters.
      model: parameters -> those of the model, statistics as well. What the former have no statistics of, or
        None, is left as it is.
    """

    def apply(params: PyTree, batch: Features, key: jax.Array | None) -> Any:
        return task.apply(model(params), batch, key)

    def apply_and_update(
        params: PyTree, batch: Features, mask: jax.Array, key: jax.Array | None
    ) -> tuple[Any, dict[str, PyTree]]:
        assert task.apply_and_update is not None
        outputs, new = task.apply_and_update(model(params), batch, mask, key)
        _, old = split_statistics(params)
        kept = jax.tree.map(
            lambda o, n: None if o is None else n, old, new, is_leaf=lambda leaf: leaf is None
        )
        return outputs, kept

    return dataclasses.replace(
        task, apply=apply, apply_and_update=task.apply_and_update and apply_and_update
    )


def measures(
    task: Task, outputs: Any, batch: Features, mask: jax.Array | None = None
) -> dict[str, Measure]:
    """The loss, as 'loss', and all metrics of a batch, per example.

    Args:
      task: the task.
      outputs: of its model.
      batch: name -> (B, ...).
      mask: (B,) bool, False on padding, for what compares examples; all are real if None.
    """

    def measured(metric: Metric) -> Measure:
        compares = mask is not None and "mask" in inspect.signature(metric).parameters
        return metric(outputs, batch, mask=mask) if compares else metric(outputs, batch)

    return {name: measured(metric) for name, metric in {"loss": task.loss, **task.metrics}.items()}


def with_derived(task: Task, means: Mapping[str, Any]) -> dict[str, Any]:
    """Adds what derives from the means of the loss and all metrics; arrays of any shape."""
    return {**means, **{name: derive(means) for name, derive in task.derived.items()}}


def mean_loss(
    task: Task, params: PyTree, batch: Features, mask: jax.Array, key: jax.Array | None
) -> tuple[jax.Array, dict[str, Measure]]:
    """The weighted mean loss of a batch's real examples; for value_and_grad(..., has_aux=True).

    The weighted sum instead if the task says so (`sum_loss`). Padded examples never count, but they
    must be such that loss and gradient are finite, as the copies of real examples are that rounds take
    for padding. A batch of padding alone has loss 0 and gradient 0.

    Args:
      task: the task.
      params: the model's parameters.
      batch: name -> (B, ...).
      mask: (B,) bool, False on padding.
      key: a PRNG key for training, None for evaluation.

    Returns:
      The scalar loss, and the batch's sums of the loss and all metrics.
    """
    loss, (sums, _) = _loss(task, params, Batch(batch, mask), key)
    return loss, sums


def gradient(
    task: Task, params: PyTree, batch: Batch, key: jax.Array | None
) -> tuple[PyTree, dict[str, Measure]]:
    """What a local step takes for its gradient: that of `mean_loss`, statistics included.

    Instead of a derivative, statistics get their old values minus those after the batch: SGD(1.0), to
    which `carrying_statistics` leaves them, turns that into the new ones (but for rounding).

    Args:
      task: the task.
      params: the model's parameters.
      batch: examples and mask of B rows.
      key: a PRNG key for training, None for evaluation.

    Returns:
      A tree like params, and the batch's sums of the loss and all metrics.
    """
    trained, old = split_statistics(params)

    def loss(trained: PyTree) -> tuple[jax.Array, tuple[dict[str, Measure], dict[str, PyTree]]]:
        return _loss(task, join_statistics(trained, old), batch, key)

    grads, (sums, new) = jax.grad(loss, has_aux=True)(trained)
    return join_statistics(grads, jax.tree.map(jnp.subtract, old, new)), sums


def _loss(
    task: Task, params: PyTree, batch: Batch, key: jax.Array | None
) -> tuple[jax.Array, tuple[dict[str, Measure], dict[str, PyTree]]]:
    """The loss, the batch's sums, and the statistics after it."""
    outputs, statistics = _apply(task, params, batch, key)
    measured = measures(task, outputs, batch.examples, batch.mask)
    sums = {name: masked_sums(measure, batch.mask) for name, measure in measured.items()}
    values, weights = sums["loss"]
    loss = values if task.sum_loss else values / jnp.where(weights > 0, weights, 1)
    return loss, (sums, statistics)


def _apply(
    task: Task, params: PyTree, batch: Batch, key: jax.Array | None
) -> tuple[Any, dict[str, PyTree]]:
    examples, mask = batch
    _, old = split_statistics(params)
    if not old:
        return task.apply(params, examples, key), old
    names = ", ".join(sorted(old))
    if task.apply_and_update is None:
        raise UserError(f"a model with {names} besides params needs a task with apply_and_update")
    # Of padding alone the model sees all rows, because the mean of none is not finite.
    some = mask.any()
    outputs, new = task.apply_and_update(params, examples, mask | ~some, key)
    if jax.tree.structure(new) != jax.tree.structure(old):
        raise UserError(f"a training step changes the structure of {names}; it must keep it")
    return outputs, jax.tree.map(lambda new, old: jnp.where(some, new, old), new, old)


def masked_sums(measure: Measure, mask: jax.Array) -> Measure:
    """Sums a measure over the examples with mask (B,) True; scalars."""
    return Measure(*(jnp.where(mask, part, 0).sum() for part in measure))


def add_by_segment(
    sums: Measure, measure: Measure, mask: jax.Array, segments: jax.Array
) -> Measure:
    """Adds a measure to the running sums of each example's segment, for instance its client.

    Where the sums are donated this costs as much as the batch, however many segments there are.

    Args:
      sums: (num_segments,) values and weights.
      measure: (B,) values and weights.
      mask: (B,) bool; examples with False are left out.
      segments: (B,) int, from 0; examples in no segment have num_segments.

    Returns:
      (num_segments,) values and weights.
    """
    return Measure(
        *(
            total.at[segments].add(jnp.where(mask, part, 0), mode="drop")
            for total, part in zip(sums, measure, strict=True)
        )
    )


def confusion_counts(
    labels: jax.Array, predictions: jax.Array, mask: jax.Array, num_classes: int
) -> jax.Array:
    """How often each class was taken for each, (num_classes, num_classes) int32, rows = labels.

    Args:
      labels: (B,) int.
      predictions: (B,) int.
      mask: (B,) bool.
      num_classes: K; examples with a label or a prediction outside [0, K) are left out.
    """
    inside = (labels >= 0) & (predictions >= 0)  # Negative indices would count from the end.
    counts = jnp.zeros((num_classes, num_classes), jnp.int32)
    return counts.at[labels, predictions].add((mask & inside).astype(jnp.int32), mode="drop")
