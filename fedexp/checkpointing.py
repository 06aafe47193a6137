"""Checkpoints: the state of a run, written by Orbax while the next round trains.

A checkpoint is a folder `<directory>/<round>` with two Orbax items: `state`, a flat dict of the
state's arrays named by their path (`params.Dense_0.kernel`), and `about`, a JSON of the caller's
metadata and every array's dtype, shape and checksum. What is found out about a round after it was saved, as
by a long evaluation, is added in `added.json`.

Client states are in checkpoints only if these are in a bucket: in a workdir of this machine they lie in a
store next to the checkpoints, which keeps what every checkpoint refers to.

Checkpoints in a bucket go through a `mirror`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import logging
import os
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gin
import jax
import jax.numpy as jnp
import numpy as np

from fedexp import kept, paths
from fedexp.errors import UserError
from fedexp.mirror import Mirror

PyTree = Any


def import_ahead() -> None:
    """Imports Orbax in the background, for it takes as long as compiling a small model."""
    threading.Thread(target=importlib.import_module, args=("orbax.checkpoint",)).start()


@gin.configurable
@dataclasses.dataclass(frozen=True)
class CheckpointPlan:
    """When a run saves, and what it keeps.

    Attributes:
      every: rounds between checkpoints; 0 saves at the end and on a stop only.
      keep: checkpoints kept besides the best one.
      best_metric: the evaluation metric that tells the best checkpoint; an evaluation that improves it is
        followed by a checkpoint. Without a group, as 'accuracy', it is that of the evaluation on the
        validation split, or else of the first evaluation. None keeps the latest only.
      best_mode: 'max' or 'min'.

    Raises:
      UserError: a value out of range.
    """

    every: int = 50
    keep: int = 2
    best_metric: str | None = "loss"
    best_mode: Literal["max", "min"] = "min"

    def __post_init__(self) -> None:
        if self.every < 0 or self.keep < 1 or self.best_mode not in ("max", "min"):
            raise UserError(
                f"CheckpointPlan needs every >= 0, keep >= 1 and best_mode 'max' or 'min', got {self}"
            )

    def bound_to(
        self, names: Mapping[str, Sequence[str]], validation: str | None
    ) -> CheckpointPlan:
        """The plan with its best metric's group.

        Args:
          names: group of an evaluation -> names of its metrics, in the evaluations' order.
          validation: the group of the evaluation on the validation split.

        Raises:
          UserError: no evaluation gives the best metric.
        """
        known = [f"{group}/{name}" for group, names in names.items() for name in names]
        best = self.best_metric
        if best is not None and best not in known and names:
            best = f"{validation or next(iter(names))}/{best}"
        if best is not None and known and best not in known:
            raise UserError(
                f"CheckpointPlan.best_metric is {self.best_metric!r}, but evaluation gives {known}"
            )
        return dataclasses.replace(self, best_metric=best if known else None)

    @property
    def sign(self) -> int:
        """1 if the best is the largest, -1 if it is the smallest."""
        return 1 if self.best_mode == "max" else -1

    def improves(self, value: float | None, best: float | None) -> bool:
        """Whether the best metric's new value, None if it was not measured, beats the best so far."""
        if value is None:
            return False
        return best is None or self.sign * value > self.sign * best


class Saved(NamedTuple):
    """What a run goes on from.

    Attributes:
      done: finished rounds.
      state: the server's.
      history: one row per evaluation.
      best: the best metric's best value, or None.
      report: what JSON can hold of a round whose evaluations are still to come; None once they are in
        `history`, and for a round without any.
      stall: what `stopping` has to remember, numbers or None.
      totals: what is summed over all rounds so far, by name; None in checkpoints that do not know.
      spent: what `privacy` has to remember of the rounds so far; empty if nothing hid clients.
    """

    done: int
    state: PyTree
    history: list[dict[str, float]]
    best: float | None
    report: dict[str, Any] | None = None
    stall: Sequence[Any] = ()
    totals: Mapping[str, float] | None = None
    spent: Sequence[Any] = ()


def template_of(state: PyTree, clients: PyTree) -> PyTree:
    """What a `Saver`'s checkpoint holds, for a server state and what it has of client states."""
    return {"server": state, "clients": clients, "params": _places_of_params(state)[1]}


