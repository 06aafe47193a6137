"""What Gin has bound: by which line, whether it fits the annotations, and whether anything reads it.

Gin itself looks at a binding when its configurable is called, which may be after hours. All here is told
from the bindings and from signatures, before anything is built.
"""

from __future__ import annotations

import ast
import collections.abc
import contextlib
import dataclasses
import difflib
import functools
import inspect
import sys
import sysconfig
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest import mock

import gin
from gin import config as gin_config
from gin import config_parser

from fedexp.errors import UserError

# What every run calls, whatever is bound.
ROOTS = ("fedexp.trainer.train", "fedexp.config.workdir", "fedexp.runtime.runtime")
# What `train` calls where it is given no other.
_DEFAULTS = (
    "fedexp.checkpointing.CheckpointPlan",
    "fedexp.data.batching.ClientBatching",
    "fedexp.data.samplers.uniform",
    "fedexp.engine.strategies.auto",
    "fedexp.engine.strategy.Packing",
    "fedexp.evaluation.evaluate",
    "fedexp.reporting.progress",
    "fedexp.reporting.tensorboard",
)
_MACRO = "gin.macro"
# Configurables that nobody's code calls, and those that nobody's but fedexp's does.
_BY_REFERENCE = ("gin.", "optax.", "optimizers.")
_OURS = (*_BY_REFERENCE, "fedexp.")
_NUMBERS = {int: (int,), float: (int, float), complex: (int, float, complex)}
_LITERALS = (bool, int, float, complex, str, bytes, list, tuple, dict, set, types.NoneType)

Reference = gin_config.ConfigurableReference
# Scope, full name of the configurable, parameter.
Key = tuple[str, str, str]


class Statement(NamedTuple):
    """One line of a file or of the command line.

    Attributes:
      key: what it binds.
      value: as Gin has parsed it.
      file: where; None for the command line.
      line: in the file.
    """

    key: Key
    value: Any
    file: str | None
    line: int

    def __str__(self) -> str:
        text = f"{name_of(*self.key)} = {text_of(self.value)}"
        if self.file is None:
            return f"--gin_param={text}"
        return f"{text} ({Path(self.file).name}, line {self.line})"


class Call(NamedTuple):
    """A configurable that a run calls, in a scope, with or without arguments of its own."""

    scope: tuple[str, ...]
    selector: str
    evaluated: bool


_statements: list[Statement] = []


# --- What has been bound ------------------------------------------------------------------------


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Keeps every statement that Gin parses within; after `gin.clear_config()` those before are gone."""
    parsed = []

    class Recorder(config_parser.ConfigParser):
        def parse_statement(self) -> Any:
            statement = super().parse_statement()
            if isinstance(statement, config_parser.BindingStatement):
                parsed.append(statement)
            return statement

    if not gin_config._CONFIG:
        _statements.clear()
    with mock.patch.object(config_parser, "ConfigParser", Recorder):
        yield
    for scope, selector, parameter, value, location in parsed:
        if parameter:
            key = scope, gin_config._REGISTRY.get_match(selector).selector, parameter
        else:
            key = f"{scope}/{selector}".lstrip("/"), _MACRO, "value"
        _statements.append(Statement(key, value, location.filename, location.line_num))


def replaced() -> list[Statement]:
    """Statements whose references later ones have replaced, as an included file's algorithm."""
    last = _last()
    return [
        statement
        for statement in _statements
        if statement is not last.get(statement.key) and any(_references(statement.value))
    ]


def name_of(scope: str, selector: str, parameter: str) -> str:
    """A binding's name as a Gin file has it."""
    if selector == _MACRO:
        return scope
    name = gin_config._REGISTRY.minimal_selector(selector)
    return f"{scope}/{name}.{parameter}" if scope else f"{name}.{parameter}"


def text_of(value: Any) -> str:
    """A value as Gin writes it, in one line."""
    return " ".join(repr(value).split())


