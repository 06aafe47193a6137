"""tf.train.Example in TFRecord and in TFF's SQLite, against what TensorFlow writes and reads.

Both are here because importing TensorFlow takes longer than the tests.
"""

import itertools
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedexp.data import FederatedDataset, sqlite, tf_examples, tfrecord, write_tfrecord
from fedexp.errors import UserError

FEATURES = {
    "image": ("image", (2, 3), "uint8"),
    "label": ("label", (), "int16"),
    "box": ("box", (2, 2), "float32"),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDEXP_CACHE", str(tmp_path / "cache"))


def test_importing_the_readers_imports_no_tensorflow():
    code = "import sys, fedexp.data; "
    code += "sys.exit(bool({'tensorflow', 'msgpack'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_without_tensorflow_its_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    path = tmp_path / "toy.sqlite"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE examples (split_name, client_id, serialized_example_proto)")
        database.execute("CREATE TABLE client_metadata (client_id, split_name, num_examples)")
        for split in ("train", "test"):
            database.execute("INSERT INTO examples VALUES (?, 'a', x'')", [split])
            database.execute("INSERT INTO client_metadata VALUES ('a', ?, 1)", [split])
    (tmp_path / "toy.tfrecord").touch()
    pattern = str(tmp_path / "toy.tfrecord")
    for read in (
        lambda: tfrecord(pattern, pattern, FEATURES),
        lambda: sqlite.tff_sqlite(str(path), FEATURES),
        lambda: write_tfrecord(_dataset(), tmp_path / "new"),
    ):
        with pytest.raises(UserError, match=r"^[^\n]*pip install 'fedexp\[tensorflow\]'"):
            read()


def _dataset() -> FederatedDataset:
    rng = np.random.default_rng(0)
    return FederatedDataset.from_clients(
        {
            client_id: {
                "image": rng.integers(0, 256, (size, 2, 3), np.uint8),
                "label": rng.integers(-5, 5, size).astype(np.int16),
                "box": rng.normal(size=(size, 2, 2)).astype(np.float32),
            }
            for client_id, size in {"a": 3, "b": 1, "o": 4, "ö": 2}.items()
        }
    )


def _same(found: FederatedDataset, expected: FederatedDataset) -> None:
    assert found.client_ids.tolist() == expected.client_ids.tolist()
    np.testing.assert_array_equal(found.offsets, expected.offsets)
    assert found.features.keys() == expected.features.keys()
    for name, array in expected.features.items():
        np.testing.assert_array_equal(found.features[name], array)
        assert found.features[name].dtype == array.dtype


def _example(**features):
    import tensorflow as tf

    def feature(values):
        values = values if isinstance(values, list) else [values]
        if isinstance(values[0], bytes):
            return tf.train.Feature(bytes_list=tf.train.BytesList(value=values))
        if isinstance(values[0], float):
            return tf.train.Feature(float_list=tf.train.FloatList(value=values))
        return tf.train.Feature(int64_list=tf.train.Int64List(value=values))

    stored = {name: feature(values) for name, values in features.items()}
    return tf.train.Example(features=tf.train.Features(feature=stored)).SerializeToString()


def _write(path: Path, records: list[bytes]) -> str:
    import tensorflow as tf

    with tf.io.TFRecordWriter(str(path)) as writer:
        for record in records:
            writer.write(record)
    return str(path)


@pytest.mark.parametrize("num_shards", [1, 3])
def test_written_and_read_back(tmp_path, monkeypatch, num_shards):
    dataset = _dataset()
    paths = write_tfrecord(dataset, tmp_path / "new" / "toy", num_shards=num_shards)
    assert [path.name for path in paths] == [
        f"toy-{i:05d}-of-{num_shards:05d}.tfrecord" for i in range(num_shards)
    ]
    assert sorted((tmp_path / "new").iterdir()) == paths
    monkeypatch.setattr(tf_examples, "CHUNK", 2)
    pattern = str(tmp_path / "new" / "toy-*")
    _same(tfrecord(pattern, pattern, FEATURES).train, dataset)
    monkeypatch.setattr(tf_examples, "group", None)  # The second time, nothing is parsed.
    _same(tfrecord(pattern, pattern, FEATURES).test, dataset)


