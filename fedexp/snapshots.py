"""Checkpoints of a run, looked at by others: nothing here writes to its workdir, or needs its experiment."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from fedexp import kept, paths
from fedexp.checkpointing import checked, filled, first_line, named_leaves
from fedexp.errors import UserError

PyTree = Any


class Snapshot(NamedTuple):
    """A checkpoint.

    Attributes:
      path: of the checkpoint.
      round: finished rounds.
      metric: the name of the metric by which it is the best; None for the latest.
      arrays: by their paths in the state.
      metadata: what is known of it besides.
    """

    path: str
    round: int
    metric: str | None
    arrays: dict[str, np.ndarray]
    metadata: dict[str, Any]


def load_params(
    workdir: str | os.PathLike, best: bool = True, like: PyTree | None = None
) -> PyTree:
    """The parameters that a run has saved, bit for bit, without its data or its config.

    Args:
      workdir: of the run, of this machine or a URL as s3://bucket/run. The run may be under way.
      best: those of the best checkpoint by `CheckpointPlan.best_metric`; else of the latest one, which
        after the end is that of the last round.
      like: parameters whose structure, dtypes and shapes these have, as a task's `init` gives.

    Returns:
      NumPy arrays in dicts and lists, which is what `apply` of a Flax model takes; or what `like` has in
      their place, for parameters of other classes.

    Raises:
      UserError: no such folder, no checkpoint, a damaged one, no best one, or one that is not like `like`.
    """
    found = read(workdir, best)
    told = "params" in found.metadata
    places = found.metadata["params"] if told else _places_by_name(found)
    params = _with_arrays(places, found.arrays)
    return params if like is None else filled(like, named_leaves(params)[0], found.path)


def read(workdir: str | os.PathLike, best: bool) -> Snapshot:
    """The best or the latest checkpoint of a workdir.

    Raises:
      UserError: see `load_params`.
    """
    folder = kept.folder_in(workdir)
    try:
        rounds = kept.rounds(workdir)
        if not rounds:
            there = paths.is_remote(workdir) or paths.exists(workdir)
            what = f"no checkpoint in {workdir}" if there else f"no folder {workdir}"
            raise UserError(f"there is {what}; a run makes some in its --workdir")
        abouts = {round: _about(os.path.join(folder, str(round))) for round in rounds}
        round, metric = _best(workdir, abouts) if best else (rounds[-1], None)
    except OSError as error:
        raise UserError(f"cannot read {workdir}: {error.strerror or error}") from error
    path, about = os.path.join(folder, str(round)), abouts[round]
    try:
        with _on_this_machine(folder, round) as state:
            import orbax.checkpoint as ocp

            arrays = checked(ocp.PyTreeCheckpointer().restore(state), about["arrays"])
    except Exception as error:  # Orbax has many.
        raise _damaged(path, error) from error
    return Snapshot(path, round, metric, arrays, about["metadata"])


def _about(path: str) -> dict[str, Any]:
    """What is known of a checkpoint besides its arrays."""
    try:
        about = json.loads(paths.read_text(os.path.join(path, "about", "metadata")))
        added = os.path.join(path, kept.ADDED)
        more = json.loads(paths.read_text(added)) if paths.exists(added) else {}
        metadata = about["metadata"] | more.pop("metadata", {})
        return about | more | {"metadata": metadata}
    except (FileNotFoundError, ValueError, LookupError, TypeError) as error:
        raise _damaged(path, error) from error


def _best(workdir: str | os.PathLike, abouts: dict[int, dict[str, Any]]) -> tuple[int, str]:
    """The round of the best checkpoint, and the metric by which it is that."""
    value = abouts[max(abouts)]["metadata"].get("best")
    for round in sorted(abouts, reverse=True):
        for name, measured in (abouts[round].get("metrics") or {}).items():
            if measured == value:
                return round, name
    raise UserError(
        f"{workdir} has no best checkpoint, for nothing was measured that tells it: bind "
        "CheckpointPlan.best_metric and an evaluation that gives it, or take the latest one"
    )


@contextlib.contextmanager
def _on_this_machine(folder: str, round: int) -> Iterator[Path]:
    """A checkpoint's folder of arrays, or a copy of a bucket's for a body."""
    if not paths.is_remote(folder):
        yield Path(os.path.abspath(folder)) / str(round) / "state"
        return
    url = os.path.join(folder, str(round), "state")
    with tempfile.TemporaryDirectory(prefix="fedexp-checkpoint-") as scratch:
        paths.download(url, paths.find(url), Path(scratch))
        yield Path(scratch)


def _places_by_name(found: Snapshot) -> PyTree:
    """Where the parameters are in a checkpoint that does not say so: in the state's field of this name.

    Raises:
      UserError: the state has no such field, or has lists in it.
    """
    field = "server.params."
    names = [name for name in found.arrays if name.startswith(field)]
    places = {tuple(name.removeprefix(field).split(".")): name for name in names}
    if not places or any(part.isdecimal() for path in places for part in path):
        raise UserError(
            f"the checkpoint {found.path} is of an older fedexp, which did not say where its parameters are; "
            "the same command with more rounds writes one that does"
        )
    return traverse_util.unflatten_dict(places)


def _with_arrays(places: Any, arrays: dict[str, np.ndarray]) -> PyTree:
    match places:
        case dict():
            return {name: _with_arrays(place, arrays) for name, place in places.items()}
        case list():
            return [_with_arrays(place, arrays) for place in places]
        case None:
            return None
        case _:
            return arrays[places]


def _damaged(path: str, error: Exception) -> UserError:
    return UserError(f"the checkpoint {path} is damaged, or gone meanwhile: {first_line(error)}")
