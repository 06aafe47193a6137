"""Full, sampled and per-client evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import gin
import jax
import numpy as np

from fedexp.compiling import jit
from fedexp.data import Batch, FederatedDataset
from fedexp.errors import UserError
from fedexp.strategies.placement import Placement, one_device
from fedexp.tasks import (
    Measure,
    Task,
    add_by_segment,
    confusion_counts,
    measures,
    with_derived,
)

PyTree = Any
_SAMPLE_STREAM = 3


@gin.configurable
@dataclasses.dataclass(frozen=True)
class EvaluationPlan:
    """When a run evaluates, and on what; the final evaluation is always full.

    Attributes:
      every: rounds between evaluations; 0 evaluates at the end only.
      clients: test clients sampled once for the evaluations on the way; all of them if None.
      batch_size: examples a device holds at once; if None, 32 on CPU, where small batches stay in the
        cache, and 256 elsewhere.

    Raises:
      UserError: a number out of range.
    """

    every: int = 10
    clients: int | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        given = [number for number in (self.clients, self.batch_size) if number is not None]
        if self.every < 0 or min(given, default=1) < 1:
            raise UserError(
                "EvaluationPlan needs every >= 0, clients >= 1 and batch_size >= 1 (or None), got "
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
    """Evaluates parameters on one data set, batch by batch; memory does not grow with the set.

    The examples are spread over the devices of `placement`. With several processes, all make the same
    calls, and each reads its own share.
    """

    def __init__(
        self,
        task: Task,
        dataset: FederatedDataset,
        batch_size: int | None = None,
        placement: Placement | None = None,
    ):
        self._task = task
        self._dataset = dataset
        self._placement = placement or one_device()
        self._share = -(-dataset.num_examples // self._placement.num_devices)
        if batch_size is None:
            batch_size = 32 if jax.default_backend() == "cpu" else 256
        self._batch_size = min(batch_size, self._share)
        self._step = jit(self._add_batch, donate_argnums=1)
        self._total = jit(self._sum_over_devices)

    def __call__(self, params: PyTree) -> Evaluation:
        """Evaluates `params` on every example."""
        sums = self._placement.split(self._zeros())
        for batch, client in self._batches():
            sums = self._step(params, sums, self._placement.arguments((batch, client)))
        per_client_sums, confusion = jax.device_get(self._total(sums))
        metrics, per_client = {}, {}
        for name, (values, weights) in per_client_sums.items():
            values, weights = values.astype(np.float64), weights.astype(np.float64)
            metrics[name] = float(values.sum() / max(weights.sum(), 1e-12))
            per_client[name] = np.divide(
                values, weights, out=np.full_like(values, np.nan), where=weights > 0
            )
        metrics = {k: float(v) for k, v in with_derived(self._task, metrics).items()}
        per_client = {
            k: np.asarray(v, np.float64) for k, v in with_derived(self._task, per_client).items()
        }
        has_classes = self._task.predict is not None
        return Evaluation(metrics, per_client, confusion.astype(np.int64) if has_classes else None)

    def _zeros(self) -> PyTree:
        """Sums of each of this process's devices: per metric and client, and the confusion."""
        devices = len(self._placement.local)
        per_client = np.zeros((devices, self._dataset.num_clients), np.float32)
        classes = self._task.num_classes if self._task.predict else 0
        confusion = np.zeros((devices, classes, classes), np.int32)
        names = ("loss", *self._task.metrics)
        return {name: Measure(per_client, per_client) for name in names}, confusion

    def _batches(self) -> Iterator[tuple[Batch, np.ndarray]]:
        """Yields (batch, client of each example), arrays (local devices, batch size, ...)."""
        last = self._dataset.num_examples - 1
        first = self._placement.local[:, None] * self._share
        for begin in range(0, self._share, self._batch_size):
            row = begin + np.arange(self._batch_size)
            rows = first + row
            mask = (row < self._share) & (rows <= last)
            rows = np.minimum(rows, last)
            yield Batch(self._dataset.gather(rows), mask), self._dataset.clients_of(rows)

    def _add_batch(self, params: PyTree, sums: PyTree, batch: PyTree) -> PyTree:
        def on_device(params, part):
            (per_client, confusion), (batch, client) = part
            outputs = self._task.apply(params, batch.examples, None)
            per_client = {
                name: add_by_segment(per_client[name], measure, batch.mask, client)
                for name, measure in measures(self._task, outputs, batch.examples).items()
            }
            if self._task.predict:
                labels, predictions = self._task.predict(outputs, batch.examples)
                confusion += confusion_counts(labels, predictions, batch.mask, len(confusion))
            return (), (per_client, confusion)

        _, sums = self._placement.run(on_device, params, (sums, batch))
        return sums

    def _sum_over_devices(self, sums: PyTree) -> PyTree:
        return self._placement.keep_replicated(jax.tree.map(lambda leaf: leaf.sum(axis=0), sums))
