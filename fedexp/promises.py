"""Holds algorithms, client work and aggregators to their contracts.

All of this happens while a round is traced: a program that is compiled knows nothing of it.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fedexp.contracts import (
    Aggregated,
    Aggregator,
    ClientWork,
    Code,
    Cohort,
    PyTree,
    RoundOutput,
    Sent,
    Update,
    with_frozen,
)
from fedexp.errors import UserError

Round = Callable[[PyTree, Cohort, Any], RoundOutput]


@contextlib.contextmanager
def calling(what: str, function: Callable[..., Any]) -> Iterator[None]:
    """Notes on a user's bug where fedexp called it; its traceback stays."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, UserError):
            error.add_note(f"fedexp was calling {what}, which is {name_of(function)}")
        raise


def name_of(function: Callable[..., Any]) -> str:
    """A function as a message names it, with its place where there is one."""
    function = inspect.unwrap(function)
    name = getattr(function, "__qualname__", repr(function))
    code = getattr(function, "__code__", None)
    return f"{name} ({code.co_filename}:{code.co_firstlineno})" if code else name


def check_like(
    found: PyTree, expected: PyTree, who: str, dtypes: bool = True, way_out: str = ""
) -> None:
    """Refuses a pytree of another structure, other shapes or other dtypes than expected.

    Args:
      found: what there is.
      expected: what it must be like.
      who: what must be like what, as the beginning of a sentence.
      dtypes: whether they must be the same, too.
      way_out: the sentence's end.
    """
    wanted, got = _leaves(expected), _leaves(found)
    for path in [*wanted, *(path for path in got if path not in wanted)]:
        pair = [_kind(leaves[path]) if path in leaves else "nothing" for leaves in (wanted, got)]
        if pair[0] != pair[1] and (dtypes or _shape(wanted.get(path)) != _shape(got.get(path))):
            at = f"{path} " if path else ""
            raise UserError(f"{who}: {at}must be {pair[0]}, got {pair[1]}{way_out}")
    structures = [jax.tree.structure(tree) for tree in (expected, found)]
    if structures[0] != structures[1]:
        raise UserError(f"{who}: must be {structures[0]}, got {structures[1]}{way_out}")


def kept_work(work: ClientWork) -> ClientWork:
    """Client work that keeps its contract, or says what does not."""

    def init(shared: PyTree, client: Any) -> PyTree:
        with calling("ClientWork.init", work.init):
            return work.init(shared, client)

    def step(shared: PyTree, carry: PyTree, batch: Any, key: jax.Array) -> PyTree:
        with calling("ClientWork.step", work.step):
            after = work.step(shared, carry, batch, key)
        who = f"ClientWork.step, {name_of(work.step)}, must return a carry like the one it is given"
        check_like(after, carry, who, way_out=_of_init(work))
        return after

    def finish(shared: PyTree, carry: PyTree, client: Any) -> tuple[PyTree, PyTree]:
        with calling("ClientWork.finish", work.finish):
            result = work.finish(shared, carry, client)
        if not isinstance(result, tuple) or isinstance(result, Update) or len(result) != 2:
            raise _wrong("ClientWork.finish", work.finish, "(total, each)", result)
        return result

    return ClientWork(init, step, finish)


def kept_round(round_: Round) -> Round:
    """An algorithm's round that keeps its contract, or says what does not."""

    def kept(state: PyTree, cohort: Cohort, for_each_client: Any) -> RoundOutput:
        with calling("Algorithm.round", round_):
            output = round_(state, cohort, for_each_client)
        if not isinstance(output, RoundOutput):
            raise _wrong("Algorithm.round", round_, "a RoundOutput", output)
        who = f"Algorithm.round, {name_of(round_)}, must return"
        before, after = with_frozen(state), with_frozen(output.state)
        check_like(after, before, f"{who} a state like the one it is given")
        for field in ("metrics", "per_client"):
            if not isinstance(getattr(output, field), Mapping):
                raise _wrong("Algorithm.round", round_, f"{field} by name", getattr(output, field))
        slots = len(cohort.real)
        for path, leaf in _leaves(dict(output.per_client)).items():
            if jnp.shape(leaf)[:1] != (slots,):
                raise UserError(
                    f"{who} per_client metrics of all {slots} client slots: {path} must be "
                    f"[{slots},...], got {_kind(leaf)}"
                )
        _check_client_states(output.client_states, cohort.clients.state, who)
        return output._replace(metrics={**for_each_client.traffic.metrics(), **output.metrics})

    return kept