def test_tensorflow_reads_what_is_written(tmp_path):
    import tensorflow as tf

    dataset = _dataset()
    paths = write_tfrecord(dataset, tmp_path / "toy", num_shards=2, client_id="who")
    shards = [list(tf.data.TFRecordDataset(str(path)).as_numpy_iterator()) for path in paths]
    assert [len(shard) for shard in shards] == [4, 6]
    for i, record in enumerate(itertools.chain(*shards)):
        feature = tf.train.Example.FromString(record).features.feature
        owner = dataset.client_ids[dataset.client_of_example[i]]
        assert feature["who"].bytes_list.value[0].decode() == owner
        assert feature["image"].bytes_list.value[0] == dataset.features["image"][i].tobytes()
        assert list(feature["label"].int64_list.value) == [dataset.features["label"][i]]
        np.testing.assert_array_equal(
            np.float32(feature["box"].float_list.value), dataset.features["box"][i].ravel()
        )


def test_a_client_spread_over_shards_and_integer_ids(tmp_path, monkeypatch):
    monkeypatch.setattr(tf_examples, "CHUNK", 2)
    for i, owners in enumerate([[7, 10, 7], [10, 7, 9]]):
        records = [_example(user=user, v=10 * i + j) for j, user in enumerate(owners)]
        _write(tmp_path / f"s-{i}", records)
    features = {"v": ("v", (), "uint8")}
    splits = tfrecord(str(tmp_path / "s-*"), str(tmp_path / "s-1"), features, "user")
    assert splits.train.client_ids.tolist() == ["10", "7", "9"]
    assert splits.train.features["v"].tolist() == [1, 10, 0, 2, 11, 12]
    assert splits.test.features["v"].tolist() == [10, 11, 12]


def test_what_convert_raises_names_the_client(tmp_path):
    def broken(rows):
        return {0: rows}[int(2 in rows)]

    path = _write(tmp_path / "s", [_example(user=user, v=user) for user in (0, 1, 2)])
    with pytest.raises(KeyError) as caught:
        tfrecord(path, path, {"v": ("v", (), "uint8", broken)}, "user")
    assert caught.value.__notes__ == [f"reading {path}: client '2', feature 'v'"]


def test_encoded_values_reach_convert(tmp_path):
    """As TFDS stores images: PNG in a bytes_list."""
    import tensorflow as tf

    images = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), np.uint8)
    records = [_example(u=b"me", image=tf.io.encode_png(image).numpy()) for image in images]
    path = _write(tmp_path / "s", records)
    decode = lambda rows: np.stack([tf.io.decode_png(row).numpy() for row in rows])  # noqa: E731
    features = {"x": ("image", (), "object", decode)}
    train = tfrecord(path, path, features, "u").train
    np.testing.assert_array_equal(train.client(0)["x"], images)


def test_reads_what_dataset_grouper_writes(tmp_path):
    import tensorflow as tf

    def group(values):
        inner = [_example(v=value) for value in values]
        return tf.train.SequenceExample(
            feature_lists=tf.train.FeatureLists(
                feature_list={
                    "serialized_bytes": tf.train.FeatureList(
                        feature=[
                            tf.train.Feature(bytes_list=tf.train.BytesList(value=[record]))
                            for record in inner
                        ]
                    )
                }
            )
        ).SerializeToString()

    path = _write(tmp_path / "s.tfrecord", [group([3, 4]), group([5])])
    train = tfrecord(path, path, {"v": ("v", (), "int64")}, client_id=None).train
    assert train.client_ids.tolist() == ["s:00000000", "s:00000001"]
    assert [e["v"].tolist() for _, e in train.clients()] == [[3, 4], [5]]
    path = _write(tmp_path / "t.tfrecord", [_example(v=1)])
    with pytest.raises(UserError, match="'t:00000000' has no feature list 'serialized_bytes'"):
        tfrecord(path, path, {"v": ("v", (), "int64")}, client_id=None)


GOOD = {"c": b"a", "x": b"123456", "y": 1}
WANTED = {"x": ("x", (6,), "uint8"), "y": ("y", (), "uint8")}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"c": b"b", "x": b"123456"}, r"client 'b' has no feature 'y', only \['c', 'x'\]"),
        ({"x": b"123456", "y": 1}, r"a record has no feature 'c', only \['x', 'y'\]"),
        (GOOD | {"c": b"b", "y": [1, 2]}, "client 'b', feature 'y': there are 2 values"),
        (GOOD | {"c": b"b", "y": 1.0}, "client 'b', feature 'y' is stored otherwise than"),
        (GOOD | {"c": b"b", "x": b"12345"}, r"client 'b', feature 'x': there are 5 bytes, .*has 6"),
        (GOOD | {"c": b"b", "y": 256}, "client 'b', feature 'y': the dtype is int64, .*uint8"),
    ],
)
def test_a_wrong_record_names_its_client(tmp_path, wrong, message):
    path = _write(tmp_path / "s", [_example(**GOOD), _example(**wrong), _example(**GOOD)])
    with pytest.raises(UserError, match=r"/s: " + message):
        tfrecord(path, path, WANTED, "c")


