"""The SQLite layouts of FedJAX and of TensorFlow Federated, read-only."""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import gin
import numpy as np

from fedexp.data import features as features_lib
from fedexp.data import tf_examples
from fedexp.data.dataset import FederatedDataset, FederatedSplits
from fedexp.data.features import Feature, Features
from fedexp.errors import UserError

Query = Callable[..., Iterator[tuple]]

_FEDJAX = "federated_data(client_id, data, num_examples)"
_TFF = (
    "examples(split_name, client_id, serialized_example_proto) and "
    "client_metadata(client_id, split_name, num_examples)"
)


@gin.configurable
def fedjax_sqlite(
    train_path: str,
    test_path: str | None = None,
    features: Features | None = None,
    drop_empty: bool = False,
    version: int | None = None,
    test_fraction: float = 0.1,
    seed: int = 0,
) -> FederatedSplits:
    """A data set as FedJAX's `SQLiteFederatedDataBuilder` writes it, one file a partition.

    A row of the table `federated_data` is a client: its id, its examples (features by name,
    MessagePack compressed with zlib) and their number. Clients are in ascending order of their ids.
    Reading needs the memory of the result twice.

    Args:
      train_path: SQLite file of the training partition.
      test_path: SQLite file of the test partition. None takes a part of every client's examples, as for
        what FedJAX's scripts make of Sent140 and the Cornell movie dialogs.
      features: name -> (source, shape, dtype) or (source, shape, dtype, convert), see
        `fedexp.data.features`. Text and byte strings have the dtype 'object' and need a `convert`.
        None reads every feature as it is stored, bfloat16 as float32.
      drop_empty: leave clients without examples out instead of raising.
      version: what the `convert` functions do, as a number to raise when they change; see
        `fedexp.data.features.load`. Where there are any and it is None, every run reads the files.
      test_fraction: the part, where there is no `test_path`; of a single example there is none.
      seed: of which examples these are.

    Raises:
      UserError: no such file, another layout, damaged data, or values that do not fit `features`.
        The message names file, client and feature.
    """
    wanted = None if features is None else features_lib.parse(features)
    paths = [features_lib.existing(path) for path in (train_path, test_path) if path is not None]
    part = {} if len(paths) == 2 else {"test_fraction": test_fraction, "seed": seed}

    def read() -> FederatedSplits:
        features_lib.fit(wanted or {}, lambda seen: _read_fedjax(paths[0], seen, drop_empty))
        train, *test = (_read_fedjax(path, wanted, drop_empty) for path in paths)
        if test:
            return FederatedSplits(train, *test)
        return FederatedSplits(*train.split_examples(1 - test_fraction, seed=seed))

    return features_lib.load(
        "fedjax_sqlite",
        wanted,
        paths,
        read,
        version=version,
        drop_empty=drop_empty,
        **part,
    )


@gin.configurable
def tff_sqlite(
    path: str,
    features: Features,
    train_split: str = "train",
    test_split: str = "test",
    drop_empty: bool = False,
    version: int | None = None,
) -> FederatedSplits:
    """A data set as TensorFlow Federated publishes it, both partitions in one SQLite file.

    An example is a row of the table `examples`, a `tf.train.Example`. Clients are in ascending order
    of their ids. Parsing imports TensorFlow, once: later runs find the result in the cache.

    Args:
      path: SQLite file, decompressed.
      features: as `tfrecord` has them.
      train_split: name of the training partition in the file.
      test_split: name of the test partition in the file.
      drop_empty: leave clients without examples out instead of raising.
      version: what the `convert` functions do, as a number to raise when they change; see
        `fedexp.data.features.load`. Where there are any and it is None, every run reads the file.

    Raises:
      UserError: no such file, another layout, no such partition, or values that do not fit
        `features`. The message names file, client and feature.
    """
    wanted = features_lib.parse(features)
    file = features_lib.existing(path)
    splits = (train_split, test_split)
    return features_lib.load(
        "tff_sqlite",
        wanted,
        [file],
        lambda: FederatedSplits(*(_read_tff(file, split, wanted, drop_empty) for split in splits)),
        version=version,
        drop_empty=drop_empty,
        splits=splits,
    )


@contextlib.contextmanager
def _database(path: Path, layout: str) -> Iterator[Query]:
    """Yields a function that reads rows; what becomes of them afterwards is not the file's fault."""

    @contextlib.contextmanager
    def reading() -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Also what Python's module makes of damaged text.
            raise UserError(f"cannot read {path}: {error}; expected the tables {layout}") from error

    def query(statement: str, *values: str) -> Iterator[tuple]:
        with reading():
            # `yield from` would close the cursor, which complains once its database is closed.
            for row in database.execute(statement, values):  # noqa: UP028
                yield row

    with reading():
        database = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
    with contextlib.closing(database):
        yield query


