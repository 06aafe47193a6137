"""The mistakes that bindings can have: what nothing reads, what is missing, what does not fit."""

from __future__ import annotations

import ast
import collections.abc
import contextlib
import dataclasses
import difflib
import inspect
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from gin import config as gin_config

from fedexp.bindings.fitting import alternatives, describe, fits
from fedexp.bindings.reach import DEFAULTS, ROOTS, Call, Reach, missing, what_was_called
from fedexp.bindings.signatures import annotations_of, given_by, hint_of, parameters_of
from fedexp.bindings.statements import (
    MACRO,
    Reference,
    Statement,
    in_force,
    name_of,
    near,
    references_in,
    statements,
    text_of,
)
from fedexp.errors import UserError

# Configurables that nobody's code calls, and those that nobody's but fedexp's does.
_BY_REFERENCE = ("gin.", "optax.", "optimizers.")
_OURS = (*_BY_REFERENCE, "fedexp.")


def is_experiment() -> bool:
    """Whether the bindings are one whole experiment, of which Python has supplied no part."""
    taken = gin_config._OPERATIVE_CONFIG.get(("", ROOTS[0]), {})
    return {"dataset", "task", "algorithm"} <= taken.keys()


def check_read(built: bool) -> None:
    """Refuses bindings that nothing reads.

    A binding of a file passes if what read it was replaced, as in a file that includes another one and binds
    another algorithm. One of the command line has to have an effect.

    Args:
      built: whether all is built that reads bindings; what is certain is refused before that, too.

    Raises:
      UserError: a binding without effect, with its line and the nearest name that has one.
    """
    now = what_was_called()
    theirs = any(not call.selector.startswith(_OURS) for call in now.calls)
    for statement in _unread(now):
        selector = statement.key[1]
        if built:  # Code of others may call it as late as when the first round is traced.
            may_be_called = statement.file is not None and not selector.startswith(_OURS)
        elif selector.startswith(_BY_REFERENCE):
            may_be_called = False
        else:  # A session calls for its default strategy.
            may_be_called = theirs or selector.startswith("fedexp.engine.")
        if may_be_called:
            continue
        raise UserError(f"gin: {statement} has no effect: {_why_unread(statement, now)}")


def had_no_effect() -> list[str]:
    """What is known at a run's end only: bindings of what a user's code might have called, and did not."""
    now = what_was_called()
    return [
        f"{statement} had no effect: {_why_unread(statement, now)}" for statement in _unread(now)
    ]


def _unread(now: Reach) -> list[Statement]:
    history = Reach(statements, _before, more=DEFAULTS)
    return [
        statement
        for statement in in_force().values()
        if not now.reads(statement) and not (statement.file and history.reads(statement))
    ]


def _before(narrow: Statement, wide: Statement) -> bool:
    """Whether a wide binding was in vain from the start, not only replaced by a later file's."""
    return narrow.file == wide.file or statements.index(narrow) < statements.index(wide)


def _why_unread(statement: Statement, now: Reach) -> str:
    scope, selector, _ = statement.key
    if hiding := now.hiding(statement):
        names = sorted(name_of(*other.key) for other in hiding)
        return f"{' and '.join(names)} {'wins' if len(names) == 1 else 'win'} by a narrower scope."
    known = {name_of(*s.key): "" for s in in_force().values() if now.reads(s)}
    if selector != MACRO:
        return f"this experiment never uses it.{near(name_of(*statement.key), known)}"
    macros = [name for name in known if "." not in name]
    if found := near(scope, macros):
        return f"nothing reads %{scope}.{found}"
    owners = {
        name: f"{gin_config._REGISTRY.minimal_selector(call.selector)}.{name}"
        for call in sorted(now.calls)
        if call.selector != MACRO
        for name in parameters_of(call.selector)
    }
    matches = difflib.get_close_matches(scope, owners, n=1, cutoff=0.5)
    meant = f" Did you mean {owners[matches[0]]!r}?" if matches else ""
    return f"nothing reads %{scope}.{meant}"


def check_required() -> None:
    """Refuses a config in which something that must be bound is not.

    Raises:
      UserError: names the first of them, and what fits it.
    """
    reach = Reach(in_force().values())
    for call in sorted(reach.calls):
        if call.selector.startswith("gin.") or call.selector in ROOTS[1:]:
            continue
        for parameter in missing(call, reach.bound(call)):
            _refuse_missing(call, parameter, reach)


def _refuse_missing(call: Call, parameter: inspect.Parameter, reach: Reach) -> None:
    name = name_of("/".join(call.scope), call.selector, parameter.name)
    hint = annotations_of(gin_config._REGISTRY[call.selector].wrapped).get(parameter.name, Any)
    for statement in in_force().values():
        for reference in references_in(statement.value) if reach.reads(statement) else ():
            given = (reference.configurable.selector, reference.evaluate)
            if given == (call.selector, True) and statement.value is reference:
                bare = gin_config.ConfigurableReference(reference.scoped_selector, False)
                if fits(bare, hint_of(statement.key)):
                    raise UserError(f"gin: {statement} needs {parameter.name}; write {bare}")
    raise UserError(
        f"gin: {name} is not bound; it must be {describe(hint)}{_examples(hint, call.scope)}"
    )


