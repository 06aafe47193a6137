"""Streaming conversion, interrupted in every way, against `packed.write` of the same clients."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedexp.data import conversion, packed
from fedexp.data.dataset import FederatedDataset, FederatedSplits
from fedexp.errors import UserError
from tests.support.disk import assert_safe, recorded
from tests.support.sources import Clients, Imports, Noted

SIZES = (3, 1, 0, 4, 2, 2, 0, 5, 1)


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _expected(tmp_path: Path, source: Clients) -> dict[str, bytes]:
    """What packing the same clients in memory writes."""
    clients = {cid: source.client(i) for i, cid in enumerate(source.client_ids())}
    dataset = FederatedDataset.from_clients(clients, drop_empty=True)
    packed.write(tmp_path / "expected", FederatedSplits(dataset, dataset))
    return _contents(tmp_path / "expected" / "train")


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=12).filter(any),
    clients_per_chunk=st.integers(1, 14),
)
def test_equals_packing_in_memory_byte_for_byte(sizes, clients_per_chunk):
    source = Clients(tuple(sizes))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        conversion.convert(source, folder / "a", num_workers=0, clients_per_chunk=clients_per_chunk)
        assert _contents(folder / "a") == _expected(folder, source)
        assert sorted(path.name for path in folder.iterdir()) == ["a", "expected"]


def test_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done = recorded(monkeypatch)
    conversion.convert(Clients(SIZES), tmp_path / "a", num_workers=0)
    assert_safe(done, tmp_path / "a")


def test_workers_change_nothing(tmp_path):
    source = Clients(SIZES)
    conversion.convert(source, tmp_path / "a", num_workers=2, clients_per_chunk=2)
    assert _contents(tmp_path / "a") == _expected(tmp_path, source)


def test_workers_do_not_run_ahead(tmp_path, monkeypatch):
    append, ahead = conversion._Part.append, []

    def slow(part, chunk):
        time.sleep(0.1)  # Long enough for a worker to read all the rest.
        ahead.append(len(list(notes.iterdir())) - part.num_clients)
        append(part, chunk)

    monkeypatch.setattr(conversion._Part, "append", slow)
    notes = tmp_path / "notes"
    notes.mkdir()
    source = Noted((1,) * 20, folder=str(notes))
    conversion.convert(source, tmp_path / "a", num_workers=1, clients_per_chunk=1)
    assert len(ahead) == 20 and max(ahead) <= 3


def test_a_worker_is_another_process_without_jax(tmp_path):
    conversion.convert(Imports(), tmp_path / "a", num_workers=3)
    row = packed.read_dataset(tmp_path / "a").features
    assert not row["jax"][0]
    assert row["pid"][0] != os.getpid()


class Interrupted(Clients):
    """Raises at a client, and remembers which it has read."""

    def __init__(self, at=None, error=KeyboardInterrupt):
        super().__init__(SIZES)
        object.__setattr__(self, "at", at)
        object.__setattr__(self, "error", error)
        object.__setattr__(self, "seen", [])

    def client(self, i):
        self.seen.append(i)
        if i == self.at:
            raise self.error
        return super().client(i)


def _interrupted(tmp_path: Path) -> tuple[Path, Path]:
    """A conversion of two clients a chunk that has been interrupted in the third chunk."""
    with pytest.raises(KeyboardInterrupt):
        conversion.convert(Interrupted(5), tmp_path / "a", num_workers=0, clients_per_chunk=2)
    assert not (tmp_path / "a").exists()
    return tmp_path / "a", tmp_path / ".a.part"


def _damage_none(part: Path) -> None:
    pass


def _damage_rows_torn(part: Path) -> None:
    with (part / "feature_0.npy").open("ab") as file:
        file.write(b"half a row")


def _damage_journal_torn(part: Path) -> None:
    with (part / "journal.jsonl").open("ab") as file:
        file.write(b'{"num_clients": 2, "siz')


def _damage_newline_lost(part: Path) -> None:
    content = (part / "journal.jsonl").read_bytes()
    (part / "journal.jsonl").write_bytes(content[:-1])


def _damage_rows_lost(part: Path) -> None:
    path = part / "feature_2.npy"
    os.truncate(path, path.stat().st_size - 1)


def _damage_rows_changed(part: Path) -> None:
    with (part / "feature_0.npy").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")


def _damage_client_id_changed(part: Path) -> None:
    path = part / "journal.jsonl"
    path.write_bytes(path.read_bytes().replace(b"c003", b"c007"))


def _damage_line_lost(part: Path) -> None:
    path = part / "journal.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[1:]))


def _damage_file_lost(part: Path) -> None:
    (part / "feature_1.npy").unlink()


@pytest.mark.parametrize(
    ("damage", "first"),
    [
        (_damage_none, 4),
        (_damage_rows_torn, 4),
        (_damage_journal_torn, 4),
        (_damage_newline_lost, 2),
        (_damage_rows_lost, 2),
        (_damage_rows_changed, 2),
        (_damage_file_lost, 0),
        (_damage_client_id_changed, 2),
        (_damage_line_lost, 0),
    ],
)
def test_an_interrupted_conversion_goes_on_after_the_last_whole_chunk(tmp_path, damage, first):
    directory, part = _interrupted(tmp_path)
    damage(part)
    source = Interrupted()
    conversion.convert(source, directory, num_workers=0, clients_per_chunk=3)
    assert source.seen == list(range(first, len(SIZES)))
    assert _contents(directory) == _expected(tmp_path, Clients(SIZES))
    assert not part.exists()


def test_a_full_disk_keeps_what_is_done(tmp_path, monkeypatch):
    flush, calls = conversion._flush, []

    def full_disk(file):
        calls.append(file)
        if len(calls) == 7:
            raise OSError(28, "No space left on device")
        flush(file)

    monkeypatch.setattr(conversion, "_flush", full_disk)
    with pytest.raises(UserError, match=r"cannot write .*No space left.*FEDEXP_CACHE"):
        conversion.convert(Clients(SIZES), tmp_path / "a", num_workers=0, clients_per_chunk=2)
    source = Interrupted()
    conversion.convert(source, tmp_path / "a", num_workers=0)
    assert source.seen[0] == 2
    assert _contents(tmp_path / "a") == _expected(tmp_path, Clients(SIZES))


def test_interrupted_while_it_is_completed(tmp_path, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(conversion.packed, "seal", killed)
        conversion.convert(Clients(SIZES), tmp_path / "a", num_workers=0)
    source = Interrupted()
    conversion.convert(source, tmp_path / "a", num_workers=0)
    assert not source.seen
    assert _contents(tmp_path / "a") == _expected(tmp_path, Clients(SIZES))


def test_clients_that_do_not_fit_each_other(tmp_path):
    source = Clients(SIZES, odd_shape_from=4)
    for clients_per_chunk in (2, 9):
        with pytest.raises(UserError, match=r"client.* c?'?c004.* have|client 'c004' has"):
            conversion.convert(
                source, tmp_path / "a", num_workers=0, clients_per_chunk=clients_per_chunk
            )


def test_bad_arguments(tmp_path):
    with pytest.raises(UserError, match="no client has examples"):
        conversion.convert(Clients((0, 0)), tmp_path / "a", num_workers=0)
    with pytest.raises(UserError, match="num_workers must not be negative"):
        conversion.convert(Clients(SIZES), tmp_path / "b", num_workers=-1)
    (tmp_path / "c").mkdir()
    with pytest.raises(UserError, match="exists already"):
        conversion.convert(Clients(SIZES), tmp_path / "c")


def test_what_a_worker_raises_arrives(tmp_path):
    with pytest.raises(UserError, match="client 'c001' has features"):
        conversion.convert(Clients((1, 1), odd_shape_from=1), tmp_path / "a", num_workers=1)
    with pytest.raises(IndexError) as error:
        conversion.convert(Clients((1,), num_ids=2), tmp_path / "b", num_workers=1)
    assert "in a worker process" in error.value.__notes__[0]


def test_listing_the_clients_may_end_its_process(tmp_path):
    source = Clients(SIZES, kill_at=-1)
    with pytest.raises(UserError, match="exit code -9"):
        conversion.convert(source, tmp_path / "a", num_workers=1)


def test_a_killed_worker_is_reported_and_the_rest_done_later(tmp_path):
    with pytest.raises(UserError, match=r"exit code -9.*smaller num_workers"):
        conversion.convert(
            Clients(SIZES, kill_at=7), tmp_path / "a", num_workers=1, clients_per_chunk=2
        )
    source = Interrupted()
    conversion.convert(source, tmp_path / "a", num_workers=0)
    assert source.seen[0] == 6
    assert _contents(tmp_path / "a") == _expected(tmp_path, Clients(SIZES))


def test_load_or_convert_converts_once(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDEXP_CACHE", str(tmp_path / "cache"))
    made = []

    def make_source():
        made.append(1)
        return Clients(SIZES)

    for _ in range(2):
        dataset = conversion.load_or_convert("name", {"v": 1}, make_source, num_workers=0)
        assert dataset.client_sizes.tolist() == [size for size in SIZES if size]
        assert isinstance(dataset.features["x"], np.memmap)
    assert made == [1]


_PROGRAM = """
import sys
from pathlib import Path
from fedexp.data import conversion
from tests.support.disk import assert_safe, recorded
from tests.support.sources import Clients

