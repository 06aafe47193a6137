"""Whether a value or a reference may be what an annotation asks for."""

from __future__ import annotations

import collections.abc
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from flax import linen as nn
from gin import config as gin_config

from fedexp.bindings.signatures import annotations_of, returned_by, signature_of
from fedexp.bindings.statements import Reference

_NUMBERS = {int: (int,), float: (int, float), complex: (int, float, complex)}
_LITERALS = (bool, int, float, complex, str, bytes, list, tuple, dict, set, types.NoneType)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value or a reference may be what an annotation asks for; what cannot be told, may."""
    if isinstance(value, Reference):
        if value.configurable.wrapped is gin_config.macro and value.evaluate:
            bound = gin_config._CONFIG.get(value.config_key, {})
            return "value" not in bound or fits(bound["value"], hint)
        if value.configurable.selector.startswith("gin."):
            return True
        if value.evaluate:
            returned = alternatives(returned_by(value))
            return any(_may_be(r, h) for r in returned for h in alternatives(hint))
        value = value.configurable.wrapped
    return any(_fits(value, alternative) for alternative in alternatives(hint))


def _fits(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin is Literal:
        return any(value == arg and type(value) is type(arg) for arg in args)
    if origin is collections.abc.Callable:
        return callable(value) and (not args or _takes(value, *args))
    if origin in (Any, object) or not isinstance(origin, type):
        return True
    if getattr(origin, "_is_protocol", False):
        return not isinstance(value, _LITERALS)
    if origin in _NUMBERS:
        is_number = isinstance(value, _NUMBERS[origin]) and not isinstance(value, bool)
        return is_number or hasattr(value, "dtype")
    if origin is tuple and args and isinstance(value, list | tuple):
        of = args[:1] * len(value) if args[1:] == (...,) else args
        return len(of) == len(value) and all(map(fits, value, of))
    if not isinstance(value, origin):
        return False
    if args and isinstance(value, Mapping):
        return all(fits(k, args[0]) and fits(v, args[-1]) for k, v in value.items())
    if args and isinstance(value, str):  # A list of its characters.
        return fits(value, args[0])
    if args and isinstance(value, Sequence):
        return all(fits(item, args[0]) for item in value)
    return True


def _may_be(returned: Any, hint: Any) -> bool:
    """Whether an object annotated as one thing may be another."""
    r, h = (typing.get_origin(one) or one for one in (returned, hint))
    if r is Any or h in (Any, object):
        return True
    if r is h is collections.abc.Callable:
        taken = [args[0] for one in (returned, hint) if (args := typing.get_args(one))]
        return len({len(args) for args in taken if isinstance(args, list)}) < 2
    if collections.abc.Callable in (r, h) and r is not h:
        one = h if r is collections.abc.Callable else r
        if not isinstance(one, type):
            return one is not Literal
        if getattr(one, "_is_protocol", False):
            return True
        if issubclass(one, nn.Module):  # To be called by `apply` alone.
            return False
        calls = [vars(kind)["__call__"] for kind in one.__mro__[:-1] if "__call__" in vars(kind)]
        wanted = typing.get_args(returned if one is h else hint)[-1:]
        return bool(calls) and all(_takes(calls[0], ..., result) for result in wanted)
    if h is Literal:
        return any(isinstance(arg, r) for arg in typing.get_args(hint) if isinstance(r, type))
    if not isinstance(r, type) or not isinstance(h, type) or getattr(h, "_is_protocol", False):
        return r is not Literal or any(_fits(arg, hint) for arg in typing.get_args(returned))
    return issubclass(r, h) or issubclass(h, r) or r in _NUMBERS.get(h, ())


def _takes(function: Callable[..., Any], args: Any, result: Any) -> bool:
    """Whether a function can be called with so many arguments, its others being bound, and for what."""
    returned = (
        function if inspect.isclass(function) else annotations_of(function).get("return", Any)
    )
    if not any(_may_be(r, h) for r in alternatives(returned) for h in alternatives(result)):
        return False
    parameters = signature_of(function).values()
    if not isinstance(args, list) or not parameters:
        return True
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return True
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters) >= len(
        args
    )


def alternatives(hint: Any) -> list[Any]:
    """The members of a union, or the one annotation that it is."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return [one for arg in typing.get_args(hint) for one in alternatives(arg)]
    if origin is typing.Annotated:
        return alternatives(typing.get_args(hint)[0])
    return [types.NoneType if hint is None else hint]


def describe(hint: Any) -> str:
    """An annotation in words."""
    parts = alternatives(hint)
    if float in parts:  # Nobody writes the others into a Gin file.
        kinds = (complex, bool, int)
        parts = [h for h in parts if h not in kinds and not hasattr(h, "dtype")]
    return " or ".join(dict.fromkeys(map(_describe, parts)))


def _describe(hint: Any) -> str:
    origin, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if hint is types.NoneType:
        return "None"
    if hint is bool:
        return "True or False"
    if origin is Literal:
        return " or ".join(map(repr, args))
    if origin is collections.abc.Callable:
        return "a function"
    of = " or ".join(describe(arg) for arg in args[-1:] if arg is not Ellipsis)
    if isinstance(origin, type) and issubclass(origin, collections.abc.Mapping):
        return f"a dict of {of}" if of else "a dict"
    if origin is not str and isinstance(origin, type) and issubclass(origin, Sequence) and args:
        return f"a list of {of}"
    return getattr(origin, "__name__", str(origin)).rpartition(".")[2]