def _places_of_params(state: PyTree) -> tuple[Any, list[Any]]:
    """Where a checkpoint has the parameters, for who knows nothing of the algorithm.

    Returns:
      The tree of parameters as JSON has it, with the names of the checkpoint's arrays for leaves; and those
      that are not among the arrays of the state, as one of several models, which it has besides.
    """
    named, _ = named_leaves({"server": state})
    name_of, apart = {id(leaf): name for name, leaf in named.items()}, []

    def place(tree: PyTree) -> Any:
        if tree is None:
            return None
        if jax.tree_util.all_leaves([tree]):
            if id(tree) not in name_of:
                name_of[id(tree)] = f"params.{len(apart)}"
                apart.append(tree)
            return name_of[id(tree)]
        below, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda one: one is not tree)
        if isinstance(tree, (tuple, list)) and not hasattr(tree, "_fields"):
            return [place(one) for _, one in below]
        return {jax.tree_util.keystr(path, simple=True): place(one) for path, one in below}

    return place(state.params), apart


class Saver:
    """Checkpoints of everything a run needs to go on; does nothing without a workdir.

    Args:
      workdir: of the run; checkpoints lie in a folder of it.
      plan: what to keep.
      client_states: of the algorithm, an `engine.ClientStates`; None if it has none.
      data: split -> what tells the data from others, as `FederatedDataset.fingerprint`.
    """

    def __init__(
        self,
        workdir: str | os.PathLike | None,
        plan: CheckpointPlan,
        client_states: Any,
        data: Mapping[str, str],
    ):
        self._workdir = workdir
        self._client_states = client_states
        self._data = dict(data)
        self._checkpointer: Checkpointer | None = None
        if workdir is not None:
            self._checkpointer = Checkpointer(
                kept.folder_in(workdir),
                keep=plan.keep,
                best_metric=plan.best_metric,
                best_mode=plan.best_mode,
            )
        self._best_metric = plan.best_metric
        self._saved = self._checkpointer.latest() if self._checkpointer else None
        self._is_waiting = False  # For the evaluations of the round that is saved.
        self._stores: Path | None = None  # Of client states.
        if workdir is not None and not paths.is_remote(workdir):
            self._stores = Path(workdir) / "client_states"

    @property
    def latest(self) -> int | None:
        """The round of the latest checkpoint, perhaps under way; None if there is none."""
        return self._saved

    def way_on(self) -> str:
        """How a run that ends here can go on."""
        if self._checkpointer is None:
            return "the same command starts afresh, for nothing is kept without a workdir"
        if self._saved is None:
            return "the same command starts afresh, for there is no checkpoint yet"
        return "the same command goes on from the latest checkpoint"

    def save(self, saved: Saved, measured: float | None = None) -> None:
        """Saves; of a round that was saved before its evaluations, only what they have found.

        Args:
          saved: what to save.
          measured: the best metric after this round, if it was evaluated.
        """
        if not self._checkpointer:
            return
        names = ("history", "best", "report", "stall", "totals", "spent")
        found = {name: getattr(saved, name) for name in names}
        metrics = None if measured is None else {str(self._best_metric): measured}
        if self._saved != saved.done:
            places, apart = _places_of_params(saved.state)
            about: dict[str, Any] = {**found, "data": self._data, "params": places}
            clients, flush = {}, None
            if self._client_states:
                others = self._checkpointer.rounds()
                clients, about["client_states"], flush = self._client_states.commit(
                    saved.done, others
                )
            state = {"server": saved.state, "clients": clients, "params": apart}
            self._checkpointer.save(saved.done, state, about, metrics, elsewhere=flush)
        elif self._is_waiting and saved.report is None:
            self._checkpointer.add(saved.done, found, metrics)
        self._saved, self._is_waiting = saved.done, saved.report is not None

    def restore(self, state: PyTree) -> Saved | None:
        """The latest checkpoint, for a first state like its own; None if there is none.

        Raises:
          UserError: it is of other data, or see `Checkpointer.restore`.
        """
        if self._checkpointer is None or self._saved is None:
            if self._client_states and self._stores:
                self._client_states.keep_in(self._stores, 0)
            return None
        clients = self._client_states.template() if self._client_states else {}
        template = template_of(state, clients)
        saved, metadata = self._checkpointer.restore(self._saved, template)
        for split, fingerprint in metadata.get("data", self._data).items():
            if self._data.get(split) != fingerprint:
                raise UserError(
                    f"the checkpoints in {self._workdir} are of other data: the {split} split had other "
                    "clients, or other numbers of examples. Bind the data they were made with, or choose "
                    "another --workdir"
                )
        if self._client_states:
            self._restore_clients(self._saved, saved["clients"], metadata.get("client_states"))
        report = metadata.get("report")
        self._is_waiting = report is not None
        history, best, stall = metadata["history"], metadata["best"], metadata.get("stall", ())
        totals, spent = metadata.get("totals"), metadata.get("spent", ())
        return Saved(self._saved, saved["server"], history, best, report, stall, totals, spent)

    def _restore_clients(self, round: int, saved: PyTree, store: str | None) -> None:
        """Takes client states from a checkpoint, or from the store of that name."""
        assert self._checkpointer
        if store is None:
            if self._stores:
                self._client_states.keep_in(self._stores, round)
            self._client_states.load(saved)
        elif self._stores is None:
            raise UserError(
                f"the checkpoints in {self._workdir} need the folder client_states next to them, which is of "
                "no use in a bucket; copy the workdir to this machine and go on there"
            )
        else:
            try:
                self._client_states.restore(self._stores, store, round, self._checkpointer.rounds())
            except (OSError, ValueError) as error:
                raise self._checkpointer.damaged(round, error) from error

    def wait(self) -> None:
        """Returns when the save under way is complete."""
        if self._checkpointer:
            self._checkpointer.wait()

    def close(self) -> None:
        """Waits for the save under way, and ends what saves in the background."""
        if self._checkpointer:
            self._checkpointer.close()


