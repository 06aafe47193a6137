"""What configurables take and give, as far as their annotations tell."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import sys
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from gin import config as gin_config

from fedexp.bindings.statements import Key, Reference


def parameters_of(selector: str) -> Mapping[str, inspect.Parameter]:
    """Name -> parameter of a configurable; none where Python cannot tell."""
    return signature_of(gin_config._REGISTRY[selector].wrapped)


@functools.cache
def signature_of(made: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """Name -> parameter of a function or class; none where Python cannot tell."""
    try:
        if inspect.isclass(made) and type(made).__call__ is not type.__call__:  # As of NNX.
            _, *own = inspect.signature(made.__init__).parameters.values()
            return {parameter.name: parameter for parameter in own}
        return inspect.signature(made).parameters
    except (TypeError, ValueError):
        return {}


@functools.cache
def annotations_of(made: Callable[..., Any]) -> dict[str, Any]:
    """Those that can be looked up, one by one: a name that exists for type checkers only hides no other."""
    if inspect.isclass(made) and dataclasses.is_dataclass(made):
        sources = [
            (own_annotations(kind), vars(sys.modules[kind.__module__]))
            for kind in reversed(inspect.getmro(made))
        ]
    else:
        function = inspect.unwrap(made.__init__ if inspect.isclass(made) else made)
        sources = [(own_annotations(function), getattr(function, "__globals__", {}))]
    found = {}
    for own, names in sources:
        for name, annotation in own.items():
            one = types.SimpleNamespace(__annotations__={name: annotation})
            with contextlib.suppress(Exception):
                found[name] = typing.get_type_hints(one, dict(names))[name]
    return found


def own_annotations(made: Callable[..., Any]) -> Mapping[str, Any]:
    """Those of a function, or of a class without its bases'; they may be text."""
    if sys.version_info < (3, 14):
        return inspect.get_annotations(made)
    import annotationlib  # Which looks names up only now, and leaves those that are not there.

    return annotationlib.get_annotations(made, format=annotationlib.Format.FORWARDREF)


def hint_of(key: Key) -> Any:
    """The annotation of what a binding is bound to; `Any` if it has none that can be looked up."""
    _, selector, parameter = key
    if selector.startswith("gin."):
        return Any
    hint = annotations_of(gin_config._REGISTRY[selector].wrapped).get(parameter, Any)
    known = parameters_of(selector).get(parameter)
    return hint | None if known is not None and known.default is None and hint is not Any else hint


def returned_by(reference: Reference) -> Any:
    """What calling a reference is annotated to give."""
    made = reference.configurable.wrapped
    return made if inspect.isclass(made) else annotations_of(made).get("return", Any)


def given_by(made: Callable[..., Any]) -> tuple[Any, ...]:
    """The classes that what a function or class makes is of; none if it does not say."""
    returned = made if inspect.isclass(made) else annotations_of(made).get("return")
    return getattr(returned, "__mro__", ())
