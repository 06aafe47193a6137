"""Group-structured TFRecord files: shards of tf.train.Example that say whose they are.

TensorFlow is imported by the functions of this module when they are called, and only then.
"""

from __future__ import annotations

import glob
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import gin
import numpy as np

from fedexp import paths
from fedexp.data import download, tf_examples
from fedexp.data import features as features_lib
from fedexp.data.dataset import FederatedDataset, FederatedSplits
from fedexp.data.features import Feature, Features
from fedexp.errors import UserError

if TYPE_CHECKING:
    import tensorflow as tf

# Dataset Grouper's name for the records inside a record.
_GROUPED = "serialized_bytes"
# Bytes around a record: its length and two checksums.
_FRAME = 16


@gin.configurable
def tfrecord(
    train_pattern: str,
    test_pattern: str,
    features: Features,
    client_id: str | None = "client_id",
    version: int | None = None,
) -> FederatedSplits:
    """A data set in shards of TFRecord, as `write_tfrecord`, TFDS and Dataset Grouper write them.

    A client's examples may be spread over shards, and stay in the order of the shards' names; clients
    are in ascending order of their ids. Parsing imports TensorFlow, once: later runs find the result
    in the cache. It needs the memory of the result, and of its largest feature once more.

    What a feature's dtype means depends on how its values are stored:
      - `int64_list`, `float_list`: as many numbers as the shape has, cast to the dtype.
      - `bytes_list`, dtype a number's: one string, the raw bytes of an array (little endian).
      - `bytes_list`, dtype 'object': strings for `convert`, which decodes text, or PNG and JPEG
        images as TFDS stores them. It gets rows of several clients at a time.

    Args:
      train_pattern: files of the training partition, as '/data/train-*.tfrecord'.
      test_pattern: files of the test partition.
      features: name -> (source, shape, dtype) or (source, shape, dtype, convert), see
        `fedexp.data.features`.
      client_id: the feature, a string or an integer, that says whose example a record is. None reads
        the files of Dataset Grouper (Charles et al. 2023, arXiv:2307.09619), where a record is a
        client, a `tf.train.SequenceExample` of serialised examples, without an id: it is named
        after its place, as 'train-00000-of-00010:00000042'.
      version: what the `convert` functions do, as a number to raise when they change; see
        `fedexp.data.features.load`. Where there are any and it is None, every run reads the files.

    Raises:
      UserError: no such files, damaged ones, or records that do not fit `features`. The message
        names file, client and feature.
    """
    wanted = features_lib.parse(features)
    patterns = (train_pattern, test_pattern)
    train, test = (_files(pattern) for pattern in patterns)
    return features_lib.load(
        "tfrecord",
        wanted,
        [*train, *test],
        lambda: FederatedSplits(
            *(
                tf_examples.group(pattern, _chunks(paths, client_id), wanted)
                for pattern, paths in zip(patterns, (train, test), strict=True)
            )
        ),
        version=version,
        client_id=client_id,
        num_train_files=len(train),
    )


def write_tfrecord(
    dataset: FederatedDataset,
    prefix: str | Path,
    *,
    num_shards: int = 1,
    client_id: str = "client_id",
) -> list[Path]:
    """Writes `dataset` as shards {prefix}-00000-of-00010.tfrecord of tf.train.Example.

    Integers and booleans are stored as int64_list and floats as float_list, flattened; uint8 arrays
    of at least one axis (images) as their raw bytes. A client is in one shard.

    Args:
      dataset: features of numbers; float64 is rounded to float32, which TFRecord has.
      prefix: folder, which is created, and beginning of the files' names.
      num_shards: at most one a client.
      client_id: the feature that is added to say whose example a record is.

    Returns:
      The shards' paths.

    Raises:
      UserError: a shard exists, features that cannot be stored, or a wrong number of shards.
    """
    tf = tf_examples.tensorflow()
    if not 1 <= num_shards <= dataset.num_clients:
        raise UserError(
            f"num_shards must be from 1 to the number of clients, {dataset.num_clients}, got "
            f"{num_shards}"
        )
    for name, array in dataset.features.items():
        if name == client_id or array.dtype.kind not in "biuf" or array.dtype == np.uint64:
            raise UserError(
                f"feature {name!r} of dtype {array.dtype} cannot be written: it must hold numbers "
                f"and have another name than client_id, {client_id!r}"
            )
    prefix = Path(prefix).expanduser()
    files = [
        prefix.with_name(f"{prefix.name}-{i:05d}-of-{num_shards:05d}.tfrecord")
        for i in range(num_shards)
    ]
    if present := [path for path in files if path.exists()]:
        raise UserError(f"{present[0]} exists already; delete it to write it anew")
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=prefix.parent) as scratch:
        shards = np.array_split(np.arange(dataset.num_clients), num_shards)
        for path, indices in zip(files, shards, strict=True):
            with tf.io.TFRecordWriter(str(Path(scratch) / path.name)) as writer:
                for index in indices:
                    for record in _records(tf, dataset, int(index), client_id):
                        writer.write(record)
        for path in files:
            paths.replace(Path(scratch) / path.name, path)
    return files


