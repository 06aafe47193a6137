"""Whether a folder, or a study, is of the sweep that is given."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from fedexp import config, paths
from fedexp.errors import UserError

# What may grow: the trials before stay the same.
_MAY_CHANGE = ("sweep.num_points",)


class Description(NamedTuple):
    """Text that tells sweeps apart.

    Attributes:
      sweep: bindings of the sweep's file.
      experiment: bindings of the experiment without those of any axis.
    """

    sweep: str
    experiment: str


def differences(before: Description, after: Description) -> list[str]:
    """One line for each binding in which two descriptions differ, of those that may not."""
    found = []
    for recorded, given in zip(before, after, strict=True):
        old, new = _bindings(recorded), _bindings(given)
        found += [
            f"{name}: {old.get(name, '(unset)')} -> {new.get(name, '(unset)')}"
            for name in sorted(old.keys() | new.keys())
            if old.get(name) != new.get(name) and name not in _MAY_CHANGE
        ]
    return found


def _bindings(text: str) -> Mapping[str, str]:
    return dict(line.split(" = ", 1) for line in text.splitlines() if " = " in line)


def claim(workdir: Path, description: Description) -> None:
    """Makes a folder this sweep's, or finds it to be.

    Raises:
      UserError: it is of another sweep, with the differences, or nothing can be written there.
    """
    record = workdir / "description.json"
    try:
        os.makedirs(workdir / "trials", exist_ok=True)
        if record.exists():
            check_same(
                f"{workdir} holds", Description(**json.loads(record.read_text())), description
            )
        elif (workdir / config.OPERATIVE).exists():
            raise UserError(f"{workdir} holds a run, and no sweep; choose another --workdir")
        paths.write(record, json.dumps(description._asdict(), indent=2) + "\n")
    except (TypeError, json.JSONDecodeError) as error:
        raise UserError(f"{record} is no description of a sweep: {error}") from error
    except OSError as error:
        raise UserError(
            f"cannot write to --workdir={workdir}: {error.strerror}; free space there"
        ) from error


def check_same(where: str, before: Description, after: Description) -> None:
    """Refuses to mix two sweeps.

    Args:
      where: the beginning of the message.
      before: what was there.
      after: what is given.

    Raises:
      UserError: names the differences.
    """
    if changed := differences(before, after):
        raise UserError(f"{where} another sweep: {'; '.join(changed)}. Choose another --workdir")