def _read_fedjax(
    path: Path, features: Mapping[str, Feature] | None, drop_empty: bool
) -> FederatedDataset:
    clients, ids = {}, tf_examples.Ids(path)
    with _database(path, _FEDJAX) as query:
        for row in query("SELECT client_id, data, num_examples FROM federated_data"):
            if (client_id := ids.text(row[0])) in clients:
                raise UserError(f"{path}: client {client_id!r} occurs more than once; remove a row")
            clients[client_id] = _client(f"{path}: client {client_id!r}", features, *row[1:])
    return features_lib.dataset(path, clients, drop_empty)


def _client(
    where: str, features: Mapping[str, Feature] | None, data: bytes, size: int
) -> dict[str, np.ndarray]:
    examples = _examples(where, data)
    if features is None:
        features = {name: Feature(name, a.shape[1:], a.dtype.type) for name, a in examples.items()}
    for feature in features.values():
        if feature.source not in examples:
            raise UserError(
                f"{where} has no feature {feature.source!r}, only {sorted(examples)}; correct "
                "`features`"
            )
        if examples[feature.source].shape[:1] != (size,):
            raise UserError(
                f"{where}, feature {feature.source!r}: the shape is "
                f"{examples[feature.source].shape}, but 'num_examples' says {size}"
            )
    if not size:
        return {name: np.zeros(0) for name in features}
    return {
        name: features_lib.rows(where, feature, examples[feature.source])
        for name, feature in features.items()
    }


def _examples(where: str, data: bytes) -> dict[str, np.ndarray]:
    """A client's examples, as fedjax.core.serialization wrote them."""
    import msgpack

    try:
        examples = msgpack.unpackb(zlib.decompress(data), ext_hook=_array, raw=False)
        return {name: np.asarray(array) for name, array in examples.items()}
    except Exception as error:  # Damaged data make msgpack and NumPy raise nearly anything.
        raise UserError(
            f"{where} has data that are not FedJAX's ({type(error).__name__}: {error}); expected "
            "arrays by name, MessagePack compressed with zlib"
        ) from error


def _array(code: int, data: bytes) -> np.ndarray:
    """Undoes FedJAX's MessagePack extensions: 1 arrays, 3 scalars, 4 arrays of byte strings."""
    import msgpack

    if code in (1, 3):
        shape, dtype, content = msgpack.unpackb(data, raw=True)
        if dtype == b"bfloat16":
            widened = np.frombuffer(content, "<u2").astype(np.uint32) << 16
            return widened.view(np.float32).reshape(shape)
        if dtype.startswith(b"str"):  # How NumPy names text, in bits; it does not parse that.
            return np.frombuffer(content, f"<U{int(dtype[3:]) // 32}").reshape(shape).astype(object)
        return np.frombuffer(content, dtype.decode()).reshape(shape)
    if code == 4:
        shape, strings = msgpack.unpackb(data, raw=True)
        return np.array(strings, object).reshape(shape)
    raise ValueError(f"MessagePack extension {code}")


def _read_tff(
    path: Path, split: str, features: Mapping[str, Feature], drop_empty: bool
) -> FederatedDataset:
    with _database(path, _TFF) as query:
        _check_split(path, query, split, drop_empty)
        rows = query(
            "SELECT client_id, serialized_example_proto FROM examples WHERE split_name = ? "
            "ORDER BY rowid",
            split,
        )
        pages = iter(lambda: list(itertools.islice(rows, tf_examples.CHUNK)), [])
        return tf_examples.group(
            path,
            ((path, [cid for cid, _ in page], [record for _, record in page]) for page in pages),
            features,
        )


def _check_split(path: Path, query: Query, split: str, drop_empty: bool) -> None:
    """Whether the two tables agree, by their indices and before an example is read."""
    ids = tf_examples.Ids(path)

    def counts(statement: str) -> dict[str, int]:
        return {ids.text(client_id): count for client_id, count in query(statement, split)}

    promised = counts("SELECT client_id, num_examples FROM client_metadata WHERE split_name = ?")
    if not promised:
        splits = [s for (s,) in query("SELECT DISTINCT split_name FROM client_metadata")]
        raise UserError(f"{path} has no split {split!r}, only {splits}; name one of them")
    found = counts(
        "SELECT client_id, COUNT(*) FROM examples WHERE split_name = ? GROUP BY client_id"
    )
    for client_id in sorted(promised.keys() | found.keys()):
        where = f"{path}: client {client_id!r} of the split {split!r}"
        sizes = promised.get(client_id, 0), found.get(client_id, 0)
        if sizes[0] != sizes[1]:
            raise UserError(f"{where} has {sizes[1]} examples, client_metadata says {sizes[0]}")
        if not any(sizes) and not drop_empty:
            raise UserError(f"{where} has no examples; pass drop_empty=True to leave it out")