def check_types() -> None:
    """Checks all bindings against the annotations of what they are bound to.

    What has no annotation passes. A reference with parentheses counts as what its configurable is annotated
    to return; where that is not known, and for configurables of others, Gin is made to look at the value.

    Raises:
      UserError: names the binding, what is expected, and the way out.
    """
    for statement in in_force().values():
        hint = hint_of(statement.key)
        if hint is not Any:
            if not fits(statement.value, hint):
                raise _misfit(statement, hint)
            _check_size(statement)
            _watch(statement, hint)


def check_fields(built: Any, but: str = "") -> None:
    """Checks what the arguments of a dataclass have turned out to be.

    Args:
      built: an object of a dataclass that Gin configures.
      but: the field that is not looked at.

    Raises:
      UserError: one is something else than its annotation says.
    """
    configurable = gin_config._INVERSE_REGISTRY[type(built)]
    for field in dataclasses.fields(built):
        if field.name != but:
            name = name_of("", configurable.selector, field.name)
            _check_value(
                name, getattr(built, field.name), hint_of(("", configurable.selector, field.name))
            )


def _check_value(name: str, value: Any, hint: Any) -> None:
    if not fits(value, hint):
        got = "None" if value is None else f"an object of {type(value).__name__}"
        raise UserError(f"gin: {name} gives {got}, and must give {describe(hint)}")


def _watch(statement: Statement, hint: Any) -> None:
    """Has Gin check what a reference gives, where its annotation does not tell."""
    reference = statement.value
    if not isinstance(reference, Reference) or not reference.evaluate:
        return
    if reference.configurable.selector.startswith(_OURS):
        return
    make = reference.scoped_configurable_fn

    def checked() -> Any:
        value = make()
        _check_value(str(statement), value, hint)
        return value

    reference._scoped_configurable_fn = checked


def _check_size(statement: Statement) -> None:
    """Refuses numbers that NumPy and JAX cannot hold."""
    for value in gin_config._iterate_flattened_values(statement.value):
        if isinstance(value, int) and abs(value) >= 2**63:
            raise UserError(f"gin: {statement} does not fit into 64 bits")
    if statement.key[2] == "seed" and isinstance(statement.value, int) and statement.value < 0:
        raise UserError(f"gin: {statement} must not be negative")


def _misfit(statement: Statement, hint: Any) -> UserError:
    return UserError(f"gin: {statement} must be {describe(hint)}{_way_out(statement.value, hint)}")


def _way_out(value: Any, hint: Any) -> str:
    """What is likely to be meant, or else what fits."""
    if isinstance(value, Reference) and value.configurable.wrapped is gin_config.macro:
        value = gin_config._CONFIG.get(value.config_key, {}).get("value", value)
    for meant in _similar(value):
        if fits(meant, hint) and not any(map(_lacks, references_in(meant))):
            return f"; write {text_of(meant)}"
    return _examples(hint)


def _similar(value: Any) -> Iterator[Any]:
    """Values that are written almost like one."""
    one_by_one = [value]
    if isinstance(value, Reference):
        one_by_one = [gin_config.ConfigurableReference(value.scoped_selector, not value.evaluate)]
    elif isinstance(value, str):
        one_by_one = []
        with contextlib.suppress(ValueError, SyntaxError):
            one_by_one = [ast.literal_eval(value)]
        if len(known := gin_config._REGISTRY.matching_selectors(value.strip("@()"))) == 1:
            name = gin_config._REGISTRY.minimal_selector(known[0])
            one_by_one += [gin_config.ConfigurableReference(name, call) for call in (True, False)]
    elif isinstance(value, float) and value.is_integer():
        one_by_one = [int(value)]
    elif isinstance(value, list):
        bare = [isinstance(item, Reference) and not item.evaluate for item in value]
        yield [next(_similar(v)) if b else v for v, b in zip(value, bare, strict=True)]
    yield from one_by_one
    yield from ([item] for item in [value, *one_by_one])


def _lacks(reference: Reference) -> bool:
    """Whether it is called without an argument that it needs, as far as it tells."""
    call = Call(tuple(reference.scopes), reference.configurable.selector, reference.evaluate)
    return bool(missing(call, Reach(in_force().values()).bound(call)))


def _examples(hint: Any, scope: Sequence[str] = ()) -> str:
    """The first three configurables that give what an annotation asks for, as they were registered."""
    wanted = {one for one in alternatives(hint) if isinstance(one, type)} - {types.NoneType}
    wanted -= {bool, int, float, complex, str, object}
    wanted = {one for one in wanted if not hasattr(one, "dtype")}
    found = []
    for selector, configurable in gin_config._REGISTRY.items():
        if wanted.intersection(given_by(configurable.wrapped)):
            needs_more = any(p.default is p.empty for p in parameters_of(selector).values())
            name = "/".join([*scope, configurable.name])
            found.append(f"@{name}" if needs_more and _takes_function(hint) else f"@{name}()")
    return f", such as {', '.join(found[:3])}" if found else ""


def _takes_function(hint: Any) -> bool:
    return any(typing.get_origin(h) is collections.abc.Callable for h in alternatives(hint))
