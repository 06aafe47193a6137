"""TensorFlow Federated's HDF5 layout: `examples/<client id>/<feature>`, examples along axis 0."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from fedexp.data import download, packed, workers
from fedexp.data import features as features_lib
from fedexp.data.dataset import Examples, FederatedDataset, FederatedSplits
from fedexp.data.features import Feature
from fedexp.errors import UserError

if TYPE_CHECKING:
    import h5py

_ROOT = "examples"
_LAYOUT = f"TFF's layout is {_ROOT}/<client id>/<feature>"
_URL = "https://storage.googleapis.com/tff-datasets-public/"


def read(
    path: Path, features: Mapping[str, Feature], *, drop_empty: bool = False
) -> FederatedDataset:
    """Reads one HDF5 file into memory, at most one client above the size of the result.

    Args:
      path: the file.
      features: name in the data set -> what to read; other features in the file are ignored.
      drop_empty: leave clients without examples out instead of raising.

    Returns:
      The data set, its clients in ascending order of their ids.

    Raises:
      UserError: no such file, not HDF5 or damaged, another layout, or values that `convert`
        refuses. The message names file, client and feature.
    """
    path = Path(path)
    with _opened(path) as root:
        return _read_clients(path, root, features, drop_empty)


@dataclasses.dataclass(frozen=True)
class Source:
    """One HDF5 file of any size, for `conversion.convert`; it makes the same checks as `read`.

    Attributes:
      path: the file.
      features: what to read, by the names that `encode` knows.
      encode: maps a client's features to those of the data set: each of as many rows, with the same
        dtype and shape for every client.
      drop_empty: leave clients without examples out instead of raising.
    """

    path: Path
    features: Mapping[str, Feature]
    encode: Callable[[Examples], Examples]
    drop_empty: bool = False

    def client_ids(self) -> list[str]:
        """In ascending order."""
        with _opened(self.path) as root, _reading(self.path):
            return sorted(root)

    def read(self, client_ids: Sequence[str]) -> Iterator[Examples]:
        """Yields what `encode` makes of each client."""
        with _opened(self.path) as root:
            for client_id in client_ids:
                where = f"{self.path}: client {client_id!r}"
                with _reading(self.path):
                    arrays = _arrays(where, root[client_id], self.features)
                    stored = {source: array[:] for source, array in arrays.items()}
                if not _size(arrays) and not self.drop_empty:
                    raise UserError(
                        f"{where} has no examples; pass drop_empty=True to leave such clients out"
                    )
                examples = {
                    name: _converted(where, feature, stored[feature.source])
                    for name, feature in self.features.items()
                }
                with features_lib.located(where):
                    encoded = self.encode(examples)
                yield encoded


def load_splits(
    name: str,
    features: Mapping[str, Feature],
    *,
    version: int,
    sha256: str,
    data_dir: str | None = None,
    drop_empty: bool = False,
    transform: Callable[[FederatedDataset], FederatedDataset] = lambda dataset: dataset,
    arguments: Mapping[str, object] | None = None,
) -> FederatedSplits:
    """Loads a data set that TFF publishes, packing it into the cache on the first call.

    That is done in a worker process, because damaged files crash libhdf5, or keep it busy for good.

    Args:
      name: TFF's name, as "fed_emnist": the files are {name}_train.h5 and {name}_test.h5, published
        together as {name}.tar.bz2.
      features: see `read`.
      version: raised whenever `features` changes what is read.
      sha256: SHA-256 checksum of the published archive, from TFF's source.
      data_dir: folder with the two files, also a URL as s3://bucket/data; None downloads them.
      drop_empty: see `read`.
      transform: makes each partition from what was read, and may change how many rows clients have.
      arguments: JSON values that `features` or `transform` depend on.

    Raises:
      UserError: the files are not in `data_dir`, cannot be downloaded, or cannot be read.
    """

    def read_folder(folder: Path) -> FederatedSplits:
        return FederatedSplits(
            *(
                transform(read(path, features, drop_empty=drop_empty))
                for path in _find(folder, name)
            )
        )

    def pack(folder: Path) -> None:
        what = "reading " + " and ".join(map(str, _find(folder, name)))
        workers.run(what, lambda: packed.write(directory, read_folder(folder)))

    def pack_published() -> None:
        archive = f"{name}.tar.bz2"
        with download.extracted(
            download.download(_URL + archive, archive, sha256=sha256)
        ) as folder:
            pack(folder)

    key = {"version": version, "drop_empty": drop_empty} | dict(arguments or {})
    if data_dir is None:
        directory = packed.location(name, key | {"sha256": sha256})
        packed.make_once(directory, pack_published)
    else:
        folder = download.local_folder(data_dir, f"{name}_*.h5")
        sources = [packed.fingerprint(path) for path in _find(folder, name)]
        directory = packed.location(name, key | {"sources": sources})
        packed.make_once(directory, lambda: pack(folder))
    return packed.read(directory)


def _find(folder: Path, name: str) -> tuple[Path, Path]:
    """The training and the test file in `folder`."""
    paths = (folder / f"{name}_train.h5", folder / f"{name}_test.h5")
    if missing := [path.name for path in paths if not path.is_file()]:
        found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        listing = ", ".join(found[:10]) + (", ..." if len(found) > 10 else "")
        raise UserError(
            f"expected {' and '.join(missing)} in {folder}, "
            + (f"found {listing or 'nothing'}" if folder.is_dir() else "which is not a folder")
            + f"; correct data_dir, or leave it out to download {_URL}{name}.tar.bz2"
        )
    return paths


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[h5py.Group]:
    """The group of clients."""
    import h5py

    if not path.is_file():
        raise UserError(f"no file {path}; correct the path, or download it")
    with contextlib.ExitStack() as stack:
        with _reading(path):
            root = _root(path, stack.enter_context(h5py.File(path, "r")))
        yield root


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """For a body that reads the file and calls nothing of the user's: what goes wrong is damage."""
    try:
        with workers.limited():
            yield
    except UserError:
        raise
    except Exception as error:  # Damaged files make h5py and NumPy raise nearly anything.
        raise UserError(
            f"{path} is damaged or not an HDF5 file ({error}); download it again"
        ) from error


