"""Samplers on a simulated clock: synchronous rounds with stragglers, and asynchronous arrivals.

Both are simulations that go on from round to round, and still pure functions of (population, seed, round):
an earlier round than the last one asked for is simulated from the start again.
"""

from __future__ import annotations

import heapq
import math
import threading
from collections.abc import Callable, Iterator

import gin
import numpy as np

from fedexp.data.clock import Clock, Devices
from fedexp.data.samplers import SECONDS, Ids, Sample, Sampler
from fedexp.errors import UserError
from fedexp.streams import Stream, generator

# (client_ids, examples, seed) -> the rounds, one after another.
Simulate = Callable[[Ids, np.ndarray, int], Iterator[Sample]]
_BLOCK = 4096
_TRIES = 16


@gin.configurable
def synchronous(
    clock: Clock, cohort_size: int = 10, asked: int | None = None, deadline: float | None = None
) -> Sampler:
    """Rounds that wait for clients, for any synchronous algorithm (Bonawitz et al. 2019, arXiv:1902.01046).

    Every round asks clients that can be asked at the time, all of these as likely. The first `cohort_size` to
    report within the deadline are the cohort, and the round is over with the last of them. Where fewer do, it
    lasts to the deadline, or without one until all have reported or would have. A cohort may be empty.

    Args:
      clock: how long clients take.
      cohort_size: clients wanted.
      asked: clients asked, more than wanted for over-selection; `cohort_size` if None.
      deadline: simulated seconds after the beginning of a round; none if None.

    Returns:
      A sampler that reports simulated/seconds at the end of a round, and simulated/lost, the clients asked
      in vain.

    Raises:
      UserError: a number out of range. The sampler raises it for more clients than there are, and for a
        deadline that nobody can meet.
    """
    asked = cohort_size if asked is None else asked
    if not 1 <= cohort_size <= asked:
        raise UserError(
            "synchronous needs 1 <= cohort_size <= asked, got "
            f"cohort_size={cohort_size}, asked={asked}"
        )
    if deadline is not None and not deadline > 0:
        raise UserError(f"synchronous.deadline must be positive, got {deadline}")

    def simulate(client_ids: Ids, examples: np.ndarray, seed: int) -> Iterator[Sample]:
        _check_at_most("synchronous.asked", asked, len(client_ids))
        devices = clock.devices(client_ids, examples, seed)
        rng = generator(Stream.CLOCK, seed, 1)
        if deadline is not None:
            fastest = (devices.seconds * clock.variations(rng, len(client_ids))).min()
            if fastest > deadline:
                raise UserError(
                    f"nobody meets synchronous.deadline = {deadline}: tried once, the fastest of "
                    f"{len(client_ids)} clients takes {fastest:.4g} simulated seconds; raise it"
                )
        now, everyone = 0.0, np.arange(len(client_ids))
        while True:
            able = everyone
            if not devices.always_available:
                opening = devices.next_available(everyone, now)
                now = _wake(opening.min(), now)
                able = np.flatnonzero(opening <= now)
            wanted = rng.choice(len(able), min(asked, len(able)), replace=False, shuffle=False)
            clients = able[wanted]
            seconds = devices.seconds[clients] * clock.variations(rng, len(clients))
            reports = rng.random(len(clients)) >= devices.drop_out[clients]
            if deadline is not None:
                reports &= seconds <= deadline
            order = np.argsort(seconds, kind="stable")
            kept = order[reports[order]][:cohort_size]
            if len(kept) == min(cohort_size, len(clients)):
                now += seconds[kept].max()
            else:
                now += seconds.max() if deadline is None else deadline
            infos = {SECONDS: float(now), "simulated/lost": len(clients) - len(kept)}
            yield Sample(np.sort(clients[kept]), infos=infos)

    return _simulated(cohort_size, simulate)


@gin.configurable
def asynchronous(clock: Clock, concurrency: int = 100, arrivals: int = 10) -> Sampler:
    """Arrivals of clients that train all the time, for FedBuff and FedAsync.

    `concurrency` clients are at work at any time: as soon as one has reported or dropped out, another one is
    asked, any that can be asked being as likely, and fetches the parameters there are. A round is a server's
    step, upon the `arrivals`-th report since the one before. A client whose report waits for that step is not
    asked again before it.

    Args:
      clock: how long clients take.
      concurrency: clients at work at a time.
      arrivals: reports to a server's step; FedBuff's K, 1 in FedAsync.

    Returns:
      A sampler that says each client's `staleness`, the server's steps since it fetched its parameters, and
      reports simulated/seconds at the step and simulated/lost, the clients that have dropped out since the
      step before.

    Raises:
      UserError: a number out of range. The sampler raises it for more clients than there are.
    """
    for name, value in (("concurrency", concurrency), ("arrivals", arrivals)):
        if value < 1:
            raise UserError(f"asynchronous.{name} must be at least 1, got {value}")

    def simulate(client_ids: Ids, examples: np.ndarray, seed: int) -> Iterator[Sample]:
        _check_at_most("asynchronous.concurrency", concurrency, len(client_ids))
        _check_at_most("asynchronous.arrivals", arrivals, len(client_ids))
        devices = clock.devices(client_ids, examples, seed)
        rng = generator(Stream.CLOCK, seed, 1)
        chances = _one_by_one(rng.random)
        variations = _one_by_one(lambda size: clock.variations(rng, size))
        seconds, drop_out = devices.seconds.tolist(), devices.drop_out.tolist()
        idle = _Idle(devices, chances)
        at_work: list[tuple[float, int, int, int]] = []  # When, which event, who, of what version.
        now, version, started = 0.0, 0, 0
        buffer: list[tuple[int, int]] = []
        lost = 0
        while True:
            while len(at_work) < concurrency and (client := idle.take(now)) is not None:
                then = now + seconds[client] * next(variations)
                heapq.heappush(at_work, (then, started, client, version))
                started += 1
            if not at_work or (len(at_work) < concurrency and idle.wake < at_work[0][0]):
                now = _wake(idle.wake, now)
                continue
            now, _, client, fetched = heapq.heappop(at_work)
            if next(chances) < drop_out[client]:
                lost += 1
                idle.add(client, now)
                continue
            buffer.append((client, version - fetched))
            if len(buffer) == arrivals:
                clients, staleness = np.array(buffer, np.int64).T
                infos = {SECONDS: now, "simulated/lost": lost}
                yield Sample(clients, {"staleness": staleness.astype(np.int32)}, infos)
                for client in clients.tolist():
                    idle.add(client, now)
                version, lost = version + 1, 0
                buffer.clear()

    return _simulated(arrivals, simulate)


