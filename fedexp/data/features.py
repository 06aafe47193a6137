"""What to read from a published format, and the checks and the cache that its readers share.

A reader takes {name in the data set: feature}. In a gin file a feature is a tuple of the arguments
of `Feature`, its dtype by name:

    leaf.features = {'x': ('x', (784,), 'float32'), 'y': ('y', (), 'int32', @to_label)}
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedexp.data import download, packed
from fedexp.data import values as values_lib
from fedexp.data.dataset import FederatedDataset, FederatedSplits
from fedexp.errors import UserError

# Part of every cache key: raise it when a reader changes what it returns.
_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Feature:
    """One feature to read.

    Attributes:
      source: its name in the file.
      shape: shape of one example in the file.
      dtype: dtype in the file, or a family as np.integer; object for strings of variable length.
      convert: maps rows (n, *shape) of one client, or of several, to n rows of the data set, with a
        dtype and a shape that are the same for every client. It raises UserError for values that cannot
        be; whatever it raises, the reader adds whose they are. It may have an attribute `key`, JSON that
        says what it does, so that its result is cached without a `version`; and a method `fit`, which
        `leaf`, `fedjax_sqlite` and tables call first with the values of the training partition.
    """

    source: str
    shape: tuple[int, ...]
    dtype: type
    convert: Callable[[np.ndarray], np.ndarray] = np.asarray


Features = Mapping[str, Feature | Sequence[Any]]


def parse(features: Features) -> dict[str, Feature]:
    """Makes a `Feature` of every tuple (source, shape, dtype) or (source, shape, dtype, convert).

    Raises:
      UserError: no features, a tuple of another form, or an unknown dtype.
    """
    if not features:
        raise UserError("there is nothing to read: `features` is empty")
    return {name: _parse(name, feature) for name, feature in features.items()}


def _parse(name: str, feature: Feature | Sequence[Any]) -> Feature:
    if isinstance(feature, Feature):
        return feature
    try:
        source, shape, dtype, *convert = feature
        return Feature(str(source), tuple(shape), _dtype(dtype), *convert)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"feature {name!r} must be (source, shape, dtype) or (source, shape, dtype, convert), "
            f"as ('pixels', (28, 28), 'uint8'), got {feature!r} ({error})"
        ) from error


def _dtype(dtype: Any) -> type:
    """The dtype as `Feature` has it: object, a NumPy scalar type, or a family as np.integer."""
    if isinstance(dtype, type) and issubclass(dtype, np.generic):
        return dtype
    scalar = np.dtype(dtype).type
    return object if scalar is np.object_ else scalar


def rows(where: str, feature: Feature, values: np.ndarray) -> np.ndarray:
    """Checks what a file has of one feature, and makes rows of the data set of it.

    Numbers are cast to `feature.dtype` where the file has another one, because many formats know
    fewer dtypes than NumPy: floats may be rounded, integers must keep their value.

    Args:
      where: file and client, for error messages.
      feature: what is expected.
      values: (n, ...).

    Returns:
      (n, ...), as `feature.convert` makes them.

    Raises:
      UserError: another shape or dtype, or values that `convert` refuses.
    """
    where = f"{where}, feature {feature.source!r}"
    if values.shape[1:] != feature.shape or values.ndim == 0:
        raise UserError(
            f"{where}: the shape is {values.shape}, expected "
            f"(examples, {', '.join(map(str, feature.shape))}); correct `features`"
        )
    values = _cast(where, values, feature.dtype)
    with located(where):
        converted = np.asarray(feature.convert(values))
    if converted.shape[:1] != values.shape[:1]:
        raise UserError(
            f"{where}: `convert` made {converted.shape} of {len(values)} rows; it must keep their "
            "number"
        )
    if converted.dtype.hasobject:
        raise UserError(f"{where} holds Python objects; give a `convert` that makes numbers of it")
    if (unfit := values_lib.first_unfit(converted)) is not None:
        raise UserError(f"{where}: {unfit[1]}")
    return converted


def fit(features: Mapping[str, Feature], read: Callable[[Mapping[str, Feature]], object]) -> None:
    """Gives the training partition's values to each `convert` that has a method `fit`.

    Args:
      features: what will be read.
      read: reads other features of the training partition.
    """

    def shown(fit: Callable[[np.ndarray], None]) -> Callable[[np.ndarray], np.ndarray]:
        def convert(values: np.ndarray) -> np.ndarray:
            fit(values)
            return np.zeros(len(values), bool)

        return convert

    seen = {
        name: dataclasses.replace(feature, convert=shown(feature.convert.fit))  # pyright: ignore
        for name, feature in features.items()
        if hasattr(feature.convert, "fit")
    }
    if seen:
        read(seen)


@contextlib.contextmanager
def located(where: str) -> Iterator[None]:
    """Around a call of a user's function: says in which file and client it was when it raised.

    A UserError's message begins with that, any other exception goes through with a note.
    """
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except Exception as error:
        error.add_note(f"reading {where}")
        raise


def check_alike(where: str, feature: Feature, found: np.ndarray, first: np.ndarray) -> None:
    """Whether `convert` makes rows of the same kind for all clients.

    Raises:
      UserError: it does not.
    """
    if (found.dtype, found.shape[1:]) != (first.dtype, first.shape[1:]):
        raise UserError(
            f"{where}, feature {feature.source!r}: `convert` made {found.dtype} of shape "
            f"{found.shape[1:]}, and {first.dtype} of shape {first.shape[1:]} before"
        )


def _cast(where: str, values: np.ndarray, dtype: type) -> np.ndarray:
    if np.issubdtype(values.dtype, dtype):
        return values
    if values.dtype.kind in "biuf" and dtype in np.sctypeDict.values() and dtype is not object:
        with np.errstate(invalid="ignore", over="ignore"):
            cast = values.astype(dtype)
        if cast.dtype.kind == "f":
            if (lost := np.isinf(cast) & np.isfinite(values)).any():
                raise UserError(
                    f"{where}: the value {values[lost][0]} does not fit {cast.dtype}; scale it, or leave "
                    "it out"
                )
            return cast
        if np.array_equal(cast, values):
            return cast
    raise UserError(
        f"{where}: the dtype is {values.dtype}, and not every value is of the dtype "
        f"{dtype.__name__}; correct `features`"
    )


def dataset(
    where: object, clients: Mapping[str, Mapping[str, np.ndarray]], drop_empty: bool
) -> FederatedDataset:
    """A data set of the clients, in ascending order of their ids; errors begin with `where`."""
    try:
        return FederatedDataset.from_clients(dict(sorted(clients.items())), drop_empty=drop_empty)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def load(
    name: str,
    features: Mapping[str, Feature] | None,
    sources: Sequence[Path],
    read: Callable[[], FederatedSplits],
    *,
    version: int | None,
    **arguments: object,
) -> FederatedSplits:
    """What `read` returns, through the cache unless there is a `convert` of unknown version.

    A function's name says nothing about what it does, nor about its gin bindings, and a cache that
    returned what an older one had made would be wrong without a word.

    Args:
      name: the reader's.
      features: None for all that the files have.
      sources: the files.
      read: makes the data set.
      version: of the `convert` functions.
      **arguments: JSON values, the reader's other arguments.
    """
    converts = {name: f.convert for name, f in (features or {}).items()}
    keys = {name: convert.key for name, convert in converts.items() if hasattr(convert, "key")}  # pyright: ignore
    unknown = [name for name, c in converts.items() if c is not np.asarray and name not in keys]
    if version is None and unknown:
        return read()
    key = {
        "reader": _VERSION,
        "features": features
        and {name: [f.source, f.shape, f.dtype.__name__] for name, f in features.items()},
        "sources": [packed.fingerprint(existing(path)) for path in sources],
        "version": version,
    }
    if keys:
        key["converts"] = keys
    return packed.load_or_build(name, key | arguments, read)


def existing(path: str | Path) -> Path:
    """The path of a file that is there, `~` expanded."""
    path = download.local_file(path)
    if not path.is_file():
        raise UserError(f"no file {path}; correct the path")
    return path
