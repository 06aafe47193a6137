"""Which checkpoints a folder has, by the names of its files, and what stands for rows in one.

A checkpoint is a folder called after its round. Orbax renames it into place when it is complete; in a bucket
it is complete with the file that Orbax leaves in it. Nothing here writes.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from fedexp import paths

# What is found out about a checkpoint after it was saved, in its folder.
ADDED = "added.json"
# In a bucket it is the last to come and the first to go.
_COMMITTED = "commit_success.txt"


@dataclasses.dataclass(frozen=True)
class Rows:
    """Stands for an array in a checkpoint, on the host, as many of whose rows are wanted as there are.

    Attributes:
      row: the shape of one.
      dtype: a NumPy dtype.
    """

    row: tuple[int, ...]
    dtype: Any

    @property
    def shape(self) -> tuple[int | None, ...]:
        return (None, *self.row)


def rounds(workdir: paths.PathLike) -> list[int]:
    """The rounds of a workdir's complete checkpoints, sorted; empty if there is none.

    Raises:
      OSError: the folder cannot be read.
    """
    folder = folder_in(workdir)
    try:
        if paths.is_remote(folder):
            return finished(paths.find(folder))
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return sorted(int(name) for name in names if name.isdecimal())


def folder_in(workdir: paths.PathLike) -> str:
    """Where checkpoints lie in a workdir."""
    return os.path.join(workdir, "checkpoints")


def finished(files: Sequence[str]) -> list[int]:
    """The rounds of complete checkpoints among a bucket's files, sorted."""
    return sorted(int(round_of(file)) for file in files if is_commit(file))


def round_of(file: str) -> str:
    """The checkpoint that a bucket's file belongs to."""
    return file.partition("/")[0]


def is_commit(file: str) -> bool:
    """Whether a bucket's file is the one that makes a checkpoint complete."""
    return file.partition("/")[2] == _COMMITTED
