"""Runs prepared rounds on the devices of a strategy."""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedexp.compiling import Compilations, jit, release_memory, run_once
from fedexp.contracts import TRAIN, Clients, ClientWork, Cohort, Release, RoundOutput, with_frozen
from fedexp.engine.client_states import ClientStates
from fedexp.engine.loop import DeviceWork, run_clients
from fedexp.engine.packed_tree import PackedMapping
from fedexp.engine.placement import Placement
from fedexp.engine.preparing import DeviceInputs, PreparedRound, Preparer
from fedexp.engine.strategy import Strategy
from fedexp.errors import UserError
from fedexp.promises import kept_work, name_of
from fedexp.rates import Rate, given
from fedexp.streams import Stream, derive
from fedexp.traffic import Traffic

PyTree = Any
Round = Callable[[PyTree, Cohort, "ForEachClient"], RoundOutput]
# One runs and one waits. Of more, virtual CPU devices would begin several at once, and none might get the
# threads on which its devices meet: XLA ends the process after a minute of that.
_MOST_UNDER_WAY = 2
_LONG_COMPILATION = 1.0  # Seconds; a shorter one leaves little memory behind.


class Population(NamedTuple):
    """Whom cohorts are drawn from: (expected cohort size, number of clients)."""

    expected_size: float
    num_clients: int


