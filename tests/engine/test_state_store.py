"""Rows of clients in files: what comes back, after what, and what it costs."""

from __future__ import annotations

import itertools
import os
import resource
import shutil
import signal
import zlib
from pathlib import Path

import numpy as np
import pytest

from fedexp.engine.client_states import ClientStates
from fedexp.engine.state_store import StateStore
from fedexp.errors import UserError

FIRST = {"a": np.zeros((2, 3), np.float32), "b": np.int8(7), "c": np.zeros((0, 2))}
ROW_BYTES = 25


def kept_in(folder: Path, clients: int = 20) -> ClientStates:
    states = ClientStates(FIRST, range(clients))
    states.keep_in(folder, 0)
    return states


def train(states: ClientStates, clients: list[int], seed: int) -> dict[int, bytes]:
    """Gives clients new states, as a round does; returns them."""
    rng = np.random.default_rng(seed)
    table = {
        "a": rng.normal(size=(len(clients) + 1, 2, 3)).astype(np.float32),
        "b": rng.integers(-100, 100, len(clients) + 1).astype(np.int8),
        "c": np.zeros((len(clients) + 1, 0, 2)),
    }
    rows = rng.permutation(len(clients) + 1)[: len(clients)]
    states.scatter(np.array(clients), rows, table)
    return {
        client: table["a"][row].tobytes() + table["b"][row].tobytes()
        for client, row in zip(clients, rows, strict=True)
    }


def held(states: ClientStates) -> dict[int, bytes]:
    saved = states.save()
    rows = zip(*saved["rows"], strict=True)
    return {
        int(client): a.tobytes() + b.tobytes()
        for client, (a, b, _) in zip(saved["clients"], rows, strict=True)
    }


def checkpoint(states: ClientStates, round_: int, kept: list[int]) -> str:
    nobody, name, flush = states.commit(round_, kept)
    assert len(nobody["clients"]) == 0
    flush()
    return name


def restored(folder: Path, name: str, round_: int, kept: list[int], clients=20) -> ClientStates:
    states = ClientStates(FIRST, range(clients))
    states.restore(folder, name, round_, kept)
    return states


@pytest.fixture
def written_anew(monkeypatch):
    """The smallest index is worth writing anew."""
    monkeypatch.setattr("fedexp.engine.state_store._SMALL_INDEX", 0)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.usefixtures("written_anew")
def test_any_kept_checkpoint_comes_back_whenever_the_process_dies(tmp_path, seed):
    """Against dicts: rounds, checkpoints of which the latest two and one older are kept, and deaths."""
    rng = np.random.default_rng(seed)
    states, now = kept_in(tmp_path), {}
    name, snapshots, best, most = "0-1", {}, None, 0
    for round_ in range(1, 60):
        now |= train(states, rng.choice(20, 3, replace=False).tolist(), 100 * seed + round_)
        assert held(states) == now
        if rng.random() < 0.5:
            kept = sorted(snapshots)
            _, _, flush = states.commit(round_, kept)
            snapshot = dict(now)
            if rng.random() < 0.5:  # The next round runs while the checkpoint is written.
                now |= train(states, [int(rng.integers(20))], seed)
            if rng.random() < 0.8:
                flush()
                snapshots[round_] = snapshot
                best = best if best in snapshots and rng.random() < 0.7 else round_
                snapshots = {
                    r: snapshots[r] for r in snapshots if r == best or r in [*kept[-1:], round_]
                }
            elif not snapshots:
                flush()
            else:  # Killed before it was on the disk.
                states, now = restored(tmp_path, name, max(snapshots), [*snapshots]), None
        elif snapshots and rng.random() < 0.3:
            back = int(rng.choice(sorted(snapshots)))
            snapshots = {r: snapshots[r] for r in snapshots if r <= back}
            states, now = restored(tmp_path, name, back, [*snapshots]), None
        if now is None:
            now = dict(snapshots[max(snapshots)])
            best = best if best in snapshots else None
        assert held(states) == now
        most = max(most, len(snapshots))
    assert most > 2


def test_a_checkpoint_costs_what_has_changed_and_not_what_there_is(tmp_path):
    def sizes():
        return [(tmp_path / "0-1" / f"0.{name}").stat().st_size for name in ("rows", "index")]

    states, kept = kept_in(tmp_path, 100_000), []
    train(states, [*range(2000)], 0)
    checkpoint(states, 1, [])
    assert sizes() == [2000 * ROW_BYTES, 24 + 2000 * 24]
    for round_ in range(2, 12):
        before = sizes()
        for again in range(3):
            train(states, [round_, round_ + 1, 90_000 + round_], again)
        checkpoint(states, round_, [1, *kept])
        rows, index = np.subtract(sizes(), before)
        assert index == 24 + 3 * 24
        kept = [*kept, round_][-2:]
        # Slots of the checkpoint that is gone are used again, but for the first, which is the best one.
        assert rows <= (3 if round_ < 6 else 2) * ROW_BYTES


