"""The `fedexp` command: the same as `python -m fedexp.main`."""

from __future__ import annotations

import os
import runpy
import sys


def run() -> None:
    """Runs `fedexp.main`; as with -m, modules of the current folder can be imported."""
    sys.path.insert(0, os.getcwd())
    runpy.run_module("fedexp.main", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    run()
