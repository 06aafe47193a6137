"""What measures parameters on a data set: the server's spread over the devices, or each client's own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedexp import shown
from fedexp.compiling import jit
from fedexp.contracts import ClientWork, Pass, Personalisation, RoundOutput, unstepped
from fedexp.data import Batch, ClientBatching, FederatedDataset, Sample
from fedexp.engine.engine import Engine
from fedexp.engine.placement import Placement, one_device
from fedexp.engine.preparing import Preparer
from fedexp.engine.runner import Runner
from fedexp.rates import Rate
from fedexp.streams import Stream, derive
from fedexp.tasks import (
    Measure,
    Task,
    add_by_segment,
    confusion_counts,
    masked_sums,
    measures,
    with_derived,
)

PyTree = Any
# Clients that are measured in one dispatch hold a model each: no more than fit into this.
_PERSONAL_BYTES = 256 << 20
_MOST_CLIENTS = 256
_CHUNK_BYTES = 64 << 20  # Of examples that a device is given at once.
_BEFORE = "before "  # With the server's parameters.


class Evaluation(NamedTuple):
    """The result of measuring some clients.

    Attributes:
      metrics: name -> value over all examples (each example counts alike).
      per_client: name -> (num_clients,) float64, NaN where a client has no weight.
      confusion: (num_classes, num_classes) int64, rows are labels; None for tasks without classes, and for
        clients with parameters of their own.
    """

    metrics: dict[str, float]
    per_client: dict[str, np.ndarray]
    confusion: np.ndarray | None = None
    __repr__ = shown.fields


class Domain(NamedTuple):
    """Parts of the examples that are measured apart.

    Attributes:
      feature: (n,) integers, the domain of each example; one outside [0, count) is in none.
      count: domains.
    """

    feature: str
    count: int

    def add(
        self, sums: dict[str, Measure], measured: dict[str, Measure], batch: Batch
    ) -> dict[str, Measure]:
        """Adds a batch's examples (B,) to the sums by domain of every metric."""
        domains = batch.examples[self.feature]
        mask = batch.mask & (domains >= 0)  # Negative ones would count from the end.
        return {
            name: add_by_segment(sums[name], measure, mask, domains)
            for name, measure in measured.items()
        }

    def metrics(self, task: Task, sums: dict[str, Measure]) -> dict[str, float]:
        """'<metric>/<feature><number>' -> mean, of the domains that have examples."""
        return {
            f"{name}/{self.feature}{number}": float(value)
            for name, values in _summary(task, sums).per_client.items()
            for number, value in enumerate(values)
            if not np.isnan(value)
        }


