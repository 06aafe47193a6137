"""How objects that hold arrays are shown: names, sizes and dtypes, never the numbers."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_WIDTH = 100
_MOST = 6  # Entries of a mapping or a sequence.


def fields(self: Any) -> str:
    """A dataclass or named tuple, a line for each field; a class takes it as its `__repr__`."""
    names = getattr(self, "_fields", None) or [one.name for one in dataclasses.fields(self)]
    lines = [f"{name}: {_line(getattr(self, name))}\n" for name in names]
    return f"{type(self).__name__}(\n{textwrap.indent(''.join(lines), '  ')})"


def short(value: Any) -> str:
    """A value in one line."""
    leaves = list(_leaves(value))
    arrays = [one for one in leaves if _is_array(one)]
    if _is_array(value):
        text = f"{value.dtype} {tuple(value.shape)}"
    elif len(arrays) == len(leaves) > _MOST:
        text = f"{sum(one.size for one in arrays)} numbers in {len(arrays)} arrays"
    elif isinstance(value, Mapping):
        shown = [f"{name!r}: {short(one)}" for name, one in value.items()]
        more = [f"... {len(shown) - _MOST} more"] if len(shown) > _MOST else []
        text = f"{{{', '.join([*shown[:_MOST], *more])}}}"
    elif type(value) in (list, tuple) and len(value) > _MOST:
        text = f"{len(value)} entries, the last {short(value[-1])}"
    elif type(value) in (list, tuple):
        text = f"[{', '.join(map(short, value))}]"
    elif isinstance(value, float):
        text = f"{value:.6g}"
    else:
        text = getattr(value, "__qualname__", None) or repr(value)
        if " at 0x" in text:  # Functions within, of which nothing can be told.
            text = type(value).__name__
    return cut(text)


def names(of: Sequence[str]) -> str:
    """Names one after another, or the first few and how many more there are."""
    more = [f"{len(of) - _MOST} more"] if len(of) > _MOST else []
    return ", ".join([*of[:_MOST], *more])


def cut(text: str) -> str:
    """A text in one line, at most as long as fits a screen."""
    return textwrap.shorten(text, _WIDTH, placeholder=" ...")


def _line(value: Any) -> str:
    """As `short`, but several lines of what is shown by fields itself, if these are few."""
    if type(value).__repr__ is fields and (text := repr(value)).count("\n") < _MOST:
        return text
    return short(value)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for one in value:
            yield from _leaves(one)
    else:
        yield value


def _is_array(value: Any) -> bool:
    return all(hasattr(value, name) for name in ("shape", "dtype", "size"))
