"""Experiments that differ in the seed: a round of all of them in one dispatch."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedexp.compiling import jit, run_once
from fedexp.engine import PreparedRound
from fedexp.errors import UserError
from fedexp.session import Round, Session

PyTree = Any


class OfSeed(NamedTuple):
    """What a round of all seeds is to one of them.

    Attributes:
      of_all: the round; its state has a leading axis of seeds, and so has what it measured.
      prepared: what this seed was given.
      waited: seconds that the host waited for it.
      state: this seed's place in the state; empty where there is no such axis.
      measured: likewise, in what was measured.
    """

    of_all: Round
    prepared: PreparedRound | None
    waited: float
    state: tuple[int, ...] = ()
    measured: tuple[int, ...] = ()


class Seeds:
    """Vmaps rounds over seeds, each with cohorts, batches and random choices of its own.

    A single one's rounds are those of its session.

    Args:
      sessions: of one experiment but for the seed, sharing their data.

    Raises:
      UserError: there are several, and clients have states or the data do not stay on the devices.
    """

    def __init__(self, sessions: Sequence[Session]):
        self._sessions = sessions
        self._is_one = len(sessions) == 1
        if not self._is_one:
            check_seeds(sessions[0])
            self._program = self._vmapped()

    def _vmapped(self) -> Callable[..., Any]:
        sessions, first = self._sessions, self._sessions[0].engine
        for session in sessions:
            session.engine.runner = first.runner  # Which counts what is compiled.
        roots = [jax.random.key_data(session.engine.root) for session in sessions]
        self._roots = first.placement.replicate(np.stack(roots))
        body, placement = first.runner.body, first.placement

        def program(states, roots, by_device, examples):
            def one(state, root, by_device):
                output, _ = body(state, None, root, by_device, examples, None, None)
                return output.state, dict(output.metrics), dict(output.per_client)

            by_device = jax.tree.map(lambda *rows: jnp.stack(rows), *by_device)
            return placement.keep_replicated(jax.vmap(one)(states, roots, by_device))

        return jit(program, donate_argnums=0)

    def first_state(self) -> PyTree:
        """The first server states, (seeds, ...); without that axis, if it is one."""
        if self._is_one:
            return self._sessions[0].first.state
        states = [session.first.state for session in self._sessions]
        stacked = run_once(lambda *s: jax.tree.map(lambda *leaves: jnp.stack(leaves), *s), *states)
        return self._sessions[0].engine.placement.replicate(stacked)

    def start(self, done: int, state: PyTree) -> list[OfSeed]:
        """What rounds go on from, for each seed."""
        of_all = Round(self._sessions[0], done, state)
        if self._is_one:
            return [OfSeed(of_all, None, 0.0)]
        return [OfSeed(of_all, None, 0.0, (place,)) for place in range(len(self._sessions))]

    def rounds(self, done: int, state: PyTree) -> Generator[list[OfSeed]]:
        """Yields the rounds after `done`, each for every seed, as soon as they are on their way."""
        if self._is_one:
            for round_ in self._sessions[0].rounds(Round(self._sessions[0], done, state)):
                yield [OfSeed(round_, round_.prepared, round_.waited)]
            return
        numbers = range(done, self._sessions[0].setup.num_rounds)
        ahead = zip(*(session.prepared(numbers) for session in self._sessions), strict=True)
        under_way: Any = ()
        for of_seeds in ahead:
            prepared = [one for one, _ in of_seeds]
            jax.block_until_ready(under_way)
            state, parts = self._run(state, prepared)
            under_way = [measured for _, measured in parts]
            found: list[Any] = [None] * len(prepared)
            for places, measured in parts:
                of_all = Round(
                    self._sessions[0], prepared[0].round + 1, state, None, (*measured, None)
                )
                for row, place in enumerate(places):
                    one, waited = of_seeds[place]
                    found[place] = OfSeed(of_all, one, waited, (place,), (row,))
            yield found

    def _run(self, state: PyTree, prepared: Sequence[PreparedRound]) -> tuple[PyTree, list[Any]]:
        """Runs a round: the new states, and what was measured for which seeds.

        Seeds whose cohorts need other shapes, which is rare, are dispatched apart.
        """
        groups: dict[Any, list[int]] = {}
        for place, one in enumerate(prepared):
            groups.setdefault(one.by_device.layout, []).append(place)
        states, parts = [], []
        for places in groups.values():
            of_group = state
            if len(groups) > 1:
                of_group = jax.tree.map(lambda leaf, places=places: leaf[np.array(places)], state)
            group = [prepared[place] for place in places]
            new, *measured = self._sessions[0].engine.runner.call(
                self._program,
                of_group,
                self._roots if len(groups) == 1 else self._roots[np.array(places)],
                [one.by_device for one in group],
                group[0].examples,
            )
            states.append(new)
            parts.append((places, measured))
        if len(groups) == 1:
            return states[0], parts
        order = np.argsort(np.concatenate([places for places, _ in parts]))
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[order], *states), parts


def check_seeds(session: Session) -> None:
    """Refuses an experiment whose seeds cannot be in one program.

    Raises:
      UserError: clients have states, or the data do not stay on the devices.
    """
    if session.engine.client_states is not None:
        raise UserError(
            "seeds in one program cannot keep states of clients; give each seed a program of its own"
        )
    if not session.engine.preparer.is_resident:
        raise UserError(
            "seeds in one program need data that stay on the devices; raise Packing.max_resident_bytes, or "
            "give each seed a program of its own"
        )
