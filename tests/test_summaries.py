from __future__ import annotations

import io
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.util import tensor_util

from fedexp import summaries
from fedexp.errors import UserError
from fedexp.summaries import Writer, confusion_image, image_grid
from tests.support.tensorboard import eventually, serve, tensors

REPOSITORY = Path(__file__).parents[1]


def decoded(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def test_values_are_read_back(tmp_path):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(50, 4))
    pictures = rng.integers(0, 256, (2, 5, 7, 3), np.uint8)
    with Writer(tmp_path / "new" / "run") as writer:
        writer.scalars(3, {"train/loss": 0.3, "train/accuracy": jnp.float32(0.5), "count": 7})
        writer.scalars(4, {"train/loss": np.nan, "half": jnp.bfloat16(1.5)})
        writer.histogram(4, "weights", values)
        writer.image(4, "pictures", pictures)
        writer.text(4, "config", "# Título\n    a = 1")
    found = tensors(tmp_path / "new" / "run")
    assert found["train/loss"][3] == np.float32(0.3) and np.isnan(found["train/loss"][4])
    assert found["train/accuracy"] == {3: 0.5}
    assert found["count"] == {3: 7} and found["half"] == {4: 1.5}
    assert found["config"][4].item().decode() == "# Título\n    a = 1"

    left, right, counts = found["weights"][4].T
    assert left[0] == values.min() and right[-1] == values.max()
    np.testing.assert_array_equal(left[1:], right[:-1])
    inside = [((values >= lo) & (values < hi)).sum() for lo, hi in zip(left, right, strict=True)]
    inside[-1] += 1  # The maximum belongs to the last bin.
    np.testing.assert_array_equal(counts, inside)

    width, height, *pngs = found["pictures"][4]
    assert (width, height) == (b"7", b"5")
    for png, picture in zip(pngs, pictures, strict=True):
        np.testing.assert_array_equal(decoded(png), picture)


@pytest.mark.parametrize("size", [0, 1, 8, 1000])
def test_records_are_those_of_tensorboard(size):
    events = [bytes(range(256)) * 4, np.random.default_rng(size).bytes(size)]
    expected = io.BytesIO()
    for event in events:
        RecordWriter(expected).write(event)
    assert summaries._records(events) == expected.getvalue()


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_single_image(tmp_path, channels):
    picture = np.random.default_rng(0).integers(0, 256, (3, 4, channels), np.uint8)
    with Writer(tmp_path) as writer:
        writer.image(1, "picture", picture)
    [png] = tensors(tmp_path)["picture"][1][2:]
    np.testing.assert_array_equal(decoded(png).reshape(picture.shape), picture)


@pytest.mark.parametrize(
    "picture", [np.zeros((3, 4, 3)), np.zeros((3, 4), np.uint8), np.zeros((3, 4, 2), np.uint8)]
)
def test_what_is_not_an_image(tmp_path, picture):
    with Writer(tmp_path) as writer, pytest.raises(ValueError, match="'picture' must be uint8"):
        writer.image(1, "picture", picture)


@pytest.mark.parametrize(
    ("values", "total"),
    [
        (np.zeros((0, 3)), 0),
        (np.full(5, 2.0, np.float32), 5),
        (np.array([1.0, np.nan, np.inf, 2.0]), 2),
        (np.array([np.nan]), 0),
        (np.arange(6, dtype=np.int32), 6),
        (jnp.ones(4, jnp.bfloat16), 4),
    ],
)
def test_histograms_of_awkward_values(tmp_path, values, total):
    with Writer(tmp_path) as writer:
        writer.histogram(1, "values", values)
    left, right, counts = tensors(tmp_path)["values"][1].T
    assert counts.sum() == total
    finite = np.asarray(values, np.float64)[np.isfinite(np.asarray(values, np.float64))]
    for value in finite:
        assert any((left <= value) & (value <= right) & (counts > 0))


def test_no_tensorflow_is_imported(tmp_path):
    program = """
        import sys
        import numpy as np
        from fedexp import summaries

        print([m for m in ("tensorboard", "matplotlib", "PIL", "jax") if m in sys.modules])
        with summaries.Writer(sys.argv[1], resume_at=2) as writer:
            writer.scalars(1, {"a": 1.0})
            writer.histogram(1, "b", np.arange(3))
            writer.image(1, "c", summaries.confusion_image(np.eye(3), "xyz"))
            writer.text(1, "d", "text")
            writer.hyperparameters({"rate": 0.1, "nesterov": True, "name": "adam"})
            writer.layout({"all": {"a": ["a"]}})
            writer.flush()
        print([m for m in ("tensorflow", "matplotlib.pyplot", "jax") if m in sys.modules])
    """
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert finished.stdout == "[]\n[]\n", finished.stderr
    pages = {"_hparams_/session_start_info", "custom_scalars__config__"}
    assert set(tensors(tmp_path)) == {"a", "b", "c", "d"} | pages


