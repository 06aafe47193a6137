"""The reader of FedJAX's SQLite layout; that of TFF's needs TensorFlow, see test_tfrecord.py."""

import sqlite3
import zlib

import msgpack
import numpy as np
import pytest

from fedexp.data import sqlite
from fedexp.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDEXP_CACHE", str(tmp_path / "cache"))


def _clients() -> dict[bytes, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return {
        client_id: {
            "image": rng.integers(0, 256, (size, 2, 3), np.uint8),
            "label": rng.integers(0, 5, size),
            "weight": rng.normal(size=size).astype(np.float16),
            "text": np.array([b"word \xff" * (i + 1) for i in range(size)], object),
        }
        for client_id, size in {b"b:1": 2, b"a\xf0": 3, b"a": 1}.items()
    }


def _pack(array: object) -> object:
    """As FedJAX's serialization module documents its format."""
    if not isinstance(array, np.ndarray):
        return array
    if array.dtype == object:
        return msgpack.ExtType(4, msgpack.packb((array.shape, array.ravel().tolist())))
    content = (array.shape, array.dtype.name, array.tobytes())
    return msgpack.ExtType(1, msgpack.packb(content))


def _data(examples: dict[str, object]) -> bytes:
    return zlib.compress(msgpack.packb({name: _pack(a) for name, a in examples.items()}))


def _write(path, rows, table="federated_data") -> str:
    path.unlink(missing_ok=True)
    with sqlite3.connect(path) as database:
        database.execute(
            f"CREATE TABLE {table} (client_id BLOB NOT NULL PRIMARY KEY, data BLOB, "
            "num_examples INTEGER NOT NULL)"
        )
        database.executemany(f"INSERT INTO {table} VALUES (?, ?, ?)", rows)
    return str(path)


def _rows(clients) -> list[tuple[bytes, bytes, int]]:
    return [(cid, _data(examples), len(examples["label"])) for cid, examples in clients.items()]


NUMBERS = {"x": ("image", (2, 3), "uint8"), "y": ("label", (), "int32")}


def test_reads_what_fedjax_writes(tmp_path):
    clients = _clients()
    path = _write(tmp_path / "a?#.sqlite", _rows(clients))
    text = lambda rows: np.array([len(row) for row in rows], np.int32)  # noqa: E731
    features = NUMBERS | {"w": ("weight", (), "float16"), "length": ("text", (), "object", text)}
    train, test, _ = sqlite.fedjax_sqlite(path, path, features)
    assert train.client_ids.tolist() == ["a", "a\\xf0", "b:1"] == test.client_ids.tolist()
    for examples, expected in zip(
        train.clients(), (clients[b"a"], clients[b"a\xf0"], clients[b"b:1"]), strict=True
    ):
        np.testing.assert_array_equal(examples[1]["x"], expected["image"])
        np.testing.assert_array_equal(examples[1]["y"], expected["label"])
        np.testing.assert_array_equal(examples[1]["w"], expected["weight"])
        assert examples[1]["length"].tolist() == [len(row) for row in expected["text"]]
    assert train.features["y"].dtype == np.int32


def test_reads_every_feature_unless_told_and_packs_once(tmp_path, monkeypatch):
    clients = {cid: {k: e[k] for k in ("image", "label")} for cid, e in _clients().items()}
    path = _write(tmp_path / "a.sqlite", _rows(clients))
    for _ in range(2):
        train = sqlite.fedjax_sqlite(path, path).train
        assert {name: a.dtype for name, a in train.features.items()} == {
            "image": np.uint8,
            "label": np.int64,
        }
        np.testing.assert_array_equal(train.client(0)["image"], clients[b"a"]["image"])
        monkeypatch.setattr(sqlite, "_read_fedjax", None)


def test_bfloat16_is_widened(tmp_path):
    # 1.0, -2.0 and the smallest normal number, as the upper halves of float32.
    halves = np.array([0x3F80, 0xC000, 0x0080], "<u2")
    array = msgpack.ExtType(1, msgpack.packb(((3,), "bfloat16", halves.tobytes())))
    path = _write(tmp_path / "a.sqlite", [(b"a", _data({"x": array}), 3)])
    x = sqlite.fedjax_sqlite(path, path).train.features["x"]
    assert x.tolist() == [1.0, -2.0, 2.0**-126]
    assert x.dtype == np.float32


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((b"c", b"no zlib", 1), "client 'c' has data that are not FedJAX's"),
        ((b"c", zlib.compress(b"\xc1"), 1), "client 'c' has data that are not FedJAX's"),
        ((b"c", zlib.compress(msgpack.packb([1])), 1), "client 'c' has data that are not"),
        (
            (
                b"c",
                _data({"label": msgpack.ExtType(1, msgpack.packb(((3,), "int32", b"abcd")))}),
                3,
            ),
            "client 'c' has data that are not FedJAX's .*reshape",
        ),
        ((b"c", _data({"label": msgpack.ExtType(9, b"")}), 1), "extension 9"),
        ((b"c", _data({"label": msgpack.ExtType(1, b"")}), 1), "that are not FedJAX's"),
        ((b"c", None, 1), "that are not FedJAX's"),
        (
            (b"c", _data({"image": np.zeros((1, 2, 3)), "label": np.array([2**40])}), 1),
            "'c', feature 'label': the dtype is int64, and not every value is of the dtype int32",
        ),
        (
            (b"c", _data({"label": np.zeros(2, int)}), 2),
            r"'c' has no feature 'image', only \['label",
        ),
        (
            (b"c", _data({"image": np.zeros((2, 2, 3), np.uint8), "label": np.zeros(2)}), 3),
            r"'c', feature 'image': the shape is \(2, 2, 3\), but 'num_examples' says 3",
        ),
        (
            (b"c", _data({"image": np.zeros((1, 6), np.uint8), "label": np.zeros(1, int)}), 1),
            r"'c', feature 'image': the shape is \(1, 6\), expected \(examples, 2, 3\)",
        ),
        (
            (b"c", _data({"image": np.full((1, 2, 3), 256), "label": np.zeros(1, int)}), 1),
            "'c', feature 'image': the dtype is int64, and not every value is of the dtype uint8",
        ),
        (
            (b"c", _data({"image": np.zeros((0, 2, 3)), "label": np.zeros(0, int)}), 0),
            "client 'c' has no examples .*drop_empty=True",
        ),
    ],
)
def test_a_wrong_client_is_named(tmp_path, row, message):
    path = _write(tmp_path / "a.sqlite", [*_rows(_clients()), row])
    with pytest.raises(UserError, match=r"a\.sqlite: .*" + message):
        sqlite.fedjax_sqlite(path, path, NUMBERS)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ((1, "1"), "the client ids 1 and '1' are one as text"),
        ((b"1", "1"), "the client ids b'1' and '1' are one as text"),
        ((b"\xff", b"\\xff"), "are one as text"),
        ((b"1", 0.5), "the client id 0.5 is no text"),
    ],
)
def test_ids_that_would_become_one(tmp_path, ids, message):
    data = _data({"label": np.zeros(1, int)})
    path = tmp_path / "a.sqlite"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE federated_data (client_id, data, num_examples)")
        rows = [(client_id, data, 1) for client_id in ids]
        database.executemany("INSERT INTO federated_data VALUES (?, ?, ?)", rows)
    with pytest.raises(UserError, match=r"a\.sqlite: .*" + message):
        sqlite.fedjax_sqlite(str(path), str(path))