def kept_client(
    link: Aggregator, state: PyTree, update: Update, own: PyTree, key: jax.Array
) -> Sent:
    """What an aggregator's client half makes of an update, if it keeps its contract."""
    if not isinstance(update, Update):
        raise UserError(f"an aggregator is given an Update, got {_described(update)}")
    with calling("Aggregator.client", link.client):
        sent = link.client(state, update, own, key)
    if not isinstance(sent, Sent):
        raise _wrong("Aggregator.client", link.client, "a Sent", sent)
    if not link.reduces and not isinstance(sent.update, Update):
        raise _wrong("Aggregator.client", link.client, "a Sent with an Update", sent.update)
    if link.init_client is not None:
        who = f"Aggregator.client, {name_of(link.client)}, must return the client's next state"
        check_like(sent.state, own, who)
    if link.reduces and sent.bits is None:
        sent = sent._replace(bits=(update.code or Code()).bits(update.value))
    return sent


def kept_server(link: Aggregator, state: PyTree, *rest: Any) -> Aggregated:
    """What an aggregator's server half returns, if it keeps its contract."""
    with calling("Aggregator.server", link.server):
        result = link.server(state, *rest)
    if not isinstance(result, Aggregated):
        raise _wrong("Aggregator.server", link.server, "an Aggregated", result)
    check_like(
        result.state,
        state,
        f"Aggregator.server, {name_of(link.server)}, must return a state like the one it is given",
    )
    return result


def kept_update(finish: Callable[..., Any], result: Any) -> tuple[Update, PyTree]:
    """What a client's `finish` returned for an aggregator, if it keeps its contract."""
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], Update)):
        raise _wrong("ClientWork.finish", finish, "(Update, each) for `aggregate`", result)
    return result


def _check_client_states(found: PyTree, given: PyTree, who: str) -> None:
    if given is None and found is not None:
        raise UserError(f"{who} no client_states: the algorithm has no init_client to begin with")
    if given is not None and found is None:
        raise UserError(
            f"{who} client_states, since the algorithm has an init_client, got None; where they do not "
            "change, return cohort.clients.state"
        )
    check_like(found, given, f"{who} client_states like those it is given")


def _wrong(role: str, function: Callable[..., Any], expected: str, found: Any) -> UserError:
    return UserError(
        f"{role}, {name_of(function)}, must return {expected}, got {_described(found)}"
    )


def _of_init(work: ClientWork) -> str:
    return f"; the first one is made by {name_of(work.init)}"


def _described(value: Any) -> str:
    if value is None:
        return "None"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return _kind(value)
    length = f" of {len(value)}" if isinstance(value, tuple | list | dict) else ""
    return f"a {type(value).__name__}{length}"


def _leaves(tree: PyTree) -> dict[str, Any]:
    """Leaves by path; None is one, because it is what is forgotten."""
    found, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: node is None)
    return {jax.tree_util.keystr(path): leaf for path, leaf in found}


def _shape(leaf: Any) -> tuple[int, ...] | None:
    return None if leaf is None else jnp.shape(leaf)


def _kind(leaf: Any) -> str:
    if leaf is None:
        return "None"
    try:
        dtype = jnp.result_type(leaf)
    except TypeError:
        return f"a {type(leaf).__name__}"
    return f"{dtype}[{','.join(map(str, jnp.shape(leaf)))}]"