def _files(pattern: str) -> list[Path]:
    folder, name = os.path.split(pattern)
    if not (paths := sorted(glob.glob(str(download.local_folder(folder, name) / name)))):
        raise UserError(f"no file matches {pattern}; correct the pattern")
    return [Path(path) for path in paths]


def _chunks(paths: list[Path], client_id: str | None) -> Iterator[tf_examples.Chunk]:
    tf = tf_examples.tensorflow()
    for path in paths:
        records = tf.data.TFRecordDataset(str(path)).batch(tf_examples.CHUNK).prefetch(1)
        size = 0
        try:
            for start, batch in enumerate(records.as_numpy_iterator()):
                size += sum(map(len, batch)) + _FRAME * len(batch)
                if client_id is None:
                    yield from _groups(tf, path, start * tf_examples.CHUNK, batch)
                else:
                    yield path, _ids(path, batch, client_id), batch
        except tf.errors.DataLossError as error:
            raise UserError(
                f"{path} is damaged or not a TFRecord file ({error.message})"
            ) from error
        # TensorFlow takes a file that ends within a record's header for one that ends before it.
        if (found := path.stat().st_size) != size:
            raise UserError(
                f"{path} is cut off: its records make {size} bytes, it has {found}; get it again"
            )


def _groups(
    tf: ModuleType, path: Path, start: int, records: Sequence[bytes]
) -> Iterator[tf_examples.Chunk]:
    """The clients of Dataset Grouper, each of which is a record."""
    for i, record in enumerate(records, start):
        client_id = f"{path.name.removesuffix('.tfrecord')}:{i:08d}"
        sequence = tf_examples.message(
            tf.train.SequenceExample, f"{path}: client {client_id!r}", record
        )
        inner = sequence.feature_lists.feature_list[_GROUPED].feature
        if not inner:
            raise UserError(
                f"{path}: client {client_id!r} has no feature list {_GROUPED!r}; name the feature "
                "client_id if a record is an example"
            )
        if any(len(feature.bytes_list.value) != 1 for feature in inner):
            raise UserError(
                f"{path}: client {client_id!r} has other than one string an example in its feature list "
                f"{_GROUPED!r}; get the file again"
            )
        yield path, [client_id] * len(inner), [f.bytes_list.value[0] for f in inner]


def _ids(path: Path, records: Sequence[bytes], client_id: str) -> list[bytes | int]:
    where = [f"{path}: a record"] * len(records)
    (column,) = tf_examples.columns(where, records, [Feature(client_id, (), object)]).values()
    return column.tolist()


def _records(
    tf: ModuleType, dataset: FederatedDataset, index: int, client_id: str
) -> Iterator[bytes]:
    """The client's serialised examples."""
    examples = dataset.client(index)
    owner = _feature(tf, [str(dataset.client_ids[index]).encode()])
    for i in range(dataset.client_sizes[index]):
        stored = {name: _feature(tf, _values(array[i])) for name, array in examples.items()}
        example = tf.train.Example(features=tf.train.Features(feature=stored | {client_id: owner}))
        yield example.SerializeToString()


def _values(value: np.ndarray) -> np.ndarray | list[bytes]:
    return [value.tobytes()] if value.dtype == np.uint8 and value.ndim else np.ravel(value)


def _feature(tf: ModuleType, values: np.ndarray | list[bytes]) -> tf.train.Feature:
    if isinstance(values, list):
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=values))
    if values.dtype.kind == "f":
        return tf.train.Feature(float_list=tf.train.FloatList(value=values))
    return tf.train.Feature(int64_list=tf.train.Int64List(value=values))
