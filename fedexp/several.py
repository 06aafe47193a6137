"""Several rounds in one dispatch, for rounds that are as short as a dispatch is long."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedexp.compiling import jit
from fedexp.engine import Engine, PreparedRound
from fedexp.errors import UserError
from fedexp.session import Round, Session, Setup
from fedexp.tasks import Measure

PyTree = Any


def several(setup: Setup, per_dispatch: int, after: Round | None = None) -> Generator[Round]:
    """`Experiment.rounds`, of which one program runs `per_dispatch` after one another.

    The parameters are those of `rounds` to float re-association. What lies inside a dispatch cannot be seen
    or changed: its last round is handed over, with the metrics of all as arrays (rounds, ...).

    Args:
      setup: an experiment on a single device whose data stay there.
      per_dispatch: rounds; the last dispatch may have fewer.
      after: a round of the same experiment, to go on from; the start if None.

    Raises:
      UserError: fewer than one round a dispatch, several devices, or data that do not stay on the device.
    """
    if per_dispatch < 1:
        raise UserError(f"a dispatch has at least one round, got per_dispatch={per_dispatch}")
    session = after.session if after and after.session.setup is setup else Session(setup)
    states, program = session.engine.client_states, jit(_program(session.engine))
    round_, under_way = after or session.first, ()
    ahead = session.prepared(range(round_.number, setup.num_rounds))
    for group in _alike(ahead, per_dispatch):
        rounds, waited = [one for one, _ in group], sum(waited for _, waited in group)
        _check(session, rounds)
        clients = np.unique(np.concatenate([one.clients for one in rounds]))
        table, places = None, np.arange(len(clients))
        if states is not None:
            table = states.gather(clients, places, (len(clients) + 1,))
        jax.block_until_ready(under_way)
        arguments = (*_arguments(rounds, clients), session.engine.runner.rates)
        state, table, *measured = program(round_.state, table, *arguments)
        under_way = measured
        if states is not None:
            states.scatter(clients, places, table)
        if hasattr(state, "frozen"):
            state = state._replace(frozen=round_.state.frozen)
        last = rounds[-1]
        round_ = Round(session, last.round + 1, state, last, (*measured, None), waited)
        yield round_


def _alike(
    prepared: Iterator[tuple[PreparedRound, float]], most: int
) -> Iterator[list[tuple[PreparedRound, float]]]:
    """Rounds one after another that one program can run."""
    group: list[tuple[PreparedRound, float]] = []
    for one in prepared:
        if group and one[0].by_device.layout != group[0][0].by_device.layout:
            yield group
            group = []
        group.append(one)
        if len(group) == most:
            yield group
            group = []
    if group:
        yield group


def _check(session: Session, rounds: Sequence[PreparedRound]) -> None:
    resident = all(
        one.examples[name] is rounds[0].examples[name] for one in rounds for name in one.examples
    )
    if session.engine.placement.num_devices > 1 or not resident:
        raise UserError(
            "several rounds in one dispatch need a single device that holds all data; bind train.strategy = "
            "@jit() and Packing.max_resident_bytes, or take Experiment.rounds"
        )


def _arguments(rounds: Sequence[PreparedRound], clients: np.ndarray) -> tuple[PyTree, ...]:
    """Of all rounds (R, ...): what devices get, and each slot's row among `clients`."""
    by_device = jax.tree.map(lambda *flat: np.stack(flat), *(one.by_device for one in rounds))
    rows = np.full((len(rounds), rounds[0].num_slots), len(clients), np.int32)  # First states.
    for row, one in zip(rows, rounds, strict=True):
        row[one.slots] = np.searchsorted(clients, one.clients)
    return rounds[0].examples, by_device, rows


def _program(engine: Engine) -> Callable[..., tuple[PyTree, ...]]:
    root = jax.random.key_data(engine.root)

    def program(state, table, examples, by_device, rows, rates):
        frozen = getattr(state, "frozen", None)

        def one(carry, inputs):
            state, table = carry
            by_device, rows = inputs
            states = jax.tree.map(lambda leaf: leaf[rows][None], table)
            output, _ = engine.runner.body(
                state, frozen, root, by_device, examples, states, None, rates
            )
            if output.client_states is not None:
                table = jax.tree.map(partial(_written, rows), table, output.client_states)
            return (output.state, table), (_means(output.metrics), dict(output.per_client))

        if frozen is not None:
            state = state._replace(frozen=None)
        (state, table), (metrics, per_client) = jax.lax.scan(one, (state, table), (by_device, rows))
        return state, table, metrics, jax.tree.map(lambda leaf: leaf[-1], per_client)

    return program


def _written(rows: jax.Array, table: jax.Array, new: jax.Array) -> jax.Array:
    """The table with new rows; the last one, which empty slots read, stays a first state."""
    return table.at[jnp.where(rows < len(table) - 1, rows, len(table))].set(new, mode="drop")


def _means(metrics: Mapping[str, Any]) -> dict[str, Any]:
    def mean(value: Any) -> Any:
        if not isinstance(value, Measure):
            return value
        return value.values / jnp.where(value.weights > 0, value.weights, jnp.nan)

    return {name: mean(value) for name, value in metrics.items()}
