"""Which devices a cohort is spread over, and how a function is run on each of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fedexp.errors import UserError

PyTree = Any
# (shared, part) -> (total, each), for one device and its part of the work.
DeviceFunction = Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]

_AXIS, _TRIALS = "devices", "trials"
_SPLIT, _WHOLE = PartitionSpec(_AXIS), PartitionSpec()


@dataclasses.dataclass(frozen=True)
class Placement:
    """The devices of a strategy, of all processes, in one row.

    Arrays that differ between devices have a leading axis of length D, one row per device; what is
    replicated has none.

    Attributes:
      mesh: of one axis; consecutive devices belong to the same process. With a second axis for trials, the
        devices along that hold copies of everything, and only trials are split over them.
      transform: (mesh, function) -> what `run` calls with (shared, parts).
    """

    mesh: Mesh
    transform: Callable[[Mesh, DeviceFunction], DeviceFunction]

    def run(self, function: DeviceFunction, shared: PyTree, parts: PyTree) -> tuple[PyTree, PyTree]:
        """Runs `function` on every device, and sums `total` over them.

        Args:
          function: (shared, part) -> (total, each).
          shared: replicated.
          parts: arrays (D, ...), a row for every device.

        Returns:
          total, replicated; and each, arrays (D, ...).
        """
        return self.transform(self.mesh, function)(shared, parts)

    def over_trials(
        self, function: Callable[..., PyTree], in_axes: Sequence[int], out_axes: Sequence[int]
    ) -> Callable[..., PyTree]:
        """`jax.vmap` over trials, of which every device has its share where there is an axis for them."""
        mapped = jax.vmap(function, tuple(in_axes), tuple(out_axes))
        if _TRIALS not in self.mesh.axis_names:
            return mapped
        specs = [
            tuple(PartitionSpec(*[None] * axis, _TRIALS) for axis in axes)
            for axes in (in_axes, out_axes)
        ]
        return jax.shard_map(
            mapped, mesh=self.mesh, in_specs=specs[0], out_specs=specs[1], check_vma=False
        )

    @property
    def num_devices(self) -> int:
        return self.mesh.shape[_AXIS]

    @functools.cached_property
    def processes(self) -> np.ndarray:
        """(D,) int, the process that each device belongs to."""
        return np.array([device.process_index for device in self.mesh.devices.T.flat])[
            : self.num_devices
        ]

    @functools.cached_property
    def local(self) -> np.ndarray:
        """Indices of this process's devices."""
        return np.flatnonzero(self.processes == jax.process_index())

    @functools.cached_property
    def num_processes(self) -> int:
        return len(np.unique(self.processes))

    def split(self, parts: PyTree) -> PyTree:
        """Puts NumPy arrays (local devices, ...) where they belong: global arrays (D, ...)."""
        sharding = NamedSharding(self.mesh, _SPLIT)

        def put(array: np.ndarray) -> jax.Array:
            shape = (self.num_devices, *array.shape[1:])
            return jax.make_array_from_process_local_data(sharding, array, shape)

        return jax.tree.map(put, parts)

    def arguments(self, parts: PyTree) -> PyTree:
        """`split` for small arrays that a compiled function is about to be called with."""
        # A single device takes NumPy arrays with the call, in a fifth of the time.
        return parts if self.num_devices == 1 else self.split(parts)

    def any_row(self, tree: PyTree) -> PyTree:
        """A row of arrays (D, ...) whose rows are all the same, replicated: each device takes its own."""

        def first(tree: PyTree) -> PyTree:
            return jax.tree.map(lambda leaf: leaf[0], tree)

        if self.num_devices == 1:
            return first(tree)
        return jax.shard_map(
            first, mesh=self.mesh, in_specs=_SPLIT, out_specs=_WHOLE, check_vma=False
        )(tree)

    def replicate(self, tree: PyTree) -> PyTree:
        """Puts a copy on every device; all processes must hold the same values."""
        sharding = NamedSharding(self.mesh, _WHOLE)

        # Not device_put: between processes it compares the values, which is a collective.
        def put(leaf: jax.typing.ArrayLike) -> jax.Array:
            if jax.numpy.issubdtype(jax.numpy.result_type(leaf), jax.dtypes.prng_key):
                return jax.random.wrap_key_data(
                    put(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf)
                )
            array = np.array(leaf)  # A copy, because rounds may donate it.
            return jax.make_array_from_process_local_data(sharding, array, array.shape)

        return jax.tree.map(put, tree)

    def keep_replicated(self, tree: PyTree) -> PyTree:
        """Tells the compiler that all devices end up with the same values."""
        return jax.lax.with_sharding_constraint(tree, NamedSharding(self.mesh, _WHOLE))

    def keep_split(self, tree: PyTree) -> PyTree:
        """Tells the compiler that the first axis is split over devices, as `local_rows` needs it."""
        return jax.lax.with_sharding_constraint(tree, NamedSharding(self.mesh, _SPLIT))

    def local_rows(self, tree: PyTree) -> PyTree:
        """This process's rows of arrays whose first axis is split over devices, as NumPy."""

        def read(array: jax.Array) -> np.ndarray:
            shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
            rows = [np.asarray(shards[start]) for start in sorted(shards)]
            return rows[0] if len(rows) == 1 else np.concatenate(rows)

        return jax.tree.map(read, tree)


