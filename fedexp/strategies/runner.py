"""Prepares rounds on the host and runs them on one device."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from fedexp.algorithms.base import Algorithm, Clients, Cohort, ForEachClient, RoundOutput
from fedexp.data import ClientBatching, FederatedDataset
from fedexp.strategies import schedule as schedule_lib
from fedexp.strategies.client_states import ClientStates
from fedexp.strategies.engine import PackedWork

PyTree = Any
_DEFAULT_RESIDENT_BYTES = 4 << 30
_SHUFFLE_STREAM = 1


class RoundInputs(NamedTuple):
    """What a round transfers to the device besides examples; see `Clients` and `Cohort`."""

    round: np.ndarray
    size: np.ndarray
    index: np.ndarray
    num_examples: np.ndarray
    num_steps: np.ndarray
    schedule: schedule_lib.Schedule


class PreparedRound(NamedTuple):
    """A round whose host work is done.

    Attributes:
      round: counted from 0.
      clients: (cohort size,) int64, indices of the sampled clients.
      inputs: on the device.
      examples: on the device; the whole data set, or the cohort's share.
      num_examples: examples the round trains on, local epochs counted.
      utilisation: share of the computed examples that are real.
    """

    round: int
    clients: np.ndarray
    inputs: RoundInputs
    examples: dict[str, jax.Array]
    num_examples: int
    utilisation: float


class Runner:
    """Binds an algorithm to a data set and a way to run its clients.

    `prepare` may run in a background thread a round ahead; `run` is one dispatch and returns before the
    device is done.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        dataset: FederatedDataset,
        batching: ClientBatching,
        *,
        params: PyTree,
        cohort_size: int,
        seed: int,
        lanes: int,
        for_each_client: ForEachClient,
        compiled: bool = True,
        max_resident_bytes: int | None = None,
    ):
        self._algorithm = algorithm
        self._dataset = dataset
        self._batching = batching
        self._seed = seed
        self._lanes = lanes
        self._for_each_client = for_each_client
        self._capacities = _Capacities.of(dataset, batching, cohort_size, lanes)
        self._resident = None
        if dataset.nbytes <= (max_resident_bytes or _device_budget()):
            self._resident = jax.device_put(dict(dataset.features))
        self.client_states: ClientStates | None = None
        if algorithm.init_client_state is not None:
            self.client_states = ClientStates(algorithm.init_client_state(params))
        self.compilations = 0
        self._round = self._body if not compiled else jax.jit(self._traced, donate_argnums=0)

    def prepare(self, round_: int, clients: np.ndarray) -> PreparedRound:
        """Draws the cohort's batches, packs them and starts their transfer to the device."""
        sizes = self._dataset.client_sizes[clients]
        starts = self._dataset.offsets[clients]
        examples = self._resident
        if examples is None:
            examples, starts = self._gather(clients, sizes)
        batches = []
        for client, start, size in zip(clients, starts, sizes, strict=True):
            rng = np.random.default_rng([_SHUFFLE_STREAM, self._seed, round_, int(client)])
            positions = self._batching.order(int(size), rng)
            batches.append(np.where(positions >= 0, positions + start, -1))
        steps = np.array([len(client) for client in batches], np.int32)
        slots = _bucket(len(clients), self._capacities.slots)
        schedule = schedule_lib.pack(
            batches,
            self._lanes,
            slots=slots,
            pad_steps=functools.partial(_bucket, capacity=self._capacities.steps),
        )
        inputs = RoundInputs(
            round=np.int32(round_),
            size=np.int32(len(clients)),
            index=_padded(clients, slots),
            num_examples=_padded(sizes, slots),
            num_steps=_padded(steps, slots),
            schedule=schedule,
        )
        return PreparedRound(
            round=round_,
            clients=clients,
            inputs=jax.device_put(inputs),
            examples=examples,
            num_examples=sum(int((rows >= 0).sum()) for rows in batches),
            utilisation=schedule_lib.utilisation(schedule),
        )

    def run(self, server_state: PyTree, prepared: PreparedRound) -> RoundOutput:
        """Runs one round; `server_state` is donated and must not be used afterwards."""
        states = None
        if self.client_states is not None:
            states = self.client_states.gather(prepared.clients, len(prepared.inputs.index))
        output = self._round(server_state, prepared.inputs, prepared.examples, states)
        if self.client_states is not None:
            self.client_states.scatter(prepared.clients, output.client_states)
        return output._replace(client_states=None)

    def _traced(self, *args) -> RoundOutput:
        self.compilations += 1  # jit traces once for every set of shapes that it compiles.
        return self._body(*args)

    def _body(self, server_state, inputs, examples, client_states) -> RoundOutput:
        key = jax.random.fold_in(jax.random.key(self._seed), inputs.round)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, inputs.index)
        cohort = Cohort(
            round=inputs.round,
            key=key,
            size=inputs.size,
            clients=Clients(
                inputs.index, inputs.num_examples, inputs.num_steps, keys, client_states
            ),
            work=PackedWork(inputs.schedule, examples),
            population=self._dataset.num_clients,
        )
        return self._algorithm.round(server_state, cohort, self._for_each_client)

    def _gather(self, clients: np.ndarray, sizes: np.ndarray) -> tuple[dict, np.ndarray]:
        """Copies the cohort's examples side by side, padded to a bucket, and starts their transfer."""
        rows = _bucket(int(sizes.sum()), self._capacities.examples)
        starts = np.cumsum(sizes) - sizes
        examples = {
            name: np.zeros((rows, *array.shape[1:]), array.dtype)
            for name, array in self._dataset.features.items()
        }
        for client, start, size in zip(clients, starts, sizes, strict=True):
            for name, array in self._dataset.client(client).items():
                examples[name][start : start + size] = array
        return jax.device_put(examples), starts


class _Capacities(NamedTuple):
    """Compiled shapes that nearly every cohort fits; larger cohorts take a power of two of them."""

    slots: int
    steps: int
    examples: int

    @classmethod
    def of(
        cls, dataset: FederatedDataset, batching: ClientBatching, cohort_size: int, lanes: int
    ) -> _Capacities:
        sizes, steps = dataset.client_sizes, batching.num_steps(dataset.client_sizes)
        room = 1.5 * cohort_size
        return cls(
            slots=max(cohort_size, 1),
            steps=math.ceil(room * steps.mean() / lanes) + int(steps.max()),
            examples=math.ceil(room * sizes.mean()) + int(sizes.max()),
        )


def _bucket(count: int, capacity: int) -> int:
    while capacity < count:
        capacity *= 2
    return capacity


def _padded(values: np.ndarray, length: int) -> np.ndarray:
    return np.pad(values.astype(np.int32), (0, length - len(values)))


@functools.cache
def _device_budget() -> int:
    """Bytes of examples that may stay on the device: half of its memory, 4 GiB where it won't tell."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit", 2 * _DEFAULT_RESIDENT_BYTES) // 2
