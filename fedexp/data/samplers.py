"""Client samplers: who takes part in a round.

A sampler is a pure function of (population, seed, round), so a resumed run samples the same cohorts
as an uninterrupted one. In a gin file: `train.sampler = @uniform()`, `uniform.cohort_size = 10`.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import gin
import numpy as np

from fedexp import shown
from fedexp.errors import UserError
from fedexp.streams import Stream, generator

Ids = Sequence[str] | np.ndarray

# What a sampler on a simulated clock calls the seconds gone by at the end of a round, in `Sample.infos`.
SECONDS = "simulated/seconds"


class Sample(NamedTuple):
    """The cohort of a round.

    Attributes:
      clients: (num_sampled,) int64 client indices, without duplicates.
      inputs: name -> (num_sampled, ...) int32, float32 or bool, what an algorithm is told of each client
        (`client.inputs`), as its staleness, its domain or a learning rate.
      infos: name -> number, what TensorBoard is told of the round. `SECONDS` is an axis there.
    """

    clients: np.ndarray
    inputs: Mapping[str, np.ndarray] = types.MappingProxyType({})
    infos: Mapping[str, float] = types.MappingProxyType({})


class Draw(Protocol):
    """Samples the cohort of a round.

    Args:
      client_ids: (num_clients,) str, the population.
      seed: of the run, not negative.
      round: of the run, not negative.

    Raises:
      UserError: a cohort that the population cannot give.
    """

    def __call__(self, client_ids: Ids, seed: int, round: int) -> Sample: ...


class Sampler(NamedTuple):
    """A client sampler.

    Attributes:
      cohort_size: how many clients a round samples, on average.
      sample: samples the cohort of a round.
      held_out: client_ids -> (num_clients,) bool, who never takes part; None if nobody is held out.
      bind: (num_clients,) int64 examples that clients train on in a round -> the sampler for these; None
        for a sampler that does not look at them.
      scheme: how cohorts are drawn, for an epsilon: 'poisson', 'fixed_size', or 'cyclic', by which a client
        takes part once in population // cohort_size rounds at most; None for any other way.

    >>> uniform(3).sample([str(i) for i in range(10)], seed=0, round=0).clients.tolist()
    [1, 2, 6]
    """

    cohort_size: float
    sample: Draw
    held_out: Callable[[Ids], np.ndarray] | None = None
    bind: Callable[[np.ndarray], Sampler] | None = None
    scheme: str | None = None
    __repr__ = shown.fields

    def bound_to(self, examples: np.ndarray) -> Sampler:
        """The sampler for clients that train on so many examples in a round."""
        return self if self.bind is None else self.bind(examples)


@gin.configurable
def uniform(cohort_size: int = 10) -> Sampler:
    """Samples `cohort_size` different clients a round, every such cohort being equally likely.

    A round costs time and memory in proportion to the cohort, not to the population.

    Args:
      cohort_size: clients of a round, at most as many as there are.
    """
    _check_positive("cohort_size", cohort_size)

    def sample(client_ids: Ids, seed: int, round: int) -> Sample:
        if cohort_size > len(client_ids):
            raise UserError(
                f"a cohort of {cohort_size} clients cannot be sampled from {len(client_ids)}; "
                "lower uniform.cohort_size"
            )
        return Sample(
            _choose(generator(Stream.SAMPLING, seed, round), len(client_ids), cohort_size)
        )

    return Sampler(cohort_size, sample, scheme="fixed_size")


@gin.configurable
def poisson(expected_cohort_size: float) -> Sampler:
    """Samples every client independently, with probability expected_cohort_size / num_clients.

    This is the sampling that privacy amplification by subsampling is proved for (Abadi et al.,
    2016). The cohort's size varies and may be 0: such a round is run like any other, and redrawing it
    would void the privacy guarantee.

    Args:
      expected_cohort_size: clients of a round on average, at most as many as there are.
    """
    _check_positive("expected_cohort_size", expected_cohort_size)

    def sample(client_ids: Ids, seed: int, round: int) -> Sample:
        num_clients = len(client_ids)
        if expected_cohort_size > num_clients:
            raise UserError(
                f"a cohort of {expected_cohort_size} clients cannot be expected from "
                f"{num_clients}; lower poisson.expected_cohort_size"
            )
        # A binomial count, then a uniform cohort of that size: independent inclusion, in O(cohort).
        rng = generator(Stream.SAMPLING, seed, round)
        size = rng.binomial(num_clients, expected_cohort_size / num_clients)
        return Sample(_choose(rng, num_clients, size))

    return Sampler(expected_cohort_size, sample, scheme="poisson")


@gin.configurable
def cyclic(cohort_size: int = 10) -> Sampler:
    """Goes through the clients in an order that is drawn once, `cohort_size` a round, over and over.

    So a client takes part once in num_clients // cohort_size rounds at most, which is what DP-FTRL needs to
    know (Kairouz et al. 2021, arXiv:2103.00039; Choquette-Choo et al. 2023, arXiv:2306.08153).

    Args:
      cohort_size: clients of a round, at most as many as there are.
    """
    _check_positive("cohort_size", cohort_size)
    orders: dict[tuple[int, int], np.ndarray] = {}

    def sample(client_ids: Ids, seed: int, round: int) -> Sample:
        num_clients = len(client_ids)
        if cohort_size > num_clients:
            raise UserError(
                f"a cohort of {cohort_size} clients cannot be sampled from {num_clients}; "
                "lower cyclic.cohort_size"
            )
        if (num_clients, seed) not in orders:
            rng = generator(Stream.SAMPLING, seed)
            orders[num_clients, seed] = rng.permutation(num_clients)
        places = (round * cohort_size + np.arange(cohort_size)) % num_clients
        return Sample(np.sort(orders[num_clients, seed][places]))

    return Sampler(cohort_size, sample, scheme="cyclic")


@gin.configurable
def fixed(cohorts: Sequence[Sequence[int | str]]) -> Sampler:
    """Takes the given cohorts in turn, starting over after the last.

    Args:
      cohorts: one sequence of client indices or client ids a round.
    """
    if not cohorts or not all(len(cohort) for cohort in cohorts):
        raise UserError(
            f"fixed.cohorts needs one cohort or more, none of them empty, got {cohorts}"
        )

    def sample(client_ids: Ids, seed: int, round: int) -> Sample:
        del seed
        number = round % len(cohorts)
        return Sample(_indices(cohorts[number], client_ids, f"fixed.cohorts[{number}]"))

    return Sampler(float(np.mean([len(cohort) for cohort in cohorts])), sample)


@gin.configurable
def hold_out(sampler: Sampler, fraction: float = 0.1, seed: int = 0) -> Sampler:
    """Keeps a part of the clients out of training altogether, for evaluations on clients never seen.

    Args:
      sampler: draws cohorts from the others.
      fraction: of the clients, at least one.
      seed: of the choice, which does not depend on the run's seed.

    Raises:
      UserError: a fraction outside (0, 1).
    """
    if not 0 < fraction < 1:
        raise UserError(f"hold_out.fraction must be between 0 and 1, got {fraction}")

    known: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # By the size of the population.

    def held_out(client_ids: Ids) -> np.ndarray:
        count = max(1, int(fraction * len(client_ids)))
        mask = np.zeros(len(client_ids), bool)
        mask[_choose(generator(Stream.HELD_OUT, seed), len(client_ids), count)] = True
        return mask

    def sample(client_ids: Ids, seed: int, round: int) -> Sample:
        if len(client_ids) not in known:
            taking_part = np.flatnonzero(~held_out(client_ids))
            known[len(client_ids)] = taking_part, np.asarray(client_ids)[taking_part]
        taking_part, ids = known[len(client_ids)]
        drawn = sampler.sample(ids, seed, round)
        return drawn._replace(clients=taking_part[drawn.clients])

    def bind(examples: np.ndarray) -> Sampler:
        return hold_out(sampler.bound_to(examples[~held_out(examples)]), fraction, seed)

    bound = bind if sampler.bind else None
    return Sampler(sampler.cohort_size, sample, held_out, bound, sampler.scheme)


def _indices(cohort: Sequence[int | str], client_ids: Ids, where: str) -> np.ndarray:
    index_of = {}
    if any(isinstance(client, str) for client in cohort):
        wanted = set(cohort)
        ids = np.asarray(client_ids).tolist()
        index_of = {client_id: index for index, client_id in enumerate(ids) if client_id in wanted}
    indices = [index_of.get(client, -1) if isinstance(client, str) else client for client in cohort]
    for client, index in zip(cohort, indices, strict=True):
        if not 0 <= index < len(client_ids):
            raise UserError(
                f"{where} names client {client!r}, which is neither an id nor an index below "
                f"{len(client_ids)} of the data set; its first id is {str(client_ids[0])!r}"
            )
    if len(set(indices)) != len(indices):
        raise UserError(f"{where} names a client more than once: {list(cohort)}")
    return np.array(indices, np.int64)


def _choose(rng: np.random.Generator, num_clients: int, size: int) -> np.ndarray:
    # For small cohorts numpy draws by Floyd's algorithm, in O(cohort) time and memory.
    return np.sort(rng.choice(num_clients, size, replace=False, shuffle=False))


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise UserError(f"{name} must be positive, got {value}")
