"""The reader of CSV files: against plain Python, real hospitals, and files with mistakes."""

import collections
import csv as csv_lib
import json
import os
from pathlib import Path

import gin
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedexp import config
from fedexp.data import csv, csv_files, dirichlet, label_ids, standardized_features
from fedexp.errors import UserError
from fedexp.trainer import Experiment

DATA = Path(os.environ.get("FEDEXP_TEST_DATA", "")) / "heart_disease"
needs_data = pytest.mark.skipif(
    "FEDEXP_TEST_DATA" not in os.environ or not DATA.is_dir(),
    reason="needs FEDEXP_TEST_DATA, a folder with heart_disease/",
)
PATIENTS = """client,age,sex,dose,target
berlin,63,1,0.5,1
rome,41,0,1.5,0

berlin,50,0,2,0
rome,70,1,1e1,1
berlin,33,0,-4,1
"""
FEATURES = {"x": "*", "y": "target"}


def _write(folder: Path, text: str, name: str = "train.csv") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def _read(folder, text=PATIENTS, features=FEATURES, **options):
    path = _write(folder, text)
    options = {"client": "client", "test_path": path} | options
    return csv(path, features, **options)


def test_rows_become_examples_of_clients(tmp_path):
    train = _read(tmp_path).train
    assert train.client_ids.tolist() == ["berlin", "rome"]
    assert train.client_sizes.tolist() == [3, 2]
    assert (train.features["x"].dtype, train.features["y"].dtype) == (np.float32, np.int32)
    expected = [[63, 1, 0.5], [50, 0, 2], [33, 0, -4], [41, 0, 1.5], [70, 1, 10]]
    assert train.features["x"].tolist() == expected
    assert train.features["y"].tolist() == [1, 0, 1, 0, 1]


def test_features_are_made_of_the_columns_named(tmp_path):
    features = {
        "two": ["dose", "age"],
        "one": "dose",
        "small": ("age", (), "uint8"),
        "image": (["age", "sex", "age", "sex"], (2, 2), "int16"),
        "rest": "*",
    }
    found = _read(tmp_path, features=features).train.slice(3, 5)
    assert found["two"].tolist() == [[1.5, 41], [10, 70]]
    assert found["one"].tolist() == [1.5, 10] and found["one"].dtype == np.float32
    assert found["small"].tolist() == [41, 70] and found["small"].dtype == np.uint8
    assert found["image"].tolist() == [[[41, 0], [41, 0]], [[70, 1], [70, 1]]]
    assert found["rest"].tolist() == [[0], [1]]  # Only the target is left.


def test_text_needs_a_function(tmp_path):
    text = 'client,words,label\na,"to be, or",good\na,"not\nto",bad\nb,ö,good\n'
    features = {
        "length": ("words", (), "object", lambda texts: np.array([len(t) for t in texts])),
        "y": ("label", (), "object", label_ids(["bad", "good"])),
    }
    found = _read(tmp_path, text, features).train.features
    assert found["length"].tolist() == [9, 6, 1]
    assert found["y"].tolist() == [1, 0, 1]
    features["y"] = ("label", (), "object", label_ids(["good"]))
    with pytest.raises(UserError, match=r"train\.csv, feature 'label': the label 'bad' is none of"):
        _read(tmp_path, text, features)


