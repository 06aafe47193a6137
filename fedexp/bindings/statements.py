"""What Gin has bound, and by which line."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from gin import config as gin_config
from gin import config_parser

MACRO = "gin.macro"
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


statements: list[Statement] = []


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
        statements.clear()
    with mock.patch.object(config_parser, "ConfigParser", Recorder):
        yield
    for scope, selector, parameter, value, location in parsed:
        if parameter:
            key = scope, gin_config._REGISTRY.get_match(selector).selector, parameter
        else:
            key = f"{scope}/{selector}".lstrip("/"), MACRO, "value"
        statements.append(Statement(key, value, location.filename, location.line_num))


def replaced() -> list[Statement]:
    """Statements whose references later ones have replaced, as an included file's algorithm."""
    last = in_force()
    return [
        statement
        for statement in statements
        if statement is not last.get(statement.key) and any(references_in(statement.value))
    ]


def in_force() -> dict[Key, Statement]:
    """The statement in force for each binding; one without a line if it was not parsed."""
    known = {statement.key: statement for statement in statements}
    return {
        key: known[key] if key in known else Statement(key, value, "Python", 0)
        for key, value in _all_bound()
    }


def _all_bound() -> Iterator[tuple[Key, Any]]:
    for (scope, selector), parameters in gin_config._CONFIG.items():
        for parameter, value in parameters.items():
            yield (scope, selector, parameter), value


def references_in(value: Any) -> Iterator[Reference]:
    """The references within a value."""
    return (v for v in gin_config._iterate_flattened_values(value) if isinstance(v, Reference))


def all_references() -> Iterator[Reference]:
    """Those in force, and those that later statements have replaced."""
    values = [value for _, value in _all_bound()] + [s.value for s in statements]
    return references_in(values)


def name_of(scope: str, selector: str, parameter: str) -> str:
    """A binding's name as a Gin file has it."""
    if selector == MACRO:
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
