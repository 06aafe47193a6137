"""The reader of Parquet files, on files that pyarrow writes."""

import decimal
import io
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fedexp.data import iid, label_ids, parquet
from fedexp.errors import UserError

USERS = ["b", "a", "b", "a"]


def _write(folder, name="rows.parquet", **columns):
    pq.write_table(pa.table({"user": USERS, **columns}), folder / name, row_group_size=2)
    return str(folder / name)


def _read(folder, features, **columns):
    path = _write(folder, **columns)
    return parquet(path, features, "user", test_path=path).train


def _png(array: np.ndarray, mode: str | None = None) -> dict[str, object]:
    buffer = io.BytesIO()
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def test_numbers_and_lists_of_numbers(tmp_path):
    train = _read(
        tmp_path,
        {
            "x": ["f", "v"],
            "m": "m",
            "y": "y",
            "small": "u",
            "b": "b",
            "half": "h",
            "fixed": "fixed",
        },
        f=[1.5, 2.5, 3.5, 4.5],
        v=[[1, 2], [3, 4], [5, 6], [7, 8]],
        m=[[[float(i)] * 3] * 2 for i in range(4)],
        y=[0, 1, 2, 3],
        u=pa.array([9, 8, 7, 255], pa.uint8()),
        b=[True, False, True, False],
        h=pa.array(np.arange(4, dtype=np.float16)),
        fixed=pa.array([[1, 2], [3, 4], [5, 6], [7, 8]], pa.list_(pa.int8(), 2)),
    )
    assert train.client_ids.tolist() == ["a", "b"]
    found = train.features
    assert found["x"].tolist() == [[2.5, 3, 4], [4.5, 7, 8], [1.5, 1, 2], [3.5, 5, 6]]
    assert found["m"].shape == (4, 2, 3) and found["m"][:, 1, 2].tolist() == [1, 3, 0, 2]
    assert found["y"].tolist() == [1, 3, 0, 2]
    assert found["fixed"].tolist() == [[3, 4], [7, 8], [1, 2], [5, 6]]
    assert {name: array.dtype.name for name, array in found.items()} == {
        "x": "float32",
        "m": "float32",
        "y": "int32",
        "small": "uint8",
        "b": "bool",
        "half": "float16",
        "fixed": "int8",
    }


def test_images_as_hugging_face_stores_them(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3)).astype(np.uint8)
    train = _read(
        tmp_path,
        {"x": "color", "grey": "grey"},
        color=[_png(image, None if i else "RGBA") for i, image in enumerate(pixels)],
        grey=[_png(image[..., 0]) for image in pixels],
    )
    np.testing.assert_array_equal(train.features["x"], pixels[[1, 3, 0, 2]])
    np.testing.assert_array_equal(train.features["grey"], pixels[[1, 3, 0, 2], ..., 0])


def test_values_as_they_are(tmp_path):
    columns = {
        "label": pa.array(["no", "yes", "no", "yes"]).dictionary_encode(),
        "ragged": [[1], [1, 2], [], [5]],
    }
    features = {
        "y": ("label", (), "object", label_ids(["no", "yes"])),
        "sum": ("ragged", (), "object", lambda rows: np.array([sum(row) for row in rows])),
    }
    found = _read(tmp_path, features, **columns).features
    assert found["y"].tolist() == [1, 1, 0, 0]
    assert found["sum"].tolist() == [3, 5, 1, 0]


def test_clients_by_number_and_a_folder_of_files(tmp_path):
    for i in range(2):
        table = pa.table({"id": [10 + i, 2], "y": [i, 5 + i]})
        pq.write_table(table, tmp_path / f"train-{i}.parquet")
    train = parquet(str(tmp_path), {"y": "y"}, "id", test_path=str(tmp_path)).train
    assert {name: e["y"].tolist() for name, e in train.clients()} == {
        "10": [0],
        "11": [1],
        "2": [5, 6],
    }
    splits = parquet(str(tmp_path), {"y": "y"}, partition=iid(2), test_fraction=0.5)
    assert splits.train.client_sizes.tolist() == splits.test.client_sizes.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([1, 2, None, 4], "row 2, column 'v' is missing; fill it, or leave the row out"),
        ([1.0, 2.0, 3.0, np.inf], "row 3, column 'v': the value inf is not finite"),
        ([[1], [2], [None], [4]], "row 2, column 'v' is missing"),
        (
            [[1, 2], [2], [3, 4], [4, 5]],
            "row 1, column 'v' has a list of 1, and row 0 one of 2; make",
        ),
        ([[1], [2], [3], [4, 5]], "row 3, column 'v' has a list of 2, and row 2 one of 1; make"),
        ([[1], [2], [3, 4], [4, 5]], r"row 2, column 'v' has the shape \(2,\), row 0 has \(1,\)"),
        ([[[1, 2]], [[3, 4]], [[5, 6]], [[7]]], "row 3, column 'v' has a list of 1, and row 2"),
        ([[[]]] * 4, "row 0, column 'v' is an empty list; make"),
        (
            ["1", "2", "3", "4"],
            "row 0, column 'v' is of the type string, which is no number; leave",
        ),
        ([["a"], ["b"], ["c"], ["d"]], "row 0, column 'v' is of the type string"),
        ([decimal.Decimal(1)] * 4, r"row 0, column 'v' is of the type decimal128\(1, 0\)"),
        (np.zeros(4, "M8[ms]"), r"row 0, column 'v' is of the type timestamp\[ms\]"),
        ([{"a": 1}] * 4, "row 0, column 'v' is no number and holds no image"),
        ([{"bytes": b"JFIF"}] * 4, r"row 0, column 'v' is no image \(Unidentified.*; mend it"),
        (
            [_png(np.zeros((2 + i % 2, 2), np.uint8)) for i in range(4)],
            r"row 1, column 'v' is an image \(3, 2\), and row 0 is \(2, 2\); make them alike",
        ),
    ],
)
def test_what_is_no_number(tmp_path, column, message):
    with pytest.raises(UserError, match=rf"rows\.parquet, {message}"):
        _read(tmp_path, {"v": "v"}, v=column)


def test_mistakes_in_files(tmp_path):
    for path in (str(tmp_path / "gone.parquet"), str(tmp_path / "folder")):
        with pytest.raises(UserError, match=r"no .*; correct the path"):
            parquet(path, {"x": "x"}, "user")
    path = _write(tmp_path)
    with pytest.raises(UserError, match=r"parquet: no column 'x' in .*; there are 'user'"):
        parquet(path, {"x": "x"}, "user")
    content = (tmp_path / "rows.parquet").read_bytes()
    (tmp_path / "rows.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"rows\.parquet cannot be read, or is damaged \(Arrow"):
        parquet(path, {"x": "x"}, "user")
    pq.write_table(pa.table({"user": pa.array([], pa.string())}), tmp_path / "none.parquet")
    with pytest.raises(UserError, match=r"none\.parquet has no rows; add examples"):
        parquet(str(tmp_path / "none.parquet"), {"x": ["user"]}, "user")


def test_without_pyarrow(tmp_path, monkeypatch):
    path = _write(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"not installed: pip install 'fedexp\[parquet\]'"):
        parquet(path, {"x": "*"}, "user")
