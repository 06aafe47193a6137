"""Prepares rounds on the host, while the devices run the ones before."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import DTypeLike

from fedexp.contracts import TRAIN, Pass
from fedexp.data import ClientBatching, Sample
from fedexp.engine import schedule as schedule_lib
from fedexp.engine.client_data import ClientData, Split
from fedexp.engine.packed_tree import PackedTree
from fedexp.engine.strategy import Strategy
from fedexp.errors import UserError
from fedexp.streams import Stream


class PassInputs(NamedTuple):
    """What a device gets of one pass.

    Attributes:
      num_examples: (S,) int32, one for each client slot, and so num_steps; see `Clients`.
      schedule: of its clients.
    """

    num_examples: Any
    num_steps: Any
    schedule: schedule_lib.Schedule


class DeviceInputs(NamedTuple):
    """What a device gets of a round; once unpacked, everything has a leading axis of all devices.

    Attributes:
      round: () int32, its number; the same for all devices.
      cohort_size: () int32, likewise.
      index: (S,) int32, the client in each slot, or -1.
      inputs: name -> (S, ...), what the sampler says of it.
      passes: name -> what it goes through.
    """

    round: Any
    cohort_size: Any
    index: Any
    inputs: dict[str, Any]
    passes: dict[str, PassInputs]


class PreparedRound(NamedTuple):
    """A round whose host work is done.

    Attributes:
      round: counted from 0.
      clients: (cohort size,) int64, indices of the sampled clients.
      slots: (cohort size,) int64, where each of them stands among the D x S slots.
      num_slots: S.
      by_device: a `DeviceInputs`; for a single device of NumPy, which goes there with the call.
      examples: split -> name -> (D, rows, ...) on the devices; the whole split, or the cohort's share.
      num_examples: examples that the round goes through, all passes counted.
      utilisation: real examples over computed ones, on this process's devices.
      infos: name -> number, what the sampler says of the round.
    """

    round: int
    clients: np.ndarray
    slots: np.ndarray
    num_slots: int
    by_device: PackedTree
    examples: dict[str, dict[str, jax.Array]]
    num_examples: int
    utilisation: float
    infos: Mapping[str, float]


class Preparer:
    """Draws the batches of cohorts, packs them and starts their transfer to the devices.

    `prepare` may run in a background thread. With several processes, all make the same calls.

    Args:
      strategy: where cohorts run.
      data: all clients' examples.
      passes: name -> what work may go through; the first one's lengths decide which device a client
        goes to.
      cohort_size: about how many clients a cohort has.
      seed: of the run.
      stream: what its draws are for, (stream, number).

    Raises:
      UserError: a pass over a split that the data lack.
    """

    def __init__(
        self,
        strategy: Strategy,
        data: ClientData,
        passes: Mapping[str, Pass],
        *,
        cohort_size: int,
        seed: int,
        stream: tuple[Stream, int] = (Stream.ORDER, 0),
    ):
        for name, (_, split) in passes.items():
            if split not in data.names():
                raise UserError(
                    f"pass {name!r} goes through the split {split!r}, the data have {data.names()}"
                )
        self._data = data
        self._seed = seed
        self._stream = stream
        self.lanes = strategy.num_lanes(cohort_size)
        devices = data.placement.num_devices
        processes = data.placement.processes
        self._devices = [np.flatnonzero(processes == process) for process in np.unique(processes)]
        self.slots = cohort_size
        if devices > 1:
            self.slots = min(cohort_size, math.ceil(1.5 * cohort_size / devices) + 2)
        limit = passes[TRAIN].batching.max_examples if TRAIN in passes else None
        self._passes = {
            name: self._plan(pass_, limit, strategy.packing.batch_sizes)
            for name, pass_ in passes.items()
        }
        self._first = next(iter(passes))
        self._rows: dict[str, _Rows] = {}
        for split in dict.fromkeys(plan.split for plan in self._passes.values()):
            used = [plan.sizes for plan in self._passes.values() if plan.split == split]
            sizes = np.max(used, axis=0)
            self._rows[split] = _Rows(data.split(split), sizes, _most(sizes, self.slots, 1))

    @property
    def is_resident(self) -> bool:
        """Whether all examples that rounds point into stay on the devices."""
        return all(rows.split.resident is not None for rows in self._rows.values())

    def batch_sizes(self, pass_: str) -> tuple[int, ...]:
        """The sizes of batches that are compiled for a pass."""
        if pass_ not in self._passes:
            raise UserError(f"there is no pass {pass_!r}, only {list(self._passes)}")
        return self._passes[pass_].batch_sizes

    def split_of(self, pass_: str) -> str:
        """The split that a pass goes through."""
        return self._passes[pass_].split

    def prepare(self, round_: int, sample: Sample) -> PreparedRound:
        """Prepares a round of the sampled clients, of which there may be none."""
        placement, clients = self._data.placement, sample.clients
        lane_of, start_of = self._assign(clients)
        device_of, lane_of = np.divmod(lane_of, self.lanes)
        position = _count_before(device_of)
        num_slots = _bucket(position.max(initial=-1) + 1, self.slots)
        members = [np.flatnonzero(device_of == device) for device in placement.local]
        examples, firsts = self._examples(clients, members, device_of)

        def by_slot(values: np.ndarray, dtype: DTypeLike = np.int32) -> np.ndarray:
            slots = np.zeros((num_slots, *values.shape[1:]), dtype)
            slots[: len(values)] = values
            return slots

        passes: list[dict[str, PassInputs]] = [{} for _ in members]
        num_examples = real = computed = 0
        for number, (name, plan) in enumerate(self._passes.items()):
            sizes, steps = plan.sizes[clients], plan.num_steps[clients]
            examples_of = plan.num_examples[clients]
            num_examples += int(examples_of.sum())
            if name != self._first:
                lane_of, start_of = self._lanes_within(device_of, steps)
            # Every process computes the shapes of all devices, because all compile the same program.
            num_steps = _bucket(int((start_of + steps).max(initial=0)), plan.capacity)
            for on_device, device_passes in zip(members, passes, strict=True):
                schedule = schedule_lib.pack(
                    self._order(
                        round_, number, plan, clients[on_device], firsts[plan.split][on_device]
                    ),
                    steps[on_device],
                    lane_of[on_device],
                    start_of[on_device],
                    lanes=self.lanes,
                    slots=num_slots,
                    steps=num_steps,
                    batch_sizes=plan.batch_sizes,
                )
                device_passes[name] = PassInputs(
                    by_slot(sizes[on_device]), by_slot(steps[on_device]), schedule
                )
                real += int(examples_of[on_device].sum())
                widths = schedule.widths[: schedule.bounds[schedule.num_segments]]
                computed += self.lanes * int(np.take(plan.batch_sizes, widths).sum())
        inputs = {name: _as_sent(values) for name, values in sample.inputs.items()}
        by_device = [
            DeviceInputs(
                np.int32(round_),
                np.int32(len(clients)),
                by_slot(clients[on_device] + 1) - 1,  # -1 where there is none.
                {name: by_slot(values[on_device], values.dtype) for name, values in inputs.items()},
                device_passes,
            )
            for on_device, device_passes in zip(members, passes, strict=True)
        ]
        return PreparedRound(
            round=round_,
            clients=clients,
            slots=device_of * num_slots + position,
            num_slots=num_slots,
            by_device=placement.arguments(PackedTree.of(by_device)),
            examples=examples,
            num_examples=num_examples,
            utilisation=real / max(computed, 1),
            infos=sample.infos,
        )

    def _plan(self, pass_: Pass, limit: int | None, most_sizes: int) -> _PassPlan:
        batching, sizes = pass_.batching, self._data.split(pass_.split).sizes
        if pass_.split == TRAIN and batching.max_examples is None:
            batching = dataclasses.replace(batching, max_examples=limit)
        sizes = batching.limited(sizes)
        ran = sizes[sizes > 0]
        if not len(ran):
            raise UserError(f"no client of the training split has examples in {pass_.split!r}")
        batching = batching.fitted(ran)
        steps = np.zeros_like(sizes)
        steps[sizes > 0] = batching.num_steps(ran)
        examples = np.zeros_like(sizes)
        examples[sizes > 0] = batching.num_examples(ran)
        return _PassPlan(
            split=pass_.split,
            batching=batching,
            sizes=sizes,
            num_steps=steps,
            num_examples=examples,
            batch_sizes=schedule_lib.batch_sizes(batching.fill_counts(ran), most_sizes),
            capacity=_most(steps, self.slots, self.lanes),
        )

    def _examples(
        self, clients: np.ndarray, members: list[np.ndarray], device_of: np.ndarray
    ) -> tuple[dict[str, dict[str, jax.Array]], dict[str, np.ndarray]]:
        """What the round's rows point into, and where each client begins in it, by split."""
        examples, firsts = {}, {}
        for name, (split, sizes, capacity) in self._rows.items():
            firsts[name] = np.zeros(len(clients), np.int64)
            if split.resident is not None:
                examples[name] = split.resident
                for on_device in members:
                    firsts[name][on_device] = split.resident_rows(clients[on_device])
                continue
            sizes = sizes[clients]
            num_rows = np.bincount(device_of, weights=sizes).max(initial=0)
            shares = [(clients[on_device], sizes[on_device]) for on_device in members]
            examples[name] = split.gather(shares, _bucket(int(num_rows), capacity))
            for on_device in members:
                firsts[name][on_device] = np.cumsum(sizes[on_device]) - sizes[on_device]
        return examples, firsts

    def _order(
        self, round_: int, number: int, plan: _PassPlan, clients: np.ndarray, firsts: np.ndarray
    ) -> np.ndarray:
        sizes = plan.sizes[clients]
        ran = np.flatnonzero(sizes)
        seeds = np.zeros((0, 0), np.uint32)
        if plan.batching.shuffle:
            stream = _words(int(self._stream[0]), self._seed, self._stream[1], round_, 0, number)
            seeds = np.repeat(stream[None], len(ran), axis=0)
            seeds[:, -2] = clients[ran]
        return plan.batching.order(sizes[ran], firsts[ran], seeds)

    def _assign(self, clients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Gives every client a lane of a device of the process that owns it.

        Returns:
          (lane, first step), (num_clients,) int64; lanes count through all devices.
        """
        steps = self._passes[self._first].num_steps[clients]
        lane_of, start_of = np.zeros((2, len(clients)), np.int64)
        owner = self._data.owner(clients)
        for number, devices in enumerate(self._devices):
            of_process = np.flatnonzero(owner == number)
            lanes, start_of[of_process] = schedule_lib.assign(
                steps[of_process], self.lanes * len(devices)
            )
            lane_of[of_process] = lanes + self.lanes * devices[0]
        return lane_of, start_of

    def _lanes_within(
        self, device_of: np.ndarray, steps: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Lanes and first steps for another pass; clients stay on their devices."""
        lane_of, start_of = np.zeros((2, len(steps)), np.int64)
        for device in np.unique(device_of):
            on_device = np.flatnonzero(device_of == device)
            lane_of[on_device], start_of[on_device] = schedule_lib.assign(
                steps[on_device], self.lanes
            )
        return lane_of, start_of


class _PassPlan(NamedTuple):
    """A pass, worked out for the population: (num_clients,) int64 arrays, and the shapes to compile."""

    split: str
    batching: ClientBatching
    sizes: np.ndarray
    num_steps: np.ndarray
    num_examples: np.ndarray
    batch_sizes: tuple[int, ...]
    capacity: int


class _Rows(NamedTuple):
    """A split, the examples of it that passes go through by client, and rows that cohorts rarely exceed."""

    split: Split
    sizes: np.ndarray
    capacity: int


def _most(values: np.ndarray, clients: int, lanes: int) -> int:
    """What a cohort's sum over a lane rarely exceeds: four standard deviations, and one more client.

    Larger cohorts double it until it does.
    """
    total = clients * values.mean() + 4 * math.sqrt(clients) * values.std()
    return math.ceil(total / lanes) + int(values.max())


def _bucket(count: int, capacity: int) -> int:
    while capacity < count:
        capacity *= 2
    return capacity


def _as_sent(values: np.ndarray) -> np.ndarray:
    """Float32, bool or int32, whatever integers they are."""
    values = np.asarray(values)
    return values if values.dtype in (np.float32, np.bool_) else values.astype(np.int32)


def _words(*numbers: int) -> np.ndarray:
    """What NumPy's `SeedSequence` makes of numbers, which it is given in two thirds of the time; uint32."""
    words = []
    for number in numbers:
        words.append(number & 0xFFFFFFFF)
        while number := number >> 32:
            words.append(number & 0xFFFFFFFF)
    return np.array(words, np.uint32)


def _count_before(values: np.ndarray) -> np.ndarray:
    """How many earlier entries are equal to each entry, (n,) int64."""
    counts = np.zeros(len(values), np.int64)
    seen: dict[int, int] = {}
    for i, value in enumerate(values.tolist()):
        counts[i] = seen.get(value, 0)
        seen[value] = counts[i] + 1
    return counts
