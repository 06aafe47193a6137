"""Trials that differ in numbers only, in one program: an algorithm that is many."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from fedexp.contracts import (
    Algorithm,
    Cohort,
    ForEachClient,
    Personalisation,
    RoundOutput,
    unstepped,
)
from fedexp.tasks import Task
from fedexp.traffic import Traffic

PyTree = Any


class TrialStates(NamedTuple):
    """The server states of K trials, with a leading axis (K, ...)."""

    states: Any

    @property
    def params(self) -> PyTree:
        """Every trial's parameters, (K, ...)."""
        return self.states.params


def trials(
    make: Callable[[Any], Algorithm], values: PyTree, vmap: Callable[..., Any] = jax.vmap
) -> Algorithm:
    """Trains K trials on the same cohorts, batches and random choices, vmapped in one dispatch a round.

    Each has the numbers that it has alone, to float re-association; its metrics are called
    '<name>/<trial>'. To measure one, bind an evaluation to it: `Evaluate(prefix="trial3",
    personalise=trial(3))`. A round holds K times the memory of one.

    Args:
      make: values of one trial -> its algorithm. Hyperparameters are tracers in it, so that nothing static,
        as sizes, can depend on them.
      values: pytree of (K,) arrays.
      vmap: (function, in_axes, out_axes) -> the function over trials; `Placement.over_trials` splits them
        over devices.
    """
    count = len(jax.tree.leaves(values)[0])
    first = make(jax.tree.map(lambda leaf: leaf[0].item(), values))

    def init(params: PyTree, key: jax.Array) -> TrialStates:
        return TrialStates(jax.vmap(lambda trial: make(trial).init(params, key))(values))

    def round_(state: TrialStates, cohort: Cohort, for_each_client: ForEachClient) -> RoundOutput:
        def one(trial: Any, state: Any, client_states: PyTree) -> tuple[Any, ...]:
            clients = dataclasses.replace(cohort.clients, state=client_states)
            own = dataclasses.replace(cohort, clients=clients)
            calls = copy.copy(for_each_client)
            calls.traffic = Traffic(cohort.size)
            output = make(trial).round(state, own, calls)
            return tuple(output._replace(metrics={**calls.traffic.metrics(), **output.metrics}))

        of_each = vmap(one, (0, 0, 1), (0, 0, 0, 1))
        states, metrics, per_client, client_states = of_each(
            values, state.states, cohort.clients.state
        )
        found = (_by_trial(metrics), _by_trial(per_client))
        return RoundOutput(TrialStates(states), *found, client_states)

    def _by_trial(metrics: Any) -> dict[str, Any]:
        return {
            f"{name}/{number}": jax.tree.map(lambda leaf, number=number: leaf[number], value)
            for name, value in metrics.items()
            for number in range(count)
        }

    def init_client(params: PyTree) -> PyTree:
        return jax.vmap(lambda trial: make(trial).init_client(params))(values)  # type: ignore

    own = init_client if first.init_client else None
    return Algorithm(
        init,
        round_,
        own,
        first.passes,
        check=first.check,
        needs=first.needs,
        heeds_rate=first.heeds_rate,
    )


def trial(number: int) -> Callable[[Task], Personalisation]:
    """For `Evaluate.personalise`: measures one of the `trials`, with its server's parameters."""

    def parameters(state: TrialStates, client: Any) -> PyTree:
        return jax.tree.map(lambda leaf: leaf[number], state.params)

    return lambda task: unstepped(parameters)
