"""Client samplers: who takes part in a round.

A sampler is a pure function of (population, seed, round), so a resumed run samples the same cohorts
as an uninterrupted one. In a gin file: `train.sampler = @uniform()`, `uniform.cohort_size = 10`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import gin
import numpy as np

from fedexp.errors import UserError

_STREAM = 0xC04027  # Tells these draws from others that start from the same seed.


class Sample(Protocol):
    """Samples the cohort of a round.

    Args:
      client_ids: (num_clients,) str, the population.
      seed: of the run, not negative.
      round: of the run, not negative.

    Returns:
      Client indices, (num_sampled,) int64, without duplicates.

    Raises:
      UserError: a cohort that the population cannot give.
    """

    def __call__(self, client_ids: Sequence[str], seed: int, round: int) -> np.ndarray: ...


class Sampler(NamedTuple):
    """A client sampler.

    Attributes:
      cohort_size: how many clients a round samples, on average.
      sample: samples the cohort of a round.
    """

    cohort_size: float
    sample: Sample


@gin.configurable
def uniform(cohort_size: int = 10) -> Sampler:
    """Samples `cohort_size` different clients a round, every such cohort being equally likely.

    A round costs time and memory in proportion to the cohort, not to the population.
    """
    _check_positive("cohort_size", cohort_size)

    def sample(client_ids: Sequence[str], seed: int, round: int) -> np.ndarray:
        if cohort_size > len(client_ids):
            raise UserError(
                f"a cohort of {cohort_size} clients cannot be sampled from {len(client_ids)}; "
                "lower uniform.cohort_size"
            )
        return _choose(_rng(seed, round), len(client_ids), cohort_size)

    return Sampler(cohort_size, sample)


@gin.configurable
def poisson(expected_cohort_size: float) -> Sampler:
    """Samples every client independently, with probability expected_cohort_size / num_clients.

    This is the sampling that privacy amplification by subsampling is proved for (Abadi et al.,
    2016). The cohort's size varies and may be 0: the trainer skips such a round, and redrawing it
    would void the privacy guarantee.
    """
    _check_positive("expected_cohort_size", expected_cohort_size)

    def sample(client_ids: Sequence[str], seed: int, round: int) -> np.ndarray:
        num_clients = len(client_ids)
        if expected_cohort_size > num_clients:
            raise UserError(
                f"a cohort of {expected_cohort_size} clients cannot be expected from "
                f"{num_clients}; lower poisson.expected_cohort_size"
            )
        # A binomial count, then a uniform cohort of that size: independent inclusion, in O(cohort).
        rng = _rng(seed, round)
        return _choose(
            rng, num_clients, rng.binomial(num_clients, expected_cohort_size / num_clients)
        )

    return Sampler(expected_cohort_size, sample)


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

    def sample(client_ids: Sequence[str], seed: int, round: int) -> np.ndarray:
        del seed
        number = round % len(cohorts)
        return _indices(cohorts[number], client_ids, f"fixed.cohorts[{number}]")

    return Sampler(float(np.mean([len(cohort) for cohort in cohorts])), sample)


def _indices(cohort: Sequence[int | str], client_ids: Sequence[str], where: str) -> np.ndarray:
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


def _rng(seed: int, round: int) -> np.random.Generator:
    return np.random.default_rng([_STREAM, seed, round])


def _choose(rng: np.random.Generator, num_clients: int, size: int) -> np.ndarray:
    # For small cohorts numpy draws by Floyd's algorithm, in O(cohort) time and memory.
    return np.sort(rng.choice(num_clients, size, replace=False, shuffle=False))


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise UserError(f"{name} must be positive, got {value}")