def near(name: str, known: Iterable[str]) -> str:
    """A question whether the nearest known name is meant; empty if there is none."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def _last() -> dict[Key, Statement]:
    """The statement in force for each binding; one without a line if it was not parsed."""
    known = {statement.key: statement for statement in _statements}
    return {
        key: known[key] if key in known else Statement(key, value, "Python", 0)
        for key, value in _in_force()
    }


def _in_force() -> Iterator[tuple[Key, Any]]:
    for (scope, selector), parameters in gin_config._CONFIG.items():
        for parameter, value in parameters.items():
            yield (scope, selector, parameter), value


def all_references() -> Iterator[Reference]:
    """Those in force, and those that later statements have replaced."""
    values = [value for _, value in _in_force()] + [s.value for s in _statements]
    return _references(values)


def caller_of(error: BaseException) -> str | None:
    """Where fedexp called the code of a user that raised an error, and for which binding, if it did."""
    frames = list(traceback.walk_tb(error.__traceback__))
    theirs = [i for i, (frame, _) in enumerate(frames) if _is_theirs(frame.f_code.co_filename)]
    ours = [i for i in range(theirs[-1] if theirs else 0) if _is_ours(frames[i][0])]
    if not ours:
        return None
    (frame, line), (caller, at) = frames[theirs[-1]], frames[ours[-1]]
    where = f"{frame.f_code.co_qualname} ({Path(frame.f_code.co_filename).name}, line {line})"
    called = f"{caller.f_globals['__name__']} (line {at})"
    owners = {_owner(frames[i][0].f_globals["__name__"], frames[i][0].f_code) for i in theirs}
    for statement in _last().values():
        for reference in _references(statement.value):
            made = reference.configurable.wrapped
            if _owner(made.__module__, made) in owners:
                return f"{where} raised this; {called} called it for {statement}"
    return f"{where} raised this; {called} called it"


def _owner(module: str, made: Any) -> tuple[str, str]:
    """The function or class of a module that a nested one belongs to."""
    name = getattr(made, "co_qualname", None) or made.__qualname__
    return module, name.partition(".")[0]


def _is_ours(frame: types.FrameType) -> bool:
    return frame.f_globals.get("__name__", "").partition(".")[0] == __name__.partition(".")[0]


def _is_theirs(file: str) -> bool:
    """Whether code is neither fedexp's, nor installed, nor Python's own."""
    paths = sysconfig.get_paths()
    others = (str(Path(__file__).parent), paths["purelib"], paths["platlib"], paths["stdlib"], "<")
    return not file.startswith(others)


def _references(value: Any) -> Iterator[Reference]:
    return (v for v in gin_config._iterate_flattened_values(value) if isinstance(v, Reference))


# --- Who reads it -------------------------------------------------------------------------------


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
                    for reference in _references(statement.value):
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


def is_experiment() -> bool:
    """Whether the bindings are one whole experiment, of which Python has supplied no part."""
    taken = gin_config._OPERATIVE_CONFIG.get(("", ROOTS[0]), {})
    return {"dataset", "task", "algorithm"} <= taken.keys()


def _is_within(scope: Sequence[str], binding: str) -> bool:
    """Whether a call in a scope sees bindings of another: those of its own beginnings."""
    parts = tuple(binding.split("/")) if binding else ()
    return tuple(scope[: len(parts)]) == parts


def _called() -> Reach:
    """What has been called by now, by whatever code."""
    reach = Reach(_last().values())
    for scope, selector in gin_config._OPERATIVE_CONFIG:
        reach.calls.add(Call(tuple(scope.split("/")) if scope else (), selector, True))
    return reach


def _before(narrow: Statement, wide: Statement) -> bool:
    """Whether a wide binding was in vain from the start, not only replaced by a later file's."""
    return narrow.file == wide.file or _statements.index(narrow) < _statements.index(wide)


def check_read(built: bool) -> None:
    """Refuses bindings that nothing reads.

    A binding of a file passes if what read it was replaced, as in a file that includes another one and binds
    another algorithm. One of the command line has to have an effect.

    Args:
      built: whether all is built that reads bindings; what is certain is refused before that, too.

    Raises:
      UserError: a binding without effect, with its line and the nearest name that has one.
    """
    now = _called()
    history = Reach(_statements, _before, more=_DEFAULTS)
    theirs = any(not call.selector.startswith(_OURS) for call in now.calls)
    for statement in _last().values():
        selector = statement.key[1]
        if now.reads(statement) or (statement.file and history.reads(statement)):
            continue
        if built:  # Code of others may call it as late as when the first round is traced.
            may_be_called = statement.file is not None and not selector.startswith(_OURS)
        elif selector.startswith(_BY_REFERENCE):
            may_be_called = False
        else:  # A session calls for its default strategy.
            may_be_called = theirs or selector.startswith("fedexp.engine.")
        if may_be_called:
            continue
        raise UserError(f"gin: {statement} has no effect: {_why_unread(statement, now)}")


