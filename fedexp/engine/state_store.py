"""Rows of clients in files, written as rounds go; they come back as they were at any checkpoint kept.

A store is a folder, called after the round it begins with and the number of processes, as `0-2`. Each process
has two files in it. `1.rows` consists of slots for one client's row each. A row that a kept checkpoint may
refer to is never written over: the client's next one goes to a free slot, and from then on stays there until
the next checkpoint. `1.index` tells, checkpoint after checkpoint, which clients have moved to which slots. So
a checkpoint costs the rows that have changed since the last. Now and then the index is written anew, without
what no kept checkpoint needs.

Rows are read and written by system calls: with mapped memory, a full disk would be a signal that kills.
"""

from __future__ import annotations

import functools
import os
import shutil
import weakref
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import numpy as np

from fedexp import paths
from fedexp.errors import UserError

# The parts of a row, each as (bytes,) uint8.
Row = Sequence[np.ndarray]
_NONE = -1
_MOST_PARTS = 1000  # Of a system call; Linux takes 1024.
_SMALL_INDEX = 1 << 20  # Bytes that are not worth writing anew.


class InMemory:
    """Rows of clients as long as the process lives."""

    def __init__(self) -> None:
        self._rows: dict[int, Row] = {}

    def clients(self) -> np.ndarray:
        """Those that have a row, (n,) int64, sorted."""
        return np.array(sorted(self._rows), np.int64)

    def read(self, client: int, row: Row) -> bool:
        """Fills `row`, if the client has one; returns whether it has."""
        if client not in self._rows:
            return False
        for part, kept in zip(row, self._rows[client], strict=True):
            part[:] = kept
        return True

    def write(self, client: int, row: Row) -> None:
        """Takes a copy."""
        if client not in self._rows:
            self._rows[client] = [part.copy() for part in row]
        for kept, part in zip(self._rows[client], row, strict=True):
            kept[:] = part