class Checkpointer:
    """Saves and restores a run's state, one folder a round, atomically and in the background.

    A process killed at any moment leaves the checkpoints it had completed. With several processes,
    every one makes the same calls, and the first one writes; states are replicated over processes.

    Args:
      directory: where checkpoints lie, of this machine or a URL; made if missing. What a killed save left
        there is removed.
      keep: the number of most recent checkpoints to keep.
      best_metric: a key of `save`'s `metrics`; the best checkpoint by it is kept as well.
      best_mode: whether the best is the largest or the smallest.

    Raises:
      UserError: here for a bad argument or a folder that cannot be made, and from every method for
        a save that failed in the background; it names the folder.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep: int = 3,
        best_metric: str | None = None,
        best_mode: Literal["max", "min"] = "max",
    ) -> None:
        if keep < 1:
            raise UserError(f"CheckpointPlan.keep must be at least 1, got {keep}")
        if best_mode not in ("max", "min"):
            raise UserError(f"CheckpointPlan.best_mode must be 'max' or 'min', got {best_mode!r}")
        import orbax.checkpoint as ocp

        # What matters in Orbax's log reaches the caller as an exception.
        logging.getLogger("absl").addFilter(_is_not_from_orbax)
        self._ocp = ocp
        self._best_metric = best_metric
        self._bucket = Mirror(str(directory)) if paths.is_remote(directory) else None
        self._directory = str(directory) if self._bucket else os.path.abspath(directory)
        self._folder = folder = self._bucket.folder if self._bucket else Path(self._directory)
        self._sign = 1 if best_mode == "max" else -1
        self._values: dict[int, float] = {}  # Round -> its value of the best metric.
        policies = ocp.checkpoint_managers
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), self]),
            cleanup_tmp_directories=True,
            # In the background, a failure to make them leaves threads that keep the process alive.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self._bucket:
                self._bucket.pull()
        except Exception as error:
            raise self._cannot_write(error) from error
        try:
            self._manager = ocp.CheckpointManager(
                folder, item_names=("state", "about", "elsewhere"), options=options
            )
        except Exception as error:
            raise UserError(
                f"A checkpoint in {self._directory} is damaged: {first_line(error)}. Delete its "
                "folder, or choose another folder."
            ) from error
        for round in self._manager.all_steps() if best_metric is not None else ():
            try:
                self._note(round, self._about(round)["metrics"])
            except Exception as error:
                raise self.damaged(round, error) from error

    def save(
        self,
        round: int,
        state: PyTree,
        metadata: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
        force: bool = False,
        elsewhere: Callable[[], None] | None = None,
    ) -> None:
        """Copies the state to the host, and writes it in the background.

        Once this returns, the state's buffers may be donated or changed. It waits for the save
        before, if that one is still being written.

        Args:
          round: the number of rounds done.
          state: a pytree of arrays and numbers, at least one of them not empty.
          metadata: what JSON can hold; `restore` returns it.
          metrics: this round's evaluation, if there was one. Without a (non-NaN) `best_metric` in
            it, the checkpoint does not take part in the choice of the best.
          force: replace the checkpoints of this and of later rounds, if there are any.
          elsewhere: puts on the disk what the checkpoint refers to; called in the background, on every
            process, before the checkpoint is complete.

        Raises:
          UserError: a checkpoint of this or of a later round exists and `force` is False; metrics
            without `best_metric`; or writing failed, now or in the save before.
        """
        json.dumps(dict(metadata))  # A TypeError here rather than in Orbax's thread.
        arrays = _host_arrays(_without_keys(state))
        tracked = self._tracked(metrics)
        about = {
            "metadata": dict(metadata),
            "arrays": {name: _description(array) for name, array in arrays.items()},
            "metrics": tracked,
        }
        args = self._ocp.args
        self.wait()
        try:
            for later in [r for r in self._manager.all_steps() if r >= round]:
                if not force:
                    raise UserError(
                        f"{self._directory} already holds a checkpoint of round {later}, so round "
                        f"{round} cannot be saved there. Use another folder, or delete {later}."
                    )
                self._manager.delete(later)
                self._values.pop(later, None)
            self._note(round, tracked)
            # Orbax refuses arrays without elements; `about` says all there is to them.
            items: dict[str, Any] = {
                "state": args.PyTreeSave({n: a for n, a in arrays.items() if a.size}),
                "about": args.JsonSave(about),
            }
            if elsewhere is not None:
                items["elsewhere"] = _calling()(elsewhere)
            self._manager.save(round, args=args.Composite(**items), force=True)
            if self._bucket:
                self._bucket.push(round, self._manager)
        except UserError:
            raise
        except Exception as error:
            raise self._cannot_write(error) from error

    def add(
        self, round: int, metadata: Mapping[str, Any], metrics: Mapping[str, float] | None = None
    ) -> None:
        """Adds to a checkpoint what was found out after `save`, once that is complete; all of it or nothing.

        Args:
          round: of the checkpoint.
          metadata: what `restore` returns besides, and instead of, what was saved.
          metrics: see `save`.

        Raises:
          UserError: writing failed, now or in the save before.
        """
        added = {"metadata": dict(metadata), "metrics": self._tracked(metrics)}
        self.wait()
        self._note(round, added["metrics"])
        if jax.process_index() != 0:
            return
        try:
            for folder in dict.fromkeys([str(self._folder), self._directory]):
                paths.write(os.path.join(folder, str(round), kept.ADDED), json.dumps(added))
        except OSError as error:
            raise self._cannot_write(error) from error

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Whether each is the best one; for Orbax."""
        del context
        best = self._best_of([checkpoint.step for checkpoint in checkpoints])
        return [checkpoint.step == best for checkpoint in checkpoints]

    def rounds(self) -> list[int]:
        """All complete checkpoints' rounds, sorted; waits for a save under way."""
        self.wait()
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """The round of the most recent checkpoint, or None; waits for a save under way."""
        self.wait()
        return self._manager.latest_step()

    def best(self) -> int | None:
        """The best checkpoint's round by `best_metric`, or None; waits for a save under way."""
        self.wait()
        return self._best_of(self._manager.all_steps())

    def restore(self, round: int | None, template: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """Reads a checkpoint, bit for bit.

        Args:
          round: which one; None is the latest.
          template: a pytree with the saved one's structure, dtypes and shapes. A leaf comes back as
            what stands in the template: a jax.Array with its sharding, a NumPy array or a number.
            A `jax.ShapeDtypeStruct` stands for an array on the host, or on its `sharding` if it
            has one; `kept.Rows` for one on the host of any number of rows.

        Returns:
          The state and the metadata given to `save`.

        Raises:
          UserError: no such checkpoint; a damaged one; or one that does not fit the template,
            naming the first leaf that differs.
        """
        self.wait()
        rounds = self.rounds()
        if not rounds or round not in (None, *rounds):
            wanted = "checkpoint" if round is None else f"checkpoint of round {round}"
            raise UserError(f"{self._directory} has no {wanted}; it has rounds {rounds}")
        round = rounds[-1] if round is None else round
        path = os.path.join(self._directory, str(round))
        args = self._ocp.args
        try:
            read: Any = self._manager.restore(
                round, args=args.Composite(state=args.PyTreeRestore(), about=args.JsonRestore())
            )
            described = read.about["arrays"]
            metadata = read.about["metadata"] | self._added(round).get("metadata", {})
            arrays = checked(read.state, described)
        except Exception as error:
            raise self.damaged(round, error) from error
        return filled(template, arrays, path), metadata

    def wait(self) -> None:
        """Returns when the save under way is complete, on disk or in the bucket."""
        try:
            self._manager.wait_until_finished()
            if self._bucket:
                self._bucket.wait()
        except Exception as error:
            raise self._cannot_write(error) from error

    def close(self) -> None:
        """Waits for the save under way and ends Orbax's threads."""
        try:
            self.wait()
        finally:
            self._manager.close()
            if self._bucket:
                self._bucket.close()

    def _about(self, round: int) -> dict[str, Any]:
        """What is known of a checkpoint besides its arrays."""
        args = self._ocp.args.Composite(about=self._ocp.args.JsonRestore())
        read: Any = self._manager.restore(round, args=args)
        return {"metrics": None, **read.about, **self._added(round)}

    def _added(self, round: int) -> dict[str, Any]:
        path = self._folder / str(round) / kept.ADDED
        return json.loads(path.read_text("utf-8")) if path.exists() else {}

    def _note(self, round: int, tracked: Mapping[str, float] | None) -> None:
        value = (tracked or {}).get(str(self._best_metric))
        if value is not None:
            self._values[round] = self._sign * value

    def _best_of(self, rounds: Sequence[int]) -> int | None:
        known = [(self._values[round], round) for round in rounds if round in self._values]
        return max(known)[1] if known else None

    def _tracked(self, metrics: Mapping[str, float] | None) -> dict[str, float] | None:
        if metrics is None or self._best_metric is None:
            return None
        if self._best_metric not in metrics:
            raise UserError(
                f"CheckpointPlan.best_metric is {self._best_metric!r}, but the evaluation gives "
                f"{sorted(metrics)}"
            )
        value = float(metrics[self._best_metric])
        return None if np.isnan(value) else {self._best_metric: value}

    def damaged(self, round: int, error: Exception) -> UserError:
        """What to raise of a checkpoint that cannot be read."""
        rounds = sorted(self._manager.all_steps())
        earlier = [r for r in rounds if r < round]
        go_on = f"go on from round {earlier[-1]}" if earlier else "start over"
        go_on = "do without it" if round < rounds[-1] else go_on
        return UserError(
            f"The checkpoint {os.path.join(self._directory, str(round))} is damaged: "
            f"{first_line(error)}. Delete that folder to {go_on}."
        )

    def _cannot_write(self, error: Exception) -> UserError:
        return UserError(
            f"Cannot write checkpoints to {self._directory}: {first_line(error)}. "
            "Free space there, or choose another folder."
        )


@functools.cache
def _calling() -> Any:
    """What makes Orbax call a function in the background, before it completes a checkpoint."""
    import orbax.checkpoint as ocp

    class Handler(ocp.AsyncCheckpointHandler):
        async def async_save(self, directory: Any, args: Any) -> Any:
            pool = ThreadPoolExecutor(1, thread_name_prefix="elsewhere")
            call = pool.submit(args.function)
            pool.shutdown(wait=False)
            return [call]

        def save(self, directory: Any, args: Any) -> None:
            args.function()

        def restore(self, directory: Any, args: Any = None) -> None:
            pass

    @ocp.args.register_with_handler(Handler, for_save=True, for_restore=True)
    @dataclasses.dataclass
    class Call(ocp.args.CheckpointArgs):
        function: Callable[[], None]

    return Call


def _is_not_from_orbax(record: logging.LogRecord) -> bool:
    return f"{os.sep}orbax{os.sep}" not in record.pathname


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0].rstrip(".")


