"""The reader of LEAF's JSON, against shards written by the test."""

import copy
import importlib
import json
import math

import gin
import numpy as np
import pytest

from fedexp.errors import UserError

# The package has the function of the same name.
leaf = importlib.import_module("fedexp.data.leaf")

FEATURES = {"image": ("x", (2, 2), "float32"), "label": ("y", (), "int32")}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDEXP_CACHE", str(tmp_path / "cache"))


def _user(user: str, size: int) -> dict[str, list]:
    first = float(ord(user[0]))
    return {
        "x": [[[first + i, 0.5], [0, 1]] for i in range(size)],
        "y": [i % 3 for i in range(size)],
    }


def _shard(**sizes: int) -> dict[str, object]:
    return {
        "users": list(sizes),
        "num_samples": list(sizes.values()),
        "user_data": {user: _user(user, size) for user, size in sizes.items()},
    }


def _write(folder, *shards):
    folder.mkdir(exist_ok=True)
    for i, shard in enumerate(shards):
        (folder / f"data_{i}.json").write_text(json.dumps(shard))
    return str(folder)


def _read(tmp_path, *shards, features=FEATURES, **options):
    if not (tmp_path / "test").exists():
        _write(tmp_path / "test", _shard(t=1))
    train = _write(tmp_path / "train", *shards)
    return leaf.leaf(train, str(tmp_path / "test"), features, **options)


def test_reads_users_of_all_shards(tmp_path):
    shards = _shard(c=2, a=3), _shard(b=1) | {"hierarchies": [None]}
    train, test, _ = _read(tmp_path, *shards)
    assert train.client_ids.tolist() == ["a", "b", "c"]
    assert train.client_sizes.tolist() == [3, 1, 2]
    assert test.client_ids.tolist() == ["t"]
    assert train.features["image"].dtype == np.float32
    assert train.features["label"].dtype == np.int32
    for user, examples in train.clients():
        expected = _user(user, len(examples["label"]))
        np.testing.assert_array_equal(examples["image"], np.array(expected["x"], np.float32))
        np.testing.assert_array_equal(examples["label"], expected["y"])


def test_reads_once_until_a_shard_changes(tmp_path, monkeypatch):
    _read(tmp_path, _shard(a=1))
    read = leaf._read
    monkeypatch.setattr(leaf, "_read", None)
    assert _read(tmp_path).train.client_ids.tolist() == ["a"]
    monkeypatch.setattr(leaf, "_read", read)
    assert _read(tmp_path, _shard(a=1, b=2)).train.client_ids.tolist() == ["a", "b"]
    assert _read(tmp_path, features={"y": ("y", (), "int64")}).train.features.keys() == {"y"}


def test_the_default_is_femnist(tmp_path):
    shard = _shard(w=2)
    shard["user_data"]["w"]["x"] = [[0.25] * 784] * 2
    folder = _write(tmp_path / "femnist", shard)
    features = leaf.leaf(folder, folder).train.features
    assert {name: (a.shape, a.dtype) for name, a in features.items()} == {
        "x": ((2, 784), np.float32),
        "y": ((2,), np.int32),
    }


def _bytes(strings: np.ndarray) -> np.ndarray:
    return np.array([list(string.encode()) for string in strings], np.uint8)


def test_text_is_converted_and_cached_only_under_a_version(tmp_path, monkeypatch):
    shard = _shard(a=2)
    shard["user_data"]["a"]["x"] = ["to be", "or no"]
    folder = _write(tmp_path / "data", shard)
    features = {"text": ("x", (), "object", _bytes)}
    for version in (None, 1):
        train = leaf.leaf(folder, folder, features, version=version).train
        assert train.features["text"].tobytes() == b"to beor no"
        assert isinstance(train.features["text"], np.memmap) == (version == 1)
    monkeypatch.setattr(leaf, "_read", None)
    leaf.leaf(folder, folder, features, version=1)
    for version in (None, 2):
        with pytest.raises(TypeError):
            leaf.leaf(folder, folder, features, version=version)


def test_lists_of_text_reach_convert_as_they_are(tmp_path):
    """Sent140's x are lists of strings, Reddit's are lists of lists of different lengths."""
    shard = _shard(a=2)
    shard["user_data"]["a"]["x"] = [["1", "hello"], ["2"]]
    features = {"n": ("x", (), "object", lambda rows: np.array([len(row) for row in rows]))}
    assert _read(tmp_path, shard, features=features).train.features["n"].tolist() == [2, 1]


def test_users_without_examples(tmp_path):
    shard = _shard(a=1, b=0)
    with pytest.raises(UserError, match=r"train: client 'b' has no examples.*drop_empty=True"):
        _read(tmp_path, shard)
    assert _read(tmp_path, shard, drop_empty=True).train.client_ids.tolist() == ["a"]
    # What LEAF's split by sample leaves of users that have too few.
    shard["users"], shard["num_samples"] = ["a"], [1]
    assert _read(tmp_path, shard).train.client_ids.tolist() == ["a"]


