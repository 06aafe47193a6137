"""The contracts between algorithms, aggregators and the engine, all in one place.

An algorithm says what one client does (`ClientWork`), and what the server does with what becomes of it.
An aggregator is to client updates what an Optax transformation is to gradients. The engine runs clients
wherever the strategy places them; neither of the others ever names a device.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from fedexp import shown
from fedexp.data import Batch, ClientBatching, FederatedDataset
from fedexp.traffic import Traffic

PyTree = Any
# A number, or a `tasks.Measure`: reported as its mean, and not at all where it has no weight.
Metrics = Mapping[str, Any]

NOTHING: Metrics = types.MappingProxyType({})

TRAIN = "train"


# --- What a round is given ----------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Clients:
    """The clients of a cohort; with the leading axis taken off, one of them.

    Attributes:
      index: (C,) int32, the client's row in the data set; -1 in a slot that is no client.
      num_examples: (C,) int32, examples that the pass at hand goes through; those of the training pass
        in `Cohort.clients`.
      num_steps: (C,) int32, steps of that pass.
      inputs: name -> (C, ...) int32, float32 or bool, what the sampler says of each client. 'rate', if there
        is one, is a factor on its learning rate in local training.
      state: pytree of (C, ...), what is kept for each client between rounds; a `ClientState` where the
        algorithm uses `aggregate`. None for algorithms without client state.
      key: a PRNG key of the client's own, for `ClientWork.init` and `finish`; None elsewhere.
    """

    index: jax.Array
    num_examples: jax.Array
    num_steps: jax.Array
    inputs: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    state: PyTree = None
    key: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cohort:
    """The clients sampled for a round, perhaps none: what then becomes of the server, the algorithm says.

    Attributes:
      round: () int32, counted from 0.
      size: () int32, sampled clients.
      real: (C,) bool, which slots are clients; the others do no work, and their rows are zeros.
      clients: the clients, C slots.
      key: PRNG key for the server's own random choices.
      aggregation_key: parent of the aggregators' keys; `aggregate` looks after it.
      expected_size: clients that the sampler draws on average.
      population: clients that it draws from.
      noise_multiplier: what `privacy.epsilon` asks of mechanisms that leave it open; None without.
    """

    round: jax.Array
    size: jax.Array
    real: jax.Array
    clients: Clients
    key: jax.Array
    aggregation_key: jax.Array
    expected_size: float = dataclasses.field(metadata={"static": True})
    population: int = dataclasses.field(metadata={"static": True})
    noise_multiplier: float | None = dataclasses.field(default=None, metadata={"static": True})

    def with_inputs(self, **inputs: jax.Array) -> Cohort:
        """The same cohort, whose clients find these (C, ...) arrays among their inputs, too."""
        inputs = {**self.clients.inputs, **inputs}
        return dataclasses.replace(self, clients=dataclasses.replace(self.clients, inputs=inputs))

    def as_expected(self) -> Cohort:
        """The same with a cohort's expected size: the real one would tell who took part."""
        return dataclasses.replace(self, size=jnp.float32(self.expected_size))


# --- What one client does -----------------------------------------------------------------------


class ClientWork(NamedTuple):
    """What one client does, as three pure functions.

    Attributes:
      init: (shared, client) -> carry, before the client's first batch.
      step: (shared, carry, batch, key) -> carry, for every batch; `batch.mask` marks the real examples.
      finish: (shared, carry, client) -> (total, each): `total` is summed over the cohort, `each` is
        kept per client. For `aggregate` it returns (Update, each).
    """

    init: Callable[[PyTree, Clients], PyTree]
    step: Callable[[PyTree, PyTree, Batch, jax.Array], PyTree]
    finish: Callable[[PyTree, PyTree, Clients], tuple[PyTree, PyTree]]


class Pass(NamedTuple):
    """How work goes through a client's examples.

    Attributes:
      batching: what batches they make. On the training split, `max_examples` is that of the training pass
        if it is None.
      split: 'train', or another split in which the same client id may have examples. A client without
        any does no work, and its rows of `each` are zeros.
    """

    batching: ClientBatching
    split: str = TRAIN


def full_pass(batch_size: int = 128, split: str = TRAIN) -> Pass:
    """Once over all of a client's examples, whatever the local epochs: for full gradients and losses."""
    return Pass(ClientBatching(batch_size, shuffle=False), split)


