"""Finished runs: what each was, and what several with other seeds have in common."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fedexp import paths
from fedexp.data import SECONDS
from fedexp.errors import UserError

# Axis -> its label, and the numbers of the history whose sum it is.
AXES = {
    "round": ("rounds", ("round",)),
    "bits": ("bits, up and down", ("traffic/total_bits_up", "traffic/total_bits_down")),
    "bits_up": ("bits, up", ("traffic/total_bits_up",)),
    "seconds": ("simulated seconds", (SECONDS,)),
    "epsilon": ("privacy spent, epsilon", ("privacy/epsilon",)),
}
SEED = "train.seed"
UNBOUND = ""
_WORKDIR = "workdir"  # Stands for the bindings of a run in Python, which nobody knows.


class Run(NamedTuple):
    """A finished run.

    Attributes:
      path: its workdir.
      bindings: name -> value, as Gin writes both; what is in force and nobody bound included.
      history: a row for every round with evaluations, name -> number.
    """

    path: str
    bindings: Mapping[str, str]
    history: Sequence[Mapping[str, float]]

    @property
    def metrics(self) -> Mapping[str, float]:
        """Of the last evaluations."""
        return self.history[-1] if self.history else {}

    def check_has(self, metric: str) -> None:
        """Refuses a metric that no evaluation has.

        Raises:
          UserError: which there are instead.
        """
        known = sorted({name for row in self.history for name in row})
        if metric not in known:
            there = ", ".join(difflib.get_close_matches(metric, known, n=3) or known)
            raise UserError(f"{self.path} has no {metric!r} in its history; there is {there}")


class Curve(NamedTuple):
    """A metric of several runs, at the evaluations that all of them have.

    Attributes:
      x: (evaluations,) rounds or what else is the axis, the mean over runs.
      mean: (evaluations,) of the metric.
      low: (evaluations,) its minimum.
      high: (evaluations,) its maximum.
    """

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


class Setting(NamedTuple):
    """Runs that differ in nothing but their seeds.

    Attributes:
      label: tells it from the others.
      bindings: name -> value of what is not the same in all settings.
      runs: at least one.
    """

    label: str
    bindings: Mapping[str, str]
    runs: Sequence[Run]

    def last(self, metric: str) -> np.ndarray:
        """(runs that have it,) a metric of the last evaluations."""
        return np.asarray([run.metrics[metric] for run in self.runs if metric in run.metrics])

    def mean(self, metric: str) -> float | None:
        """The mean of these, if there is one."""
        values = self.last(metric)
        return float(values.mean()) if len(values) else None

    def curve(self, x: str, metric: str) -> Curve | None:
        """A metric against a name of `AXES`; None if the histories do not have both."""
        names = (metric, *AXES[x][1])
        rows = [
            {row["round"]: row for row in run.history if all(name in row for name in names)}
            for run in self.runs
        ]
        if not (rounds := sorted(set.intersection(*map(set, rows)))):
            return None
        found = np.asarray([[[of[r][name] for name in names] for r in rounds] for of in rows])
        values = found[:, :, 0]
        at = found[:, :, 1:].sum(-1).mean(0)
        finite = np.isfinite(at) & np.isfinite(values).all(0)
        curve = Curve(at, values.mean(0), values.min(0), values.max(0))
        return Curve(*(part[finite] for part in curve)) if finite.any() else None


def found_in(path: str) -> list[str]:
    """The workdirs of finished runs that a path is, or has below it; itself if there is none."""
    if paths.is_remote(path) or os.path.exists(os.path.join(path, "final.json")):
        return [path]
    below = sorted(folder for folder, _, files in os.walk(path) if "final.json" in files)
    return below or [path]


def read(path: str) -> Run:
    """A run from its workdir; one in Python has no bindings but `workdir`, by which it is told from others.

    Raises:
      UserError: it has no `final.json`, or another program's.
    """
    rows = _history(path)
    try:
        text = "".join(
            paths.read_text(os.path.join(path, name))
            for name in ("operative_config.gin", "config.gin")
        )
    except FileNotFoundError:
        return Run(path, {_WORKDIR: path}, rows)
    except OSError as error:
        raise UserError(f"the config of {path} cannot be read: {error}") from error
    lines = text.replace("\\\n", " ").splitlines()
    pairs = (line.split(" = ", 1) for line in lines if " = " in line and not line.startswith("#"))
    return Run(path, {name: " ".join(value.split()) for name, value in pairs}, rows)


def _history(path: str) -> list[Mapping[str, float]]:
    file = os.path.join(path, "final.json")
    try:
        return list(json.loads(paths.read_text(file))["history"])
    except FileNotFoundError as error:
        raise UserError(f"{file}: there is none; a run writes it after its last round") from error
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{file} cannot be read as fedexp's: {error!r}") from error


def differing(runs: Sequence[Run]) -> list[str]:
    """Names of bindings that are not the same in all runs that have any, sorted; `workdir` of the others."""
    known = [run for run in runs if _WORKDIR not in run.bindings]
    names = sorted({name for run in known for name in run.bindings})
    found = [name for name in names if len({run.bindings.get(name, UNBOUND) for run in known}) > 1]
    return found + [_WORKDIR] * (len(known) < len(runs))


def settings(runs: Sequence[Run]) -> list[Setting]:
    """Runs by all of their bindings but the seed, in the order of their first ones."""
    names = [name for name in differing(runs) if name != SEED]
    found: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        found.setdefault(tuple(run.bindings.get(name, UNBOUND) for name in names), []).append(run)
    return [
        Setting(_label(names, key) or "all runs", dict(zip(names, key, strict=True)), of)
        for key, of in found.items()
    ]


def shortened(names: Sequence[str]) -> list[str]:
    """Bindings by their parameters where these are told apart, by scope and parameter, or as they are."""
    parameters = [name.rpartition(".")[2] for name in names]
    scoped = [
        f"{name.rpartition('/')[0]} {parameter}".strip()
        for name, parameter in zip(names, parameters, strict=True)
    ]
    return [
        next((one for one, all_ in ((p, parameters), (s, scoped)) if all_.count(one) == 1), name)
        for name, p, s in zip(names, parameters, scoped, strict=True)
    ]


def number(text: str) -> float | None:
    """The number that a binding's value is, if it is one."""
    try:
        return float(text)
    except ValueError:
        return None


def _label(names: Sequence[str], values: Sequence[str]) -> str:
    pairs = zip(shortened(names), values, strict=True)
    return ", ".join(f"{name}={value}" for name, value in pairs if value)