def test_files_that_are_not_there_or_damaged(tmp_path):
    with pytest.raises(UserError, match=r"no file matches .*gone-\*"):
        tfrecord(str(tmp_path / "gone-*"), str(tmp_path / "gone-*"), WANTED)
    (tmp_path / "text").write_text("not a TFRecord, but long enough to have a header")
    (tmp_path / "empty").write_text("")
    path = _write(tmp_path / "bytes", [b"not an example"])
    for name, message in {
        "text": "text is damaged or not a TFRecord file",
        "empty": "empty has no examples",
        "bytes": "a record is not a tf.train.Example",
    }.items():
        with pytest.raises(UserError, match=message):
            tfrecord(str(tmp_path / name), path, WANTED)


@pytest.mark.parametrize("strings", [[], [b"", b""]])
def test_a_group_of_something_else_names_the_client(tmp_path, strings):
    import tensorflow as tf

    sequence = tf.train.SequenceExample()
    feature = sequence.feature_lists.feature_list["serialized_bytes"].feature.add()
    feature.bytes_list.value.extend(strings)
    path = _write(tmp_path / "s", [sequence.SerializeToString()])
    with pytest.raises(UserError, match=r"/s: client 's:00000000' has other than one string"):
        tfrecord(path, path, {"v": ("v", (), "uint8")}, client_id=None)


@pytest.mark.parametrize("rest", [1, 11, 12, 20])
def test_a_file_that_ends_within_a_record(tmp_path, rest):
    """TensorFlow itself takes the first two for the end of the file."""
    path = Path(_write(tmp_path / "s", [_example(c=b"a", v=1), _example(c=b"b", v=2)]))
    first = 16 + len(_example(c=b"a", v=1))
    path.write_bytes(path.read_bytes()[: first + rest])
    with pytest.raises(UserError, match=r"/s is (cut off|damaged or not a TFRecord)"):
        tfrecord(str(path), str(path), {"v": ("v", (), "uint8")}, "c")


def test_ids_of_two_kinds_that_would_become_one(tmp_path):
    path = _write(tmp_path / "s-0", [_example(c=1, v=1)])
    _write(tmp_path / "s-1", [_example(c=b"1", v=2)])
    with pytest.raises(UserError, match=r"s-\*: the client ids 1 and b'1' are one as text"):
        tfrecord(str(tmp_path / "s-*"), path, {"v": ("v", (), "uint8")}, "c")


@pytest.mark.parametrize("damage", [lambda record: b"\x0a\xff" + record, lambda r: r + b"\x88\xff"])
def test_a_damaged_record_is_named(tmp_path, damage):
    records = [_example(c=b"a", v=1), damage(_example(c=b"b", v=2))]
    path = _write(tmp_path / "s", records)
    with pytest.raises(UserError, match=r"/s: .* is (not a tf.train.Example|damaged)"):
        tfrecord(path, path, {"v": ("v", (), "uint8")}, "c")


def test_what_cannot_be_written(tmp_path):
    dataset = _dataset()
    with pytest.raises(UserError, match="num_shards must be from 1 to the number of clients, 4"):
        write_tfrecord(dataset, tmp_path / "toy", num_shards=5)
    with pytest.raises(UserError, match="feature 'label' of dtype int16 cannot be written"):
        write_tfrecord(dataset, tmp_path / "toy", client_id="label")
    text = FederatedDataset.from_clients({"a": {"s": np.array(["x"])}})
    with pytest.raises(UserError, match="feature 's' of dtype <U1 cannot be written"):
        write_tfrecord(text, tmp_path / "toy")
    write_tfrecord(dataset, tmp_path / "toy")
    with pytest.raises(UserError, match=r"toy-00000-of-00001\.tfrecord exists already"):
        write_tfrecord(dataset, tmp_path / "toy")


# TFF's SQLite.


