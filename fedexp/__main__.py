"""The `fedexp` command: an experiment, as `python -m fedexp.main`, or a command as `fedexp list`."""

from __future__ import annotations

import os
import runpy
import sys

# What a first word stands for: a module, and the arguments that come before the others.
COMMANDS = {
    "compare": ["fedexp.compare"],
    "describe": ["fedexp.reference.terminal", "describe"],
    "evaluate": ["fedexp.evaluate"],
    "inspect": ["fedexp.inspect"],
    "launch": ["fedexp.launch"],
    "list": ["fedexp.reference.terminal", "list"],
    "plots": ["fedexp.plots"],
    "status": ["fedexp.status"],
    "sweep": ["fedexp.sweep"],
}


def run() -> None:
    """Runs a command, or else `fedexp.main`; as with -m, modules of the current folder can be imported."""
    sys.path.insert(0, os.getcwd())
    module, first = ["fedexp.main"], sys.argv[1:2]
    if first and first[0] in COMMANDS:
        module = COMMANDS[first[0]]
        sys.argv[1:2] = module[1:]
    elif first and not first[0].startswith("-"):
        sys.exit(_refused(first[0]))
    runpy.run_module(module[0], run_name="__main__", alter_sys=True)


def _refused(word: str) -> int:
    """Says that a word is no command; returns the exit code."""
    from fedexp.bindings import near

    known = ", ".join(COMMANDS)
    meant = near(word, COMMANDS) or " A Gin file is given as --gin_file=..."
    print(f"error: fedexp has no command {word!r}, only {known}.{meant}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    run()
