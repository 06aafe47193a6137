"""LEAF's JSON layout: shards of {users, num_samples, user_data: {user: {x, y}}}."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import gin
import numpy as np

from fedexp.data import download
from fedexp.data import features as features_lib
from fedexp.data.dataset import FederatedDataset, FederatedSplits
from fedexp.data.features import Feature, Features
from fedexp.errors import UserError

_LAYOUT = "LEAF's layout is {users: [...], num_samples: [...], user_data: {user: {x, y}}}"
_FEMNIST = {"x": ("x", (784,), "float32"), "y": ("y", (), "int32")}


@gin.configurable
def leaf(
    train_dir: str,
    test_dir: str,
    features: Features | None = None,
    drop_empty: bool = False,
    version: int | None = None,
) -> FederatedSplits:
    """A data set as LEAF's `preprocess.sh` writes it (Caldas et al. 2018, arXiv:1812.01097).

    A client is a LEAF user, and clients are in ascending order of their ids. Reading needs the memory
    of the result twice, and that of the largest shard's parsed JSON.

    Args:
      train_dir: folder of *.json shards, LEAF's data/train.
      test_dir: LEAF's data/test.
      features: name -> (source, shape, dtype) or (source, shape, dtype, convert), see
        `fedexp.data.features`. Sources are keys of a user's data. With the dtype 'object' and the
        shape () `convert` gets JSON values as they are: strings (Shakespeare), lists (Sent140,
        Reddit), dicts. The default are FEMNIST's: x (784,) float32, 1 is white; y int32, 0 to 61.
      drop_empty: leave users without examples out instead of raising.
      version: what the `convert` functions do, as a number to raise when they change; see
        `fedexp.data.features.load`. Where there are any and it is None, every run reads the files.

    Raises:
      UserError: no shards, another layout, a user in several shards, or values that do not fit
        `features`. The message names file, user and feature.
    """
    wanted = features_lib.parse(_FEMNIST if features is None else features)
    train, test = shards_of(train_dir), shards_of(test_dir)

    def read() -> FederatedSplits:
        features_lib.fit(wanted, lambda seen: _read(train, seen, drop_empty=drop_empty))
        return FederatedSplits(
            *(_read(paths, wanted, drop_empty=drop_empty) for paths in (train, test))
        )

    return features_lib.load(
        "leaf",
        wanted,
        [*train, *test],
        read,
        version=version,
        drop_empty=drop_empty,
        num_train_shards=len(train),
    )


def shards_of(directory: str) -> list[Path]:
    """The files of a folder, also of one in a bucket; it raises UserError where there are none."""
    folder = download.local_folder(directory, "*.json")
    if not (paths := sorted(folder.glob("*.json"))):
        raise UserError(f"no *.json files in {folder}; correct the path to LEAF's shards")
    return paths


def _read(
    paths: list[Path], features: Mapping[str, Feature], *, drop_empty: bool
) -> FederatedDataset:
    clients = {
        user: {name: _rows(where, feature, data, size) for name, feature in features.items()}
        for where, user, size, data in users_of(paths)
    }
    return features_lib.dataset(paths[0].parent, clients, drop_empty)


def users_of(paths: Sequence[Path]) -> Iterator[tuple[str, str, int, dict[str, list]]]:
    """Goes through the users of shards: file and user for messages, the user, num_samples, and the data.

    Raises:
      UserError: another layout, or a user in several shards.
    """
    shard_of: dict[str, Path] = {}
    for path in paths:
        for user, size, data in _users(path):
            where = f"{path}: client {user!r}"
            if user in shard_of:
                raise UserError(f"{where} is in {shard_of[user].name} too; remove one")
            shard_of[user] = path
            yield where, user, size, data


def _users(path: Path) -> Iterator[tuple[str, int, dict[str, list]]]:
    """The users of one shard."""
    try:
        shard = json.loads(path.read_bytes())
        users, sizes, user_data = (shard[key] for key in ("users", "num_samples", "user_data"))
        sizes = dict(zip(users, sizes, strict=True))
        has_data = {user: any(data.values()) for user, data in user_data.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is not a shard of LEAF ({type(error).__name__}: {error}); {_LAYOUT}"
        ) from error
    if len(sizes) != len(users):
        twice = next(user for user in sizes if users.count(user) > 1)
        raise UserError(f"{path}: client {twice!r} occurs more than once in 'users'")
    # LEAF's own split leaves users whom it drops behind, without data.
    if unlisted := [user for user, has in has_data.items() if has and user not in sizes]:
        raise UserError(f"{path}: client {unlisted[0]!r} has data but is not one of 'users'")
    for user, size in sizes.items():
        data = user_data.get(user)
        if not isinstance(user, str) or data is None:
            raise UserError(f"{path}: client {user!r} has no entry in 'user_data'; {_LAYOUT}")
        yield user, size, data


def _rows(where: str, feature: Feature, data: dict[str, list], size: int) -> np.ndarray:
    values = data.get(feature.source)
    if not isinstance(values, list):
        raise UserError(
            f"{where} has no list {feature.source!r}, only {sorted(data)}; correct `features`"
        )
    if len(values) != size:
        raise UserError(
            f"{where}, feature {feature.source!r}: there are {len(values)} examples, 'num_samples' "
            f"says {size}; mend the file"
        )
    if not values:
        return np.zeros(0)
    if feature.dtype is object:
        array = np.empty(len(values), object)
        for i, value in enumerate(values):
            array[i] = value
    else:
        try:
            array = np.asarray(values)
        except (ValueError, OverflowError) as error:
            raise UserError(
                f"{where}, feature {feature.source!r}: examples have different shapes; read them "
                "with the dtype 'object' and a `convert`"
            ) from error
    return features_lib.rows(where, feature, array)