class ForEachClient(Protocol):
    """Runs `work` for every client of the cohort, wherever the strategy places them.

    Returns (total, each): the sum over the cohort, and (C, ...) arrays with one row per client slot
    (zeros in slots that are no clients). `shared` is what every client can read: parameters, the round,
    a learning rate. `pass_` names one of the algorithm's passes, or the trainer's own, 'train'.

    Attributes:
      calls: how many there have been in this round.
      traffic: bits that go to and fro in it: all of `shared`, and a client's `total`. Who knows better passes
        `counted=False`, and adds to it.
      releases: what the server has learned of the clients: the totals of its calls, one after another. An
        algorithm that has the server use a client's own numbers, as metrics, adds these.
    """

    calls: int
    traffic: Traffic
    releases: list[Release]

    def __call__(
        self,
        work: ClientWork,
        shared: PyTree,
        cohort: Cohort,
        pass_: str = TRAIN,
        counted: bool = True,
    ) -> tuple[PyTree, PyTree]: ...


# --- What hides a client -----------------------------------------------------------------------


class Mechanism(NamedTuple):
    """Gaussian noise that hides what one client adds.

    Attributes:
      noise_multiplier: its standard deviation over the norm of what one client sends.
      kind: 'independent', drawn afresh every round; 'tree' or 'toeplitz', correlated over rounds; or 'local',
        every client's own.
      coefficients: of a Toeplitz matrix C, if the noise is C^-1 times independent noise.
      num_rounds: how many it is good for; any number if None.
      cohort_size: clients that it pretends to hide one among; those of the sampler if None.
      open: whether `privacy.epsilon` decides on the multiplier.
    """

    noise_multiplier: float
    kind: str = "independent"
    coefficients: tuple[float, ...] = ()
    num_rounds: int | None = None
    cohort_size: float | None = None
    open: bool = False


class Noise(NamedTuple):
    """How an aggregator hides a client.

    Attributes:
      mechanism: cohort -> what it does.
      norm: what the link before it must bound updates by; None if it does so itself.
      on_sum: whether it is added to the sum of updates, and not to each of them.
    """

    mechanism: Callable[[Cohort], Mechanism]
    norm: Any = None
    on_sum: bool = True


class Release(NamedTuple):
    """Something that the server is told of the clients of a round.

    Attributes:
      what: in words.
      mechanism: what hides a client in it; None if nothing does.
    """

    what: str
    mechanism: Mechanism | None = None


# --- What becomes of a client's update ----------------------------------------------------------


class Code(NamedTuple):
    """How the numbers of an update are written for their way to the server, a float32 each at first.

    Attributes:
      width: bits of each number that is sent.
      scales: bits of what all of them are decoded with.
      indices: bits that say which of them are sent.
      sent: numbers that are; all if None.
      support: pytree of bool like the value, where these are; None if all are sent.
      final: whether the widths are of an entropy code, which nothing may change any more.
    """

    width: Any = 32.0
    scales: Any = 0.0
    indices: Any = 0.0
    sent: Any = None
    support: PyTree = None
    final: bool = False

    def bits(self, value: PyTree) -> jax.Array:
        """() float32, what a value takes that is written so."""
        sent = sum(leaf.size for leaf in jax.tree.leaves(value)) if self.sent is None else self.sent
        return jnp.float32(self.width * sent + self.scales + self.indices)


class Update(NamedTuple):
    """What a client sends.

    Attributes:
      value: a pytree, most often the change of the parameters.
      weight: () what the client counts for in a mean.
      code: how the value is written, for the count of bits; `Code()` if None. A link that compresses says.
      client: () int32, whose it is: the client's row in the data set. `aggregate` says.
    """

    value: PyTree
    weight: jax.Array
    code: Code | None = None
    client: jax.Array | None = None


class Sent(NamedTuple):
    """What the client half of an aggregator makes of an update.

    Attributes:
      update: for the next link of a chain; None from a link that reduces.
      total: a pytree, summed over the cohort where the clients run: memory for one of them.
      each: a pytree, kept for every client: memory for the whole cohort.
      state: the client's next state; None without `init_client`.
      metrics: name -> scalar of this client.
      bits: () float32 that the client sends, from a chain; of another one that reduces, those of its input.
    """

    update: Update | None = None
    total: PyTree = ()
    each: PyTree = ()
    state: PyTree = None
    metrics: Metrics = NOTHING
    bits: jax.Array | None = None


class Aggregated(NamedTuple):
    """What the server half of an aggregator returns.

    Attributes:
      update: the aggregate, shaped like one client's `Update.value`.
      state: the aggregator's next state.
      metrics: name -> scalar of the round.
    """

    update: PyTree
    state: PyTree = ()
    metrics: Metrics = NOTHING


