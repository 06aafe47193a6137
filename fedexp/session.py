"""A run under way: what is trained, bound to its engine, and its rounds one by one."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gin
import jax
import numpy as np

from fedexp import evaluation, shown
from fedexp.algorithms.wrapping import made
from fedexp.contracts import TRAIN, Algorithm
from fedexp.data import ClientBatching, FederatedDataset, FederatedSplits, Sample, Sampler, uniform
from fedexp.engine import Engine, PreparedRound, Strategy, auto
from fedexp.errors import UserError
from fedexp.evaluation import About, Evaluate, Evaluation
from fedexp.privacy import Account, Part, Privacy, Sampling, opened
from fedexp.rates import found
from fedexp.streams import Stream, derive
from fedexp.tasks import Measure, Task
from fedexp.waiting import saying

PyTree = Any


@dataclasses.dataclass(frozen=True, repr=False)
class Setup:
    """What is trained, on what, and where.

    Everything random follows from `seed`, the round, the client and the step.

    Attributes:
      dataset: training and test partition, and perhaps one for validation.
      task: model, loss and metrics.
      algorithm: what clients and server do, or a function of the task that makes it, as `fedavg`.
      num_rounds: rounds in total, those before a resume included.
      sampler: draws each round's cohort; by default 10 clients uniformly.
      batching: the clients' local batches.
      strategy: where cohorts run; `auto()` if None.
      evaluations: when to evaluate, and on what.
      seed: of the initial parameters, cohorts, batches and dropout.
      privacy: how epsilon is accounted for where an aggregator hides clients; not at all if None.

    Raises:
      UserError: fewer than one round, or a negative seed.
    """

    dataset: FederatedSplits = gin.REQUIRED
    task: Task = gin.REQUIRED
    algorithm: Algorithm | Callable[[Task], Algorithm] = gin.REQUIRED
    num_rounds: int = 100
    sampler: Sampler = dataclasses.field(default_factory=lambda: uniform())
    batching: ClientBatching = dataclasses.field(default_factory=lambda: ClientBatching())
    strategy: Strategy | None = None
    evaluations: Sequence[Evaluate] = dataclasses.field(default_factory=lambda: [Evaluate()])
    seed: int = 0
    privacy: Privacy | None = dataclasses.field(default_factory=lambda: Privacy())

    __repr__ = shown.fields

    def __post_init__(self) -> None:
        if self.num_rounds < 1:
            raise UserError(f"train.num_rounds must be at least 1, got {self.num_rounds}")
        if self.seed < 0:
            raise UserError(f"train.seed must not be negative, got {self.seed}")


class Round:
    """A round that has been sent to the devices, and may not have come back yet.

    Attributes:
      number: finished rounds, this one included.
      state: the algorithm's server state after it. What is assigned here is what the next round starts
        from. It is good until then: the next round uses it up.
      prepared: what it was given; None before the first round.
      waited: seconds that the host waited for it to be prepared.
    """

    def __init__(
        self,
        session: Session,
        number: int,
        state: PyTree,
        prepared: PreparedRound | None = None,
        output: tuple[Any, Any, Any] = ({}, {}, None),
        waited: float = 0.0,
    ):
        self.session = session
        self.number = number
        self.state = state
        self.prepared = prepared
        self.waited = waited
        self._output = output

    def __repr__(self) -> str:
        return f"Round(number={self.number}, params={shown.short(self.params)})"

    @property
    def params(self) -> PyTree:
        """The model's parameters after it."""
        return self.state.params

    @property
    def epsilon(self) -> float | None:
        """Of all rounds up to this one, at `session.account.delta`; None if nothing hides clients."""
        account = self.session.account
        return None if account is None else account.epsilon(self.number)

    @functools.cached_property
    def _fetched(self) -> tuple[Any, Any]:
        return jax.device_get(self._output[:2])

    @functools.cached_property
    def _measured(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Metrics of the round and of its clients as the devices have them; waits for them."""
        metrics, per_client = map(dict, self._fetched)
        slots = self.prepared.slots if self.prepared else []
        return metrics, jax.tree.map(lambda leaf: leaf[slots], per_client)

    def is_finite(self) -> bool:
        """Whether all that is measured is finite, even in slots that are no clients; waits for the round."""
        return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(self._fetched))

    def measured(self) -> dict[str, np.ndarray]:
        """Name -> number or array that must be finite; waits for the round."""
        metrics, per_client = self._measured
        return {
            name: np.stack(value) if isinstance(value, Measure) else np.asarray(value)
            for name, value in {**metrics, **per_client}.items()
        }

    @functools.cached_property
    def metrics(self) -> dict[str, float | np.ndarray]:
        """Name -> number of the round, or array; waits for it. What nothing has weight in is left out."""
        found, infos = {}, self.prepared.infos if self.prepared else {}
        for name, value in {**self._measured[0], **infos}.items():
            if isinstance(value, Measure):
                value = value.values / value.weights if value.weights else None
            if value is not None:
                found[name] = float(value) if np.ndim(value) == 0 else value
        return found

    @functools.cached_property
    def per_client(self) -> dict[str, np.ndarray]:
        """Name -> (cohort size,) number of each client, NaN where it has no weight; waits for it."""
        return {
            name: _means(value) if isinstance(value, Measure) else value
            for name, value in self._measured[1].items()
        }

    @property
    def note(self) -> int:
        """The highest number that a process had for the others; waits for it."""
        return 0 if self._output[2] is None else int(self._output[2])

    def evaluate(self) -> dict[str, float]:
        """All evaluations, of all clients, name -> value."""
        results = self.session.evaluate(self, range(len(self.session.evaluations)), full=True)
        return row(results)


class Session:
    """Everything that rounds need, built and checked.

    Args:
      setup: what is trained.
      like: of the same data and strategy, to share what is on the devices.

    Attributes:
      setup: what is trained.
      splits: name -> data set.
      algorithm: what clients and server do.
      engine: runs the rounds.
      params: the model's first parameters.
      first: the round before the first one.
      evaluations: of the setup, ready to be called.
      account: of what the rounds tell of clients, from the first one on; None if nothing hides them.
    """

    def __init__(self, setup: Setup, like: Session | None = None):
        self.setup = setup
        splits, task, seed = setup.dataset, setup.task, setup.seed
        for name, kind in (("dataset", FederatedSplits), ("task", Task), ("sampler", Sampler)):
            given = getattr(setup, name)
            if not isinstance(given, kind):
                raise UserError(f"train.{name} must be {kind.__name__}, got {shown.short(given)}")
        self.splits = splits.present()
        for part in self.splits.values():
            task.check(part)
        with found() as rates:
            self.algorithm = made(setup.algorithm, task, "train.algorithm")
        names = [plan.name for plan in setup.evaluations]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"two evaluations are called {twice[0]!r}; bind one's evaluate.prefix")
        batching, sizes = setup.batching, np.asarray(splits.train.client_sizes)
        examples = batching.num_examples(batching.limited(sizes))
        self._sampler = sampler = setup.sampler.bound_to(examples)
        _check_inputs(self.algorithm, self.sample(0))  # Which refuses what it cannot do.
        taking_part = splits.train.num_clients
        if sampler.held_out is not None:
            taking_part -= int(sampler.held_out(splits.train.client_ids).sum())
        key = derive(jax.random.key(seed), Stream.PARAMETERS)
        self.params = saying("making the model")(task.init)(key, splits.train.slice(0, 1))
        self.engine = saying("placing the data on the devices")(Engine)(
            setup.strategy or auto(),  # It has something to say, and mistakes come alone.
            self.algorithm,
            self.splits,
            setup.batching,
            params=self.params,
            cohort_size=sampler.cohort_size,
            seed=seed,
            population=taking_part,
            data=like.engine.data if like else None,
            rates=rates,
        )
        bind = saying("preparing the evaluations")(evaluation.bind)
        self.evaluations = [
            bind(plan, task, self.algorithm, splits, sampler, self.engine, number)
            for number, plan in enumerate(setup.evaluations)
        ]
        self.first = Round(self, 0, self.engine.start(self.params))
        self.account: Account | None = None
        self._is_opened = False
        self._ahead: PreparedRound | None = None  # The first round's, if it is there already.
        self._sampling = Sampling(sampler.scheme, sampler.cohort_size, taking_part)

    def open_account(self, done: int, earlier: Sequence[Part] = ()) -> None:
        """Finds what hides clients, with the noise that a target asks for, and sets `account`.

        Args:
          done: finished rounds.
          earlier: what they were like; empty if nobody was hidden.

        Raises:
          UserError: see `privacy.opened`.
        """
        self._is_opened, privacy = True, self.setup.privacy
        if privacy is None:
            return
        runner, prepared = self.engine.runner, self.engine.prepare(done, self.sample(done))
        self._ahead = prepared
        self.account, runner.noise_multiplier = opened(
            privacy,
            lambda multiplier: runner.told(self.first.state, prepared, multiplier),
            self._sampling,
            self.setup.num_rounds,
            done,
            earlier,
        )

    def sample(self, number: int) -> Sample:
        """What the sampler says of a round, counted from 0."""
        return self._sampler.sample(self.splits[TRAIN].client_ids, self.setup.seed, number)

    def metric_names(self) -> dict[str, list[str]]:
        """Group of an evaluation -> names of its metrics."""
        return {plan.name: plan.metric_names(self.setup.task) for plan in self.setup.evaluations}

    def rounds(
        self,
        after: Round,
        note: Callable[[], int] = lambda: 0,
        watch: Callable[[Iterator[Any]], Iterator[Any]] = lambda prepared: prepared,
    ) -> Generator[Round]:
        """Yields the rounds after one, each as soon as it is on its way to the devices.

        Args:
          after: where to go on.
          note: what this process has for the others when a round begins; see `Round.note`.
          watch: wraps the iterator of prepared rounds, each of which is run until the next is asked for.
        """
        before, states = after.session.engine.client_states, self.engine.client_states
        if before is not states and before is not None and states is not None:
            states.load(before.save())
        round_, account = after, after.session.account
        if not self._is_opened:
            self.open_account(after.number, account.parts if account else ())
        for prepared, waited in watch(self.prepared(range(after.number, self.setup.num_rounds))):
            output, noted = self.engine.runner.run(round_.state, prepared, note())
            reported = (output.metrics, output.per_client, noted)
            round_ = Round(self, prepared.round + 1, output.state, prepared, reported, waited)
            yield round_

    def evaluate(self, round_: Round, which: Iterable[int], full: bool) -> dict[str, Evaluation]:
        """Results of some of the evaluations after a round, by group."""
        cohort, plans = self._cohort(round_), self.setup.evaluations
        return {
            plans[i].name: self.evaluations[i].measure(round_.state, round_.number, cohort, full)
            for i in which
        }

    def about(self, round_: Round) -> list[About]:
        """What evaluations of all clients after a round measure, in their order."""
        return [bound.about(self._cohort(round_)) for bound in self.evaluations]

    def check_evaluations(self) -> None:
        """Traces the evaluations, so that a mistake in one comes before training and not after it."""
        trained_on = _shapes(self.splits["train"])
        for plan, bound in zip(self.setup.evaluations, self.evaluations, strict=True):
            try:
                bound.check(self.first.state)
            except UserError:
                raise
            except Exception as error:
                measured_on = _shapes(self.splits[plan.split])
                if measured_on != trained_on:
                    raise UserError(
                        f"the evaluation {plan.name!r} cannot be: an example has {measured_on} in the split "
                        f"{plan.split!r} and {trained_on} in 'train', for which the model was made "
                        f"({str(error).strip().splitlines()[0]})"
                    ) from error
                error.add_note(f"fedexp was tracing the evaluation {plan.name!r}, before training")
                raise

    def _cohort(self, round_: Round) -> np.ndarray:
        """Whom a round trained; one that was restored is drawn again."""
        if round_.prepared is not None:
            return round_.prepared.clients
        if round_.number == 0:
            return np.zeros(0, np.int64)
        return self.sample(round_.number - 1).clients

    def prepared(self, rounds: range) -> Iterator[tuple[PreparedRound, float]]:
        """Yields (prepared round, seconds waited for it); the next one is prepared meanwhile."""

        def prepare(number: int) -> PreparedRound:
            ahead, self._ahead = self._ahead, None
            if ahead is not None and ahead.round == number:
                return ahead
            return self.engine.prepare(number, self.sample(number))

        with ThreadPoolExecutor(1, thread_name_prefix="prepare") as pool:
            futures = [pool.submit(prepare, number) for number in rounds[:1]]
            for number in rounds:
                begin = time.perf_counter()
                prepared = futures.pop().result()
                waited = time.perf_counter() - begin
                futures = [
                    pool.submit(prepare, later) for later in (number + 1,) if later in rounds
                ]
                yield prepared, waited


def _check_inputs(algorithm: Algorithm, told: Sample) -> None:
    """Whether the sampler tells of clients what the algorithm has to know, and nothing in vain."""
    for name, refusal in algorithm.needs.items():
        if name not in told.inputs:
            raise UserError(refusal)
    if "rate" in told.inputs and not algorithm.heeds_rate:
        raise UserError(
            "train.sampler gives clients a 'rate', but train.algorithm has no local training; bind one "
            "that has"
        )


def _shapes(dataset: FederatedDataset) -> dict[str, tuple[int, ...]]:
    return {name: array.shape[1:] for name, array in dataset.features.items()}


def _means(measure: Measure) -> np.ndarray:
    values, weights = measure
    return np.asarray(values) / np.where(weights > 0, weights, np.nan)


def row(results: Mapping[str, Evaluation]) -> dict[str, float]:
    """Results of evaluations as 'group/metric' -> value."""
    return {
        f"{group}/{name}": value
        for group, result in results.items()
        for name, value in result.metrics.items()
    }