@pytest.mark.usefixtures("written_anew")
def test_the_index_is_as_long_as_what_is_kept_and_not_as_the_run(tmp_path):
    states, rng = kept_in(tmp_path), np.random.default_rng(0)
    sizes = []
    for round_ in range(1, 200):
        wanted = train(states, rng.choice(20, 5, replace=False).tolist(), round_)
        kept = [round_ - 2, round_ - 1] if round_ > 2 else []
        checkpoint(states, round_, kept)
        sizes.append((tmp_path / "0-1" / "0.index").stat().st_size)
    # Three checkpoints, of which the first has everyone, twice over, and one that comes on top.
    block = 24 + 5 * 24
    assert max(sizes) <= 2 * (24 + 20 * 24 + 2 * block) + block
    now = held(states)
    assert len(now) == 20 and wanted.items() <= now.items()
    assert held(restored(tmp_path, "0-1", 199, [197, 198, 199])) == now
    assert held(restored(tmp_path, "0-1", 197, [197])).keys() == now.keys()


@pytest.mark.usefixtures("written_anew")
def test_a_process_may_die_at_any_call_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    states, rng, snapshots, called = kept_in(tmp_path / "run"), np.random.default_rng(0), {}, []

    def copying_before(name):
        call = getattr(os, name)

        def copied(*args):
            shutil.copytree(tmp_path / "run", tmp_path / f"copy{len(copies)}")
            copies.append(name)
            return call(*args)

        return copied

    for round_ in range(1, 9):
        train(states, rng.choice(20, 5, replace=False).tolist(), round_)
        kept, copies = sorted(snapshots)[-2:], []
        with monkeypatch.context() as patched:
            for name in ("pwritev", "fsync", "replace"):
                patched.setattr(os, name, copying_before(name))
            checkpoint(states, round_, kept)
        for number, at in itertools.product(range(len(copies)), kept):
            again = shutil.copytree(tmp_path / f"copy{number}", tmp_path / "again")
            found = restored(again, "0-1", at, [k for k in kept if k <= at])
            assert held(found) == snapshots[at]
            checkpoint(found, round_, [at])  # It goes on from there.
            assert held(restored(again, "0-1", round_, [at, round_])) == snapshots[at]
            shutil.rmtree(again)
        for number in range(len(copies)):
            shutil.rmtree(tmp_path / f"copy{number}")
        snapshots[round_], called = held(states), called + copies[2:]
    assert called.count("replace") > 2


def test_rows_are_on_the_disk_before_the_index_has_them(tmp_path, monkeypatch):
    states, done = kept_in(tmp_path), []
    train(states, [1, 2], 0)
    inode = {path.stat().st_ino: path.name for path in (tmp_path / "0-1").iterdir()}
    fsync, pwritev = os.fsync, os.pwritev
    noted = lambda what, file: done.append((what, inode[os.fstat(file).st_ino]))  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda file: (noted("sync", file), fsync(file)))
    monkeypatch.setattr(
        os, "pwritev", lambda file, *rest: (noted("write", file), pwritev(file, *rest))[1]
    )
    checkpoint(states, 1, [])
    assert done == [("sync", "0.rows"), ("write", "0.index"), ("sync", "0.index")]


@pytest.mark.parametrize("counts", [(1, 2), (2, 1), (2, 3)])
def test_another_number_of_processes_takes_over(tmp_path, monkeypatch, counts):
    def of_processes(count):
        monkeypatch.setattr("jax.process_count", lambda: count)
        borders = np.linspace(0, 20, count + 1).astype(int)
        for process, (begin, end) in enumerate(itertools.pairwise(borders)):
            monkeypatch.setattr("jax.process_index", lambda process=process: process)
            yield ClientStates(FIRST, range(begin, end))

    def held_by(states):
        clients = states._rows.clients()
        table = states.gather(clients, np.arange(len(clients)), (len(clients),))
        rows = zip(table["a"], table["b"], strict=True)
        return {
            c: a.tobytes() + b.tobytes() for c, (a, b) in zip(clients.tolist(), rows, strict=True)
        }

    wanted = {}
    for states in of_processes(counts[0]):
        states.keep_in(tmp_path, 0)
        mine = [client for client in (1, 3, 9, 11, 18) if client in states._clients]
        wanted |= train(states, mine, 0)
        name = checkpoint(states, 5, [])
        train(states, mine, 1)  # Lost.
    first, done, kept = tmp_path / name, 5, [5]
    for round_ in (6, 7, 8):
        found, former = {}, name
        for states in of_processes(counts[1]):
            states.restore(tmp_path, former, done, kept)
            found |= held_by(states)
            name = checkpoint(states, round_, kept)
        assert found == wanted
        assert first.exists() == (5 in kept)  # As long as a checkpoint needs it.
        done, kept = round_, [done, round_]


