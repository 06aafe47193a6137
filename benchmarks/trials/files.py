"""Damages the files of all readers, byte by byte and field by field, and reads them.

    python -m benchmarks.trials files [--count=20000] [--seed=0] [--kinds=npz,leaf]

A worker process with limits of time and memory reads; what ends it is a crash or a hang, unless the
library, read as users read it, makes one line of it too. Outcomes by reader go to
benchmarks/results/trials_files.json, with examples of the bad ones. Of a mutation only the kind, the seed
and its number matter: --kinds=npz --first=17 --count=1 does number 17 again.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
import sqlite3
import tempfile
import time
import traceback
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.trials import RESULTS, save
from fedexp import paths
from fedexp.data import (
    FederatedDataset,
    FederatedSplits,
    arrays,
    conversion,
    fedjax_sqlite,
    iid,
    leaf,
    packed,
    tff_hdf5,
    tff_sqlite,
    tfrecord,
    workers,
    write_tfrecord,
)
from fedexp.data.features import Feature
from fedexp.data.vocabulary import read_tag_counts, read_word_counts
from fedexp.errors import UserError

LIMIT_S = 20.0
MEMORY = 12 << 30
SAME, DIFFERS, WRONG = "as before", "differs", "wrong despite checksums"
LINE, ENDED, TRACEBACK, CRASH, HANG = "one line", "worker ended", "traceback", "crash", "hang"
OUTCOMES = (SAME, DIFFERS, LINE, ENDED, WRONG, TRACEBACK, CRASH, HANG)
BAD = (WRONG, TRACEBACK, CRASH, HANG)

Rng = np.random.Generator
Mutation = Callable[[Path, Rng], None]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A format.

    Attributes:
      name: of the reader.
      write: makes small files in a folder.
      read: reads them as a user would, or nearly.
      fields: damages that leave the format whole.
      checksummed: whether the format's checksums tell every changed byte.
      as_users_do: reads where `read` may end the process.
      share: of the mutations, relative to others'; TensorFlow takes its time.
    """

    name: str
    write: Callable[[Path], None]
    read: Callable[[Path], Any]
    fields: Sequence[Mutation] = ()
    checksummed: bool = False
    as_users_do: Callable[[Path], Any] | None = None
    share: float = 1.0


# --- Damage to bytes ----------------------------------------------------------------------------