def _with(change) -> dict[str, object]:
    shard = copy.deepcopy(_shard(a=2, b=3))
    change(shard)
    return shard


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("users"), r"not a shard of LEAF \(KeyError: 'users'\); LEAF's layout is"),
        (lambda s: s["num_samples"].pop(), "not a shard of LEAF"),
        (lambda s: s["num_samples"].__setitem__(1, 4), "'b', .*'x': there are 3 .*says 4"),
        (lambda s: s["user_data"]["b"].pop("y"), r"client 'b' has no list 'y', only \['x'\]"),
        (lambda s: s["user_data"]["b"]["y"].pop(), "'b', feature 'y': there are 2 .*says 3"),
        (lambda s: s["user_data"].pop("b"), "client 'b' has no entry in 'user_data'"),
        (lambda s: (s["users"].pop(), s["num_samples"].pop()), "'b' has data but is not one of"),
        (
            lambda s: (s["users"].append("a"), s["num_samples"].append(2)),
            "'a' occurs more than once in 'users'",
        ),
        (
            lambda s: s["user_data"]["b"]["x"].__setitem__(1, [0.0]),
            "'b', feature 'x': examples have different shapes; .*'object'",
        ),
        (
            lambda s: s["user_data"]["b"].update(x=[[1.0]] * 3),
            r"'b', feature 'x': the shape is \(3, 1\), expected \(examples, 2, 2\)",
        ),
        (
            lambda s: s["user_data"]["b"].update(y=[0, 1, 1.5]),
            "'b', feature 'y': the dtype is float64, and not every value is of the dtype int32",
        ),
        (lambda s: s["user_data"]["b"].update(y=list("abc")), "feature 'y': the dtype is <U1"),
        (lambda s: s["user_data"].update(b=[1]), "not a shard of LEAF .AttributeError"),
        (lambda s: s.update(user_data=[1]), "not a shard of LEAF .AttributeError"),
        (lambda s: s.update(users=[["a"], "b"]), "not a shard of LEAF .TypeError"),
        (lambda s: s.update(users=["a", 1]), "client 1 has no entry|client 'b' has data but"),
        (lambda s: s["user_data"]["b"].update(y=[0, 1, 2**70]), "feature 'y': the dtype is object"),
        (lambda s: s["user_data"]["b"].update(y=[0, 1, 2**40]), "feature 'y': the dtype is int64"),
        (
            lambda s: s["user_data"]["b"]["x"][2].__setitem__(0, [math.nan, 0.0]),
            "'b', feature 'x': the value nan is not finite",
        ),
        (
            lambda s: s["user_data"]["b"]["x"][2].__setitem__(0, [1e300, 0.0]),
            r"'b', feature 'x': the value 1e\+300 does not fit float32",
        ),
    ],
)
def test_a_wrong_layout_names_file_and_user(tmp_path, change, message):
    with pytest.raises(UserError, match=r"train/data_0\.json.*" + message):
        _read(tmp_path, _with(change))


def test_a_user_in_two_shards(tmp_path):
    with pytest.raises(UserError, match=r"data_1\.json: client 'a' is in data_0\.json too"):
        _read(tmp_path, _shard(a=1), _shard(b=1, a=1))


def test_json_that_is_nested_too_deeply(tmp_path):
    folder = tmp_path / "deep"
    folder.mkdir()
    (folder / "data.json").write_text("[" * 200_000 + "]" * 200_000)
    with pytest.raises(UserError, match=r"data\.json is not a shard of LEAF \(RecursionError"):
        leaf.leaf(str(folder), str(folder))


def test_no_shards_and_no_json(tmp_path):
    with pytest.raises(UserError, match=r"no \*\.json files in .*gone"):
        leaf.leaf(str(tmp_path / "gone"), str(tmp_path / "gone"))
    _write(tmp_path / "train")
    (tmp_path / "train" / "data_0.json").write_text('{"users": [')
    with pytest.raises(UserError, match=r"data_0\.json is not a shard of LEAF \(JSONDecodeError"):
        _read(tmp_path)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({}, "nothing to read"),
        ({"x": ("x", ())}, r"feature 'x' must be \(source, shape, dtype\).*got \('x', \(\)\)"),
        ({"x": ("x", (), "flot32")}, "feature 'x' must be .*flot32"),
        ({"x": ("x", (), "object")}, "'x' holds Python objects; give a `convert`"),
        ({"x": ("x", (), "object", lambda rows: rows[:1])}, "must keep their number"),
    ],
)
def test_wrong_features(tmp_path, features, message):
    with pytest.raises(UserError, match=message):
        _read(tmp_path, _shard(a=2), features=features)


def test_what_convert_raises_goes_through_with_a_note(tmp_path):
    def broken(rows):
        return rows if len(rows) == 1 else {}["a word"]

    with pytest.raises(KeyError, match="a word") as caught:
        _read(tmp_path, _shard(a=1, b=2), features={"y": ("y", (), "int32", broken)})
    path = tmp_path / "train" / "data_0.json"
    assert caught.value.__notes__ == [f"reading {path}: client 'b', feature 'y'"]


def test_what_convert_refuses_names_the_user(tmp_path):
    def refuse(rows):
        raise UserError("too long")

    with pytest.raises(UserError, match=r"data_0\.json: client 'a', feature 'y': too long"):
        _read(tmp_path, _shard(a=2), features={"y": ("y", (), "int32", refuse)})


def test_features_from_a_gin_file(tmp_path):
    gin.external_configurable(_bytes, "to_bytes", module="test_leaf")
    shard = _shard(a=1)
    shard["user_data"]["a"]["x"] = ["hi"]
    folder = _write(tmp_path / "data", shard)
    with gin.unlock_config():
        gin.parse_config(
            f"""
            leaf.train_dir = '{folder}'
            leaf.test_dir = '{folder}'
            leaf.features = {{'x': ('x', (), 'object', @to_bytes), 'y': ('y', (), 'int32')}}
            """
        )
    try:
        assert leaf.leaf().train.features["x"].tolist() == [[104, 105]]
    finally:
        gin.clear_config()