class _Idle:
    """The clients that are not at work, of which one that can be asked is taken at random.

    Attributes:
      wake: no one can be asked before this simulated second; infinite if no one ever can.
    """

    def __init__(self, devices: Devices, chances: Iterator[float]):
        self._devices = devices
        self._always = devices.always_available
        self._first = devices.available_from.tolist()
        self._length = devices.available_for.tolist()
        self._chances = chances
        self._clients = list(range(len(self._first)))
        self._places = list(self._clients)  # Of each client among them.
        self._busy = np.zeros(len(self._first), bool)
        self.wake = 0.0

    def add(self, client: int, now: float) -> None:
        """Puts a client back."""
        self._places[client] = len(self._clients)
        self._clients.append(client)
        self._busy[client] = False
        self.wake = min(self.wake, self._opening(client, now))

    def take(self, now: float) -> int | None:
        """Takes a client out; None if there is none that can be asked."""
        if not self._clients:
            self.wake = math.inf
        if now < self.wake:
            return None
        for _ in range(_TRIES):  # Most often enough, and quick.
            client = self._clients[int(next(self._chances) * len(self._clients))]
            if self._opening(client, now) <= now:
                return self._out(client)
        opening = self._devices.next_available(np.arange(len(self._busy)), now)
        opening[self._busy] = math.inf
        self.wake = float(opening.min())
        if self.wake > now:
            return None
        able = np.flatnonzero(opening <= now)
        return self._out(int(able[int(next(self._chances) * len(able))]))

    def _out(self, client: int) -> int:
        place, last = self._places[client], self._clients.pop()
        if last != client:
            self._clients[place], self._places[last] = last, place
        self._busy[client] = True
        return client

    def _opening(self, client: int, now: float) -> float:
        """As `Devices.next_available`, of one."""
        if self._always:
            return now
        period, first, length = self._devices.period, self._first[client], self._length[client]
        if period == math.inf:
            return first if now < first else now if now < first + length else math.inf
        since = (now - first) % period
        return now if since < length else now + (period - since)


class _Rounds:
    """A simulation's rounds by number."""

    def __init__(self, start: Callable[[Ids, int], Iterator[Sample]]):
        self._start = start
        self._lock = threading.Lock()  # The next round is prepared in a thread of its own.
        self._of: tuple[int, int] | None = None

    def sample(self, client_ids: Ids, seed: int, round: int) -> Sample:
        asked_of = len(client_ids), seed
        with self._lock:
            if self._of != asked_of or round < self._number:
                self._simulation, self._number = self._start(client_ids, seed), -1
            self._of = None  # Should the simulation end with an error.
            while self._number < round:
                self._last = next(self._simulation)
                self._number += 1
            self._of = asked_of
            return self._last


def _simulated(cohort_size: int, simulate: Simulate) -> Sampler:
    def bind(examples: np.ndarray) -> Sampler:
        rounds = _Rounds(lambda client_ids, seed: simulate(client_ids, examples, seed))
        return Sampler(cohort_size, rounds.sample)

    def sample(client_ids: Ids, seed: int, round: int) -> Sample:
        raise UserError(
            "a sampler on a simulated clock must know what clients train on: take "
            "sampler.bound_to(examples)"
        )

    return Sampler(cohort_size, sample, bind=bind)


def _one_by_one(draw: Callable[[int], np.ndarray]) -> Iterator[float]:
    while True:
        yield from draw(_BLOCK).tolist()


def _wake(then: float, now: float) -> float:
    if then == math.inf:
        raise UserError(
            f"no client can be asked any more after {now:.4g} simulated seconds; bind "
            "clock.period, or lengthen clock.available_for"
        )
    return max(then, now)


def _check_at_most(name: str, value: int, num_clients: int) -> None:
    if value > num_clients:
        raise UserError(f"{name} is {value}, and there are {num_clients} clients; lower it")