@dataclasses.dataclass(frozen=True, repr=False)
class Aggregator:
    """What happens to client updates on their way to the server.

    Attributes:
      client: (state, update, client_state, key) -> Sent, on the client.
      server: (state, total, each, later, cohort, key) -> Aggregated. `total` and `each` are what became of
        this link's own; `later` is the aggregate of the links after it, None for one that reduces.
        `cohort.real` tells which rows of `each` are clients.
      init: value -> first state, kept in the server's state. `value` is shaped like `Update.value`.
      init_client: value -> a client's first state; None if it keeps none.
      told: state -> what of it clients read, for the count of bits.
      reduces: whether it makes one update of many, as the last link of a chain does.
      averages: whether it takes the mean of updates, by their weights.
      bound: the L2 norm that no client's update exceeds after this link; None if it promises none.
      noise: by which it hides what a client sends; then nothing may be sent past it. None if it does not.
    """

    client: Callable[[PyTree, Update, PyTree, jax.Array], Sent]
    server: Callable[[PyTree, PyTree, PyTree, PyTree, Cohort, jax.Array], Aggregated]
    init: Callable[[PyTree], PyTree] = lambda value: ()
    init_client: Callable[[PyTree], PyTree] | None = None
    told: Callable[[PyTree], PyTree] = lambda state: ()
    reduces: bool = False
    averages: bool = False
    bound: Any = None
    noise: Noise | None = None
    __repr__ = shown.fields


# --- What an algorithm is -----------------------------------------------------------------------


class RoundOutput(NamedTuple):
    """What a round leaves behind.

    Attributes:
      state: the next round's server state.
      metrics: name -> metric of the round, as 'train/loss'. In TensorBoard arrays that are no scalars become
        histograms.
      per_client: name -> (C,) metric of each client, reported as mean and percentiles.
      client_states: pytree of (C, ...), the cohort's next client states, or None.
    """

    state: PyTree
    metrics: Metrics = NOTHING
    per_client: Metrics = NOTHING
    client_states: PyTree = None


def with_frozen(state: PyTree, frozen: PyTree = None) -> PyTree:
    """A server state with another `frozen`, if it has such an attribute; see `Algorithm.init`."""
    return state._replace(frozen=frozen) if hasattr(state, "frozen") else state


class Personalisation(NamedTuple):
    """How a client comes by parameters of its own, to be measured with.

    Attributes:
      work: its `shared` is the server state, its `finish` returns ((), parameters).
      through: the pass that its steps go through; None for none.
    """

    work: ClientWork
    through: Pass | None = None


def unstepped(personal: Callable[[PyTree, Clients], PyTree]) -> Personalisation:
    """Personal parameters that take no training: personal(server state, client) -> parameters."""

    def step(shared: PyTree, carry: PyTree, batch: Batch, key: jax.Array) -> PyTree:
        return carry

    def finish(shared: PyTree, carry: PyTree, client: Clients) -> tuple[PyTree, PyTree]:
        return (), carry

    return Personalisation(ClientWork(personal, step, finish))


@dataclasses.dataclass(frozen=True, repr=False)
class Algorithm:
    """A federated algorithm.

    Attributes:
      init: (params, key) -> server state, a pytree with an attribute `params`, which is what is evaluated
        and, at the end, what has been trained. It may be a property: an average, or a whole made of parts.
        An attribute `frozen`, if a NamedTuple has one, is given to every round, and never donated nor
        changed.
      round: (state, cohort, for_each_client) -> RoundOutput.
      init_client: params -> one client's first state; None for algorithms without client state.
      passes: name -> the passes that `round` goes through besides 'train'.
      personalise: how a client comes by parameters of its own; None if there is but one model.
      report: (state, rounds done) -> name -> number, on the host, with every evaluation.
      check: raises UserError for a training split that does not fit, on the host, before anything else.
      evaluates: what `params` are, in a word or two, for tables.
      needs: inputs of clients that the sampler must give: name -> what a run without it is refused with.
      heeds_rate: whether clients' input 'rate' makes a difference, as it does wherever there is
        `local_training`.
    """

    init: Callable[[PyTree, jax.Array], PyTree]
    round: Callable[[PyTree, Cohort, ForEachClient], RoundOutput]
    init_client: Callable[[PyTree], PyTree] | None = None
    passes: Mapping[str, Pass] = dataclasses.field(default_factory=dict)
    personalise: Personalisation | None = None
    report: Callable[[PyTree, int], Mapping[str, float]] | None = None
    check: Callable[[FederatedDataset], None] = lambda train: None
    evaluates: str = "server's"
    needs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    heeds_rate: bool = True
    __repr__ = shown.fields