def one_device() -> Placement:
    """The first device, with nothing to sum over."""
    return Placement(_row(jax.local_devices()[:1]), _alone)


def pmapped(num_devices: int | None = None) -> Placement:
    """This process's first `num_devices` devices, all if None, through `jax.pmap`."""
    return Placement(_row(_first(num_devices, jax.local_devices())), _pmapped)


def meshed(num_devices: int | None = None) -> Placement:
    """The first `num_devices` devices of every process, through `jax.shard_map`."""
    devices = [
        device
        for process in range(jax.process_count())
        for device in _first(num_devices, jax.local_devices(process))
    ]
    return Placement(_row(devices), _meshed)


def for_trials(devices: Sequence[Any]) -> Placement:
    """Trials split over these devices of one process; each does all of a cohort's work for its share."""
    mesh = Mesh(np.array(devices)[None], (_AXIS, _TRIALS), axis_types=(AxisType.Auto,) * 2)
    return Placement(mesh, _alone)


def _first(num_devices: int | None, devices: list[Any]) -> list[Any]:
    if num_devices is not None and not 1 <= num_devices <= len(devices):
        raise UserError(
            f"num_devices must be 1 to {len(devices)}, the devices of a process, got {num_devices}; "
            "on CPU, runtime.num_cpu_devices makes more"
        )
    return devices[:num_devices]


def _row(devices: list[Any]) -> Mesh:
    return Mesh(np.array(devices), (_AXIS,), axis_types=(AxisType.Auto,))


def _alone(mesh: Mesh, function: DeviceFunction) -> DeviceFunction:
    del mesh
    return _on_only_row(function)


def _pmapped(mesh: Mesh, function: DeviceFunction) -> DeviceFunction:
    devices = list(mesh.devices)
    axes = (None, 0)
    return jax.pmap(_summed(function), _AXIS, in_axes=axes, out_axes=axes, devices=devices)


def _meshed(mesh: Mesh, function: DeviceFunction) -> DeviceFunction:
    specs = (_WHOLE, _SPLIT)
    summed = _on_only_row(_summed(function))
    return jax.shard_map(summed, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False)


def _on_only_row(function: DeviceFunction) -> DeviceFunction:
    """Takes the leading axis of length 1 off the part, and gives it back to `each`."""

    def run(shared, parts):
        total, each = function(shared, jax.tree.map(lambda leaf: leaf[0], parts))
        return total, jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], each)

    return run


def _summed(function: DeviceFunction) -> DeviceFunction:
    """Sums `total` over the devices: the one collective of a call."""

    def run(shared, part):
        total, each = function(shared, part)
        return _sum_over_devices(total), jax.tree.map(jnp.asarray, each)

    return run


def _sum_over_devices(tree: PyTree) -> PyTree:
    """One psum of everything (one per dtype), instead of one for each leaf."""
    leaves, structure = jax.tree.flatten(tree)
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    for dtype in dict.fromkeys(leaf.dtype for leaf in leaves):
        group = [i for i, leaf in enumerate(leaves) if leaf.dtype == dtype]
        sums = jax.lax.psum(jnp.concatenate([leaves[i].ravel() for i in group]), _AXIS)
        ends = np.cumsum([leaves[i].size for i in group])[:-1]
        for i, flat in zip(group, jnp.split(sums, ends), strict=True):
            leaves[i] = flat.reshape(leaves[i].shape)
    return structure.unflatten(leaves)