def _flip_bits(content: bytearray, rng: Rng) -> None:
    for place in rng.integers(0, 8 * len(content), rng.integers(1, 9)):
        content[place // 8] ^= 1 << (place % 8)


def _cut_off(content: bytearray, rng: Rng) -> None:
    del content[rng.integers(0, len(content)) :]


def _span(content: bytearray, rng: Rng) -> slice:
    start = int(rng.integers(0, len(content)))
    return slice(start, start + int(2 ** rng.uniform(0, 9)))


def _insert(content: bytearray, rng: Rng) -> None:
    start = _span(content, rng).start
    content[start:start] = rng.bytes(int(2 ** rng.uniform(0, 9)))


def _remove(content: bytearray, rng: Rng) -> None:
    del content[_span(content, rng)]


def _zero(content: bytearray, rng: Rng) -> None:
    span = _span(content, rng)
    content[span] = bytes(len(content[span]))


def _overwrite(content: bytearray, rng: Rng) -> None:
    span = _span(content, rng)
    content[span] = rng.bytes(len(content[span]))


def _repeat(content: bytearray, rng: Rng) -> None:
    span = _span(content, rng)
    content[span] = content[span] * 2


BYTES = (_flip_bits, _flip_bits, _cut_off, _insert, _remove, _zero, _overwrite, _repeat)


def _damaged(content: bytes, rng: Rng) -> bytes:
    changed = bytearray(content or b"\0")
    BYTES[rng.integers(len(BYTES))](changed, rng)
    return bytes(changed)


# --- Damage to fields ---------------------------------------------------------------------------

_DEEP = "@deep@"
ODD = (
    None,
    True,
    False,
    0,
    -1,
    3,
    2**31,
    2**63,
    2**70,
    0.5,
    -0.0,
    float("nan"),
    float("inf"),
    1e300,
)
ODD += ("", "x", "\ud800", "a\0", _DEEP, [], [[]], [1, [2]], [[0.5]], {}, {"x": [1]}, ["f0"])


def _odd(rng: Rng) -> Any:
    return ODD[rng.integers(len(ODD))]


def _json_places(node: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(node) if isinstance(node, dict) else range(len(node)):
        yield node, key
        if isinstance(node[key], dict | list):
            yield from _json_places(node[key])


def _json_field(path: Path, rng: Rng) -> None:
    tree = json.loads(path.read_bytes())
    places = list(_json_places(tree))
    node, key = places[rng.integers(len(places))]
    match rng.integers(4):
        case 0:
            del node[key]
        case 1 if isinstance(node, dict):
            node["x"] = node.pop(key)
        case 2:
            node[key] = [node[key]]
        case _:
            node[key] = _odd(rng)
    depth = int(rng.choice([100, 5000, 200_000]))
    path.write_text(json.dumps(tree).replace(f'"{_DEEP}"', "[" * depth + "]" * depth))


def _sqlite_field(path: Path, rng: Rng) -> None:
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        tables = [
            t for (t,) in database.execute("SELECT name FROM sqlite_master WHERE type='table'")
        ]
        table = tables[rng.integers(len(tables))]
        columns = [row[1] for row in database.execute(f"PRAGMA table_info({table})")]
        column = columns[rng.integers(len(columns))]
        rows = list(database.execute(f"SELECT rowid, {column} FROM {table}"))
        rowid, value = rows[rng.integers(len(rows))]
        match rng.integers(8):
            case 0:
                database.execute(f"DELETE FROM {table} WHERE rowid = ?", (rowid,))
            case 1:
                database.execute(f"ALTER TABLE {table} RENAME COLUMN {column} TO other")
            case 2:
                database.execute(f"CREATE TABLE copy AS SELECT * FROM {table}")
                database.execute(
                    f"INSERT INTO copy SELECT * FROM {table} WHERE rowid = ?", (rowid,)
                )
                database.execute(f"DROP TABLE {table}")
                database.execute(f"ALTER TABLE copy RENAME TO {table}")
            case 3:
                database.execute(f"DROP TABLE {table}")
            case _:
                odd: Any = (None, -1, 2**40, 0.5, float("inf"), "", "x", b"", b"\xff", b"1", "1", 1)
                change = isinstance(value, bytes) and rng.random() < 0.5
                value = _damaged(value, rng) if change else odd[rng.integers(len(odd))]
                with contextlib.suppress(sqlite3.IntegrityError):
                    database.execute(
                        f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (value, rowid)
                    )


def _text_encoding(path: Path, rng: Rng) -> None:
    """A client id that SQLite takes for text, and that is no UTF-8."""
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        tables = [
            t for (t,) in database.execute("SELECT name FROM sqlite_master WHERE type='table'")
        ]
        table = tables[rng.integers(len(tables))]
        database.execute(f"UPDATE {table} SET client_id = CAST(x'ff41' AS TEXT) WHERE rowid = 1")


def _fedjax_field(path: Path, rng: Rng) -> None:
    """A client's MessagePack, compressed again."""
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        rows = list(database.execute("SELECT rowid, data FROM federated_data"))
        rowid, data = rows[rng.integers(len(rows))]
        data = zlib.compress(_damaged(zlib.decompress(data), rng))
        database.execute("UPDATE federated_data SET data = ? WHERE rowid = ?", (data, rowid))


def _npz_field(path: Path, rng: Rng) -> None:
    """An array's file in the archive, with the right checksum."""
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    name = list(contents)[rng.integers(len(contents))]
    head = contents[name][:128] if rng.random() < 0.5 else contents[name]
    contents[name] = _damaged(head, rng) + contents[name][len(head) :]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)


def _npz_array(path: Path, rng: Rng) -> None:
    """Another array in an array's place."""
    content = dict(np.load(path))
    name = list(content)[rng.integers(len(content))]
    array = content[name]
    odd: Any = (
        array.astype(str), array.astype(object), array.astype("S4"), array.astype("M8[s]"), array * np.nan,
        array.astype(complex), array.astype(np.int64) + 2**40, array[:-1], array[None], np.float32(3),
        array.astype([("a", "f4")]), array[:0], array.astype(np.float64) * 1e300, array.astype(">f4"),
    )  # fmt: skip
    content[name] = odd[rng.integers(len(odd))]
    np.savez(path, **content)


def _records(path: Path) -> list[bytes]:
    content, records, start = path.read_bytes(), [], 0
    while start < len(content):
        size = int.from_bytes(content[start : start + 8], "little")
        records.append(content[start + 12 : start + 12 + size])
        start += size + 16
    return records


def _write_records(path: Path, records: Sequence[bytes]) -> None:
    import tensorflow as tf

    with tf.io.TFRecordWriter(str(path)) as writer:
        for record in records:
            writer.write(record)


def _record_bytes(path: Path, rng: Rng) -> None:
    """A record, with the right checksum."""
    records = _records(path)
    place = rng.integers(len(records))
    records[place] = _damaged(records[place], rng)
    _write_records(path, records)


def _odd_example(record: bytes, rng: Rng) -> bytes:
    """An example of which a feature is another."""
    import tensorflow as tf

    example = tf.train.Example.FromString(record)
    stored = example.features.feature
    name = sorted(stored)[rng.integers(len(stored))]
    match rng.integers(6):
        case 0:
            del stored[name]
        case 1:
            stored[name].Clear()
        case 2:
            stored[name].float_list.value[:] = [float("nan")] * int(rng.integers(0, 8))
        case 3:
            stored[name].int64_list.value[:] = [2**40] * int(rng.integers(0, 8))
        case 4:
            stored[name].bytes_list.value[:] = [b"\xff"] * int(rng.integers(0, 8))
        case _:
            stored["\u00e9"].CopyFrom(stored[name])
    return example.SerializeToString()


def _record_fields(path: Path, rng: Rng) -> None:
    records = _records(path)
    place = rng.integers(len(records))
    records[place] = _odd_example(records[place], rng)
    _write_records(path, records)


def _tff_fields(path: Path, rng: Rng) -> None:
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        rows = list(database.execute("SELECT rowid, serialized_example_proto FROM examples"))
        rowid, record = rows[rng.integers(len(rows))]
        database.execute(
            "UPDATE examples SET serialized_example_proto = ? WHERE rowid = ?",
            (_odd_example(record, rng), rowid),
        )


def _hdf5_field(path: Path, rng: Rng) -> None:
    import h5py

    with h5py.File(path, "r+") as file:
        root = file["examples"]
        clients = sorted(root)
        client = root[clients[rng.integers(len(clients))]]
        name = ("pixels", "label")[rng.integers(2)]
        array = client[name][:]
        odd: Any = (
            array.astype("S4"), array * np.nan, array[:-1], array[None], np.float32(3), array[:0],
            array.astype(np.float64) * 1e300, array.astype(np.int64) + 2**40, array.astype(">f4"),
            h5py.SoftLink(client.name), h5py.SoftLink("/nowhere"), h5py.ExternalLink("none.h5", "/"),
            h5py.Empty("f4"), array.astype(bool), array.astype([("a", "f4")]), root[clients[0]],
        )  # fmt: skip
        del client[name]
        client[name] = odd[rng.integers(len(odd))]


# --- The formats --------------------------------------------------------------------------------

X, Y = ("pixels", (2, 3), "float32"), ("label", (), "int32")


def _dataset(seed: int) -> FederatedDataset:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(6, 2, 3)).astype(np.float32)
    y = rng.integers(0, 5, 6).astype(np.int32)
    return FederatedDataset({"x": x, "y": y}, [0, 3, 4, 6], np.array(["f0", "f1", "é2"]))