def _write_tff(path: Path, examples, metadata=None) -> str:
    """`examples` are (split, client, pixels, label), in the order of the file."""
    sizes: dict[tuple[str, str], int] = {}
    path.unlink(missing_ok=True)
    with sqlite3.connect(path) as database:
        database.execute(
            "CREATE TABLE examples (split_name TEXT NOT NULL, client_id TEXT NOT NULL, "
            "serialized_example_proto BLOB NOT NULL)"
        )
        database.execute(
            "CREATE TABLE client_metadata (client_id TEXT NOT NULL, split_name TEXT NOT NULL, "
            "num_examples INTEGER NOT NULL)"
        )
        for split, client, pixels, label in examples:
            sizes[client, split] = sizes.get((client, split), 0) + 1
            record = _example(pixels=pixels, label=label, text=b"x" * label)
            database.execute("INSERT INTO examples VALUES (?, ?, ?)", (split, client, record))
        database.executemany(
            "INSERT INTO client_metadata VALUES (?, ?, ?)",
            [(*key, size) for key, size in (sizes | (metadata or {})).items()],
        )
    return str(path)


EXAMPLES = [
    ("train", "b", [0.0, 0.5], 3),
    ("test", "b", [0.25, 0.5], 1),
    ("train", "a", [1.0, 2.0], 2),
    ("train", "b", [4.0, 5.0], 1),
    ("heldout", "c", [6.0, 7.0], 0),
]
TFF = {"x": ("pixels", (2,), "float32"), "y": ("label", (), "int32")}


def test_reads_what_tff_publishes(tmp_path, monkeypatch):
    path = _write_tff(tmp_path / "a.sqlite", EXAMPLES)
    for _ in range(2):
        train, test, _ = sqlite.tff_sqlite(path, TFF)
        assert train.client_ids.tolist() == ["a", "b"]
        assert train.client_sizes.tolist() == [1, 2]
        assert train.features["x"].tolist() == [[1.0, 2.0], [0.0, 0.5], [4.0, 5.0]]
        assert train.features["y"].tolist() == [2, 3, 1]
        assert test.features["x"].tolist() == [[0.25, 0.5]]
        monkeypatch.setattr(sqlite, "_read_tff", None)  # The second time, nothing is read.


def test_tff_splits_are_named(tmp_path):
    path = _write_tff(tmp_path / "a.sqlite", EXAMPLES)
    lengths = ("text", (), "object", lambda rows: np.array([len(row) for row in rows]))
    heldout = sqlite.tff_sqlite(path, {"n": lengths}, test_split="heldout").test
    assert heldout.client_ids.tolist() == ["c"]
    assert heldout.features["n"].tolist() == [0]
    with pytest.raises(UserError, match=r"no split 'val', only \['train', 'test', 'heldout'\]"):
        sqlite.tff_sqlite(path, TFF, test_split="val")


def test_tff_tables_must_agree(tmp_path):
    path = _write_tff(tmp_path / "a.sqlite", EXAMPLES, metadata={("b", "train"): 3})
    with pytest.raises(UserError, match=r"'b' of the split 'train' has 2 examples, .*says 3"):
        sqlite.tff_sqlite(path, TFF)
    path = _write_tff(tmp_path / "a.sqlite", EXAMPLES, metadata={("z", "test"): 0})
    with pytest.raises(UserError, match=r"'z' of the split 'test' has no examples; .*drop_empty"):
        sqlite.tff_sqlite(path, TFF)
    assert sqlite.tff_sqlite(path, TFF, drop_empty=True).test.num_clients == 1


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "UPDATE examples SET client_id = CAST(client_id AS BLOB) WHERE rowid = 1",
            "are one as text",
        ),
        (
            "UPDATE client_metadata SET client_id = x'ff' WHERE rowid = 1",
            "has 0 examples, .* says 2",
        ),
        (
            "UPDATE examples SET serialized_example_proto = 'text' WHERE rowid = 1",
            "'b' is not a tf",
        ),
        (
            "UPDATE examples SET serialized_example_proto = x'0aff' WHERE rowid = 4",
            "'b' is not a tf",
        ),
        ("UPDATE examples SET serialized_example_proto = 7 WHERE rowid = 4", "'b' is not a tf"),
    ],
)
def test_cells_of_another_type(tmp_path, change, message):
    path = _write_tff(tmp_path / "a.sqlite", EXAMPLES)
    with sqlite3.connect(path) as database:
        database.execute(change)
    with pytest.raises(UserError, match=r"a\.sqlite: .*" + message):
        sqlite.tff_sqlite(path, TFF)


def test_a_wrong_tff_example_names_its_client(tmp_path):
    path = _write_tff(tmp_path / "a.sqlite", [*EXAMPLES, ("train", "d", [1.0], 0)])
    with pytest.raises(UserError, match=r"client 'd', feature 'pixels': there are 1 values, .*2"):
        sqlite.tff_sqlite(path, TFF)
    with pytest.raises(UserError, match=r"client 'b' has no feature 'z', only \['label', 'pixels'"):
        sqlite.tff_sqlite(path, {"z": ("z", (), "int64")})
