"""Evaluations: on any split, of all clients or some, with one model or with every client's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import gin
import jax
import numpy as np
from absl import logging

from fedexp.contracts import TRAIN, Algorithm, Personalisation
from fedexp.data import FederatedDataset, FederatedSplits, Sampler
from fedexp.engine.engine import Engine
from fedexp.errors import UserError
from fedexp.evaluators import ClientEvaluator as ClientEvaluator
from fedexp.evaluators import Domain, with_percentiles
from fedexp.evaluators import Evaluation as Evaluation
from fedexp.evaluators import Evaluator as Evaluator
from fedexp.rates import found
from fedexp.streams import Stream, generator
from fedexp.tasks import Task
from fedexp.tasks.checks import check_features, check_ids

PyTree = Any


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
      gain: whether personalised clients are measured with the server's parameters, too: what they are before,
        as 'accuracy/before', and what they gain, as 'accuracy/gain', over examples and of each client.
      percentiles: of every metric over the clients, in percent, as 'accuracy/p10'.
      domain: a feature (n,) of integers from 0, by which examples are measured apart, as 'accuracy/y3'; one
        that is the same in all of a client's examples is an attribute of the client.
      num_domains: how many of these there are.
      prefix: the group of its metrics; the split's name, with what else tells it apart, if None.
      batch_size: examples a device measures at once; if None, 64 on CPU, where small batches stay in the
        cache, and 256 elsewhere.
      at_start: whether the initial parameters are measured, too, as round 0. They take no part in the choice
        of the best checkpoint, nor in early stopping. Of a cohort nothing is measured, as there is none yet.

    Raises:
      UserError: a number out of range, or an unknown name.
    """

    split: str = "test"
    every: int = 10
    clients: int | Literal["cohort", "held_out", "taking_part"] | None = None
    personalise: bool | Callable[[Task], Personalisation] | None = None
    gain: bool = False
    percentiles: Sequence[float] = ()
    domain: str | None = None
    num_domains: int | None = None
    prefix: str | None = None
    batch_size: int | None = None
    at_start: bool = False

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
        if self.gain and not self.personalise:
            raise UserError(
                "evaluate.gain compares personal parameters with the server's; bind evaluate.personalise"
            )
        if not all(0 <= percentile <= 100 for percentile in self.percentiles):
            raise UserError(
                f"evaluate.percentiles must be between 0 and 100, got {self.percentiles}"
            )
        count = 1 if self.num_domains is None else self.num_domains
        if (self.domain is None) != (self.num_domains is None) or count < 1:
            raise UserError(
                "evaluate.domain needs evaluate.num_domains, at least 1, and the other way round, got "
                f"domain={self.domain!r}, num_domains={self.num_domains}"
            )

    @property
    def name(self) -> str:
        """The group of its metrics."""
        if self.prefix is not None:
            return self.prefix
        name = "train_split" if self.split == TRAIN else self.split  # 'train' is the cohort's.
        name += f"_{self.clients}" if isinstance(self.clients, str) else ""
        return f"{name}_personal" if self.personalise else name

    def metric_names(self, task: Task) -> list[str]:
        """Names of its metrics, without the group."""
        plain = ["loss", *task.metrics, *task.derived]
        parts = ("/before", "/gain") if self.gain else ()
        names = plain + [name + part for part in parts for name in plain]
        spread = [f"{name}/p{p:g}" for name in names for p in self.percentiles]
        domains = [
            f"{name}/{self.domain}{d}" for name in plain for d in range(self.num_domains or 0)
        ]
        return names + spread + domains

    @property
    def is_due_at_start(self) -> bool:
        """Whether it takes place before the first round."""
        return self.at_start and self.clients != "cohort"

    def is_due(self, done: int) -> bool:
        """Whether it takes place after `done` rounds, when it is not the end."""
        return bool(self.every) and done % self.every == 0


class About(NamedTuple):
    """What was measured, in words and numbers.

    Attributes:
      name: the group of the metrics.
      split: whose examples.
      clients: which of its clients.
      parameters: which were measured.
      num_clients: clients with examples there.
      num_examples: theirs.
    """

    name: str
    split: str
    clients: str
    parameters: str
    num_clients: int
    num_examples: int