class Runner:
    """Runs rounds, one dispatch each; calls return before the devices are done, two rounds ahead at most.

    With several processes, all make the same calls.

    Args:
      strategy: where rounds run.
      round_: (state, cohort, for_each_client) -> RoundOutput; what an algorithm does, or an evaluation.
      preparer: what prepares its rounds.
      population: whom cohorts are drawn from.
      client_states: taken from and put back into, for this process's clients; None if there are none.
      root: the key that everything random in the rounds derives from.
      rates: that `round_` asks for, for whose values nothing is compiled.
      donate: whether a call may use up the state it is given.
      client_ids: of the data set, for error messages.

    Attributes:
      compilations: programs that calls have had compiled, or fetched from the cache folder.
      rates: (K,) float32, the values.
      releases: what the server was told of clients in the round that was traced last.
      noise_multiplier: for mechanisms that leave it open, in rounds that are traced from now on.
    """

    def __init__(
        self,
        strategy: Strategy,
        round_: Round,
        preparer: Preparer,
        population: Population,
        *,
        root: jax.Array,
        client_ids: np.ndarray,
        client_states: ClientStates | None = None,
        rates: Sequence[Rate] = (),
        donate: bool = True,
    ):
        self._strategy = strategy
        self._placement = strategy.placement
        self._round = round_
        self._preparer = preparer
        self._population = population
        self._client_ids = client_ids
        self._client_states = client_states
        self._root = self._placement.replicate(jax.random.key_data(root))
        self._root_type = jax.random.key_impl(root)
        self._rates = rates
        self.rates: jax.Array = self._placement.replicate(
            np.array([rate.value for rate in rates], np.float32)
        )
        self._compilations = Compilations()
        self.releases: Sequence[Release] = ()
        self.noise_multiplier: float | None = None
        self._under_way: collections.deque[jax.Array] = collections.deque()
        self._program: Any = self._interpreted
        if strategy.compiled:
            self._program = jit(self._traced, donate_argnums=0 if donate else ())

    @property
    def compilations(self) -> int:
        return self._compilations.count

    def run(
        self, state: PyTree, prepared: PreparedRound, note: int = 0
    ) -> tuple[RoundOutput, jax.Array | None]:
        """Runs a round.

        Args:
          state: the server's; used up by the call if `donate`, but for an attribute `frozen`.
          prepared: the round.
          note: a number that this process has for the others.

        Returns:
          What the round leaves behind, without client states; and, with several processes, () int32, the
          highest note, which all know after the same round.
        """
        arguments = self._arguments(state, prepared, note)
        while len(self._under_way) >= _MOST_UNDER_WAY:
            self._under_way.popleft().block_until_ready()
        output, noted = self.call(self._program, *arguments)
        self._under_way.extend(_one_of(output))
        if self._client_states is not None and output.client_states is not None:
            new_states = self._placement.local_rows(output.client_states)
            self._client_states.scatter(*self._clients_here(prepared), new_states)
        if output.client_states is not None:
            output = output._replace(client_states=None)
        frozen = arguments[1]
        if frozen is not None and hasattr(output.state, "frozen"):  # An evaluation's has none.
            output = output._replace(state=output.state._replace(frozen=frozen))
        return output, noted

    def compiled(self, state: PyTree, prepared: PreparedRound) -> jax.stages.Compiled:
        """A round's program, compiled once more, for tools that read it."""
        return self._program.lower(*self._arguments(state, prepared)).compile()

    def trace(self, state: PyTree, prepared: PreparedRound) -> None:
        """Traces a round and does not run it; nothing where rounds are not compiled."""
        if self._strategy.compiled:
            self._program.eval_shape(*self._arguments(state, prepared))

    def told(
        self, state: PyTree, prepared: PreparedRound, noise_multiplier: float | None
    ) -> Sequence[Release]:
        """What the server is told of clients in a round, by tracing it with this noise where it is open."""
        given, strategy = self.noise_multiplier, self._strategy
        self.noise_multiplier = noise_multiplier
        try:
            if strategy.compiled and noise_multiplier is None:
                self.trace(state, prepared)  # Which a run would do anyway.
            else:
                self._strategy = dataclasses.replace(strategy, run_clients=run_clients)
                jax.eval_shape(lambda *args: self.body(*args), *self._arguments(state, prepared))
        except Exception as error:
            if strategy.compiled or isinstance(error, UserError):
                raise
            return ()  # What cannot be traced, `debug` may run, or say more of.
        finally:
            self._strategy, self.noise_multiplier = strategy, given
        return self.releases

    def _arguments(
        self, state: PyTree, prepared: PreparedRound, note: int = 0
    ) -> tuple[PyTree, ...]:
        """What a round's program is called with; see `body`."""
        frozen = getattr(state, "frozen", None)
        if frozen is not None:
            state = with_frozen(state)
        states = notes = None
        if self._client_states is not None:
            shape = (len(self._placement.local), prepared.num_slots)
            states = self._client_states.gather(*self._clients_here(prepared), shape)
            states = self._placement.split(states)
        if self._placement.num_processes > 1:
            notes = self._placement.split(np.full(len(self._placement.local), note, np.int32))
        by_device, examples = prepared.by_device, prepared.examples
        return state, frozen, self._root, by_device, examples, states, notes, self.rates

    def _clients_here(self, prepared: PreparedRound) -> tuple[np.ndarray, np.ndarray]:
        """The clients of this process, and their rows among the slots of its devices."""
        rows = prepared.slots - prepared.num_slots * self._placement.local[0]
        here = (rows >= 0) & (rows < prepared.num_slots * len(self._placement.local))
        return prepared.clients[here], rows[here]

    def call(self, program: Callable[..., Any], *args: PyTree) -> Any:
        """Calls a program, and counts what is compiled for it."""
        compilations = self._compilations
        before, start = compilations.count, time.perf_counter()
        with compilations.counted():
            output = program(*args)
        if compilations.count > before and time.perf_counter() - start > _LONG_COMPILATION:
            release_memory()
        return output

    def _traced(self, *args: PyTree) -> tuple[RoundOutput, jax.Array | None]:
        output, noted = self.body(*args)
        metrics, per_client = map(PackedMapping.of, (output.metrics, output.per_client))
        kept = (output.state, metrics, per_client, noted)
        state, metrics, per_client, noted = self._placement.keep_replicated(kept)
        client_states = self._placement.keep_split(output.client_states)
        return RoundOutput(state, metrics, per_client, client_states), noted

    def _interpreted(self, *args: PyTree) -> tuple[RoundOutput, jax.Array | None]:
        try:
            return self.body(*args)
        except Exception as error:
            _, _, _, by_device, *_ = args
            device: DeviceInputs = jax.device_get(by_device.unpack())
            clients = device.index.ravel()[: int(device.cohort_size[0])]
            ids = {int(client): str(self._client_ids[client]) for client in clients}
            error.add_note(f"in round {device.round[0]}, whose clients are {ids}")
            raise

    def body(
        self,
        state,
        frozen,
        root,
        by_device,
        examples,
        client_states,
        notes,
        rates=None,
    ) -> tuple[RoundOutput, jax.Array | None]:
        """A round as a pure function, for programs of more than one.

        Args:
          state: the server's, with None for `frozen`.
          frozen: the server state's attribute `frozen`, or None.
          root: key data of the run's key.
          by_device: see `PreparedRound`.
          examples: likewise.
          client_states: (D, S, ...) of the cohort's slots, or None.
          notes: (D,) int32; None for a single process.
          rates: (K,) float32, the learning rates; what the attribute says if None.

        Returns:
          What the round leaves, its state with None for `frozen`; and the highest note.
        """
        if frozen is not None:
            state = state._replace(frozen=frozen)
        device: DeviceInputs = by_device.unpack()
        root = jax.random.wrap_key_data(root, impl=self._root_type)
        round_, size = self._placement.any_row((device.round, device.cohort_size))
        key = derive(root, Stream.ROUND, round_)
        for_each_client = ForEachClient(
            self._strategy, self._preparer, device, examples, key, Traffic(size)
        )
        first = next(iter(device.passes.values()))
        clients = Clients(
            index=device.index,
            num_examples=first.num_examples,
            num_steps=first.num_steps,
            inputs=device.inputs,
            state=client_states,
        )
        cohort = Cohort(
            round=round_,
            size=size,
            real=(device.index >= 0).reshape(-1),
            clients=_flat(clients),
            key=derive(key, Stream.SERVER),
            aggregation_key=key,
            expected_size=self._population.expected_size,
            population=self._population.num_clients,
            noise_multiplier=self.noise_multiplier,
        )
        with given(self._rates, self.rates if rates is None else rates):
            output = self._round(state, cohort, for_each_client)
        self.releases = tuple(for_each_client.releases)
        output = output._replace(state=with_frozen(output.state))
        return output, None if notes is None else notes.max()


