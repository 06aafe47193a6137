"""What a run tells of its clients: epsilon, by the library dp-accounting.

Aggregators say what noise they add (`contracts.Mechanism`), samplers how they draw cohorts, and tracing a
round tells what the server learns in it. From these follows the epsilon of any number of rounds.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import gin

from fedexp.contracts import Mechanism, Release
from fedexp.errors import UserError

# Of PLD's grid of privacy losses. Finer ones take longer and change the third digit of epsilon.
_INTERVAL = 1e-3
_LARGEST_MULTIPLIER = 1e6

_ADD_OR_REMOVE = "one client more or less"
_REPLACE = "one client replaced"
_ZERO_OUT = "one client's updates zero or not"
_REPLACE_UPDATE = "one client's updates replaced, against the server"


class Sampling(NamedTuple):
    """How cohorts are drawn.

    Attributes:
      scheme: see `Sampler.scheme`.
      cohort_size: clients a round, on average.
      population: clients that they are drawn from.
    """

    scheme: str | None
    cohort_size: float
    population: int


class Part(NamedTuple):
    """Rounds of a run that are all alike.

    Attributes:
      begin: the first of them, from 0.
      mechanisms: what hides a client in each of the round's releases.
      sampling: how cohorts are drawn.
    """

    begin: int
    mechanisms: tuple[Mechanism, ...]
    sampling: Sampling

    @classmethod
    def restored(cls, saved: Sequence[Any]) -> Part:
        """From what JSON made of it."""
        begin, mechanisms, sampling = saved
        made = tuple(Mechanism(z, kind, tuple(c), *rest) for z, kind, c, *rest in mechanisms)
        return cls(begin, made, Sampling(*sampling))


class Loss(NamedTuple):
    """What rounds cost: a Gaussian mechanism, `count` times.

    Attributes:
      noise_multiplier: standard deviation over what one client changes.
      count: how often.
      probability: that a client takes part; 1 without amplification by sampling.
      of: the same as (population, cohort), for cohorts of a fixed size; None for others.
      relation: which data sets cannot be told apart.
    """

    noise_multiplier: float
    count: int
    probability: float
    of: tuple[int, int] | None
    relation: str


@gin.configurable("privacy")
@dataclasses.dataclass(frozen=True)
class Privacy:
    """How epsilon is accounted for, as `train.privacy`.

    It is the epsilon of (epsilon, delta)-differential privacy of clients, of all the server's updates
    together. Losses and other metrics that fedexp reports are no part of it: a deployment would not send
    them.

    Attributes:
      epsilon: of the whole run, to find the noise that aggregators leave open from; None takes theirs.
      delta: population^-1.1 if None (as McMahan et al. 2018).
      accountant: 'pld', privacy loss distributions, within 0.3 % and never too low; or 'rdp', Renyi
        differential privacy, which is looser and can do cohorts of a fixed size.
      amplified: whether it counts that nobody knows whom the sampler draws. Without, every client may take
        part as often as the sampler lets it, and any sampler will do.
      population: of the deployment that is simulated; that of the data set if None.

    Raises:
      UserError: a number out of range, or an unknown accountant.
    """

    epsilon: float | None = None
    delta: float | None = None
    accountant: Literal["pld", "rdp"] = "pld"
    amplified: bool = True
    population: int | None = None

    def __post_init__(self) -> None:
        if self.epsilon is not None and not 0 < self.epsilon < math.inf:
            raise UserError(f"privacy.epsilon must be positive and finite, got {self.epsilon}")
        if self.delta is not None and not 0 < self.delta < 1:
            raise UserError(f"privacy.delta must be between 0 and 1, got {self.delta}")
        if self.accountant not in ("pld", "rdp"):
            raise UserError(f"privacy.accountant must be 'pld' or 'rdp', got {self.accountant!r}")
        if self.population is not None and self.population < 1:
            raise UserError(f"privacy.population must be at least 1, got {self.population}")

    def delta_for(self, sampling: Sampling) -> float:
        """The delta of a run."""
        return self.delta or float((self.population or sampling.population) ** -1.1)


def mechanisms_of(releases: Sequence[Release]) -> tuple[Mechanism, ...]:
    """What hides a client in a round's releases; empty if nothing does.

    Raises:
      UserError: some are without noise, so that the others' is of no use.
    """
    hidden = tuple(
        release.mechanism
        for release in releases
        if release.mechanism is not None and _is_noise(release.mechanism)
    )
    if hidden and len(hidden) < len(releases):
        bare = next(r.what for r in releases if r.mechanism is None or not _is_noise(r.mechanism))
        raise UserError(
            f"the clients' updates have noise, but the server is also told {bare}, without any: there is no "
            "epsilon. Take an algorithm that sends nothing past its aggregator, or train.privacy = None"
        )
    return hidden


def _is_noise(mechanism: Mechanism) -> bool:
    try:
        return float(mechanism.noise_multiplier) > 0
    except Exception as error:  # A tracer.
        raise UserError(
            "epsilon is that of one noise multiplier; for trials with several take train.privacy = None"
        ) from error


class Account:
    """What a run has told of its clients, and will have.

    Args:
      privacy: how to account for it.
      parts: of the run, in their order.

    Attributes:
      delta: see `Privacy`.
      parts: of the run.

    Raises:
      UserError: an accountant cannot do what the run does, or dp-accounting is missing.
    """

    def __init__(self, privacy: Privacy, parts: Sequence[Part]):
        self._privacy = privacy
        self.parts = tuple(parts)
        self.delta = privacy.delta_for(self.parts[-1].sampling)
        if len(self.parts) > 1 and any(
            m.kind in _CORRELATED for p in self.parts for m in p.mechanisms
        ):
            raise UserError(
                "the rounds before had other noise or another sampler, and noise that is correlated over "
                "rounds must not change: bind what it was, or choose another --workdir"
            )
        relations = {self._loss(part, 1).relation for part in self.parts}
        if len(relations) > 1:
            raise UserError(
                "the rounds before had another sampler, which hides something else "
                f"({' and '.join(sorted(relations))}): bind it, or choose another --workdir"
            )

    def epsilon(self, rounds: int) -> float:
        """Of the first `rounds` rounds; 0 of none."""
        ends = [part.begin for part in self.parts[1:]] + [rounds]
        losses = tuple(
            self._loss(part, min(end, rounds) - part.begin)
            for part, end in zip(self.parts, ends, strict=True)
            if min(end, rounds) > part.begin
        )
        if not losses:
            return 0.0
        return _epsilon(self._privacy.accountant, losses, self.delta)

    def report(self, rounds: int) -> dict[str, float]:
        """'privacy/epsilon' after so many rounds."""
        return {"privacy/epsilon": self.epsilon(rounds)}

    def about(self, rounds: int) -> dict[str, Any]:
        """What epsilon is of, for `final.json`."""
        part = self.parts[-1]
        return {
            "epsilon": self.epsilon(rounds),
            "delta": self.delta,
            "hides": self._loss(part, 1).relation,
            "accountant": self._privacy.accountant,
            "amplified": self._privacy.amplified,
            "sampling": part.sampling._asdict(),
            "simulated_population": self._privacy.population,
            "mechanisms": [mechanism._asdict() for mechanism in part.mechanisms],
        }

    def saying(self, rounds: int) -> str:
        """The same in a line."""
        hides = self._loss(self.parts[-1], 1).relation
        z = ", ".join(f"{m.noise_multiplier:.4g}" for m in self.parts[-1].mechanisms)
        text = (
            f"privacy: epsilon {self.epsilon(rounds):.4g} at delta {self.delta:.2g} after {rounds} rounds, "
            f"of {hides}; noise multiplier {z}"
        )
        population = self._privacy.population or self.parts[-1].sampling.population
        if self.delta >= 1 / population:
            text += (
                f". WARNING: a delta of 1 / {population} clients or more lets a mechanism publish a client "
                "whole; lower privacy.delta"
            )
        return text

    def _loss(self, part: Part, rounds: int) -> Loss:
        """What the first rounds of a part cost."""
        privacy, (scheme, cohort_size, population) = self._privacy, part.sampling
        kinds = {mechanism.kind for mechanism in part.mechanisms}
        sizes = {mechanism.cohort_size for mechanism in part.mechanisms}
        if len(kinds) > 1 or len(sizes) > 1:
            raise UserError(f"one run cannot have noise of several kinds: {sorted(kinds)}")
        (kind,), (simulated,) = kinds, sizes
        cohort_size, population = simulated or cohort_size, privacy.population or population
        if cohort_size > population:
            raise UserError(
                f"noise for cohorts of {cohort_size:g} clients needs as many clients, and there are "
                f"{population}; bind privacy.population to those of the deployment that is simulated"
            )
        limit = min((m.num_rounds for m in part.mechanisms if m.num_rounds), default=rounds)
        if rounds > limit:
            raise UserError(
                f"the noise is good for {limit} rounds, and there are {rounds}; raise its num_rounds"
            )
        apart = int(population // cohort_size) if scheme == "cyclic" else 1
        times = math.ceil(rounds / apart)
        # Several Gaussian mechanisms of the same data are one of less noise.
        squares = sum(
            _sensitivity(m, rounds, apart) / m.noise_multiplier**2 for m in part.mechanisms
        )
        multiplier = squares**-0.5
        if kind in _CORRELATED:
            if scheme != "cyclic" and privacy.amplified:
                raise UserError(
                    "noise that is correlated over rounds hides a client that takes part seldom, and this "
                    "sampler does not say how seldom: bind train.sampler = @cyclic(), or privacy.amplified "
                    "= False for clients that take part in every round"
                )
            return Loss(multiplier, 1, 1.0, None, _ZERO_OUT)
        if kind == "local":
            return Loss(multiplier / 2, times, 1.0, None, _REPLACE_UPDATE)
        if scheme == "cyclic" or not privacy.amplified:
            return Loss(multiplier, times, 1.0, None, _ZERO_OUT)
        if scheme == "poisson":
            return Loss(multiplier, rounds, cohort_size / population, None, _ADD_OR_REMOVE)
        if scheme == "fixed_size" and privacy.accountant == "rdp":
            of = (population, round(cohort_size))
            return Loss(multiplier / 2, rounds, cohort_size / population, of, _REPLACE)
        if scheme == "fixed_size":
            raise UserError(
                "the PLD accountant does not know cohorts of a fixed size: bind train.sampler = @poisson(), "
                "privacy.accountant = 'rdp', or privacy.amplified = False"
            )
        raise UserError(
            "no accountant knows how this sampler draws cohorts: bind train.sampler = @poisson(), "
            "privacy.amplified = False for an epsilon that does not rely on it, or train.privacy = None"
        )


def opened(
    privacy: Privacy,
    told: Callable[[float | None], Sequence[Release]],
    sampling: Sampling,
    num_rounds: int,
    done: int,
    earlier: Sequence[Part],
) -> tuple[Account | None, float | None]:
    """The account of a run, and the noise multiplier that a target asks for.

    Args:
      privacy: how to account.
      told: noise multiplier where it is open -> what the server is told of clients in a round.
      sampling: of the run.
      num_rounds: of the run.
      done: finished ones.
      earlier: what these were like; empty if nobody was hidden.

    Returns:
      The account, None if nothing hides clients; and the multiplier, None without a target.

    Raises:
      UserError: only some rounds have noise, there is no finite epsilon, or it is above the target.
    """
    multiplier = None
    if privacy.epsilon is not None:
        multiplier = calibrated(privacy, mechanisms_of(told(1.0)), sampling, num_rounds)
    mechanisms = mechanisms_of(told(multiplier))
    if not mechanisms and not earlier:
        return None, multiplier
    if not mechanisms or (done and not earlier):
        which = "rounds from here on" if earlier else f"first {done} rounds"
        raise UserError(
            f"the {which} have no noise and others do, so that the run has no epsilon: bind the same noise, "
            "choose another --workdir, or train.privacy = None"
        )
    part = Part(done, mechanisms, sampling)
    goes_on = bool(earlier) and earlier[-1][1:] == part[1:]
    account = Account(privacy, earlier if goes_on else (*earlier, part))
    epsilon = account.epsilon(num_rounds)
    if not math.isfinite(epsilon):
        raise UserError(
            f"no epsilon is finite at delta {account.delta:.2g} after {num_rounds} rounds: raise the noise "
            "multiplier"
        )
    if privacy.epsilon is not None and epsilon > 1.01 * privacy.epsilon:
        raise UserError(
            f"the rounds before leave too little of privacy.epsilon = {privacy.epsilon}: {num_rounds} "
            f"rounds will have {epsilon:.4g}; raise it, or choose another --workdir"
        )
    return account, multiplier


def calibrated(
    privacy: Privacy, mechanisms: Sequence[Mechanism], sampling: Sampling, num_rounds: int
) -> float:
    """The smallest noise multiplier, to 0.1 %, with which a run keeps to `privacy.epsilon`.

    Args:
      privacy: has a target.
      mechanisms: of a round; those that are `open` get the multiplier.
      sampling: of the run.
      num_rounds: of the run.

    Raises:
      UserError: nothing is open, or no noise is enough.
    """
    target = privacy.epsilon
    assert target is not None
    if not any(mechanism.open for mechanism in mechanisms):
        raise UserError(
            "privacy.epsilon is a target, and no noise is left open: bind its noise_multiplier = None, or "
            "leave privacy.epsilon to be found"
        )

    def over(log_multiplier: float) -> float:
        multiplier = math.exp(log_multiplier)
        made = tuple(m._replace(noise_multiplier=multiplier) if m.open else m for m in mechanisms)
        epsilon = Account(privacy, [Part(0, made, sampling)]).epsilon(num_rounds)
        return min(epsilon, 1e6) - target

    high = 0.0
    while over(high) > 0:
        high += math.log(2)
        if high > math.log(_LARGEST_MULTIPLIER):
            raise UserError(
                f"no noise multiplier up to {_LARGEST_MULTIPLIER:.0e} reaches privacy.epsilon = {target} at "
                f"delta {privacy.delta_for(sampling):.2g}; raise one of them"
            )
    low = high - math.log(2)
    while over(low) <= 0 and low > -5:
        low -= math.log(2)
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if over(middle) > 0 else (low, middle)
    return math.exp(high)


# --- How much one client changes all that correlated noise is added to --------------------------

_CORRELATED = ("tree", "toeplitz")


@functools.cache
def _sensitivity(mechanism: Mechanism, rounds: int, apart: int) -> float:
    """Squared, in norms of its updates: of a client that takes part every `apart` rounds at most."""
    if mechanism.kind == "tree":
        return float(
            sum(_in_nodes(2**level, rounds, apart) for level in range(rounds.bit_length()))
        )
    if mechanism.kind == "toeplitz":
        # Coefficients fall: the worst is to take part as early and as often as possible.
        import numpy as np

        column = np.zeros(rounds)
        for start in range(0, rounds, apart):
            some = mechanism.coefficients[: rounds - start]
            column[start : start + len(some)] += some
        return float(column @ column)
    return 1.0


def _in_nodes(length: int, rounds: int, apart: int) -> int:
    """The most that the squares of a client's participations in a tree's nodes of a length add up to."""
    in_one = math.ceil(length / apart)
    in_all = math.ceil(rounds // length * length / apart)
    return in_all // in_one * in_one**2 + (in_all % in_one) ** 2


# --- dp-accounting ------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def _epsilon(accountant: str, losses: tuple[Loss, ...], delta: float) -> float:
    if accountant == "rdp":
        return _by_rdp(losses, delta)
    parts = [
        _one(loss.noise_multiplier, loss.probability).self_compose(loss.count) for loss in losses
    ]
    return float(functools.reduce(lambda a, b: a.compose(b), parts).get_epsilon_for_delta(delta))


@functools.lru_cache(maxsize=8)
def _one(noise_multiplier: float, probability: float) -> Any:
    from_gaussian = _library().pld.privacy_loss_distribution.from_gaussian_mechanism
    # Losses are of the order of 1 / z^2, and the grid must stay short.
    interval = _INTERVAL * max(1.0, 0.05 / noise_multiplier**2)
    return from_gaussian(
        noise_multiplier, sampling_prob=probability, value_discretization_interval=interval
    )


def _by_rdp(losses: tuple[Loss, ...], delta: float) -> float:
    dp = _library()
    relations = dp.NeighboringRelation
    fixed = losses[0].of is not None
    relation = relations.REPLACE_ONE if fixed else relations.ADD_OR_REMOVE_ONE
    accountant = dp.rdp.RdpAccountant(neighboring_relation=relation)
    for loss in losses:
        event = dp.GaussianDpEvent(loss.noise_multiplier)
        if loss.of is not None:
            event = dp.SampledWithoutReplacementDpEvent(*loss.of, event)
        elif loss.probability < 1:
            event = dp.PoissonSampledDpEvent(loss.probability, event)
        accountant.compose(event, loss.count)
    return float(accountant.get_epsilon(delta))


def _library() -> Any:
    try:
        import dp_accounting
        from dp_accounting import pld, rdp  # noqa: F401  For its attributes.
    except ImportError as error:
        raise UserError(
            "epsilon needs the library dp-accounting: pip install 'fedexp[privacy]'; train.privacy = None "
            "runs without epsilon"
        ) from error
    return dp_accounting
