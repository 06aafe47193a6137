"""Models of which only a part travels: trees of parameters, split by the paths of their leaves."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, NamedTuple

import jax
import optax

from fedexp.algorithms.aggregation import ClientState
from fedexp.algorithms.local import Shared, Trained, Training, WeighBy, local_training
from fedexp.contracts import Algorithm, Clients, ClientWork, Update, unstepped
from fedexp.errors import UserError
from fedexp.tasks import Task, reparametrised

PyTree = Any


class Parts(NamedTuple):
    """Trees like the whole one, each with None in the places of the others' leaves."""

    travelling: PyTree
    local: PyTree
    frozen: PyTree


def split(params: PyTree, local: str | None = None, frozen: str | None = None) -> Parts:
    """Parts a tree by regular expressions, searched for in each leaf's path, as 'Dense_1/kernel'.

    Raises:
      UserError: an expression that matches no leaf, a leaf that both match, or nothing left to travel.

    >>> split({"body": 1, "head": 2}, local="head")
    Parts(travelling={'body': 1, 'head': None}, local={'body': None, 'head': 2}, \
frozen={'body': None, 'head': None})
    """
    paths, structure = jax.tree_util.tree_flatten_with_path(params)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
    kinds = [
        tuple(pattern is not None and bool(re.search(pattern, name)) for pattern in (local, frozen))
        for name in names
    ]
    known = f"; the parameters are {', '.join(names)}"
    for number, pattern in enumerate((local, frozen)):
        if pattern is not None and not any(kind[number] for kind in kinds):
            raise UserError(f"the pattern {pattern!r} matches none of the parameters{known}")
    if (True, True) in kinds:
        raise UserError(f"{local!r} and {frozen!r} match the same parameters{known}")
    if (False, False) not in kinds:
        raise UserError(
            f"{local!r} and {frozen!r} match all parameters: none is left to travel{known}"
        )
    return Parts(
        *(
            structure.unflatten(
                leaf if kind == wanted else None
                for kind, (_, leaf) in zip(kinds, paths, strict=True)
            )
            for wanted in ((False, False), (True, False), (False, True))
        )
    )


def merge(*parts: PyTree) -> PyTree:
    """Puts together what `split` has parted.

    >>> merge({"body": None, "head": 2}, {"body": 1, "head": None})
    {'body': 1, 'head': 2}
    """
    return jax.tree.map(
        lambda *leaves: next((leaf for leaf in leaves if leaf is not None), None),
        *parts,
        is_leaf=_is_none,
    )


def partial_training(
    task: Task, optimizer: optax.GradientTransformation, weigh_by: WeighBy, local: str | None
) -> ClientWork:
    """`local_training` of all but what is frozen, of which only what travels is sent.

    Args:
      task: and so on: see `local_training`.
      optimizer: of local and travelling parameters together.
      weigh_by: what a client counts for.
      local: pattern of what the client keeps, its `ClientState.own`; see `split`.

    Returns:
      Work for `partial`, whose `shared.extra` are the frozen parameters.
    """

    def start(shared: Shared, client: Clients) -> PyTree:
        return merge(shared.params, client.state.own) if local else shared.params

    def within(shared: Shared) -> Task:
        return reparametrised(task, lambda params: merge(params, shared.extra))

    training = local_training(task, optimizer, weigh_by, start=start, within=within)

    def finish(shared: Shared, carry: Training, client: Clients) -> tuple[Update, Trained]:
        travelling, own, _ = split(carry.params, local)
        update, kept = training.finish(shared, carry._replace(params=travelling), client)
        return update, kept._replace(own=own if local else None)

    return training._replace(finish=finish)


class PartialState(NamedTuple):
    """The server state of what travels, the first values of what stays local, and what is frozen."""

    travelling: Any
    local: PyTree
    frozen: PyTree

    @property
    def params(self) -> PyTree:
        """The whole model, of which evaluations that are not personalised make use."""
        return merge(self.travelling.params, self.local, self.frozen)


def partial(algorithm: Algorithm, local: str | None, frozen: str | None) -> Algorithm:
    """What `averaging` makes of `partial_training`, as an algorithm of whole models.

    A personalised evaluation measures each client with its own local parameters. See `split` for the
    patterns.

    Raises:
      UserError: from `init`, as `split`.
    """
    run: Any = algorithm.round
    first: Any = algorithm.init_client or (lambda travelling: ClientState(None, None))

    def init(params, key):
        parts = split(params, local, frozen)
        return PartialState(algorithm.init(parts.travelling, key), parts.local, parts.frozen)

    def round_(state, cohort, for_each_client):
        output = run(state.travelling, cohort, for_each_client, state.frozen)
        return output._replace(state=state._replace(travelling=output.state))

    def init_client(params):
        parts = split(params, local, frozen)
        state = first(parts.travelling)
        return state._replace(own=parts.local) if local else state

    def personal(state, client):
        return merge(state.travelling.params, client.state.own, state.frozen)

    return dataclasses.replace(
        algorithm,
        init=init,
        round=round_,
        init_client=init_client if local or algorithm.init_client else None,
        personalise=unstepped(personal) if local else None,
    )


def _is_none(leaf: Any) -> bool:
    return leaf is None