class ForEachClient:
    """`contracts.ForEachClient` for one round; see there."""

    def __init__(
        self,
        strategy: Strategy,
        preparer: Preparer,
        device: DeviceInputs,
        examples: dict[str, dict[str, jax.Array]],
        key: jax.Array,
        traffic: Traffic,
    ):
        self.calls = 0
        self.traffic = traffic
        self.releases: list[Release] = []
        self._strategy = strategy
        self._preparer = preparer
        self._device = device
        self._examples = examples
        self._key = key

    def __call__(
        self,
        work: ClientWork,
        shared: PyTree,
        cohort: Cohort,
        pass_: str = TRAIN,
        counted: bool = True,
    ) -> tuple[PyTree, PyTree]:
        who = name_of(work.finish)
        work, batch_sizes = kept_work(work), self._preparer.batch_sizes(pass_)
        inputs = self._device.passes[pass_]
        parent = derive(self._key, Stream.CALL, self.calls)
        parent = jax.random.fold_in(parent, int(Stream.CLIENT))
        self.calls += 1
        shape = self._device.index.shape
        clients = jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), cohort.clients)
        clients = dataclasses.replace(
            clients,
            num_examples=inputs.num_examples,
            num_steps=inputs.num_steps,
            key=jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (None, 0))(parent, clients.index),
        )
        run_clients = self._strategy.run_clients
        placement = self._strategy.placement
        total, each = placement.run(
            lambda shared, part: run_clients(work, shared, part, batch_sizes),
            shared,
            DeviceWork(inputs.schedule, self._examples[self._preparer.split_of(pass_)], clients),
        )
        if jax.tree.leaves(total):
            self.releases.append(Release(f"what {who} adds up"))
        if counted:
            self.traffic.down(shared)
            self.traffic.up_by_each(total)
        return total, _flat(_gathered(placement, each))


def first_state(init: Callable[..., PyTree], *args: PyTree) -> PyTree:
    """What `init(*args)` returns, without weak types: a restored state has none, and compiles alike."""

    def strong(leaf: Any) -> jax.Array:
        dtype = jnp.result_type(leaf)
        if jnp.issubdtype(dtype, jax.dtypes.prng_key):
            return leaf
        return jax.lax.convert_element_type(leaf, dtype)

    return run_once(lambda *args: jax.tree.map(strong, init(*args)), *args)


def _one_of(output: RoundOutput) -> list[jax.Array]:
    """An array that is ready when the round is; none if it measures nothing, or is not compiled."""
    mappings = [m for m in (output.metrics, output.per_client) if isinstance(m, PackedMapping)]
    return [array for mapping in mappings for array in mapping.flat.values()][:1]


def _gathered(placement: Placement, each: PyTree) -> PyTree:
    """Puts numbers of clients, (D, S) arrays, on all devices: one collective, instead of one for each."""
    if placement.num_devices == 1:
        return each
    leaves, structure = jax.tree.flatten(each)
    for dtype in dict.fromkeys(leaf.dtype for leaf in leaves):
        group = [i for i, leaf in enumerate(leaves) if leaf.ndim == 2 and leaf.dtype == dtype]
        if group:
            numbers = placement.keep_replicated(jnp.stack([leaves[i] for i in group]))
            for i, leaf in zip(group, numbers, strict=True):
                leaves[i] = leaf
    return structure.unflatten(leaves)


def _flat(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), tree)