def _damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "flipped":
        content[len(content) // 2] ^= 1
    path.write_bytes(content[: len(content) // 2] if how == "cut" else content)
    if how == "gone":
        path.unlink()


@pytest.mark.parametrize("file", ["0.rows", "0.index"])
@pytest.mark.parametrize("how", ["cut", "flipped", "gone"])
@pytest.mark.parametrize("processes", [1, 2])
def test_damage_is_found(tmp_path, monkeypatch, file, how, processes):
    states = kept_in(tmp_path)
    train(states, [4, 5, 6], 0)
    checkpoint(states, 1, [])
    _damage(tmp_path / "0-1" / file, how)
    monkeypatch.setattr("jax.process_count", lambda: processes)
    with pytest.raises((ValueError, OSError, UserError), match=f"0-1/{file}"):
        held(restored(tmp_path, "0-1", 1, [1]))


def test_a_row_that_was_damaged_is_told_when_it_is_read(tmp_path):
    states = kept_in(tmp_path)
    train(states, [4, 5, 6], 0)
    checkpoint(states, 1, [])
    _damage(tmp_path / "0-1" / "0.rows", "flipped")
    states = restored(tmp_path, "0-1", 1, [1])
    for client in (4, 6, 7):
        states.gather(np.array([client]), np.array([0]), (1,))
    with pytest.raises(
        UserError, match=r"the state of client 5 cannot be read: .*0\.rows does not"
    ):
        states.gather(np.array([5]), np.array([0]), (1,))
    train(states, [5], 1)
    states.gather(np.array([5]), np.array([0]), (1,))


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path):
    states = kept_in(tmp_path)
    wanted = train(states, [1, 2], 0)
    checkpoint(states, 1, [])
    before, limits = (
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
        resource.getrlimit(resource.RLIMIT_FSIZE),
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * ROW_BYTES + 10, limits[1]))
    try:
        with pytest.raises(
            UserError, match=f"Cannot write client states to {tmp_path}/0-1: File too"
        ):
            train(states, [*range(10)], 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert held(restored(tmp_path, "0-1", 1, [1])) == wanted


def test_rows_of_many_parts_that_the_system_takes_bit_by_bit(tmp_path, monkeypatch):
    """Linux reads and writes at most 2 GiB, and 1024 parts, in one call."""
    calls = []

    def some(call):
        def partly(file, parts, offset):
            calls.append(len(parts))
            assert len(parts) <= 1024
            return call(file, [part[: 1 + len(part) // 2] for part in parts[:1]], offset)

        return partly

    monkeypatch.setattr(os, "preadv", some(os.preadv))
    monkeypatch.setattr(os, "pwritev", some(os.pwritev))
    store = StateStore(tmp_path, "0-1", 0, range(9), 5 * 1500)
    row = [np.random.default_rng(i).integers(0, 256, 5, np.uint8) for i in range(1500)]
    store.write(4, row)
    found = [np.zeros(5, np.uint8) for _ in row]
    assert store.read(4, found)
    np.testing.assert_array_equal(found, row)
    assert len(calls) == 2 * 2 * 1500


def test_files_have_the_layout_that_is_documented(tmp_path):
    store = StateStore(tmp_path, "0-1", 0, range(3, 9), 4)
    for client in (7, 4, 7):
        store.write(client, [np.full(4, client, np.uint8)])
    store.commit(12, [])()
    rows = (tmp_path / "0-1" / "0.rows").read_bytes()
    assert rows == bytes([7] * 4 + [4] * 4)
    index = np.frombuffer((tmp_path / "0-1" / "0.index").read_bytes(), "<i8")
    moved = [4, 1, zlib.crc32(rows[4:]), 7, 0, zlib.crc32(rows[:4])]
    assert index.tolist() == [12, 2, zlib.crc32(index[3:].tobytes()), *moved]
