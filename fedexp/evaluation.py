"""Evaluations: on any split, of all clients or some, with one model or with every client's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import gin
import jax
import jax.numpy as jnp
import numpy as np

from fedexp.compiling import jit
from fedexp.contracts import (
    TRAIN,
    Algorithm,
    ClientWork,
    Pass,
    Personalisation,
    RoundOutput,
    unstepped,
)
from fedexp.data import Batch, ClientBatching, FederatedDataset, FederatedSplits, Sample, Sampler
from fedexp.engine.engine import Engine
from fedexp.engine.placement import Placement, one_device
from fedexp.engine.preparing import Preparer
from fedexp.engine.runner import Runner
from fedexp.errors import UserError
from fedexp.streams import Stream, derive, generator
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


@gin.configurable("evaluate")
@dataclasses.dataclass(frozen=True)
class Evaluate:
    """When a run evaluates, on what, and with which parameters.

    Attributes:
      split: 'test', 'validation' or 'train'.
      every: rounds between evaluations; 0 evaluates at the end only.
      clients: whose examples. All of the split's if None; a number, sampled once for the evaluations on
        the way (the last one is of all); 'cohort', the clients of the round; 'held_out' or 'taking_part',
        those that the sampler keeps out of training, or the others.
      personalise: None measures the server's parameters. True measures every client with parameters of its
        own, as the algorithm has it; so does a function of the task, as `@fine_tuning`, in its own way.
      prefix: the group of its metrics; the split's name, with what else tells it apart, if None.
      batch_size: examples a device holds at once; if None, 32 on CPU, where small batches stay in the
        cache, and 256 elsewhere.

    Raises:
      UserError: a number out of range, or an unknown name.
    """

    split: str = "test"
    every: int = 10
    clients: int | Literal["cohort", "held_out", "taking_part"] | None = None
    personalise: bool | Callable[[Task], Personalisation] | None = None
    prefix: str | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        known = ("cohort", "held_out", "taking_part")
        numbers = [n for n in (self.clients, self.batch_size) if n is not None and n not in known]
        if self.every < 0 or any(not isinstance(n, int) or n < 1 for n in numbers):
            raise UserError(
                f"evaluate needs every >= 0, clients >= 1, {', '.join(map(repr, known))} or None, and "
                f"batch_size >= 1 or None, got every={self.every}, clients={self.clients!r}, "
                f"batch_size={self.batch_size!r}"
            )
        if self.split not in FederatedSplits._fields:
            raise UserError(
                f"evaluate.split must be one of {FederatedSplits._fields}, got {self.split!r}"
            )

    @property
    def name(self) -> str:
        """The group of its metrics."""
        if self.prefix is not None:
            return self.prefix
        name = "train_split" if self.split == TRAIN else self.split  # 'train' is the cohort's.
        name += f"_{self.clients}" if isinstance(self.clients, str) else ""
        return f"{name}_personal" if self.personalise else name

    def is_due(self, done: int) -> bool:
        """Whether it takes place after `done` rounds, when it is not the end."""
        return bool(self.every) and done % self.every == 0


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


class Bound(NamedTuple):
    """An evaluation that is ready for a run.

    Attributes:
      measure: (server state, rounds done, the last round's cohort, whether of all clients) -> Evaluation.
      check: traces the evaluation of a server state, which does nothing else; raises what it would raise.
    """

    measure: Callable[[PyTree, int, np.ndarray, bool], Evaluation]
    check: Callable[[PyTree], None]


def bind(
    plan: Evaluate,
    task: Task,
    algorithm: Algorithm,
    splits: FederatedSplits,
    sampler: Sampler,
    engine: Engine,
    number: int,
) -> Bound:
    """Makes an evaluation ready for a run.

    Args:
      plan: what to do.
      task: model, loss and metrics.
      algorithm: may know how to personalise.
      splits: the data.
      sampler: knows who is held out.
      engine: of the run.
      number: of the evaluation in the run, for its random choices.

    Raises:
      UserError: a split that the data lack, an algorithm without personal parameters, or nobody to measure.
    """
    dataset = getattr(splits, plan.split)
    if dataset is None:
        raise UserError(
            f"evaluate.split is {plan.split!r}, but the data have none; @split_validation() takes one "
            "from the training examples"
        )
    personal = _personalisation(plan, task, algorithm)
    of_all, of_some = _whom(plan, dataset, splits.train, sampler, engine.seed, number)
    if plan.clients == "cohort" or personal is not None:
        by_client = ClientEvaluator(task, personal, engine, plan.split, plan.batch_size, number)
        index_of = by_client.index_of(dataset.client_ids)

        def measure_by_client(state, done, cohort, full):
            if plan.clients == "cohort":
                return by_client(state, done, cohort)
            return by_client(state, done, index_of[of_all if full else of_some])

        return Bound(measure_by_client, by_client.check)
    evaluators = [
        Evaluator(task, _selected(dataset, whom), plan.batch_size, engine.placement)
        for whom in ((of_all,) if of_all is of_some else (of_all, of_some))
    ]
    return Bound(
        lambda state, done, cohort, full: evaluators[0 if full else -1](state.params),
        lambda state: evaluators[-1].check(state.params),
    )


def _personalisation(plan: Evaluate, task: Task, algorithm: Algorithm) -> Personalisation | None:
    if callable(plan.personalise):
        return plan.personalise(task)
    if plan.personalise and algorithm.personalise is None:
        raise UserError(
            "evaluate.personalise is True, but this algorithm has one model for all clients; bind a way "
            "to personalise it, as @fine_tuning"
        )
    return algorithm.personalise if plan.personalise else None


def _whom(
    plan: Evaluate,
    dataset: FederatedDataset,
    train: FederatedDataset,
    sampler: Sampler,
    seed: int,
    number: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Whom the last evaluation measures, and those on the way: rows of `dataset`'s clients."""
    chosen = np.arange(dataset.num_clients)
    if plan.clients in ("held_out", "taking_part"):
        taking_part = train.client_ids
        if sampler.held_out is not None:
            taking_part = taking_part[~sampler.held_out(train.client_ids)]
        takes_part = np.isin(dataset.client_ids, taking_part)
        chosen = np.flatnonzero(takes_part == (plan.clients == "taking_part"))
        if not len(chosen):
            raise UserError(
                f"evaluate.clients is {plan.clients!r}, but there is no such client in the "
                f"{plan.split} split; train.sampler = @hold_out() holds some out"
            )
    if not isinstance(plan.clients, int) or plan.clients >= len(chosen):
        return chosen, chosen
    rng = generator(Stream.EVALUATION, seed, number)
    return chosen, np.sort(rng.choice(chosen, plan.clients, replace=False))


def _selected(dataset: FederatedDataset, clients: np.ndarray) -> FederatedDataset:
    return dataset if len(clients) == dataset.num_clients else dataset.select_clients(clients)


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


class ClientEvaluator:
    """Evaluates client by client, each where its state is, with parameters of its own or the server's.

    Args:
      task: model, loss and metrics.
      personal: how a client comes by its parameters; the server's if None.
      engine: of the run, with the clients' examples and states.
      split: whose examples are measured.
      batch_size: examples that are measured in one step; 128 if None.
      number: of the evaluation in the run.
    """

    def __init__(
        self,
        task: Task,
        personal: Personalisation | None,
        engine: Engine,
        split: str,
        batch_size: int | None,
        number: int,
    ):
        self._task = task
        self._engine = engine
        self._sizes = engine.data.split(split).sizes
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
        clients = self._interleaved(clients[self._sizes[clients] > 0])
        parts = [
            self._measure(state, done, clients[begin : begin + self._chunk])
            for begin in range(0, max(len(clients), 1), self._chunk)
        ]
        sums = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
        return _summary(self._task, sums)

    def check(self, state: PyTree) -> None:
        """Traces an evaluation, which raises what its functions raise of these shapes."""
        anyone = np.flatnonzero(self._sizes > 0)[:1]
        self._runner.trace(state, self._preparer.prepare(0, Sample(anyone)))

    def _measure(self, state: PyTree, done: int, clients: np.ndarray) -> dict[str, Measure]:
        prepared = self._preparer.prepare(done, Sample(clients))
        output, _ = self._runner.run(state, prepared)
        sums = dict(jax.device_get(output.per_client))
        return jax.tree.map(lambda leaf: leaf[prepared.slots], sums)

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
                    return client.state, self._zeros()
                _, params = personal.work.finish(state, personal.work.init(state, client), client)
                return params, self._zeros()

            def step(state, carry, batch, key):
                params, sums = carry
                outputs = self._task.apply(params, batch.examples, None)
                measured = measures(self._task, outputs, batch.examples)
                added = {name: masked_sums(m, batch.mask) for name, m in measured.items()}
                return params, jax.tree.map(jnp.add, sums, added)

            work = ClientWork(init, step, lambda state, carry, client: ((), carry[1]))
            _, sums = for_each_client(work, state, cohort, "measure")
            return RoundOutput((), per_client=sums)

        return round_

    def _zeros(self) -> dict[str, Measure]:
        names = ("loss", *self._task.metrics)
        return {name: Measure(jnp.zeros(()), jnp.zeros(())) for name in names}


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
        per_client, confusion = jax.device_get(self._total(sums))
        confusion = confusion.astype(np.int64) if self._task.predict is not None else None
        return _summary(self._task, per_client, confusion)

    def check(self, params: PyTree) -> None:
        """Traces an evaluation, which raises what its functions raise of these shapes."""

        def of_all_devices(array: np.ndarray) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(
                (self._placement.num_devices, *array.shape[1:]), array.dtype
            )

        parts = (self._zeros(), next(self._batches()))
        self._step.eval_shape(params, *jax.tree.map(of_all_devices, parts))

    def _zeros(self) -> PyTree:
        """Sums of each of this process's devices: per metric and client, and the confusion."""
        devices = len(self._placement.local)
        per_client: Any = np.zeros((devices, self._dataset.num_clients), np.float32)
        classes = (self._task.num_classes or 0) if self._task.predict else 0
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