def test_text_that_is_not_utf8(tmp_path):
    path = _write(tmp_path / "a.sqlite", _rows(_clients()))
    with sqlite3.connect(path) as database:
        database.execute(
            "UPDATE federated_data SET client_id = CAST(x'ff' AS TEXT) WHERE rowid = 1"
        )
    with pytest.raises(UserError, match=r"cannot read .*a\.sqlite: Could not decode to UTF-8"):
        sqlite.fedjax_sqlite(path, path, NUMBERS)


@pytest.mark.parametrize("error", [sqlite3.OperationalError("mine"), ZeroDivisionError("by zero")])
def test_what_convert_raises_is_not_the_files_fault(tmp_path, error):
    def broken(rows):
        raise error

    path = _write(tmp_path / "a.sqlite", _rows(_clients()))
    with pytest.raises(type(error), match=str(error)) as caught:  # Gin makes another of it.
        sqlite.fedjax_sqlite(path, path, {"y": ("label", (), "int32", broken)})
    assert caught.value.__notes__ == [f"reading {path}: client 'b:1', feature 'label'"]


def test_byte_strings_need_a_convert(tmp_path):
    path = _write(tmp_path / "a.sqlite", _rows(_clients()))
    with pytest.raises(UserError, match=r"client 'b:1', feature 'text' holds Python objects"):
        sqlite.fedjax_sqlite(path, path)


def test_empty_clients_can_be_dropped(tmp_path):
    empty = {"image": np.zeros((0, 2, 3), np.uint8), "label": np.zeros(0, int)}
    path = _write(tmp_path / "a.sqlite", _rows(_clients() | {b"c": empty}))
    train = sqlite.fedjax_sqlite(path, path, NUMBERS, drop_empty=True).train
    assert train.client_ids.tolist() == ["a", "a\\xf0", "b:1"]


def test_another_file(tmp_path):
    good = _write(tmp_path / "good.sqlite", _rows(_clients()))
    other = _write(tmp_path / "other.sqlite", [], table="something")
    (tmp_path / "text.sqlite").write_text("not a database, but long enough to look like one" * 9)
    for name, message in {
        "gone.sqlite": r"no file .*gone\.sqlite",
        "text.sqlite": r"cannot read .*text\.sqlite: file is not a database; expected the tables",
        "other.sqlite": r"cannot read .*other\.sqlite: no such table: federated_data",
    }.items():
        with pytest.raises(UserError, match=message):
            sqlite.fedjax_sqlite(good, str(tmp_path / name), NUMBERS)
    with pytest.raises(UserError, match=r"no such table.*expected the tables examples\(split_name"):
        sqlite.tff_sqlite(other, NUMBERS)