PARTITIONS = {"train": _dataset(0), "test": _dataset(1)}


def _write_npz(folder: Path) -> None:
    np.savez_compressed(folder / "train.npz", **PARTITIONS["train"].features)
    np.savez(folder / "test.npz", **PARTITIONS["test"].features)


def _read_npz(folder: Path) -> FederatedSplits:
    return arrays(str(folder / "train.npz"), iid(3), str(folder / "test.npz"))


def _write_leaf(folder: Path) -> None:
    for split, dataset in PARTITIONS.items():
        (folder / split).mkdir()
        clients = {
            str(cid): {"pixels": e["x"].tolist(), "label": e["y"].tolist()}
            for cid, e in dataset.clients()
        }
        shard = {
            "users": list(clients),
            "num_samples": dataset.client_sizes.tolist(),
            "user_data": clients,
        }
        (folder / split / "0.json").write_text(json.dumps(shard))


def _read_leaf(folder: Path) -> FederatedSplits:
    return leaf(str(folder / "train"), str(folder / "test"), {"x": X, "y": Y})


def _write_fedjax(folder: Path) -> None:
    import msgpack

    def extension(array: np.ndarray) -> msgpack.ExtType:
        return msgpack.ExtType(1, msgpack.packb((array.shape, array.dtype.name, array.tobytes())))

    for split, dataset in PARTITIONS.items():
        with contextlib.closing(sqlite3.connect(folder / f"{split}.sqlite")) as database, database:
            database.execute(
                "CREATE TABLE federated_data (client_id BLOB NOT NULL PRIMARY KEY, data BLOB NOT "
                "NULL, num_examples INTEGER NOT NULL)"
            )
            for cid, e in dataset.clients():
                data = msgpack.packb({"pixels": extension(e["x"]), "label": extension(e["y"])})
                row = cid.encode(), zlib.compress(data), len(e["y"])
                database.execute("INSERT INTO federated_data VALUES (?, ?, ?)", row)


