"""Where fedexp called a user's code that raised an error."""

from __future__ import annotations

import sysconfig
import traceback
import types
from pathlib import Path
from typing import Any

from fedexp.bindings.statements import in_force, references_in


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
    for statement in in_force().values():
        for reference in references_in(statement.value):
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
    ours = str(Path(__file__).parent.parent)
    others = (ours, paths["purelib"], paths["platlib"], paths["stdlib"], "<")
    return not file.startswith(others)
