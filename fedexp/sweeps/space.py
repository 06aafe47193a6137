"""What a sweep varies: axes, each a binding and its values, and the points that they span."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import gin
import numpy as np

from fedexp.errors import UserError, check

# Binding -> its value, both as Gin writes them.
Bindings = Mapping[str, str]
# Draws in vain after which random axes are taken to have no more points.
_PATIENCE = 1000


class Grid(NamedTuple):
    """Values each of which is tried."""

    values: tuple[Any, ...]


class Choice(NamedTuple):
    """Values one of which is drawn."""

    values: tuple[Any, ...]

    def draw(self, rng: np.random.Generator) -> Any:
        """One of them, all being as likely."""
        return self.values[rng.integers(len(self.values))]


class Interval(NamedTuple):
    """Numbers from `low` to `high`, drawn uniformly, or their logarithms are."""

    low: float
    high: float
    log: bool = False
    integer: bool = False

    def draw(self, rng: np.random.Generator) -> float:
        """A number of it; of integers `high` is one, too."""
        low, high = self.low, self.high + (1 if self.integer else 0)
        u = rng.uniform()
        drawn = low * (high / low) ** u if self.log else low + (high - low) * u
        return min(int(drawn), int(self.high)) if self.integer else round_off(drawn)


@gin.configurable("grid")
def grid(values: Sequence[Any]) -> Grid:
    """All of these values; a plain list is the same.

    Args:
      values: numbers, texts, or what else Gin can write.
    """
    return Grid(tuple(values))


@gin.configurable("log_grid")
def log_grid(
    low: float, high: float, per_decade: int | None = None, count: int | None = None
) -> Grid:
    """Values from `low` to `high`, evenly spaced in their logarithm, of seven digits.

    Args:
      low: the first one.
      high: the last one.
      per_decade: how many make a factor of ten.
      count: how many there are, instead.

    Raises:
      UserError: no such values.
    """
    _check_interval("log_grid", low, high, log=True)
    if (per_decade is None) == (count is None):
        raise UserError("log_grid needs one of per_decade and count")
    decades = math.log10(high / low)
    if per_decade is not None:
        check(per_decade >= 1, f"log_grid.per_decade must be at least 1, got {per_decade}")
        count = round(decades * per_decade) + 1
        check(
            math.isclose(decades * per_decade, count - 1, abs_tol=1e-4),
            f"log_grid: from {low:g} to {high:g} is no whole number of steps of 1/{per_decade} decade; bind "
            "log_grid.count instead",
        )
    assert count is not None
    check(count >= 2, f"log_grid.count must be at least 2, got {count}")
    steps = (low * 10 ** (decades * i / (count - 1)) for i in range(count))
    return Grid(tuple(map(round_off, steps)))


@gin.configurable("random_choice")
def random_choice(values: Sequence[Any]) -> Choice:
    """Draws one of these values for every point.

    Args:
      values: each as likely as the others.
    """
    return Choice(tuple(values))


@gin.configurable("random_uniform")
def random_uniform(low: float, high: float) -> Interval:
    """Draws a number between `low` and `high` for every point.

    Args:
      low: the least.
      high: above it.
    """
    return _check_interval("random_uniform", low, high)


@gin.configurable("random_log_uniform")
def random_log_uniform(low: float, high: float) -> Interval:
    """Draws a number between `low` and `high` for every point, whose logarithm is uniform.

    Args:
      low: the least, positive.
      high: above it.
    """
    return _check_interval("random_log_uniform", low, high, log=True)


@gin.configurable("random_integer")
def random_integer(low: int, high: int, log: bool = False) -> Interval:
    """Draws an integer from `low` to `high`, both included, for every point.

    Args:
      low: the least.
      high: above it.
      log: whether the logarithm is uniform, not the number; `low` is positive then.
    """
    return _check_interval("random_integer", low, high, log=log, integer=True)


def _check_interval(name: str, low: float, high: float, **kind: bool) -> Interval:
    if not low < high or (kind.get("log") and low <= 0):
        above = "0 < low < high" if kind.get("log") else "low < high"
        raise UserError(f"{name} needs {above}, got low={low!r}, high={high!r}")
    return Interval(low, high, **kind)


def round_off(value: float) -> float:
    """Seven digits of a number: enough for float32, and short in a command."""
    return float(f"{value:.7g}")


@gin.configurable("axis")
@dataclasses.dataclass(frozen=True)
class Axis:
    """What is varied: a binding, or several together, and its values.

    Attributes:
      binding: its name, as 'client/sgd.learning_rate'. Of several each gets the same value, or its own part
        of values that are tuples.
      values: a list, `@log_grid()`, or one of `@random_...()`.
      expressions: instead, values as Gin writes them, for those that are references: '@fedprox'.

    Raises:
      UserError: no values, or values that Gin cannot read in a command.
    """

    binding: str | Sequence[str] = ""
    values: Sequence[Any] | Grid | Choice | Interval | None = None
    expressions: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not self.names or not all(name.strip() for name in self.names):
            raise UserError("axis.binding is not bound; it must be the name of a binding to vary")
        if (self.values is None) == (not self.expressions):
            raise UserError(
                f"axis.values of {self.label} is not bound; it must be a list, @log_grid() or one of "
                "@random_...()"
                if self.values is None
                else f"axis of {self.label} needs one of axis.values and axis.expressions"
            )
        if not isinstance(self.space, Interval):
            check(
                self.space.values, f"axis.values of {self.label} is empty; there is nothing to try"
            )
        for value in self.examples():
            self.bindings(value)

    @property
    def names(self) -> tuple[str, ...]:
        """The bindings."""
        return (self.binding,) if isinstance(self.binding, str) else tuple(self.binding)

    @property
    def label(self) -> str:
        """The bindings in words."""
        return " and ".join(self.names)

    @property
    def space(self) -> Grid | Choice | Interval:
        """Its values, a plain list being a grid."""
        values = self.values if self.values is not None else self.expressions
        return values if isinstance(values, Grid | Choice | Interval) else Grid(tuple(values))

    def examples(self) -> tuple[Any, ...]:
        """All values of a list, and the ends of an interval."""
        space = self.space
        return (space.low, space.high) if isinstance(space, Interval) else space.values

    def bindings(self, value: Any) -> dict[str, str]:
        """What one of its values binds.

        Raises:
          UserError: a tuple of another length, or an object that no command can hold.
        """
        parts = [value] * len(self.names)
        if len(self.names) > 1 and isinstance(value, tuple):
            if len(value) != len(self.names):
                raise UserError(
                    f"axis.values of {self.label} has {value!r}, which is not one value each"
                )
            parts = list(value)
        return dict(zip(self.names, map(self._text, parts), strict=True))

    def _text(self, value: Any) -> str:
        if self.expressions:
            return str(value)
        if not _is_literal(value):
            raise UserError(
                f"axis.values of {self.label} has {value!r}, which no command can hold; list references as "
                "text in axis.expressions"
            )
        return repr(value)


def _is_literal(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_literal, value))
    if isinstance(value, dict):
        return all(map(_is_literal, [*value, *value.values()]))
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, bool | int | str)


def points(axes: Sequence[Axis], num_points: int | None, seed: int) -> list[Bindings]:
    """All points that grids span, or so many draws of the random axes at each of these.

    Draws come first to last, so that more of them change nothing before.

    Args:
      axes: what is varied.
      num_points: draws of the random axes; None if there are no such.
      seed: of the draws.

    Raises:
      UserError: a point twice, or no more different ones.
    """
    random = [axis for axis in axes if not isinstance(axis.space, Grid)]
    if not random and num_points is not None:
        raise UserError("sweep.num_points needs an axis of @random_...() or a sweep.study")
    if random and num_points is None:
        raise UserError(f"sweep.num_points is not bound: how often {random[0].label} is drawn")
    found: list[Bindings] = []
    for drawn in itertools.islice(_draws(random, seed), num_points) if random else [{}]:
        choices = [
            axis.space.values if isinstance(axis.space, Grid) else (drawn[number],)
            for number, axis in enumerate(axes)
        ]
        found += [together(axes, values) for values in itertools.product(*choices)]
    if num_points is not None and len(found) < num_points:
        raise UserError(f"sweep.num_points = {num_points}, but the random axes have fewer points")
    _check_different(found)
    return found


def together(axes: Sequence[Axis], values: Sequence[Any]) -> Bindings:
    """What one value of each axis binds."""
    return {
        k: v
        for axis, value in zip(axes, values, strict=True)
        for k, v in axis.bindings(value).items()
    }


def examples(axes: Sequence[Axis]) -> list[Bindings]:
    """Points in which every value of a list and both ends of every interval are met."""
    count = max(len(axis.examples()) for axis in axes)
    return [
        together(axes, [a.examples()[i % len(a.examples())] for a in axes]) for i in range(count)
    ]


def check_axes(axes: Sequence[Axis]) -> None:
    """Refuses a binding of two axes.

    Raises:
      UserError: names it.
    """
    names = [name for axis in axes for name in axis.names]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two axes bind {twice[0]}; bind it in one")


def _draws(axes: Sequence[Axis], seed: int) -> Iterator[dict[int, Any]]:
    """Place -> value of each random axis, none of them twice."""
    seen: set[str] = set()
    vain = 0
    for attempt in itertools.count():
        drawn = {
            number: axis.space.draw(np.random.default_rng([seed, attempt, number]))
            for number, axis in enumerate(axes)
            if not isinstance(axis.space, Grid)
        }
        vain = vain + 1 if repr(drawn) in seen else 0
        if vain > _PATIENCE:
            return
        if not vain:
            seen.add(repr(drawn))
            yield drawn


def _check_different(found: Sequence[Bindings]) -> None:
    first: dict[tuple, int] = {}
    for number, bindings in enumerate(found):
        if (before := first.setdefault(tuple(bindings.items()), number)) != number:
            raise UserError(
                f"trials {before} and {number} would be the same, {in_words(bindings)}; take a value out"
            )


def in_words(bindings: Bindings) -> str:
    """Bindings in one line."""
    return "; ".join(f"{name} = {value}" for name, value in bindings.items())