def _read_fedjax(folder: Path) -> FederatedSplits:
    return fedjax_sqlite(
        str(folder / "train.sqlite"), str(folder / "test.sqlite"), {"x": X, "y": Y}
    )


def _write_tfrecord(folder: Path) -> None:
    for split, dataset in PARTITIONS.items():
        named = {"pixels": dataset.features["x"], "label": dataset.features["y"]}
        write_tfrecord(dataclasses.replace(dataset, features=named), folder / split)


def _read_tfrecord(folder: Path) -> FederatedSplits:
    patterns = (str(folder / f"{split}-*.tfrecord") for split in PARTITIONS)
    return tfrecord(*patterns, {"x": X, "y": Y})


def _write_grouped(folder: Path) -> None:
    import tensorflow as tf

    _write_tfrecord(folder)
    for split, dataset in PARTITIONS.items():
        (path,) = folder.glob(f"{split}-*")
        records = _records(path)
        clients = []
        for start, stop in zip(dataset.offsets[:-1], dataset.offsets[1:], strict=True):
            sequence = tf.train.SequenceExample()
            for record in records[start:stop]:
                feature = sequence.feature_lists.feature_list["serialized_bytes"].feature.add()
                feature.bytes_list.value.append(record)
            clients.append(sequence.SerializeToString())
        _write_records(path, clients)


def _read_grouped(folder: Path) -> FederatedSplits:
    patterns = (str(folder / f"{split}-*.tfrecord") for split in PARTITIONS)
    return tfrecord(*patterns, {"x": X, "y": Y}, client_id=None)