@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from("abc"), st.floats(width=32, allow_nan=False, allow_infinity=False)
        ),
        min_size=1,
        max_size=12,
    ),
    block=st.integers(1, 5),
)
def test_against_the_csv_module(tmp_path_factory, rows, block):
    folder = tmp_path_factory.mktemp("rows")
    with (folder / "train.csv").open("w", newline="") as file:
        csv_lib.writer(file, delimiter=";").writerows([("who", "v"), *rows])
    expected = collections.defaultdict(list)
    for who, value in rows:
        expected[who].append(value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(csv_files, "_BLOCK", block)
        path = str(folder / "train.csv")
        train = csv(path, {"x": ("v", (), "float32")}, "who", test_path=path, delimiter=";").train
    assert {who: e["x"].tolist() for who, e in train.clients()} == dict(sorted(expected.items()))


def test_excel_begins_with_a_byte_order_mark(tmp_path):
    assert _read(tmp_path, "\ufeff" + PATIENTS).train.client_ids.tolist() == ["berlin", "rome"]


def test_the_test_is_another_file_a_column_or_a_fraction(tmp_path):
    test = _write(tmp_path, "target,client,dose,sex,age\n1,rome,7,1,9\n", "test.csv")
    splits = _read(tmp_path, test_path=test, validation_path=test)
    assert splits.train.num_examples == 5
    for split in (splits.test, splits.validation):
        assert split.features["y"].tolist() == [1]
    text = "client,part,v\na,train,1\na,test,2\nb,train,3\nb,validation,4\na,test,5\n"
    splits = _read(tmp_path, text, {"v": "*"}, split="part", test_path=None)
    assert {name: split.features["v"].tolist() for name, split in splits.present().items()} == {
        "train": [[1], [3]],
        "test": [[2], [5]],
        "validation": [[4]],
    }
    splits, again, other = (
        _read(tmp_path, test_path=None, test_fraction=0.4, seed=seed) for seed in (0, 0, 4)
    )
    assert splits.test.client_sizes.tolist() == [1, 1]
    both = np.concatenate([split.features["x"] for split in (splits.train, splits.test)])
    assert sorted(both[:, 0]) == [33, 41, 50, 63, 70]
    np.testing.assert_array_equal(splits.test.features["x"], again.test.features["x"])
    assert not np.array_equal(splits.test.features["x"], other.test.features["x"])


def test_a_partition_in_place_of_a_column(tmp_path):
    options = {"client": None, "partition": dirichlet(2, 1e6), "features": {"y": "target"}}
    splits = _read(tmp_path, **options)
    assert splits.train.client_ids.tolist() == ["0", "1"]
    assert splits.train.client_sizes.tolist() == [3, 2]


def test_clients_of_the_test_alone(tmp_path):
    test = _write(tmp_path, PATIENTS.replace("rome", "oslo"), "test.csv")
    message = r"client 'oslo' has no examples in 'train', but has in 'test' \(1 of 2 clients\)"
    with pytest.raises(UserError, match=message):
        _read(tmp_path, test_path=test)
    splits = _read(tmp_path, test_path=test, unseen_clients=True)
    assert splits.test.client_ids.tolist() == ["berlin", "oslo"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "client,age",
            "clients,age",
            r"no column 'client' in .*; there are 'clients', 'age', 'sex'",
        ),
        ("age,sex", "age,age", r"has several columns \['age'\]; rename"),
        (",1.5,", ",abc,", "line 3, column 'dose' holds 'abc', which is no number; correct it"),
        (",1.5,", ",,", "line 3, column 'dose' is empty; correct it, leave the row or column out"),
        (",1.5,", ",nan,", "line 3, column 'dose': the value nan is not finite"),
        (",2,", ",-inf,", "line 5, column 'dose': the value -inf is not finite"),
        ("1e1", "1e39", r"line 6, column 'dose': the value 1e\+39 does not fit float32"),
        ("1e1,1", "1e1,8589934592", "line 6, column 'target': the value 8589934592 does not fit"),
        (",70,", ",70,70,", "line 6: there are 6 fields, the first line has 5; mend it"),
        ("0.5,1\n", "0.5\n", "line 2: there are 4 fields, the first line has 5"),
        ("\nrome,70", "\n,70", "line 6, column 'client' is empty; fill it"),
        ("rome,70", '"rome,70', "after line 5: unexpected end of data; mend the file"),
        (PATIENTS, "", "is empty; its first line must name the columns"),
        (PATIENTS, "client,age,sex,dose,target\n", "has no rows; add examples"),
    ],
)
def test_mistakes_in_files(tmp_path, old, new, message):
    assert old in PATIENTS
    with pytest.raises(UserError, match=message) as caught:
        _read(tmp_path, PATIENTS.replace(old, new))
    assert "train.csv" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"client": None}, "csv needs one of `client`, .*, and `partition`"),
        ({"partition": dirichlet(2, 1.0)}, "csv needs one of `client`"),
        ({"split": "sex"}, r"csv\.split is for a file with several partitions"),
        (
            {"split": "sex", "test_path": None},
            r"train\.csv, line 2, column 'sex': '1' is no partition; write 'train', 'test' or",
        ),
        ({"features": {}}, r"nothing to read: csv\.features is empty"),
        ({"features": {"x": "weight"}}, "no column 'weight' in .*train.csv; there are 'client',"),
        ({"features": {"x": 3}}, "feature 'x' must be a column, a list of columns or '\\*'"),
        ({"features": {"x": ("age", "sex")}}, r"feature 'x' must be \(source, shape, dtype\)"),
        ({"features": {"x": ("age", (), "flot")}}, "feature 'x' must be .*flot"),
        ({"features": {"x": (["age"], (2,), "int32")}}, r"shape \(1,\) an example, .* be \(2,\)"),
        (
            {"features": {"x": ("dose", (), "int32")}},
            "line 2, column 'dose': the value 0.5 is no int",
        ),
        ({"features": {"x": ("target", (), "object")}}, "holds Python objects; give a `convert`"),
        ({"test_path": "gone.csv"}, r"no file gone\.csv; correct the path"),
        ({"test_path": None, "test_fraction": 1.5}, "fraction must be between 0 and 1"),
        ({"delimiter": ";"}, "no column 'client' in .*; there are 'client,age,sex,dose,target'"),
        ({"delimiter": ", "}, "csv.delimiter must be one character, got ', '"),
    ],
)
def test_mistakes_in_bindings(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        _read(tmp_path, **options)


def test_other_bytes_than_text(tmp_path):
    path = tmp_path / "latin.csv"
    path.write_bytes("client,y\nköln,1\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.csv is not in UTF-8 \(.*; save it as that"):
        csv(str(path), {"y": "y"}, "client")


def test_a_partition_that_has_no_rows(tmp_path):
    text = "client,part,v\na,train,1\n"
    with pytest.raises(UserError, match="column 'part': all rows are of 'train'; mark some as"):
        _read(tmp_path, text, {"v": "v"}, split="part", test_path=None)


@needs_data
def test_hospitals_and_their_moments():
    splits = csv(
        str(DATA / "heart_train.csv"), FEATURES, "client", test_path=str(DATA / "heart_test.csv")
    )
    assert splits.train.client_ids.tolist() == ["cleveland", "hungarian", "switzerland", "va"]
    assert splits.train.client_sizes.tolist() == [199, 172, 30, 85]
    assert splits.test.client_sizes.tolist() == [104, 89, 16, 45]
    moments = json.loads((DATA / "results.json").read_text())["settings"]["moments"]
    scaled = standardized_features(splits, by="client", test_by="all")
    for name, part, raw in (
        ("va", scaled.train, splits.train),
        ("pooled", scaled.test, splits.test),
    ):
        mean, std = (np.array(moments[name][key]) for key in ("mean", "std"))
        rows = slice(*raw.offsets[[3, 4]]) if name == "va" else slice(None)
        expected = (raw.features["x"][rows] - mean) / (std + 1e-9)
        np.testing.assert_allclose(part.features["x"][rows], expected, atol=2e-4)


@needs_data
def test_fedavg_over_the_hospitals_is_as_published():
    """FLamby's five seeds have 0.748 with a standard deviation of 0.027."""
    gin.clear_config()
    overrides = [
        f"csv.path = '{DATA}/heart_train.csv'",
        f"csv.test_path = '{DATA}/heart_test.csv'",
        "evaluate.every = 0",
    ]
    try:
        config.load(["heart_disease_fedavg.gin"], overrides)
        result = Experiment(observers=[]).run(overrides=overrides)
    finally:
        gin.clear_config()
    assert abs(result.metrics["test/accuracy"] - 0.748) < 3 * 0.027