def named_leaves(tree: PyTree) -> tuple[dict[str, Any], Any]:
    """The leaves by path (`params.Dense_0.kernel`), in the tree's order."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator=".") or "state": leaf
             for path, leaf in leaves}  # fmt: skip
    if len(named) != len(leaves):
        raise UserError("two leaves of the state have the same path; rename a key with a '.' in it")
    return named, structure


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _without_keys(tree: PyTree) -> PyTree:
    """The tree with typed PRNG keys as the numbers that they are made of."""
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, tree)


def _as_key(leaf: Any, like: Any) -> Any:
    if not _is_key(like):
        return leaf
    return jax.random.wrap_key_data(leaf, impl=jax.random.key_impl(like))


def _host_arrays(state: PyTree) -> dict[str, np.ndarray]:
    # On a CPU these may be views of the state's buffers: Orbax copies them before `save` returns.
    named, _ = named_leaves(jax.device_get(state))
    return {name: np.asarray(leaf) for name, leaf in named.items()}


def _description(array: np.ndarray) -> tuple[str, list[int], int]:
    return array.dtype.name, list(array.shape), _checksum(array)


def _checksum(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def checked(
    read: Mapping[str, np.ndarray], described: Mapping[str, Sequence[Any]]
) -> dict[str, np.ndarray]:
    """A checkpoint's arrays, those without elements among them.

    Args:
      read: name -> array that has elements.
      described: name -> what every array was when it was saved.

    Raises:
      KeyError, ValueError: one is missing, or is something else now.
    """
    arrays = {}
    for name, (dtype, shape, checksum) in described.items():
        array = read[name] if 0 not in shape else np.zeros(shape, jnp.dtype(dtype))
        if _description(array) != (dtype, shape, checksum):
            raise ValueError(f"{name} is not what was saved")
        arrays[name] = array
    return arrays


def filled(template: PyTree, arrays: Mapping[str, np.ndarray], path: str) -> PyTree:
    """A checkpoint's arrays in the place of a template's leaves; see `Checkpointer.restore`.

    Args:
      template: what is wanted.
      arrays: name -> array.
      path: of the checkpoint, for messages.

    Raises:
      UserError: they do not fit, with the first leaf that differs.
    """
    plain = _fill(_without_keys(template), arrays, path)
    return jax.tree.map(_as_key, plain, template)


def _fill(template: PyTree, arrays: Mapping[str, np.ndarray], path: str) -> PyTree:
    named, structure = named_leaves(template)
    for name in [*named, *(name for name in arrays if name not in named)]:
        saved = _kind(arrays[name]) if name in arrays else "missing"
        wanted = _kind(named[name]) if name in named else "missing"
        if not (name in arrays and name in named and _fits(arrays[name], named[name])):
            raise UserError(
                f"The checkpoint {path} is of another experiment: {name} is {saved} in it and "
                f"{wanted} here. Run it with the configuration that wrote it, or start afresh in "
                "another folder."
            )
    return structure.unflatten(_place(arrays[name], like) for name, like in named.items())


def _signature(leaf: Any) -> tuple[np.dtype, tuple[int | None, ...]]:
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return np.dtype(leaf.dtype), leaf.shape


def _kind(leaf: Any) -> str:
    dtype, shape = _signature(leaf)
    return f"{dtype.name}[{','.join('*' if size is None else str(size) for size in shape)}]"


def _fits(array: np.ndarray, like: Any) -> bool:
    dtype, shape = _signature(like)
    return (
        array.dtype == dtype
        and array.ndim == len(shape)
        and all(want in (None, size) for want, size in zip(shape, array.shape, strict=True))
    )


def _place(array: np.ndarray, like: Any) -> Any:
    match like:
        case jax.Array() if not like.committed:
            return jnp.asarray(array)
        case jax.Array() | jax.ShapeDtypeStruct() if like.sharding is not None:
            return jax.device_put(array, like.sharding)
        case np.ndarray() | jax.ShapeDtypeStruct() | kept.Rows():
            return array
        case np.generic():
            return array[()]
        case _:
            return array.item()
