"""Prepares rounds on the host and runs them on the devices of a strategy."""

from __future__ import annotations

import math
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from fedexp.algorithms.base import Algorithm, Clients, ClientWork, Cohort, RoundOutput
from fedexp.compiling import jit, release_memory, run_once
from fedexp.data import ClientBatching, FederatedDataset
from fedexp.strategies import schedule as schedule_lib
from fedexp.strategies.base import Strategy
from fedexp.strategies.client_states import ClientStates
from fedexp.strategies.engine import DeviceWork
from fedexp.strategies.packed_tree import PackedTree

PyTree = Any
_DEFAULT_RESIDENT_BYTES = 4 << 30
_SHUFFLE_STREAM = 1
_LONG_COMPILATION = 1.0  # Seconds; a shorter one leaves little memory behind.


class RoundInputs(NamedTuple):
    """What a round transfers besides examples.

    Attributes:
      number: (2,) int32, the round and how many clients are in the cohort.
      by_device: a `DeviceInputs`.
    """

    number: jax.Array
    by_device: PackedTree


class DeviceInputs(NamedTuple):
    """What a device gets of a round; once unpacked, everything has a leading axis of all devices.

    Attributes:
      index: (S,) int32, one for each client slot, and so num_examples and num_steps; see `Clients`.
      schedule: of its clients.
    """

    index: jax.Array
    num_examples: jax.Array
    num_steps: jax.Array
    schedule: schedule_lib.Schedule


class PreparedRound(NamedTuple):
    """A round whose host work is done.

    Attributes:
      round: counted from 0.
      clients: (cohort size,) int64, indices of the sampled clients.
      slots: (cohort size,) int64, where each of them stands among the D x S slots.
      num_slots: S.
      inputs: on the devices; for a single one NumPy, which goes there with the call.
      examples: name -> (D, rows, ...) on the devices; the whole data set, or the cohort's share.
      num_examples: examples that the round trains on, local epochs counted.
      utilisation: real examples over computed ones, on this process's devices.
    """

    round: int
    clients: np.ndarray
    slots: np.ndarray
    num_slots: int
    inputs: RoundInputs
    examples: dict[str, jax.Array]
    num_examples: int
    utilisation: float