def _root(path: Path, file: h5py.File) -> h5py.Group:
    import h5py

    root = file.get(_ROOT)
    if not isinstance(root, h5py.Group):
        raise UserError(
            f"{path} has no group {_ROOT!r} at its root but {sorted(file) or 'nothing'}; {_LAYOUT}"
        )
    return root


def _arrays(where: str, group: object, features: Mapping[str, Feature]) -> dict[str, h5py.Dataset]:
    """What the file has of a client's features, by their sources, checked: all of the same length."""
    import h5py

    if not isinstance(group, h5py.Group):
        raise UserError(f"{where} is an array, not a group of features; {_LAYOUT}")
    arrays: dict[str, h5py.Dataset] = {}
    for feature in features.values():
        array = group.get(feature.source)
        if not isinstance(array, h5py.Dataset):
            raise UserError(
                f"{where} has no feature {feature.source!r}, only {sorted(group)}; read another "
                "feature, or mend the file"
            )
        if array.shape[1:] != feature.shape or array.ndim == 0:
            raise UserError(
                f"{where}, feature {feature.source!r}: the shape is {array.shape}, expected "
                f"(examples, {', '.join(map(str, feature.shape))}); is it the right file?"
            )
        if not np.issubdtype(array.dtype, feature.dtype) or _holds_arrays(array):
            raise UserError(
                f"{where}, feature {feature.source!r}: the dtype is {array.dtype}, expected "
                f"{feature.dtype.__name__}; is it the right file?"
            )
        arrays[feature.source] = array
    lengths = {source: len(array) for source, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise UserError(f"{where} has features of different lengths: {lengths}; mend the file")
    return arrays


def _size(arrays: Mapping[str, h5py.Dataset]) -> int:
    return len(next(iter(arrays.values())))


def _holds_arrays(array: h5py.Dataset) -> bool:
    """Whether its entries are arrays of variable length: objects to numpy, as strings are."""
    import h5py

    return array.dtype.hasobject and h5py.check_string_dtype(array.dtype) is None


def _converted(where: str, feature: Feature, values: np.ndarray) -> np.ndarray:
    with features_lib.located(f"{where}, feature {feature.source!r}"):
        return feature.convert(values)


def _read_clients(
    path: Path, root: h5py.Group, features: Mapping[str, Feature], drop_empty: bool
) -> FederatedDataset:
    """Two passes, so that the only large arrays are those of the result: sizes, then rows."""
    with _reading(path):
        where = {cid: f"{path}: client {cid!r}" for cid in sorted(root)}
        sizes = {cid: _size(_arrays(where[cid], root[cid], features)) for cid in where}
    if (empty := [cid for cid, size in sizes.items() if not size]) and not drop_empty:
        raise UserError(
            f"{where[empty[0]]} has no examples ({len(empty)} of {len(sizes)} clients are empty); "
            "pass drop_empty=True to leave them out"
        )
    sizes = {cid: size for cid, size in sizes.items() if size}
    if not sizes:
        raise UserError(f"{path} has no client with examples; is it the right file?")
    offsets = np.concatenate([[0], np.cumsum(list(sizes.values()))])
    flat: dict[str, np.ndarray] = {}
    for index, cid in enumerate(sizes):
        for name, feature in features.items():
            with _reading(path):
                stored = cast("h5py.Dataset", root[f"{cid}/{feature.source}"])[:]
            rows = np.asarray(_converted(where[cid], feature, stored))
            if name not in flat:
                flat[name] = np.empty((offsets[-1], *rows.shape[1:]), rows.dtype)
            features_lib.check_alike(where[cid], feature, rows, flat[name])
            flat[name][offsets[index] : offsets[index + 1]] = rows
    return FederatedDataset(flat, offsets, np.array(list(sizes)))