def _why_unread(statement: Statement, now: Reach) -> str:
    scope, selector, _ = statement.key
    if hiding := now.hiding(statement):
        names = sorted(name_of(*other.key) for other in hiding)
        return f"{' and '.join(names)} {'wins' if len(names) == 1 else 'win'} by a narrower scope."
    known = {name_of(*s.key): "" for s in _last().values() if now.reads(s)}
    if selector != _MACRO:
        return f"this experiment never uses it.{near(name_of(*statement.key), known)}"
    macros = [name for name in known if "." not in name]
    if found := near(scope, macros):
        return f"nothing reads %{scope}.{found}"
    owners = {
        name: f"{gin_config._REGISTRY.minimal_selector(call.selector)}.{name}"
        for call in sorted(now.calls)
        if call.selector != _MACRO
        for name in _parameters(call.selector)
    }
    matches = difflib.get_close_matches(scope, owners, n=1, cutoff=0.5)
    meant = f" Did you mean {owners[matches[0]]!r}?" if matches else ""
    return f"nothing reads %{scope}.{meant}"


def check_required() -> None:
    """Refuses a config in which something that must be bound is not.

    Raises:
      UserError: names the first of them, and what fits it.
    """
    reach = Reach(_last().values())
    for call in sorted(reach.calls):
        if call.selector.startswith("gin.") or call.selector in ROOTS[1:]:
            continue
        for parameter in _missing(call, reach.bound(call)):
            _refuse_missing(call, parameter, reach)


def _missing(call: Call, bound: set[str]) -> list[inspect.Parameter]:
    """The parameters that a call needs; where it gives arguments of its own, of those that say so."""
    return [
        p
        for p in _parameters(call.selector).values()
        if p.name not in bound
        and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        and (p.default is gin.REQUIRED or (call.evaluated and p.default is p.empty))
    ]


def _refuse_missing(call: Call, parameter: inspect.Parameter, reach: Reach) -> None:
    name = name_of("/".join(call.scope), call.selector, parameter.name)
    hint = _annotations(gin_config._REGISTRY[call.selector].wrapped).get(parameter.name, Any)
    for statement in _last().values():
        for reference in _references(statement.value) if reach.reads(statement) else ():
            given = (reference.configurable.selector, reference.evaluate)
            if given == (call.selector, True) and statement.value is reference:
                bare = gin_config.ConfigurableReference(reference.scoped_selector, False)
                if fits(bare, _hint(statement.key)):
                    raise UserError(f"gin: {statement} needs {parameter.name}; write {bare}")
    raise UserError(
        f"gin: {name} is not bound; it must be {describe(hint)}{_examples(hint, call.scope)}"
    )


# --- Whether it fits the annotations ------------------------------------------------------------


def check_types() -> None:
    """Checks all bindings against the annotations of what they are bound to.

    What has no annotation passes. A reference with parentheses counts as what its configurable is annotated
    to return; where that is not known, and for configurables of others, Gin is made to look at the value.

    Raises:
      UserError: names the binding, what is expected, and the way out.
    """
    for statement in _last().values():
        hint = _hint(statement.key)
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
                name, getattr(built, field.name), _hint(("", configurable.selector, field.name))
            )


def _check_value(name: str, value: Any, hint: Any) -> None:
    if not fits(value, hint):
        got = "None" if value is None else f"an object of {type(value).__name__}"
        raise UserError(f"gin: {name} gives {got}, and must give {describe(hint)}")


def fits(value: Any, hint: Any) -> bool:
    """Whether a value or a reference may be what an annotation asks for; what cannot be told, may."""
    if isinstance(value, Reference):
        if value.configurable.wrapped is gin_config.macro and value.evaluate:
            bound = gin_config._CONFIG.get(value.config_key, {})
            return "value" not in bound or fits(bound["value"], hint)
        if value.configurable.selector.startswith("gin."):
            return True
        if value.evaluate:
            returned = _alternatives(_returned(value))
            return any(_may_be(r, h) for r in returned for h in _alternatives(hint))
        value = value.configurable.wrapped
    return any(_fits(value, alternative) for alternative in _alternatives(hint))


