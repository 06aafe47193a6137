"""Full, sampled and per-client evaluation."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import gin
import jax
import jax.numpy as jnp
import numpy as np

from fedexp.data import Batch, FederatedDataset
from fedexp.errors import UserError
from fedexp.tasks import Task, confusion_counts, measures, segment_sums

PyTree = Any
_SAMPLE_STREAM = 3


@gin.configurable
@dataclasses.dataclass(frozen=True)
class EvaluationPlan:
    """When a run evaluates, and on what; the final evaluation is always full.

    Attributes:
      every: rounds between evaluations; 0 evaluates at the end only.
      clients: test clients sampled once for the evaluations on the way; all of them if None.
      batch_size: examples a device holds at once; small batches stay in a CPU's cache.

    Raises:
      UserError: a number out of range.
    """

    every: int = 10
    clients: int | None = None
    batch_size: int = 32

    def __post_init__(self) -> None:
        if self.every < 0 or self.batch_size < 1 or (self.clients is not None and self.clients < 1):
            raise UserError(
                "EvaluationPlan needs every >= 0, clients >= 1 (or None) and batch_size >= 1, got "
                f"every={self.every}, clients={self.clients}, batch_size={self.batch_size}"
            )

    def sample(self, dataset: FederatedDataset, seed: int) -> FederatedDataset:
        """The clients that evaluations on the way look at."""
        if self.clients is None or self.clients >= dataset.num_clients:
            return dataset
        rng = np.random.default_rng([_SAMPLE_STREAM, seed])
        return dataset.select_clients(
            np.sort(rng.choice(dataset.num_clients, self.clients, replace=False))
        )


class Evaluation(NamedTuple):
    """The result of evaluating a data set.

    Attributes:
      metrics: name -> value over all examples (each example counts alike).
      per_client: name -> (num_clients,) float64, NaN where a client has no weight.
      confusion: (num_classes, num_classes) int64, rows are labels; None for tasks without classes.
    """

    metrics: dict[str, float]
    per_client: dict[str, np.ndarray]
    confusion: np.ndarray | None


class Evaluator:
    """Evaluates parameters on one data set, batch by batch; memory does not grow with the set."""

    def __init__(self, task: Task, dataset: FederatedDataset, batch_size: int = 32):
        self._task = task
        self._dataset = dataset
        self._batch_size = min(batch_size, dataset.num_examples)
        self._step = jax.jit(self._body, donate_argnums=(1, 2))

    def __call__(self, params: PyTree) -> Evaluation:
        """Evaluates `params` on every example."""
        zeros = np.zeros(self._dataset.num_clients, np.float32)
        sums = {name: (zeros, zeros) for name in ("loss", *self._task.metrics)}
        classes = self._task.num_classes if self._task.predict else 0
        confusion = np.zeros((classes, classes), np.int32)
        for batch, client in self._dataset.batches(self._batch_size):
            sums, confusion = self._step(params, sums, confusion, batch, client)
        metrics, per_client = {}, {}
        for name, (values, weights) in jax.device_get(sums).items():
            values, weights = values.astype(np.float64), weights.astype(np.float64)
            metrics[name] = float(values.sum() / max(weights.sum(), 1e-12))
            per_client[name] = np.divide(
                values, weights, out=np.full_like(values, np.nan), where=weights > 0
            )
        return Evaluation(metrics, per_client, np.asarray(confusion, np.int64) if classes else None)

    def _body(self, params, sums, confusion, batch: Batch, client):
        outputs = self._task.apply(params, batch.examples, None)
        new_sums = {}
        for name, measure in measures(self._task, outputs, batch.examples).items():
            added = segment_sums(measure, batch.mask, client, self._dataset.num_clients)
            new_sums[name] = jax.tree.map(jnp.add, sums[name], tuple(added))
        if self._task.predict:
            labels, predictions = self._task.predict(outputs, batch.examples)
            confusion += confusion_counts(labels, predictions, batch.mask, confusion.shape[0])
        return new_sums, confusion