def with_gain(after: Evaluation, before: Evaluation) -> Evaluation:
    """`after`, with '<metric>/before' and '<metric>/gain', after minus before, of all and of each client."""

    def both(after: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
        more = {f"{name}/before": before[name] for name in after}
        return {**after, **more, **{f"{name}/gain": after[name] - before[name] for name in after}}

    return after._replace(
        metrics=both(after.metrics, before.metrics),
        per_client=both(after.per_client, before.per_client),
    )


def with_percentiles(result: Evaluation, percentiles: Sequence[float]) -> Evaluation:
    """The result, with percentiles over the clients that have a value, as '<metric>/p10'."""
    metrics = dict(result.metrics)
    for name, values in result.per_client.items() if percentiles else ():
        values = values[~np.isnan(values)]
        if len(values):
            found = np.percentile(values, percentiles).tolist()
            metrics |= {
                f"{name}/p{p:g}": value for p, value in zip(percentiles, found, strict=True)
            }
    return result._replace(metrics=metrics)


def _summary(
    task: Task, sums: dict[str, Measure], confusion: np.ndarray | None = None
) -> Evaluation:
    """Means over all examples and by client, of sums by client (num_clients,).

    What nothing has weight in, as after an empty cohort, is left out; so is what derives from means, without
    a loss.
    """
    metrics, per_client = {}, {}
    for name, (values, weights) in sums.items():
        values, weights = values.astype(np.float64), weights.astype(np.float64)
        metrics[name] = float(values.sum() / max(weights.sum(), 1e-12))
        per_client[name] = np.divide(
            values, weights, out=np.full_like(values, np.nan), where=weights > 0
        )
    derived = {
        name: float(value)
        for name, value in with_derived(task, metrics).items()
        if sums[name if name in sums else "loss"].weights.any()
    }
    of_clients = {k: np.asarray(v, np.float64) for k, v in with_derived(task, per_client).items()}
    return Evaluation(derived, of_clients, confusion)


class _Sums(NamedTuple):
    """Of some clients (C,), with their own parameters and with the server's; and by domain (K,) of all."""

    own: dict[str, Measure]
    before: dict[str, Measure]
    by_domain: dict[str, Measure]


class ClientEvaluator:
    """Evaluates client by client, each where its state is, with parameters of its own or the server's.

    Args:
      task: model, loss and metrics.
      personal: how a client comes by its parameters; the server's if None.
      engine: of the run, with the clients' examples and states.
      split: whose examples are measured.
      batch_size: examples that are measured in one step; 128 if None.
      number: of the evaluation in the run.
      gain: whether to measure them with the server's parameters, too; see `with_gain`.
      domain: what is measured apart, besides.
      rates: that `personal` was made with.

    Attributes:
      sizes: (clients of the training split,) int64, examples of each that may be measured.
    """

    def __init__(
        self,
        task: Task,
        personal: Personalisation | None,
        engine: Engine,
        split: str,
        batch_size: int | None,
        number: int,
        gain: bool = False,
        domain: Domain | None = None,
        rates: Sequence[Rate] = (),
    ):
        self._task = task
        self._engine = engine
        self._gain = gain
        self._domain = domain
        self.sizes = engine.data.split(split).sizes
        personal = personal or unstepped(lambda state, client: state.params)
        passes = {"measure": Pass(ClientBatching(batch_size or 128, shuffle=False), split)}
        if personal.through is not None:
            passes["personalise"] = personal.through
        self._chunk = self._clients_at_once(personal)
        self._preparer = Preparer(
            engine.strategy,
            engine.data,
            passes,
            cohort_size=self._chunk,
            seed=engine.seed,
            stream=(Stream.EVALUATION, number),
        )
        self._runner = Runner(
            engine.strategy,
            self._measuring(personal),
            self._preparer,
            engine.population,
            root=derive(engine.root, Stream.EVALUATION, number),
            client_ids=engine.data.client_ids,
            client_states=engine.client_states,
            rates=rates,
            donate=False,
        )

    def index_of(self, client_ids: np.ndarray) -> np.ndarray:
        """Clients by their row in the training split, (n,) int64; -1 for one that it does not have."""
        ids = self._engine.data.client_ids
        order = np.argsort(ids)
        place = np.minimum(np.searchsorted(ids, client_ids, sorter=order), len(ids) - 1)
        return np.where(ids[order[place]] == client_ids, order[place], -1)

    def __call__(self, state: PyTree, done: int, clients: np.ndarray) -> Evaluation:
        """Measures those of the clients that have examples, after `done` rounds."""
        clients = clients[clients >= 0]
        clients = self._interleaved(clients[self.sizes[clients] > 0])
        parts = [
            self._measure(state, done, clients[begin : begin + self._chunk])
            for begin in range(0, max(len(clients), 1), self._chunk)
        ]
        own, before = (
            jax.tree.map(lambda *leaves: np.concatenate(leaves), *sums)
            for sums in zip(*((part.own, part.before) for part in parts), strict=True)
        )
        result = _summary(self._task, own)
        if self._gain:
            result = with_gain(result, _summary(self._task, before))
        if self._domain:
            sums = jax.tree.map(lambda *leaves: sum(leaves), *(part.by_domain for part in parts))
            metrics = result.metrics | self._domain.metrics(self._task, sums)
            result = result._replace(metrics=metrics)
        return result

    def check(self, state: PyTree) -> None:
        """Traces an evaluation, which raises what its functions raise of these shapes."""
        anyone = np.flatnonzero(self.sizes > 0)[:1]
        self._runner.trace(state, self._preparer.prepare(0, Sample(anyone)))

    def _measure(self, state: PyTree, done: int, clients: np.ndarray) -> _Sums:
        prepared = self._preparer.prepare(done, Sample(clients))
        output, _ = self._runner.run(state, prepared)
        by_domain, by_client = jax.device_get((dict(output.metrics), dict(output.per_client)))
        by_client = jax.tree.map(lambda leaf: leaf[prepared.slots], by_client)
        before = {
            n.removeprefix(_BEFORE): by_client.pop(n) for n in [*by_client] if n.startswith(_BEFORE)
        }
        return _Sums(by_client, before, by_domain)

    def _clients_at_once(self, personal: Personalisation) -> int:
        fit = _MOST_CLIENTS
        if personal.through is not None:  # Every client's parameters wait for its examples.
            fit = min(max(_PERSONAL_BYTES // self._engine.model_bytes, 1), _MOST_CLIENTS)
        return min(fit * self._engine.placement.num_devices, self._engine.data.num_clients)

    def _interleaved(self, clients: np.ndarray) -> np.ndarray:
        """Takes the clients of all processes in turn, so that every dispatch has work for each."""
        owner = self._engine.data.owner(clients)
        rank = np.zeros(len(clients), np.int64)
        for process in np.unique(owner):
            rank[owner == process] = np.arange((owner == process).sum())
        return clients[np.argsort(rank, kind="stable")]

    def _measuring(self, personal: Personalisation) -> Callable[..., RoundOutput]:
        def round_(state, cohort, for_each_client):
            trained = None
            if personal.through is not None:
                _, trained = for_each_client(personal.work, state, cohort, "personalise")
                clients = dataclasses.replace(cohort.clients, state=trained)
                cohort = dataclasses.replace(cohort, clients=clients)

            def init(state, client):
                if trained is not None:
                    return client.state, *self._zeros()
                _, params = personal.work.finish(state, personal.work.init(state, client), client)
                return params, *self._zeros()

            def step(state, carry, batch, key):
                params, sums, by_domain = carry
                measured = self._measured(params, batch)
                if self._domain:
                    by_domain = self._domain.add(by_domain, measured, batch)
                if self._gain:
                    of_server = self._measured(state.params, batch)
                    measured |= {_BEFORE + name: measure for name, measure in of_server.items()}
                added = {name: masked_sums(m, batch.mask) for name, m in measured.items()}
                return params, jax.tree.map(jnp.add, sums, added), by_domain

            work = ClientWork(init, step, lambda state, carry, client: (carry[2], carry[1]))
            by_domain, sums = for_each_client(work, state, cohort, "measure")
            return RoundOutput((), by_domain, sums)

        return round_

    def _measured(self, params: PyTree, batch: Batch) -> dict[str, Measure]:
        outputs = self._task.apply(params, batch.examples, None)
        return measures(self._task, outputs, batch.examples, batch.mask)

    def _zeros(self) -> tuple[dict[str, Measure], dict[str, Measure]]:
        """A client's sums, and its sums by domain."""
        names = ["loss", *self._task.metrics]
        zeros = jnp.zeros(self._domain.count if self._domain else 0)
        by_domain = {name: Measure(zeros, zeros) for name in names if self._domain}
        names += [_BEFORE + name for name in names] if self._gain else []
        return {name: Measure(jnp.zeros(()), jnp.zeros(())) for name in names}, by_domain


class Evaluator:
    """Evaluates parameters on one data set: a loop over its batches, on the devices.

    The examples are spread over the devices of `placement`. A set that fits into a chunk stays there for
    later evaluations; of others one chunk after another is read, so that memory does not grow with the set.
    The examples of a domain are measured apart, too. With several processes, all make the same calls, and
    each reads its own share.

    Attributes:
      num_chunks: dispatches of an evaluation.
    """

    def __init__(
        self,
        task: Task,
        dataset: FederatedDataset,
        batch_size: int | None = None,
        placement: Placement | None = None,
        domain: Domain | None = None,
    ):
        self._task = task
        self._dataset = dataset
        self._domain = domain
        self._placement = placement or one_device()
        self._share = -(-dataset.num_examples // self._placement.num_devices)
        if batch_size is None:
            batch_size = 64 if jax.default_backend() == "cpu" else 256
        batch_size = min(batch_size, self._share)
        batches = -(-self._share // batch_size)
        of_a_batch = batch_size * (dataset.nbytes // dataset.num_examples + 1)
        self.num_chunks = -(-batches // max(_CHUNK_BYTES // of_a_batch, 1))
        self._shape = -(-batches // self.num_chunks), batch_size
        self._resident: PyTree = None
        self._add = jit(self._add_chunk, donate_argnums=1)
        self._total = jit(self._sum_over_devices)

    def __call__(self, params: PyTree) -> Evaluation:
        """Evaluates `params` on every example."""
        sums = self._placement.split(self._zeros())
        for chunk in self._chunks():
            sums = self._add(params, sums, chunk)
        per_client, by_domain, confusion = jax.device_get(self._total(sums))
        confusion = confusion.astype(np.int64) if self._task.predict is not None else None
        result = _summary(self._task, per_client, confusion)
        if self._domain:
            metrics = result.metrics | self._domain.metrics(self._task, by_domain)
            result = result._replace(metrics=metrics)
        return result

    def check(self, params: PyTree) -> None:
        """Traces an evaluation, which raises what its functions raise of these shapes."""

        def of_all_devices(array: np.ndarray, *axes: int) -> jax.ShapeDtypeStruct:
            shape = (self._placement.num_devices, *axes, *array.shape[1:])
            return jax.ShapeDtypeStruct(shape, array.dtype)

        row = Batch(self._dataset.slice(0, 1), np.ones(1, bool)), np.zeros(1, np.int32)
        chunk = jax.tree.map(lambda array: of_all_devices(array, *self._shape), row)
        self._add.eval_shape(params, jax.tree.map(of_all_devices, self._zeros()), chunk)

    def compiled(self, params: PyTree) -> jax.stages.Compiled:
        """A chunk's program, compiled once more, for tools that read it."""
        sums = self._placement.split(self._zeros())
        return self._add.lower(params, sums, next(self._chunks())).compile()

    def _zeros(self) -> PyTree:
        """Sums of each of this process's devices: per metric and client, and domain, and the confusion."""
        devices = len(self._placement.local)
        per_client: Any = np.zeros((devices, self._dataset.num_clients), np.float32)
        classes = (self._task.num_classes or 0) if self._task.predict else 0
        confusion = np.zeros((devices, classes, classes), np.int32)
        names = ("loss", *self._task.metrics)
        by_client = {name: Measure(per_client, per_client) for name in names}
        per_domain: Any = np.zeros((devices, self._domain.count if self._domain else 0), np.float32)
        by_domain = {name: Measure(per_domain, per_domain) for name in names if self._domain}
        return by_client, by_domain, confusion

    def _chunks(self) -> Iterator[tuple[Batch, jax.Array]]:
        """Yields (batches, client of each example) on the devices: (D, batches, batch size, ...)."""
        if self._resident is not None:
            yield self._resident
            return
        last = self._dataset.num_examples - 1
        first = self._placement.local[:, None, None] * self._share
        size = math.prod(self._shape)
        for begin in range(0, self.num_chunks * size, size):
            row = begin + np.arange(size).reshape(self._shape)
            rows = first + row
            mask = (row < self._share) & (rows <= last)
            rows = np.minimum(rows, last)
            batches = Batch(self._dataset.gather(rows), mask)
            chunk = self._placement.split((batches, self._dataset.clients_of(rows)))
            if self.num_chunks == 1:
                self._resident = chunk
            yield chunk

    def _add_chunk(self, params: PyTree, sums: PyTree, chunk: PyTree) -> PyTree:
        def on_device(params, part):
            sums, chunk = part

            def add(number, sums):
                return self._add_batch(params, sums, jax.tree.map(lambda leaf: leaf[number], chunk))

            return (), jax.lax.fori_loop(0, self._shape[0], add, sums)

        _, sums = self._placement.run(on_device, params, (sums, chunk))
        return sums

    def _add_batch(self, params: PyTree, sums: PyTree, part: tuple[Batch, jax.Array]) -> PyTree:
        (per_client, by_domain, confusion), (batch, client) = sums, part
        outputs = self._task.apply(params, batch.examples, None)
        measured = measures(self._task, outputs, batch.examples, batch.mask)
        per_client = {
            name: add_by_segment(per_client[name], measure, batch.mask, client)
            for name, measure in measured.items()
        }
        if self._domain:
            by_domain = self._domain.add(by_domain, measured, batch)
        if self._task.predict:
            labels, predictions = self._task.predict(outputs, batch.examples)
            confusion += confusion_counts(labels, predictions, batch.mask, len(confusion))
        return per_client, by_domain, confusion

    def _sum_over_devices(self, sums: PyTree) -> PyTree:
        return self._placement.keep_replicated(jax.tree.map(lambda leaf: leaf.sum(axis=0), sums))
