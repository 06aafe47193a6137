"""Parsing tf.train.Example, and putting together whose they are.

TensorFlow is imported by the functions of this module when they are called, and only then.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from fedexp.data import features as features_lib
from fedexp.data.dataset import FederatedDataset
from fedexp.data.features import Feature
from fedexp.errors import UserError

if TYPE_CHECKING:
    import tensorflow as tf
    from google.protobuf.message import Message

# Records that are parsed at a time.
CHUNK = 4096

# A file, and of some of its records the client ids as they are stored and the bytes, each (n,).
Chunk = tuple[Path, Sequence[bytes | str | int], Sequence[bytes]]


def group(
    where: object, chunks: Iterable[Chunk], features: Mapping[str, Feature]
) -> FederatedDataset:
    """Parses serialised examples, which come in any order, and puts each client's together.

    Args:
      where: what all chunks come from, for error messages.
      chunks: (file, client ids (n,), records (n,)), n being different from chunk to chunk.
      features: what to read.

    Returns:
      Clients in ascending order of their ids, a client's examples as they came.
    """
    code_of: dict[str, int] = {}
    texts = Ids(where)
    codes: list[np.ndarray] = []
    parts: dict[str, list[np.ndarray]] = {name: [] for name in features}
    for file, stored, records in chunks:
        ids = [texts.text(client_id) for client_id in stored]
        codes.append(np.array([code_of.setdefault(cid, len(code_of)) for cid in ids]))
        places = [f"{file}: client {cid!r}" for cid in ids]
        for name, rows in _parse(places, records, features).items():
            parts[name].append(rows)
            features_lib.check_alike(places[0], features[name], rows, parts[name][0])
    if not codes:
        raise UserError(f"{where} has no examples; is it the right one?")
    client_ids, rank = np.unique(np.array(list(code_of)), return_inverse=True)
    client = rank[np.concatenate(codes)]
    place = np.empty(len(client), np.int64)
    place[np.argsort(client, kind="stable")] = np.arange(len(client))
    sizes = np.bincount(client)
    return FederatedDataset(
        {name: _scatter(parts.pop(name), place) for name in features},
        np.concatenate([[0], np.cumsum(sizes)]),
        client_ids,
    )


def _scatter(chunks: list[np.ndarray], place: np.ndarray) -> np.ndarray:
    """Row i of the chunks becomes row place[i]."""
    result = np.empty((len(place), *chunks[0].shape[1:]), chunks[0].dtype)
    start = 0
    for rows in chunks:
        result[place[start : start + len(rows)]] = rows
        start += len(rows)
    return result


class Ids:
    """Client ids as text, of one data set: what is stored differently shall not become the same.

    Args:
      where: what the ids come from, for error messages.
    """

    def __init__(self, where: object):
        self._where = where
        self._stored: dict[str, object] = {}

    def text(self, stored: object) -> str:
        """The id as text; bytes that are not UTF-8 are escaped.

        Raises:
          UserError: it is neither text nor a whole number, or another one has the same text.
        """
        if isinstance(stored, bytes):
            text = stored.decode("utf-8", "backslashreplace")
        elif isinstance(stored, str | int):
            text = str(stored)
        else:
            raise UserError(f"{self._where}: the client id {stored!r} is no text; mend the file")
        if (other := self._stored.setdefault(text, stored)) != stored:
            raise UserError(
                f"{self._where}: the client ids {other!r} and {stored!r} are one as text; store all of "
                "them in one way"
            )
        return text


def tensorflow() -> ModuleType:
    """TensorFlow, kept off the GPU: it would take the memory that JAX needs, to parse on the CPU.

    Raises:
      UserError: it is not installed.
    """
    try:
        import tensorflow as tf
    except ImportError as error:
        raise UserError(
            "TFRecord files and TFF's SQLite files are read with TensorFlow, which is not installed: "
            "pip install 'fedexp[tensorflow]'"
        ) from error
    with contextlib.suppress(RuntimeError):
        tf.config.set_visible_devices([], "GPU")
    return tf


def _parse(
    where: Sequence[str], records: Sequence[bytes], features: Mapping[str, Feature]
) -> dict[str, np.ndarray]:
    """Rows of every feature; where[i] says whose record i is."""
    found = columns(where, records, features.values())
    return {
        name: _rows(where, feature, found[feature.source]) for name, feature in features.items()
    }


def columns(
    where: Sequence[str], records: Sequence[bytes], features: Iterable[Feature]
) -> dict[str, np.ndarray]:
    """What the records have of every feature: source -> (n, *shape), raw bytes as (n,) object.

    The first record tells how features are stored. Where others differ, a slower look finds which.
    """
    tf = tensorflow()
    features = list(features)
    layout = {f.source: _stored(tf, where[0], records[0], f) for f in features}
    try:
        parsed = tf.io.parse_example(records, layout)
    except (tf.errors.InvalidArgumentError, ValueError, TypeError) as error:
        for place, record in zip(where, records, strict=True):
            for feature in features:
                if _stored(tf, place, record, feature) != layout[feature.source]:
                    raise UserError(
                        f"{place}, feature {feature.source!r} is stored otherwise than in the "
                        "records before; mend the file"
                    ) from error
        raise UserError(
            f"{where[0]}, or one soon after, is damaged ({' '.join(str(error).split())})"
        ) from error
    return {source: tensor.numpy() for source, tensor in parsed.items()}


def _stored(tf: ModuleType, where: str, record: bytes, feature: Feature) -> tf.io.FixedLenFeature:
    """How a record stores a feature, checked against what is wanted."""
    stored = message(tf.train.Example, where, record).features.feature
    kind = stored[feature.source].WhichOneof("kind") if feature.source in stored else None
    if kind is None:
        raise UserError(
            f"{where} has no feature {feature.source!r}, only {sorted(stored)}; correct `features`"
        )
    raw = kind == "bytes_list" and feature.dtype is not object
    shape = () if raw else feature.shape
    if (count := len(getattr(stored[feature.source], kind).value)) != math.prod(shape):
        raise UserError(
            f"{where}, feature {feature.source!r}: there are {count} values, the shape {shape} has "
            f"{math.prod(shape)}; correct `features`"
        )
    dtype = {"int64_list": tf.int64, "float_list": tf.float32, "bytes_list": tf.string}[kind]
    return tf.io.FixedLenFeature(shape, dtype)


def message(kind: type[Message], where: str, record: bytes) -> Any:
    """Parses a record.

    Raises:
      UserError: it is something else; the message begins with `where`.
    """
    from google.protobuf.message import DecodeError

    try:
        return kind.FromString(record)
    except (DecodeError, TypeError, ValueError) as error:
        raise UserError(f"{where} is not a tf.train.{kind.__name__} ({error})") from error


def _rows(where: Sequence[str], feature: Feature, column: np.ndarray) -> np.ndarray:
    if column.dtype == object and feature.dtype is not object:
        column = _from_bytes(where, feature, column)
    try:
        return features_lib.rows(where[0], feature, column)
    except Exception:
        # The culprit need not be the first: look at one record after another.
        for i, place in enumerate(where):
            features_lib.rows(place, feature, column[i : i + 1])
        raise


def _from_bytes(where: Sequence[str], feature: Feature, column: np.ndarray) -> np.ndarray:
    dtype = np.dtype(feature.dtype).newbyteorder("<")
    size = dtype.itemsize * math.prod(feature.shape)
    for place, content in zip(where, column, strict=True):
        if len(content) != size:
            raise UserError(
                f"{place}, feature {feature.source!r}: there are {len(content)} bytes, an array "
                f"{feature.shape} of {dtype} has {size}; correct `features`, or read encoded values "
                "with the dtype 'object' and a `convert`"
            )
    return np.frombuffer(b"".join(column), dtype).reshape(len(column), *feature.shape)