def test_values_appear_without_a_flush(tmp_path, monkeypatch):
    monkeypatch.setattr(summaries, "_FLUSH_SECS", 0.05)
    with Writer(tmp_path) as writer:
        for step in range(3):
            writer.scalars(step, {"a": step})
            eventually(lambda step=step: step in tensors(tmp_path).get("a", {}))


def test_flush_and_close(tmp_path):
    writer = Writer(tmp_path)
    writer.scalars(1, {"a": 1})
    writer.flush()
    assert tensors(tmp_path)["a"] == {1: 1}
    writer.scalars(2, {"a": 2})
    writer.close()
    writer.close()
    assert tensors(tmp_path)["a"] == {1: 1, 2: 2}
    with pytest.raises(ValueError, match="closed"):
        writer.scalars(3, {"a": 3})
    assert "summaries" not in [thread.name for thread in threading.enumerate()]


def test_many_threads_may_write(tmp_path, monkeypatch):
    monkeypatch.setattr(summaries, "_FLUSH_SECS", 0.001)
    with Writer(tmp_path) as writer:

        def write(name: str) -> None:
            for step in range(100):
                writer.scalars(step, {name: step})

        threads = [threading.Thread(target=write, args=(name,)) for name in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert tensors(tmp_path) == {name: {step: step for step in range(100)} for name in "abcd"}


def test_resuming_drops_what_a_killed_run_wrote_later(tmp_path):
    first = Writer(tmp_path)
    for step in range(10):
        first.scalars(step, {"a": step, "never again": step})
    first.flush()
    with Writer(tmp_path, resume_at=6) as second:
        second.scalars(6, {"a": -6})
    found = tensors(tmp_path)
    assert found["never again"] == {step: step for step in range(6)}
    assert found["a"] == {**{step: step for step in range(6)}, 6: -6}
    first.close()


def test_an_error_in_the_block_is_not_hidden_by_closing(tmp_path):
    with pytest.raises(ZeroDivisionError), Writer(tmp_path / "run") as writer:
        writer.scalars(1, {"a": 1})
        os.rename(tmp_path / "run", tmp_path / "gone")
        raise ZeroDivisionError


def test_runs_are_folders_of_one_writer(tmp_path):
    """Each drops by itself what a killed run wrote later."""
    for start in (1, 3):
        with Writer(tmp_path, runs=["", "train", "a/b"], resume_at=start) as writer:
            for step in range(start, start + 4):
                writer.scalars(step, {"loss": start}, "train")
                writer.histogram(step, "weights", np.arange(step), "a/b")
            writer.text(start, "config", "text")
    assert tensors(tmp_path)["config"].keys() == {1, 3}
    assert tensors(tmp_path / "train") == {"loss": {1: 1, 2: 1, 3: 3, 4: 3, 5: 3, 6: 3}}
    assert sorted(tensors(tmp_path / "a" / "b")["weights"]) == [1, 2, 3, 4, 5, 6]
    assert sum(path.is_file() for path in tmp_path.rglob("*")) == 2 * 3


@pytest.mark.parametrize("where", ["here", "bucket"])
def test_a_clock_that_is_set_back_loses_nothing(tmp_path, monkeypatch, where):
    """TensorBoard reads files by name, and shows times as they are written."""
    folder = str(tmp_path) if where == "here" else f"memory://{uuid.uuid4().hex}/run"
    clocks = (2e9, 1e9, 3e9, 2.5e9)
    for number, clock in enumerate(clocks):
        monkeypatch.setattr(summaries.time, "time", lambda clock=clock: clock)
        start = 1 + 10 * number
        with Writer(folder, resume_at=start) as writer:
            for step in range(start, start + 20):  # Ten of them the next one writes again.
                writer.scalars(step, {"a": number})
    accumulator = EventAccumulator(folder, size_guidance={"tensors": 0}).Reload()
    events = accumulator.Tensors("a")
    assert [event.step for event in events] == list(range(1, 51))
    numbers = [tensor_util.make_ndarray(event.tensor_proto).item() for event in events]
    assert numbers == [min((step - 1) // 10, 3) for step in range(1, 51)]
    times = [event.wall_time for event in events]
    assert min(np.diff(times)) > -1e-3 and times[0] == pytest.approx(2e9) and times[-1] < 3e9 + 1


def test_ctrl_c_during_a_write_loses_nothing(tmp_path, monkeypatch):
    writer = Writer(tmp_path)
    records = summaries._records

    def interrupted(events):
        monkeypatch.setattr(summaries, "_records", records)
        os.kill(os.getpid(), signal.SIGINT)
        return records(events)

    monkeypatch.setattr(summaries, "_records", interrupted)
    with pytest.raises(KeyboardInterrupt), writer:
        writer.scalars(1, {"a": 1})
        writer.flush()
        time.sleep(1)  # Where the signal may arrive late.
    assert tensors(tmp_path)["a"] == {1: 1}


@pytest.mark.parametrize(
    "end", ["", "raise SystemExit", "cut = True; writer.close()", "cut = True; writer.flush()"]
)
def test_a_process_that_ends_without_closing_loses_nothing(tmp_path, end):
    """Also one whose last flush or close was interrupted."""
    program = f"""
        import sys, threading
        from fedexp import summaries

        cut = False

        def interrupted(method):
            def call(*args):
                global cut
                if cut and threading.current_thread() is threading.main_thread():
                    cut = False
                    raise KeyboardInterrupt
                return method(*args)
            return call

        threading.Event.wait = interrupted(threading.Event.wait)
        threading.Thread.join = interrupted(threading.Thread.join)
        summaries._FLUSH_SECS = 3600.0
        writer = summaries.Writer(sys.argv[1])
        writer.scalars(1, {{"a": 1.0}})
        {end}
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert ("KeyboardInterrupt" in done.stderr) == ("cut" in end), done.stderr
    assert tensors(tmp_path)["a"] == {1: 1}


@pytest.mark.parametrize("below", ["", "deeper/folder"])
def test_a_file_in_place_of_the_folder(tmp_path, below):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"Cannot write summaries to .*file"):
        Writer(tmp_path / "file" / below)


@pytest.mark.parametrize(
    "call",
    [
        lambda writer: writer.scalars(2, {"a": 1}),
        lambda writer: writer.text(2, "a", "b"),
        lambda writer: writer.flush(),
        lambda writer: writer.close(),
    ],
)
def test_an_error_in_the_background_reaches_the_next_call(tmp_path, monkeypatch, call):
    monkeypatch.setattr(summaries, "_FLUSH_SECS", 0.01)
    writer = Writer(tmp_path / "run")
    os.rename(tmp_path / "run", tmp_path / "gone")
    writer.scalars(1, {"a": 1})
    time.sleep(0.2)
    with pytest.raises(UserError, match=f"Cannot write summaries to {tmp_path / 'run'}: .*No such"):
        call(writer)


def test_a_full_disk(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    writer = Writer(tmp_path)
    [file] = tmp_path.iterdir()
    file.unlink()
    file.symlink_to("/dev/full")
    writer.scalars(1, {"a": 1})
    with pytest.raises(UserError, match="No space left on device"):
        writer.flush()


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["--load_fast=true", "--load_fast=false"])
def test_a_live_tensorboard(tmp_path, loader):
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    with Writer(tmp_path / "run") as writer, serve(tmp_path, loader) as board:
        for step in range(1, 6):
            writer.scalars(step, {"train/loss": step / 2, "eval/accuracy": 0.5})
        writer.histogram(5, "weights", np.arange(10))
        writer.image(5, "confusion", picture)
        writer.text(5, "config", "**bold**")
        losses = {step: step / 2 for step in range(1, 6)}
        eventually(lambda: board.scalars("train/loss", "run") == losses)
        eventually(lambda: board.tags("text", "run"))
        assert board.tags("scalars", "run") == {"train/loss", "eval/accuracy"}
        assert board.tags("histograms", "run") == {"weights"}
        assert board.tags("images", "run") == {"confusion"}
        assert board.tags("text", "run") == {"config"} or set(board.get("text/tags")["run"])
        [[_, step, buckets]] = board.get("histograms/histograms", run="run", tag="weights")
        assert step == 5 and sum(count for *_, count in buckets) == 10
        [image] = board.get("images/images", run="run", tag="confusion", sample="0")
        query = dict(pair.split("=") for pair in image["query"].split("&"))
        np.testing.assert_array_equal(
            decoded(board.read("images/individualImage", **query)), picture
        )
        [text] = board.get("text/text", run="run", tag="config")
        assert "<strong>bold</strong>" in text["text"]

        # As after a kill: the first writer stays open, a second one goes on from round 3.
        with Writer(tmp_path / "run", resume_at=3) as resumed:
            resumed.scalars(3, {"train/loss": -3})
            eventually(lambda: board.scalars("train/loss", "run") == {1: 0.5, 2: 1.0, 3: -3.0})


def test_confusion_image_shows_row_shares():
    matrix = np.array([[90, 10, 0], [0, 0, 0], [0, 5, 5]])
    image = confusion_image(matrix, ["a", "b", "c"])
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    np.testing.assert_array_equal(image, confusion_image(matrix * [[7], [1], [3]], ["a", "b", "c"]))
    assert (image != confusion_image(matrix.T, ["a", "b", "c"])).any()


@pytest.mark.parametrize(
    ("num_classes", "cell", "rows"), [(2, 155, 1), (10, 31, 1), (31, 10, 1), (62, 5, 2)]
)
def test_a_confusion_image_is_legible_at_the_size_shown(num_classes, cell, rows):
    """TensorBoard shows 350 pixels: every class has whole pixels, and a label that touches no other."""
    predicted = np.random.default_rng(0).permutation(num_classes)
    matrix = np.zeros((num_classes, num_classes), int)
    matrix[np.arange(num_classes), predicted] = 7
    image = confusion_image(matrix, "H" * num_classes).astype(int)
    assert image.shape[1] == 350
    left, top, side = 350 - 8 - cell * num_classes, 46, cell * num_classes
    inside = image[top : top + side, left : left + side]
    # Numbers are written at the middle of a cell, the frame goes along the outermost pixels.
    places = slice(max(cell // 5, 2), None, cell)
    corners = inside[places, places]
    dark = abs(corners - [8, 48, 107]).max(axis=-1) < 3
    np.testing.assert_array_equal(dark.argmax(axis=1), predicted)
    assert dark.sum() == num_classes
    # Left of the matrix there is something light between labels, in one row of them or in two.
    rows_of_pixels = slice(top - 4, top + side + 4)
    near = image[rows_of_pixels, left - 11 : left - 4].min(axis=(1, 2)) < 128
    assert count_runs(near) == math.ceil(num_classes / rows)
    if rows == 2:
        far = image[rows_of_pixels, left - 20 : left - 13].min(axis=(1, 2)) < 128
        assert count_runs(far) == num_classes // 2


def count_runs(flags):
    return int(flags[0]) + int((flags[1:] & ~flags[:-1]).sum())


@pytest.mark.parametrize("num_classes", [20, 100])
def test_long_names_leave_room_for_the_matrix(num_classes):
    image = confusion_image(np.eye(num_classes), ["a long name of a class"] * num_classes)
    assert (image.shape[1] == 350) == (num_classes == 20)
    dark = (abs(image[47:].astype(int) - [8, 48, 107]).max(axis=-1) < 3).sum()
    side = {20: 11, 100: 3}[num_classes]
    assert 0.6 < dark / (num_classes * side**2) < 1.1


def test_confusion_image_of_names_that_do_not_fit():
    with pytest.raises(ValueError, match="2 class names"):
        confusion_image(np.eye(3), ["a", "b"])


@pytest.mark.parametrize(
    ("count", "shape", "columns", "grid_shape"),
    [
        (1, (4, 5), None, (4, 5, 1)),
        (5, (4, 5), None, (4 * 2 + 1, 5 * 3 + 2, 1)),
        (6, (4, 5, 3), 2, (4 * 3 + 2, 5 * 2 + 1, 3)),
        (3, (4, 5, 1), 7, (4, 5 * 7 + 6, 1)),
    ],
)
def test_image_grid(count, shape, columns, grid_shape):
    images = np.random.default_rng(0).integers(0, 255, (count, *shape), np.uint8)
    grid = image_grid(images, columns=columns)
    assert grid.dtype == np.uint8 and grid.shape == grid_shape
    per_row = (grid_shape[1] + 1) // 6
    rest = np.full(grid_shape, True)
    for i, image in enumerate(images):
        row, column = divmod(i, per_row)
        place = np.s_[row * 5 : row * 5 + 4, column * 6 : column * 6 + 5]
        np.testing.assert_array_equal(grid[place], image.reshape(*shape[:2], -1))
        rest[place] = False
    assert (grid[rest] == 255).all()