class Bound(NamedTuple):
    """An evaluation that is ready for a run.

    Attributes:
      measure: (server state, rounds done, the last round's cohort, whether of all clients) -> Evaluation.
      check: traces the evaluation of a server state, which does nothing else; raises what it would raise.
      about: the last round's cohort -> what an evaluation of all clients measures.
    """

    measure: Callable[[PyTree, int, np.ndarray, bool], Evaluation]
    check: Callable[[PyTree], None]
    about: Callable[[np.ndarray], About]


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
      UserError: a split or a domain that the data lack, an algorithm without personal parameters, or nobody
        to measure.
    """
    dataset = getattr(splits, plan.split)
    if dataset is None:
        raise UserError(
            f"evaluate.split is {plan.split!r}, but the data have none; @split_validation() takes one "
            "from the training examples"
        )
    with found() as rates:
        personal = _personalisation(plan, task, algorithm)
    domain = _domain(plan, dataset)
    by_themselves = plan.clients == "cohort" or personal is not None
    of_all, of_some = _whom(
        plan, dataset, splits.train, sampler, engine.seed, number, by_themselves
    )
    parameters = algorithm.evaluates if personal is None else _own(plan)

    def about(sizes: np.ndarray) -> About:
        clients = _words(plan)
        counts = int((sizes > 0).sum()), int(sizes.sum())
        return About(plan.name, plan.split, clients, parameters, *counts)

    if by_themselves:
        by_client = ClientEvaluator(
            task,
            personal,
            engine,
            plan.split,
            plan.batch_size,
            number,
            plan.gain,
            domain,
            [*engine.rates, *rates],
        )
        index_of = by_client.index_of(dataset.client_ids)
        _tell_who_is_missing(plan, by_client.sizes, index_of[of_all])

        def whom(cohort: np.ndarray, full: bool = True) -> np.ndarray:
            if plan.clients == "cohort":
                return cohort
            return index_of[of_all if full else of_some]

        def measure_by_client(state, done, cohort, full):
            return with_percentiles(by_client(state, done, whom(cohort, full)), plan.percentiles)

        def about_clients(cohort: np.ndarray) -> About:
            clients = whom(cohort)
            return about(by_client.sizes[clients[clients >= 0]])

        return Bound(measure_by_client, by_client.check, about_clients)
    evaluators = [
        Evaluator(task, _selected(dataset, whom), plan.batch_size, engine.placement, domain)
        for whom in ((of_all,) if of_all is of_some else (of_all, of_some))
    ]

    def measure(state, done, cohort, full):
        return with_percentiles(evaluators[0 if full else -1](state.params), plan.percentiles)

    return Bound(
        measure,
        lambda state: evaluators[-1].check(state.params),
        lambda cohort: about(np.asarray(dataset.client_sizes)[of_all]),
    )


_WORDS = {
    "cohort": "the cohort",
    "held_out": "held out of training",
    "taking_part": "taking part in training",
}


def _words(plan: Evaluate) -> str:
    """Whose examples an evaluation measures."""
    return _WORDS.get(plan.clients, "all")  # type: ignore  A number is all in the end.


def _own(plan: Evaluate) -> str:
    """Whose parameters a personalised evaluation measures."""
    way = getattr(plan.personalise, "__name__", "")
    return f"each client's, {way}" if way.isidentifier() else "each client's"


def _domain(plan: Evaluate, dataset: FederatedDataset) -> Domain | None:
    """What is measured apart.

    Raises:
      UserError: the data have no such integers.
    """
    if plan.domain is None or plan.num_domains is None:
        return None
    if plan.domain not in dataset.features:
        raise UserError(
            f"evaluate.domain is {plan.domain!r}, but the {plan.split} split has the features "
            f"{sorted(dataset.features)}"
        )
    check_features("evaluate.domain", dataset, {plan.domain: 1})
    remedy = "bind evaluate.num_domains to fit"
    check_ids(plan.domain, dataset.features[plan.domain], 0, plan.num_domains, remedy)
    return Domain(plan.domain, plan.num_domains)


def _tell_who_is_missing(plan: Evaluate, sizes: np.ndarray, clients: np.ndarray) -> None:
    without, strangers = int((sizes == 0).sum()), int((clients < 0).sum())
    if (without or strangers) and jax.process_index() == 0:
        logging.info(
            "the evaluation %r leaves out %d clients of the training split that have no examples in the %s "
            "split, and %d of the latter's that do not train",
            plan.name,
            without,
            plan.split,
            strangers,
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
    by_themselves: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Whom the last evaluation measures, and those on the way: rows of `dataset`'s clients.

    If each is measured where its state is, those on the way are clients of the training split.
    """
    chosen = np.arange(dataset.num_clients)
    taking_part = train.client_ids
    if sampler.held_out is not None:
        taking_part = taking_part[~sampler.held_out(train.client_ids)]
    if plan.clients in ("held_out", "taking_part"):
        takes_part = np.isin(dataset.client_ids, taking_part)
        chosen = np.flatnonzero(takes_part == (plan.clients == "taking_part"))
        if not len(chosen):
            raise UserError(
                f"evaluate.clients is {plan.clients!r}, but there is no such client in the "
                f"{plan.split} split; train.sampler = @hold_out() holds some out"
            )
    able = chosen
    if by_themselves:
        known = taking_part if plan.clients == "cohort" else train.client_ids
        able = chosen[np.isin(dataset.client_ids[chosen], known)]
        if not len(able):
            raise UserError(
                f"the evaluation {plan.name!r} measures clients of the training split ({_words(plan)}), none "
                f"of which has examples in the {plan.split} split; @split_validation() makes one in which "
                "they have some"
            )
    if not isinstance(plan.clients, int) or plan.clients >= len(able):
        return chosen, chosen
    rng = generator(Stream.EVALUATION, seed, number)
    return chosen, np.sort(rng.choice(able, plan.clients, replace=False))


def _selected(dataset: FederatedDataset, clients: np.ndarray) -> FederatedDataset:
    return dataset if len(clients) == dataset.num_clients else dataset.select_clients(clients)