class Runner:
    """Binds an algorithm to a data set and a strategy.

    `prepare` may run in a background thread a round ahead; `run` is one dispatch and returns before
    the devices are done. With several processes, all make the same calls. Each owns a contiguous
    share of the clients and reads, holds and trains no others.
    """

    def __init__(
        self,
        strategy: Strategy,
        algorithm: Algorithm,
        dataset: FederatedDataset,
        batching: ClientBatching,
        *,
        params: PyTree,
        cohort_size: int,
        seed: int,
    ):
        self.placement = strategy.placement
        self._strategy = strategy
        self._algorithm = algorithm
        self._dataset = dataset
        self._batching = batching
        self._seed = seed
        self._lanes = strategy.num_lanes(cohort_size)
        self._capacity = _Capacity.of(
            dataset, batching, cohort_size, self._lanes, self.placement.num_devices
        )
        self._batch_sizes = schedule_lib.batch_sizes(
            batching.fill_counts(batching.used(dataset.client_sizes)), strategy.batch_sizes
        )
        self._borders = _shares(dataset, self.placement.num_processes)
        number = int(np.flatnonzero(np.unique(self.placement.processes) == jax.process_index())[0])
        self._own = range(*self._borders[number : number + 2].tolist())
        self._resident = self._make_resident(strategy.max_resident_bytes)
        self.client_states: ClientStates | None = None
        if algorithm.init_client_state is not None:
            self.client_states = ClientStates(algorithm.init_client_state(params), self._own)
        self.compilations = 0
        self._round = self._interpreted
        if strategy.compiled:
            self._round = jit(self._traced, donate_argnums=0)

    def prepare(self, round_: int, clients: np.ndarray) -> PreparedRound:
        """Draws the cohort's batches, packs them and starts their transfer to the devices."""
        sizes = self._batching.used(self._dataset.client_sizes[clients])
        steps = self._batching.num_steps(sizes)
        lane_of, start_of = self._assign(clients, steps)
        device_of, lane_of = np.divmod(lane_of, self._lanes)
        position = _count_before(device_of)
        # Every process computes the shapes of all devices, because all compile the same program.
        num_slots = _bucket(position.max(initial=-1) + 1, self._capacity.slots)
        num_steps = _bucket((start_of + steps).max(initial=0), self._capacity.steps)
        members = [np.flatnonzero(device_of == device) for device in self.placement.local]
        if self._resident is None:
            num_rows = np.bincount(device_of, weights=sizes).max(initial=0)
            num_rows = _bucket(int(num_rows), self._capacity.examples)
            examples = self._gather([(clients[own], sizes[own]) for own in members], num_rows)
            firsts = np.zeros(len(clients), np.int64)
            for own in members:
                firsts[own] = np.cumsum(sizes[own]) - sizes[own]
        else:
            examples = self._resident
            firsts = self._dataset.offsets[clients] - self._dataset.offsets[self._own.start]

        def by_slot(values: np.ndarray) -> np.ndarray:
            slots = np.zeros(num_slots, np.int32)
            slots[: len(values)] = values
            return slots

        def pack(own: np.ndarray) -> DeviceInputs:
            seeds = [[_SHUFFLE_STREAM, self._seed, round_, one] for one in clients[own].tolist()]
            schedule = schedule_lib.pack(
                self._batching.order(sizes[own], firsts[own], seeds),
                steps[own],
                lane_of[own],
                start_of[own],
                lanes=self._lanes,
                slots=num_slots,
                steps=num_steps,
                batch_sizes=self._batch_sizes,
            )
            return DeviceInputs(*map(by_slot, (clients[own], sizes[own], steps[own])), schedule)

        by_device = [pack(own) for own in members]
        inputs = self.placement.arguments(PackedTree.of(by_device))
        schedules = [one.schedule for one in by_device]
        real = sum(int((one.rows >= 0).sum()) for one in schedules)
        computed = self._lanes * sum(
            int(np.take(self._batch_sizes, one.widths[: one.bounds[one.num_segments]]).sum())
            for one in schedules
        )
        return PreparedRound(
            round=round_,
            clients=clients,
            slots=device_of * num_slots + position,
            num_slots=num_slots,
            inputs=RoundInputs(np.array([round_, len(clients)], np.int32), inputs),
            examples=examples,
            num_examples=int(self._batching.num_examples(sizes).sum()),
            utilisation=real / max(computed, 1),
        )

    def run(self, server_state: PyTree, prepared: PreparedRound) -> RoundOutput:
        """Runs one round; `server_state` is donated and must not be used afterwards.

        Client states are taken from and put back into `client_states`, for this process's clients.
        """
        if self.client_states is None:
            return self._call(server_state, prepared.inputs, prepared.examples, None)
        num_slots = prepared.num_slots
        rows = prepared.slots - num_slots * self.placement.local[0]
        own = (rows >= 0) & (rows < num_slots * len(self.placement.local))
        clients, rows = prepared.clients[own], rows[own]
        states = self.client_states.gather(clients, rows, (len(self.placement.local), num_slots))
        states = self.placement.split(states)
        output = self._call(server_state, prepared.inputs, prepared.examples, states)
        new_states = self.placement.own_rows(output.client_states)
        self.client_states.scatter(clients, rows, new_states)
        return output._replace(client_states=None)

    def start(self, params: PyTree) -> PyTree:
        """The algorithm's first server state, on all devices."""
        # A restored state has no weak types, so neither may a first one: they compile differently.
        # Copies, because rounds donate it.
        state = jax.tree.map(
            lambda leaf: np.array(leaf, jax.numpy.result_type(leaf)),
            run_once(self._algorithm.init, params),
        )
        return self.placement.replicate(state)

    def _call(self, *args) -> RoundOutput:
        before, start = self.compilations, time.perf_counter()
        output = self._round(*args)
        if self.compilations > before and time.perf_counter() - start > _LONG_COMPILATION:
            release_memory()
        return output

    def _traced(self, *args) -> RoundOutput:
        self.compilations += 1  # jit traces once for every set of shapes that it compiles.
        state, metrics, client_states = self._body(*args)
        state, metrics = self.placement.keep_replicated((state, dict(metrics)))
        return RoundOutput(state, metrics, client_states)

    def _interpreted(self, state, inputs, *args) -> RoundOutput:
        try:
            return self._body(state, inputs, *args)
        except Exception as error:
            round_, size = inputs.number.tolist()
            clients = np.asarray(inputs.by_device.unpack().index).ravel()[:size]
            ids = {int(client): str(self._dataset.client_ids[client]) for client in clients}
            error.add_note(f"in round {round_}, whose clients are {ids}")
            raise

    def _body(self, server_state, inputs, examples, client_states) -> RoundOutput:
        (round_, size), device = inputs.number, inputs.by_device.unpack()
        key = jax.random.fold_in(jax.random.key(self._seed), round_)
        by_device = Clients(
            index=device.index,
            num_examples=device.num_examples,
            num_steps=device.num_steps,
            key=jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (None, 0))(key, device.index),
            state=client_states,
        )

        def flat(tree: PyTree) -> PyTree:
            return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), tree)

        run_clients = self._strategy.run_clients

        def for_each_client(work: ClientWork, shared: PyTree, cohort: Cohort):
            clients = jax.tree.map(
                lambda leaf: leaf.reshape(*device.index.shape, *leaf.shape[1:]), cohort.clients
            )
            total, each = self.placement.run(
                lambda shared, part: run_clients(work, shared, part, self._batch_sizes),
                shared,
                DeviceWork(device.schedule, examples, clients),
            )
            return total, flat(each)

        cohort = Cohort(
            round=round_,
            key=key,
            size=size,
            clients=flat(by_device),
            population=self._dataset.num_clients,
        )
        return self._algorithm.round(server_state, cohort, for_each_client)

    def _assign(self, clients: np.ndarray, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Gives every client a lane of a device of the process that owns it.

        Returns:
          (lane, first step), (num_clients,) int64; lanes count through all devices.
        """
        lane_of = np.zeros(len(clients), np.int64)
        start_of = np.zeros(len(clients), np.int64)
        owner = np.searchsorted(self._borders, clients, side="right") - 1
        for number, process in enumerate(np.unique(self.placement.processes)):
            own = np.flatnonzero(owner == number)
            devices = np.flatnonzero(self.placement.processes == process)
            lanes, start_of[own] = schedule_lib.assign(steps[own], self._lanes * len(devices))
            lane_of[own] = lanes + self._lanes * devices[0]
        return lane_of, start_of

    def _make_resident(self, max_bytes: int | None) -> dict[str, jax.Array] | None:
        """This process's clients on each of its devices, if they fit."""
        offsets = self._dataset.offsets[self._borders]
        rows = int(np.diff(offsets).max())  # The same on all processes: they share one program.
        row_bytes = self._dataset.nbytes / self._dataset.num_examples
        budget = _device_budget() if max_bytes is None else max_bytes
        if rows * row_bytes > budget:
            return None
        share = self._dataset.slice(
            self._dataset.offsets[self._own.start], self._dataset.offsets[self._own.stop]
        )

        def copies(array: np.ndarray) -> np.ndarray:
            if len(array) < rows:
                array = np.concatenate(
                    [array, np.zeros_like(array, shape=(rows - len(array), *array.shape[1:]))]
                )
            return np.broadcast_to(array, (len(self.placement.local), *array.shape))

        return self.placement.split(jax.tree.map(copies, share))

    def _gather(
        self, shares: list[tuple[np.ndarray, np.ndarray]], rows: int
    ) -> dict[str, jax.Array]:
        """Copies the first examples of each device's clients side by side and starts their transfer.

        Args:
          shares: per device, its clients and how many examples of each.
          rows: examples to pad each device's to.
        """
        examples = {
            name: np.zeros((len(shares), rows, *array.shape[1:]), array.dtype)
            for name, array in self._dataset.features.items()
        }
        for device, (clients, sizes) in enumerate(shares):
            self._dataset.prefetch(clients)
            ends = np.cumsum(sizes)
            for client, size, end in zip(clients, sizes, ends, strict=True):
                first = self._dataset.offsets[client]
                for name, array in self._dataset.slice(first, first + size).items():
                    examples[name][device, end - size : end] = array
        return self.placement.split(examples)


class _Capacity(NamedTuple):
    """Compiled shapes that nearly every cohort fits; larger cohorts double them until they do."""

    slots: int
    steps: int
    examples: int

    @classmethod
    def of(
        cls,
        dataset: FederatedDataset,
        batching: ClientBatching,
        cohort_size: int,
        lanes: int,
        devices: int,
    ) -> _Capacity:
        sizes = batching.used(dataset.client_sizes)
        share = cohort_size
        if devices > 1:
            share = min(cohort_size, math.ceil(1.5 * cohort_size / devices) + 2)

        def most(values: np.ndarray, lanes: int) -> int:
            """Four standard deviations above the mean, and one client as large as any."""
            total = share * values.mean() + 4 * math.sqrt(share) * values.std()
            return math.ceil(total / lanes) + int(values.max())

        return cls(share, most(batching.num_steps(sizes), lanes), most(sizes, 1))


def _bucket(count: int, capacity: int) -> int:
    while capacity < count:
        capacity *= 2
    return capacity


def _count_before(values: np.ndarray) -> np.ndarray:
    """How many earlier entries are equal to each entry, (n,) int64."""
    counts = np.zeros(len(values), np.int64)
    seen: dict[int, int] = {}
    for i, value in enumerate(values.tolist()):
        counts[i] = seen.get(value, 0)
        seen[value] = counts[i] + 1
    return counts


def _shares(dataset: FederatedDataset, processes: int) -> np.ndarray:
    """Cuts the clients into one contiguous range a process, of about as many examples each.

    Returns:
      (processes + 1,) int64 client indices.
    """
    wanted = np.arange(processes + 1) * dataset.num_examples / processes
    return np.searchsorted(dataset.offsets, wanted).astype(np.int64)


def _device_budget() -> int:
    """Bytes of examples that may stay on a device: half of its memory, where it tells.

    Virtual CPU devices share 4 GiB.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] // 2
    return _DEFAULT_RESIDENT_BYTES // jax.local_device_count()