class StateStore:
    """Rows of a process's clients in files, with the methods of `InMemory` and a few more.

    Args:
      root: folder of stores, made if missing.
      name: of the store, as `name_of` has it; made if missing.
      process: whose files these are.
      clients: of the process.
      row_bytes: of every row.

    Raises:
      UserError: here and when writing, a file that cannot be written; when reading, a row that is not what
        was written.
    """

    def __init__(self, root: Path, name: str, process: int, clients: range, row_bytes: int):
        self.name = name
        self._root, self._folder = root, root / name
        self._process, self._clients, self._row_bytes = process, clients, row_bytes
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._rows = _File(self._folder / f"{process}.rows", os.O_RDWR | os.O_CREAT)
            self._index = _File(self._folder / f"{process}.index", os.O_RDWR | os.O_CREAT)
            for folder in (self._folder, root, root.parent):
                paths.sync(folder)
        except OSError as error:
            raise self._cannot_write(error) from error
        self._slots = np.full(len(clients), _NONE)
        self._checksums = np.full(len(clients), _NONE)  # Of rows that have not been read yet.
        self._has_changed = np.zeros(len(clients), bool)  # Since the last checkpoint.
        self._kept: dict[int, np.ndarray] = {}  # Round of a checkpoint -> slots.
        self._free: list[int] = []
        self._num_slots = self._index_bytes = 0
        self._needed_bytes = 0  # Of the index when it was last written anew.

    def clients(self) -> np.ndarray:
        return np.flatnonzero(self._slots != _NONE) + self._clients.start

    def read(self, client: int, row: Row) -> bool:
        i = client - self._clients.start
        slot, checksum = self._slots[i].item(), self._checksums[i].item()
        if slot == _NONE:
            return False
        try:
            self._rows.read(row, slot * self._row_bytes, None if checksum == _NONE else checksum)
        except (OSError, ValueError) as error:
            raise UserError(
                f"the state of client {client} cannot be read: {error}; put back a copy of the workdir, or "
                "start afresh in another --workdir"
            ) from error
        self._checksums[i] = _NONE
        return True

    def write(self, client: int, row: Row) -> None:
        i = client - self._clients.start
        if self._has_changed[i]:
            slot = self._slots[i].item()
        elif self._free:
            slot = self._free.pop()
        else:
            slot, self._num_slots = self._num_slots, self._num_slots + 1
        try:
            self._rows.write(row, slot * self._row_bytes)
        except OSError as error:
            raise self._cannot_write(error) from error
        self._slots[i], self._checksums[i], self._has_changed[i] = slot, _NONE, True

    def commit(self, round: int, kept: Collection[int]) -> Callable[[], None]:
        """Makes the rows as they are now those of a checkpoint.

        Args:
          round: of the checkpoint.
          kept: rounds of the other checkpoints that are complete; slots of no other are used again.

        Returns:
          What puts it all on the disk, for another thread; the checkpoint counts only after that.
        """
        changed = np.flatnonzero(self._has_changed)
        self._has_changed[:] = False
        self._kept = {r: slots for r, slots in self._kept.items() if r in kept}
        self._kept[round] = self._slots.copy()
        self._free_unused()
        if self._process == 0 and kept and min(kept) > int(self.name.partition("-")[0]):
            for older in set(self._root.iterdir()) - {self._folder}:
                shutil.rmtree(older, ignore_errors=True)
        return functools.partial(self._flush, round, changed, self._slots[changed], [*self._kept])

    def restore(self, round: int, kept: Collection[int]) -> None:
        """Goes back to the rows of a checkpoint; those of later ones are lost.

        Args:
          round: of the checkpoint.
          kept: rounds of all complete checkpoints.

        Raises:
          ValueError: files that do not have all of it.
        """
        for at, moved, end in _moves(self._index, round):
            places = moved[:, 0] - self._clients.start
            if len(moved) and not (places.min() >= 0 and places.max() < len(self._slots)):
                raise ValueError(f"{self._index.path} is of other clients")
            self._slots[places], self._checksums[places] = moved[:, 1], moved[:, 2]
            if at in kept:
                self._kept[at] = self._slots.copy()
            self._index_bytes = end
        self._kept[round] = self._slots.copy()
        self._free_unused()
        self._rows.cut(self._num_slots * self._row_bytes)

    def take(self, name: str, round: int) -> None:
        """Copies this process's clients from a checkpoint that a number of processes wrote.

        Raises:
          ValueError: files that do not have all of it.
        """
        row = [np.empty(self._row_bytes, np.uint8)]
        for process in range(processes_of(name)):
            path = self._root / name / f"{process}.index"
            moves = np.concatenate([m for _, m, _ in _moves(_File(path, os.O_RDONLY), round)])
            latest = {move[0]: move for move in moves.tolist() if move[0] in self._clients}
            rows = _File(path.with_suffix(".rows"), os.O_RDONLY)
            for client, slot, checksum in latest.values():
                rows.read(row, slot * self._row_bytes, checksum)
                self.write(client, row)

    def clear(self) -> None:
        """Empties the files of a store that is new: a killed process may have left something there."""
        self._rows.cut(0)
        self._index.cut(0)

    def _free_unused(self) -> None:
        slots = np.concatenate([*self._kept.values()])
        self._num_slots = max(self._num_slots, slots.max(initial=_NONE).item() + 1)
        is_used = np.zeros(self._num_slots, bool)
        is_used[slots[slots != _NONE]] = True
        self._free = np.flatnonzero(~is_used)[::-1].tolist()

    def _flush(
        self, round: int, places: np.ndarray, slots: np.ndarray, kept: Collection[int]
    ) -> None:
        row, checksums = [np.empty(self._row_bytes, np.uint8)], []
        for slot in slots.tolist():
            self._rows.read(row, slot * self._row_bytes)
            checksums.append(_checksum(row))
        moved = np.column_stack([places + self._clients.start, slots, np.array(checksums, int)])
        block = _block(round, moved)
        self._rows.sync()
        self._index.write([block], self._index_bytes)
        self._index.sync()
        self._index_bytes += block.nbytes
        if self._index_bytes > max(_SMALL_INDEX, 2 * self._needed_bytes):
            self._compact(round, kept)

    def _compact(self, until: int, kept: Collection[int]) -> None:
        """Writes the index anew: of each kept checkpoint who has moved since the one before it.

        Whenever the process dies, there is the former index or the new one; both have all kept checkpoints.
        """
        latest = np.zeros((len(self._clients), 3), np.int64)
        latest[:, 0], has_moved = self._clients, np.zeros(len(self._clients), bool)
        blocks = []
        for round, moved, _ in _moves(self._index, until):
            places = moved[:, 0] - self._clients.start
            latest[places], has_moved[places] = moved, True
            if round in kept:
                blocks.append(_block(round, latest[has_moved]))
                has_moved[:] = False
        path = self._index.path.with_suffix(".new")
        new = _File(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        new.write(blocks, 0)
        new.sync()
        os.replace(path, self._index.path)
        paths.sync(self._folder)
        new.path, self._index = self._index.path, new
        self._index_bytes = self._needed_bytes = sum(block.nbytes for block in blocks)

    def _cannot_write(self, error: OSError) -> UserError:
        return UserError(
            f"Cannot write client states to {self._folder}: {error.strerror}. Free space there, or choose "
            "another --workdir"
        )


def name_of(round: int, processes: int) -> str:
    """The name of a store that begins after a round, on a number of processes."""
    return f"{round}-{processes}"


def processes_of(name: str) -> int:
    """How many processes have files in a store."""
    return int(name.partition("-")[2])


def _moves(index: _File, until: int) -> Iterator[tuple[int, np.ndarray, int]]:
    """Yields a process's checkpoints: (round, (n, 3) int64 of client, slot and checksum, end in the file)."""
    content, at, round = index.content(), 0, None
    numbers = np.frombuffer(content, "<i8", len(content) // 8).astype(np.int64)
    while round != until:
        if at + 3 > len(numbers):
            raise ValueError(f"{index.path} ends before round {until}")
        round, count, checksum = numbers[at : at + 3].tolist()
        moved = numbers[at + 3 : at + 3 + 3 * count]
        if len(moved) != 3 * count or _checksum([moved]) != checksum:
            raise ValueError(f"{index.path} does not hold what was saved")
        at += 3 + len(moved)
        yield round, moved.reshape(-1, 3), 8 * at


def _block(round: int, moved: np.ndarray) -> np.ndarray:
    """What the index has of a checkpoint, as bytes: who, (n, 3) int64, has moved to which slot."""
    header = np.array([round, len(moved), _checksum([moved])])
    return np.concatenate([header, moved.ravel()]).astype("<i8").view(np.uint8)


def _checksum(row: Row) -> int:
    return functools.reduce(lambda value, part: zlib.crc32(part.data, value), row, 0)


class _File:
    """A file, until nobody has it any more."""

    def __init__(self, path: Path, flags: int):
        self.path = path
        self._descriptor = os.open(path, flags, 0o666)
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, row: Row, offset: int, checksum: int | None = None) -> None:
        """Fills a row.

        Raises:
          ValueError: the file ends before, or has something else there than what the checksum is of.
        """
        self._transfer(os.preadv, row, offset)
        if checksum is not None and _checksum(row) != checksum:
            raise ValueError(f"{self.path} does not hold what was saved")

    def write(self, row: Row, offset: int) -> None:
        self._transfer(os.pwritev, row, offset)

    def _transfer(self, call: Callable[..., int], row: Row, offset: int) -> None:
        left = [part.data for part in row if part.size]
        while left:
            done = call(self._descriptor, left[:_MOST_PARTS], offset)
            if done == 0:
                raise ValueError(f"{self.path} is cut short")
            offset += done
            while left and done >= left[0].nbytes:
                done -= left.pop(0).nbytes
            if done:
                left[0] = left[0][done:]

    def content(self) -> bytes:
        content = np.empty(os.fstat(self._descriptor).st_size, np.uint8)
        self.read([content], 0)
        return content.tobytes()

    def cut(self, size: int) -> None:
        """Cuts off what lies beyond.

        Raises:
          ValueError: the file is shorter than that.
        """
        if os.fstat(self._descriptor).st_size < size:
            raise ValueError(f"{self.path} is cut short")
        os.ftruncate(self._descriptor, size)

    def sync(self) -> None:
        os.fsync(self._descriptor)