source = Clients((2,) * 40, seconds=0.05)
conversion.convert(source, Path(sys.argv[1]), num_workers=2, clients_per_chunk=1)
"""


def _children(pid: int) -> list[str]:
    """Of all of its threads."""
    children = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # The thread has ended.
            children += path.read_text().split()
    return children


def _assert_gone(pids: list[str]) -> None:
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("when", ["starting", "at work"])
def test_ctrl_c_is_for_the_parent_alone(tmp_path, when):
    with (tmp_path / "stderr").open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, tmp_path / "a"],
            cwd=Path(__file__).parents[2],
            stderr=stderr,
            start_new_session=True,
        )
    journal = tmp_path / ".a.part" / "journal.jsonl"
    while len(children := _children(process.pid)) < 4 or (
        when == "at work" and journal.read_bytes().count(b"\n") < 3
    ):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # As a terminal does.
    assert process.wait(30) == -signal.SIGINT
    _assert_gone(children)
    written = (tmp_path / "stderr").read_text()
    assert written.count("Traceback") == 1 and "LokyProcess" not in written, written


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_process_leaves_no_workers_and_is_resumed(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, tmp_path / "a"], cwd=Path(__file__).parents[2]
    )
    journal = tmp_path / ".a.part" / "journal.jsonl"
    while not journal.exists() or journal.read_bytes().count(b"\n") < 3:
        assert process.poll() is None
        time.sleep(0.01)
    children = _children(process.pid)
    workers = [
        pid for pid in children if b"LokyProcess" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(workers) == 2
    _assert_gone(children)

    class Rest(Clients):
        def client(self, i):
            seen.append(i)
            return super().client(i)

    seen = []
    done = sum(
        json.loads(line.partition(b" ")[2])["num_clients"]
        for line in journal.read_bytes().splitlines(True)
        if line.endswith(b"\n")
    )
    conversion.convert(Rest((2,) * 40), tmp_path / "a", num_workers=0)
    assert seen == list(range(done, 40))
    assert _contents(tmp_path / "a") == _expected(tmp_path, Clients((2,) * 40))