def describe(hint: Any) -> str:
    """An annotation in words."""
    alternatives = _alternatives(hint)
    if float in alternatives:  # Nobody writes the others into a Gin file.
        kinds = (complex, bool, int)
        alternatives = [h for h in alternatives if h not in kinds and not hasattr(h, "dtype")]
    return " or ".join(dict.fromkeys(map(_describe, alternatives)))


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


def _alternatives(hint: Any) -> list[Any]:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return [one for arg in typing.get_args(hint) for one in _alternatives(arg)]
    if origin is typing.Annotated:
        return _alternatives(typing.get_args(hint)[0])
    return [types.NoneType if hint is None else hint]


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
    if collections.abc.Callable in (r, h) and r is not h:
        one = h if r is collections.abc.Callable else r
        if not isinstance(one, type):
            return one is not Literal
        if getattr(one, "_is_protocol", False):
            return True
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
    returned = function if inspect.isclass(function) else _annotations(function).get("return", Any)
    if not any(_may_be(r, h) for r in _alternatives(returned) for h in _alternatives(result)):
        return False
    parameters = _signature(function).values()
    if not isinstance(args, list) or not parameters:
        return True
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return True
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters) >= len(
        args
    )


def _hint(key: Key) -> Any:
    """The annotation of what a binding is bound to; `Any` if it has none that can be looked up."""
    _, selector, parameter = key
    if selector.startswith("gin."):
        return Any
    hint = _annotations(gin_config._REGISTRY[selector].wrapped).get(parameter, Any)
    known = _parameters(selector).get(parameter)
    return hint | None if known is not None and known.default is None and hint is not Any else hint


def _returned(reference: Reference) -> Any:
    made = reference.configurable.wrapped
    return made if inspect.isclass(made) else _annotations(made).get("return", Any)


def _parameters(selector: str) -> Mapping[str, inspect.Parameter]:
    return _signature(gin_config._REGISTRY[selector].wrapped)


@functools.cache
def _signature(made: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(made).parameters
    except (TypeError, ValueError):
        return {}


@functools.cache
def _annotations(made: Callable[..., Any]) -> dict[str, Any]:
    """Those that can be looked up, one by one: a name that exists for type checkers only hides no other."""
    if inspect.isclass(made) and dataclasses.is_dataclass(made):
        sources = [
            (vars(kind).get("__annotations__", {}), vars(sys.modules[kind.__module__]))
            for kind in reversed(inspect.getmro(made))
        ]
    else:
        function = inspect.unwrap(made.__init__ if inspect.isclass(made) else made)
        annotations = getattr(function, "__annotations__", {})
        sources = [(annotations, getattr(function, "__globals__", {}))]
    found = {}
    for annotations, names in sources:
        for name, annotation in annotations.items():
            one = types.SimpleNamespace(__annotations__={name: annotation})
            with contextlib.suppress(Exception):
                found[name] = typing.get_type_hints(one, dict(names))[name]
    return found


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
        if fits(meant, hint) and not any(map(_lacks, _references(meant))):
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
    return bool(_missing(call, Reach(_last().values()).bound(call)))


def _examples(hint: Any, scope: Sequence[str] = ()) -> str:
    """Three configurables or fewer that give what an annotation asks for."""
    wanted = {one for one in _alternatives(hint) if isinstance(one, type)} - {types.NoneType}
    wanted -= {bool, int, float, complex, str, object}
    wanted = {one for one in wanted if not hasattr(one, "dtype")}
    found = []
    for selector, configurable in sorted(gin_config._REGISTRY.items()):
        if wanted.intersection(_gives(configurable.wrapped)):
            needs_more = any(p.default is p.empty for p in _parameters(selector).values())
            name = "/".join([*scope, configurable.name])
            found.append(f"@{name}" if needs_more and _takes_function(hint) else f"@{name}()")
    return f", such as {', '.join(found[:3])}" if found else ""


def _takes_function(hint: Any) -> bool:
    return any(typing.get_origin(h) is collections.abc.Callable for h in _alternatives(hint))


def _gives(made: Callable[..., Any]) -> tuple[Any, ...]:
    returned = made if inspect.isclass(made) else _annotations(made).get("return")
    return getattr(returned, "__mro__", ())