def _write_tff_sqlite(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        _write_tfrecord(Path(scratch))
        with contextlib.closing(sqlite3.connect(folder / "data.sqlite")) as database, database:
            database.execute(
                "CREATE TABLE examples (split_name TEXT NOT NULL, client_id TEXT NOT NULL, "
                "serialized_example_proto BLOB NOT NULL)"
            )
            database.execute(
                "CREATE TABLE client_metadata (client_id TEXT NOT NULL, split_name TEXT NOT NULL, "
                "num_examples INTEGER NOT NULL)"
            )
            for split, dataset in PARTITIONS.items():
                (path,) = Path(scratch).glob(f"{split}-*")
                ids = dataset.client_ids[dataset.client_of_example].tolist()
                rows = zip([split] * len(ids), ids, _records(path), strict=True)
                database.executemany("INSERT INTO examples VALUES (?, ?, ?)", rows)
                sizes = dataset.client_sizes.tolist()
                rows = zip(dataset.client_ids.tolist(), [split] * len(sizes), sizes, strict=True)
                database.executemany("INSERT INTO client_metadata VALUES (?, ?, ?)", rows)


def _read_tff_sqlite(folder: Path) -> FederatedSplits:
    return tff_sqlite(str(folder / "data.sqlite"), {"x": X, "y": Y})


HDF5 = {"x": Feature("pixels", (2, 3), np.float32), "y": Feature("label", (), np.integer)}


def _write_hdf5(folder: Path) -> None:
    import h5py

    for split, dataset in PARTITIONS.items():
        with h5py.File(folder / f"toy_{split}.h5", "w") as file:
            for cid, e in dataset.clients():
                group = file.create_group(f"examples/{cid}")
                options: Any = {"compression": "gzip"} if split == "train" else {}
                group.create_dataset("pixels", data=e["x"], **options)
                group.create_dataset("label", data=e["y"], **options)


def _read_hdf5(folder: Path) -> FederatedSplits:
    return FederatedSplits(*(tff_hdf5.read(folder / f"toy_{s}.h5", HDF5) for s in PARTITIONS))


def _load_hdf5(folder: Path) -> FederatedSplits:
    return tff_hdf5.load_splits("toy", HDF5, version=1, sha256="", data_dir=str(folder))


def _write_packed(folder: Path) -> None:
    packed.write(folder / "packed", FederatedSplits(**PARTITIONS))


def _read_packed(folder: Path) -> FederatedSplits:
    return packed.read(folder / "packed")


@dataclasses.dataclass
class _Source:
    """A source of which a client at a time is read, up to one that interrupts."""

    stop_at: str = ""

    def client_ids(self) -> list[str]:
        return PARTITIONS["train"].client_ids.tolist()

    def read(self, client_ids: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
        clients = dict(PARTITIONS["train"].clients())
        for client_id in client_ids:
            if client_id == self.stop_at:
                raise KeyboardInterrupt
            yield clients[client_id]


def _write_interrupted(folder: Path) -> None:
    with contextlib.suppress(KeyboardInterrupt):
        _convert(_Source("é2"), folder)


def _read_interrupted(folder: Path) -> FederatedSplits:
    _convert(_Source(), folder)
    return FederatedSplits(*[packed.read_dataset(folder / "packed")] * 2)


def _convert(source: _Source, folder: Path) -> None:
    conversion.convert(source, folder / "packed", num_workers=0, clients_per_chunk=1)


def _write_vocabulary(folder: Path) -> None:
    (folder / "words.word_count").write_text("the 90\nof 80\nnaïve 7\nto 6\nand 5\n")
    (folder / "tags.json").write_text(json.dumps({"c": 3, "python": 9, "jax": 5, "gin": 1}))


def _read_vocabulary(folder: Path) -> Any:
    words = read_word_counts(folder / "words.word_count", 4)
    tags = read_tag_counts(folder / "tags.json", 3)
    return [entry.encode() for entry in (*words, *tags)]


_ALL = (
    Kind("npz", _write_npz, _read_npz, (_npz_field, _npz_array), checksummed=True),
    Kind("packed", _write_packed, _read_packed, (_json_field,), checksummed=True),
    Kind("conversion", _write_interrupted, _read_interrupted, checksummed=True),
    Kind("leaf", _write_leaf, _read_leaf, (_json_field, _json_field)),
    Kind("tff_hdf5", _write_hdf5, _read_hdf5, (_hdf5_field,), as_users_do=_load_hdf5),
    Kind(
        "fedjax_sqlite", _write_fedjax, _read_fedjax, (_sqlite_field, _fedjax_field, _text_encoding)
    ),
    Kind(
        "tff_sqlite",
        _write_tff_sqlite,
        _read_tff_sqlite,
        (_sqlite_field, _tff_fields, _text_encoding),
        share=0.25,
    ),
    Kind(
        "tfrecord",
        _write_tfrecord,
        _read_tfrecord,
        (_record_bytes, _record_fields),
        checksummed=True,
        share=0.25,
    ),
    Kind(
        "tfrecord_grouped",
        _write_grouped,
        _read_grouped,
        (_record_bytes,),
        checksummed=True,
        share=0.25,
    ),
    Kind("vocabulary", _write_vocabulary, _read_vocabulary, (_json_field,)),
)
KINDS = {kind.name: kind for kind in _ALL}
SUFFIXES = {_json_field: ".json", _npz_field: ".npz", _npz_array: ".npz"}


# --- A trial ------------------------------------------------------------------------------------


def _mutate(kind: Kind, folder: Path, rng: Rng) -> bool:
    """Damages one of the files; returns whether checksums can tell."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    if kind.fields and rng.random() < 0.5:
        mutation = kind.fields[rng.integers(len(kind.fields))]
        files = [path for path in files if path.name.endswith(SUFFIXES.get(mutation, ""))]
        mutation(files[rng.integers(len(files))], rng)
        return kind.checksummed and mutation is _json_field
    path = files[rng.integers(len(files))]
    path.write_bytes(_damaged(path.read_bytes(), rng))
    return kind.checksummed


def _digest(found: Any) -> str:
    if isinstance(found, FederatedSplits):
        found = [
            (
                split,
                d.client_ids.tolist(),
                d.offsets.tolist(),
                n,
                str(a.dtype),
                a.shape,
                a.tobytes(),
            )
            for split, d in found.present().items()
            for n, a in d.features.items()
        ]
    return hashlib.sha256(repr(found).encode("utf-8", "backslashreplace")).hexdigest()


def trial(kind: Kind, seed: int, number: int, *, as_users_do: bool = False) -> tuple[str, str]:
    """One trial: its outcome, and the message of an error."""
    rng = np.random.default_rng([seed, zlib.crc32(kind.name.encode()), number])
    read = (as_users_do and kind.as_users_do) or kind.read
    with _copied(kind) as folder:
        covered = _mutate(kind, folder, rng)
        try:
            found = _digest(read(folder))
        except UserError as error:
            line = str(error).partition(_GIN)[0]
            return (TRACEBACK if "\n" in line else LINE), line
        except Exception:
            return TRACEBACK, traceback.format_exc()
    same = found == _digest_of_undamaged(kind)
    return (SAME if same else WRONG if covered else DIFFERS), ""


# What Gin adds to an error, and `fedexp` leaves out again.
_GIN = "\n  In call to configurable"


@contextlib.contextmanager
def _copied(kind: Kind) -> Iterator[Path]:
    """The undamaged files in a folder of their own, and an empty cache beside it."""
    with tempfile.TemporaryDirectory(prefix="trial-") as scratch:
        os.environ["FEDEXP_CACHE"] = str(Path(scratch) / "cache")
        shutil.copytree(_undamaged(kind).name, Path(scratch) / "data")
        yield Path(scratch) / "data"


@functools.cache
def _undamaged(kind: Kind) -> tempfile.TemporaryDirectory:
    folder = tempfile.TemporaryDirectory(prefix=f"undamaged-{kind.name}-")
    kind.write(Path(folder.name))
    return folder


@functools.cache
def _digest_of_undamaged(kind: Kind) -> str:
    with _copied(kind) as folder:
        return _digest(kind.read(folder))


def _work(channel: Connection, kind: Kind) -> None:
    """Does trials until it is told to end, or ended by one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    paths.sync = lambda path: None  # Nothing here has to outlive a power cut.
    _digest_of_undamaged(kind)
    channel.send(None)
    while (asked := channel.recv()) is not None:
        channel.send(trial(kind, *asked))


def _outcomes(kind: Kind, seed: int, numbers: Iterable[int]) -> Iterator[tuple[int, str, str]]:
    """(number, outcome, message) of every trial of a kind."""
    worker = None
    for number in numbers:
        process, channel = worker = worker or _start(kind)
        channel.send((seed, number))
        try:
            if channel.poll(LIMIT_S):
                yield number, *channel.recv()
                continue
            outcome = HANG
        except EOFError:
            outcome = CRASH
        process.kill()
        process.join()
        worker = None
        line = ""
        if kind.as_users_do is not None:
            found, line = _as_users_do(kind, seed, number)
            outcome = ENDED if found == LINE else outcome
        yield number, outcome, line or f"exit code {process.exitcode}"
    if worker is not None:
        process, channel = worker
        channel.send(None)
        process.join()


def _start(kind: Kind) -> tuple[multiprocessing.process.BaseProcess, Connection]:
    context = multiprocessing.get_context("spawn")
    channel, other = context.Pipe()
    process = context.Process(target=_work, args=(other, kind), daemon=True)
    process.start()
    other.close()
    channel.recv()
    return process, channel


def _as_users_do(kind: Kind, seed: int, number: int) -> tuple[str, str]:
    """The same trial as users have it, where the library reads in a process of its own."""
    limit, workers.LIMIT_S = workers.LIMIT_S, LIMIT_S / 4
    try:
        return trial(kind, seed, number, as_users_do=True)
    finally:
        workers.LIMIT_S = limit


# --- The command --------------------------------------------------------------------------------


def trials(kind: Kind, count: int, seed: int, first: int = 0) -> dict[str, Any]:
    """Outcomes of `count` trials of a kind, with some examples of those that tell of a mistake."""
    counts: collections.Counter[str] = collections.Counter()
    examples: dict[str, list[Any]] = collections.defaultdict(list)
    start = time.perf_counter()
    for number, outcome, message in _outcomes(kind, seed, range(first, first + count)):
        counts[outcome] += 1
        if outcome in (*BAD, ENDED) and len(examples[outcome]) < 5:
            examples[outcome].append({"number": number, "message": message})
    return {
        "outcomes": {outcome: counts[outcome] for outcome in OUTCOMES},
        "seconds": round(time.perf_counter() - start, 1),
        "examples": examples,
    }


def table(report: dict[str, dict[str, Any]]) -> str:
    """Outcomes as Markdown, a reader a line."""
    lines = [
        f"| reader | {' | '.join(OUTCOMES)} |",
        f"| --- |{' ---: |' * len(OUTCOMES)}",
    ]
    for name, found in report.items():
        counts = found["outcomes"].values()
        lines.append(f"| {name} | {' | '.join(map(str, counts))} |")
    totals = [sum(found["outcomes"][o] for found in report.values()) for o in OUTCOMES]
    return "\n".join([*lines, f"| all | {' | '.join(map(str, totals))} |"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--count", type=int, default=20_000, help="mutations of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(KINDS), help="of " + ", ".join(KINDS))
    parser.add_argument("--first", type=int, default=0, help="number of the first mutation")
    parser.add_argument("--output", type=Path, default=RESULTS / "trials_files.json")


def run(args: argparse.Namespace) -> None:
    kinds = args.kinds.split(",")
    if unknown := set(kinds) - set(KINDS):
        raise SystemExit(f"no kind {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    about = machine.machine(("numpy", "h5py", "tensorflow"))
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    report = {}
    shares = sum(KINDS[name].share for name in kinds)
    for name in kinds:
        count = math.ceil(args.count * KINDS[name].share / shares)
        report[name] = trials(KINDS[name], count, args.seed, args.first)
        print(f"{name}: {report[name]['outcomes']} in {report[name]['seconds']} s", flush=True)
        for outcome, examples in report[name]["examples"].items():
            for example in examples if outcome in BAD else []:
                last = example["message"].strip().splitlines()[-1:]
                print(f"  {outcome}, number {example['number']}: {' '.join(last)}", flush=True)
        # After every reader, as an interrupted run counts too.
        content = {"machine": about, "seed": args.seed, "readers": report}
        save(args.output, content)
    print(table(report))
