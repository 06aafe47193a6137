"""A simulated clock: how long clients take, when they can be asked, and whether they ever report.

Each of these is a number, is drawn for every client from a distribution, or stands in a table. A clock says
nothing about the order of events; the samplers of `simulation.py` do.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import gin
import numpy as np

from fedexp import paths
from fedexp.data.samplers import Ids
from fedexp.errors import UserError
from fedexp.streams import Stream, generator


class Distribution(NamedTuple):
    """What numbers of seconds, probabilities or factors are drawn from.

    Attributes:
      draw: (generator, size) -> (size,) float64.
    """

    draw: Callable[[np.random.Generator, int], np.ndarray]


@gin.configurable
def between(low: float = 0.0, high: float = 1.0) -> Distribution:
    """Uniform in [low, high).

    Args:
      low: not negative.
      high: finite, at least `low`.
    """
    _check("between", "low", low)
    if not low <= high < math.inf:
        raise UserError(f"between.high must be finite and at least low = {low}, got {high}")
    return Distribution(lambda rng, size: rng.uniform(low, high, size))


@gin.configurable
def exponential(mean: float = 1.0) -> Distribution:
    """Exponential, of this mean.

    Args:
      mean: not negative.
    """
    _check("exponential", "mean", mean)
    return Distribution(lambda rng, size: rng.exponential(mean, size))


@gin.configurable
def lognormal(median: float = 1.0, sigma: float = 1.0) -> Distribution:
    """Log-normal: the logarithm has mean log(median) and standard deviation `sigma`.

    Args:
      median: not negative.
      sigma: not negative; 0 is the median alone.
    """
    _check("lognormal", "median", median)
    _check("lognormal", "sigma", sigma)
    return Distribution(lambda rng, size: median * np.exp(sigma * rng.standard_normal(size)))


@gin.configurable
def half_normal(scale: float = 1.0) -> Distribution:
    """|z| of a normal z of standard deviation `scale`.

    Args:
      scale: not negative.
    """
    _check("half_normal", "scale", scale)
    return Distribution(lambda rng, size: np.abs(scale * rng.standard_normal(size)))


class Devices(NamedTuple):
    """What a clock knows of a population; (num_clients,) float64 each.

    Attributes:
      seconds: that a client's work on a round takes, before variation.
      drop_out: probability that it never reports.
      available_from: simulated second from which it can be asked.
      available_for: seconds for which it can be asked from then on; may be infinite.
      period: after how many seconds it can be asked again, and so on; infinite for once.
    """

    seconds: np.ndarray
    drop_out: np.ndarray
    available_from: np.ndarray
    available_for: np.ndarray
    period: float

    @property
    def always_available(self) -> bool:
        """Whether everyone can be asked at any time."""
        open_ended = np.all(self.available_for >= self.period)
        return bool(open_ended and (self.period < math.inf or not self.available_from.any()))

    def next_available(self, clients: np.ndarray, now: float) -> np.ndarray:
        """When each can be asked: `now`, or a later second; infinite for never again."""
        first, length = self.available_from[clients], self.available_for[clients]
        if self.period == math.inf:
            return np.where(now < first, first, np.where(now < first + length, now, math.inf))
        since = (now - first) % self.period
        return np.where(since < length, now, now + (self.period - since))


@gin.configurable("clock")
@dataclasses.dataclass(frozen=True)
class Clock:
    """How long clients take, when they can be asked, and whether they report; by default a second, always.

    A client's work on a round takes (seconds + seconds_per_example * examples) * variation simulated seconds,
    its examples being those that it trains on, local epochs counted. All follows from the run's seed.

    Attributes:
      seconds_per_example: of each client.
      seconds: of each client, whatever its examples: for communication.
      variation: a factor, drawn for every piece of work.
      drop_out: probability that a client that is asked never reports; below 1.
      available_from: simulated second from which a client can be asked. What it has begun, it finishes.
      available_for: seconds for which it can be asked; for ever if None.
      period: after how many seconds it can be asked again, as 86400 for daily; never if None.
      table: CSV file, here or in a bucket, with a header: a column `client` of client ids, and any of
        seconds_per_example, seconds, drop_out, available_from and available_for, which go before those above.

    Raises:
      UserError: a number out of range. `devices` raises it for a table that cannot be used.
    """

    seconds_per_example: float | Distribution = 0.0
    seconds: float | Distribution = 1.0
    variation: float | Distribution = 1.0
    drop_out: float | Distribution = 0.0
    available_from: float | Distribution = 0.0
    available_for: float | Distribution | None = None
    period: float | None = None
    table: str | None = None

    def __post_init__(self) -> None:
        for name in (*_COLUMNS, "variation"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Distribution):
                _check("clock", name, value)
        if self.period is not None and not 0 < self.period < math.inf:
            raise UserError(f"clock.period must be positive and finite, got {self.period}")

    def devices(self, client_ids: Ids, examples: np.ndarray, seed: int) -> Devices:
        """Draws or reads what there is to know of a population.

        Args:
          client_ids: (num_clients,) str.
          examples: (num_clients,) int64, what each trains on in a round.
          seed: of the run.
        """
        table = {} if self.table is None else _read(self.table, client_ids)
        columns = {}
        for number, name in enumerate(_COLUMNS):
            value = getattr(self, name)
            if name in table:
                columns[name] = table[name]
            elif isinstance(value, Distribution):
                rng = generator(Stream.CLOCK, seed, 0, number + 1)
                columns[name] = value.draw(rng, len(client_ids))
                _check("clock", name, columns[name], "draws ")
            else:
                columns[name] = np.full(len(client_ids), math.inf if value is None else value)
        each = columns.pop("seconds_per_example")
        columns["seconds"] = columns["seconds"] + each * examples
        return Devices(**columns, period=math.inf if self.period is None else self.period)

    def variations(self, rng: np.random.Generator, size: int) -> np.ndarray:
        """Draws the factors of pieces of work, (size,) float64."""
        if not isinstance(self.variation, Distribution):
            return np.full(size, self.variation)
        return self.variation.draw(rng, size)


_COLUMNS = ("seconds_per_example", "seconds", "drop_out", "available_from", "available_for")


def _check(owner: str, name: str, value: float | np.ndarray, how: str = "got ") -> None:
    """Refuses numbers that are no seconds, factors or probabilities."""
    values = np.atleast_1d(value)
    right, wanted = (values >= 0) & (values < math.inf), "finite and not negative"
    if name == "drop_out":
        right, wanted = (values >= 0) & (values < 1), "a probability in [0, 1)"
    elif name == "available_for":
        right, wanted = values > 0, "positive"
    if not np.all(right):
        raise UserError(f"{owner}.{name} must be {wanted}, {how}{values[~right][0]}")


def _read(path: str, client_ids: Ids) -> dict[str, np.ndarray]:
    """Reads a table's columns, in the order of the population."""
    where = f"clock.table = {path!r}"
    try:
        text = paths.read_text(path)
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error.strerror}") from error
    rows = csv.DictReader(io.StringIO(text))
    names: Sequence[str] = rows.fieldnames or ()
    if "client" not in names or not set(names) <= {"client", *_COLUMNS}:
        raise UserError(
            f"{where} needs a header with client and any of {', '.join(_COLUMNS)}; it has "
            f"{', '.join(names) or 'none'}"
        )
    columns = [name for name in names if name != "client"]
    found: dict[str, list[float]] = {}
    for row in rows:
        at, client = f"{where}, line {rows.line_num}", row["client"]
        if client in found:
            raise UserError(f"{at}: the client {client!r} stands there twice")
        try:
            found[client] = [float(row[name]) for name in columns]
        except (TypeError, ValueError) as error:
            raise UserError(f"{at}: {', '.join(columns)} must be numbers") from error
        for name, value in zip(columns, found[client], strict=True):
            _check(at + ": clock", name, value)
    ids = np.asarray(client_ids).tolist()
    if missing := [client for client in ids if client not in found]:
        raise UserError(
            f"{where} lacks {len(missing)} of {len(ids)} clients, the first of them {missing[0]!r}"
        )
    values = np.array([found[client] for client in ids]).reshape(len(ids), len(columns))
    return dict(zip(columns, values.T, strict=True))
