"""What a run calls, from the references that its bindings hold."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import gin
from gin import config as gin_config

from fedexp.bindings.signatures import parameters_of
from fedexp.bindings.statements import Statement, in_force, references_in

# What every run calls, whatever is bound.
ROOTS = ("fedexp.trainer.train", "fedexp.config.workdir", "fedexp.runtime.runtime")
# What `train` calls where it is given no other.
DEFAULTS = (
    "fedexp.checkpointing.CheckpointPlan",
    "fedexp.data.batching.ClientBatching",
    "fedexp.data.samplers.uniform",
    "fedexp.engine.strategies.auto",
    "fedexp.engine.strategy.Packing",
    "fedexp.evaluation.evaluate",
    "fedexp.reporting.progress",
    "fedexp.reporting.tensorboard",
)


class Call(NamedTuple):
    """A configurable that a run calls, in a scope, with or without arguments of its own."""

    scope: tuple[str, ...]
    selector: str
    evaluated: bool


class Reach:
    """What a run may call, from the references that its bindings hold.

    Args:
      statements: the bindings.
      shadows: whether a binding hides one of the same parameter in a wider scope.
      more: what is called besides `ROOTS`.
    """

    def __init__(
        self,
        statements: Iterable[Statement],
        shadows: Callable[[Statement, Statement], bool] = lambda narrow, wide: True,
        more: Sequence[str] = (),
    ):
        self._shadows = shadows
        self._bound: dict[str, list[Statement]] = {}
        for statement in statements:
            self._bound.setdefault(statement.key[1], []).append(statement)
        self.calls: set[Call] = set()
        found = [Call((), selector, True) for selector in (*ROOTS, *more)]
        while found:
            call = found.pop()
            if call in self.calls:
                continue
            self.calls.add(call)
            for statement in self._bound.get(call.selector, ()):
                if self._reads(call, statement):
                    for reference in references_in(statement.value):
                        scope = tuple(reference.scopes) or call.scope
                        selector = reference.configurable.selector
                        found.append(Call(scope, selector, reference.evaluate))

    def reads(self, statement: Statement) -> bool:
        """Whether any call takes this binding."""
        return any(self._reads(call, statement) for call in self.calls)

    def bound(self, call: Call) -> set[str]:
        """The parameters that a call finds bound."""
        statements = self._bound.get(call.selector, ())
        return {s.key[2] for s in statements if _is_within(call.scope, s.key[0])}

    def hiding(self, statement: Statement) -> list[Statement]:
        """The bindings that calls take instead of this one."""
        calls = [call for call in self.calls if call.selector == statement.key[1]]
        return list({s.key: s for c in calls for s in self._narrower(c, statement)}.values())

    def _reads(self, call: Call, statement: Statement) -> bool:
        scope, selector, _ = statement.key
        return (
            selector == call.selector
            and _is_within(call.scope, scope)
            and not any(self._shadows(s, statement) for s in self._narrower(call, statement))
        )

    def _narrower(self, call: Call, statement: Statement) -> Iterator[Statement]:
        scope, selector, parameter = statement.key
        for other in self._bound.get(selector, ()):
            is_narrower = other.key[2] == parameter and len(other.key[0]) > len(scope)
            if is_narrower and _is_within(call.scope, other.key[0]):
                yield other


def _is_within(scope: Sequence[str], binding: str) -> bool:
    """Whether a call in a scope sees bindings of another: those of its own beginnings."""
    parts = tuple(binding.split("/")) if binding else ()
    return tuple(scope[: len(parts)]) == parts


def missing(call: Call, bound: set[str]) -> list[inspect.Parameter]:
    """The parameters that a call needs; where it gives arguments of its own, of those that say so."""
    return [
        p
        for p in parameters_of(call.selector).values()
        if p.name not in bound
        and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        and (p.default is gin.REQUIRED or (call.evaluated and p.default is p.empty))
    ]


def what_was_called() -> Reach:
    """What has been called by now, by whatever code."""
    reach = Reach(in_force().values())
    for scope, selector in gin_config._OPERATIVE_CONFIG:
        reach.calls.add(Call(tuple(scope.split("/")) if scope else (), selector, True))
    return reach
