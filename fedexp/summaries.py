"""TensorBoard summaries, written without TensorFlow."""

from __future__ import annotations

import atexit
import collections
import functools
import importlib
import io
import itertools
import math
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from fedexp import paths
from fedexp.errors import UserError

_FLUSH_SECS = 1.0
_BUCKET_FLUSH_SECS = 30.0
_BUCKET_FILE_BYTES = 4 << 20
_HISTOGRAM_BINS = 30
_IMAGE_PIXELS = 350
_LABEL_PIXELS = 10
_FONT = 6.5
_MADE = re.compile(r"events\.out\.tfevents\.(\d+(?:\.\d+)?)\.")
_file_numbers = itertools.count()


class Writer:
    """Writes TensorBoard events; a live TensorBoard sees values within about a second.

    Events are collected in memory and written by a background thread, which no Ctrl-C interrupts. Buckets
    have no appending: there a file is written anew every half minute, and followed by another once it is
    large.

    Args:
      logdir: the folder; made if missing. It may be a URL, as s3://bucket/run.
      runs: sub-folders that are runs of their own, "" for `logdir` itself. TensorBoard draws what has the
        same tag in several runs into one chart.
      resume_at: the first step this writer will write, or that of each run. TensorBoard then drops what an
        earlier, killed run wrote for this and for later steps.

    Raises:
      UserError: `logdir` cannot be written, at once. Every method raises it too, if writing in the
        background has failed since.
    """

    def __init__(
        self,
        logdir: str | Path,
        *,
        runs: Sequence[str] = ("",),
        resume_at: int | Mapping[str, int] | None = None,
    ) -> None:
        self._logdir = str(logdir)
        self._error: Exception | None = None
        self._closed = threading.Event()
        # In order: events of a run, and flags of those who wait until what is before them is written.
        self._pending: collections.deque[tuple[str, bytes] | threading.Event] = collections.deque()
        self._wake = threading.Event()
        try:
            folders = {
                run: os.path.join(self._logdir, run) if run else self._logdir for run in runs
            }
            self._clock = _Clock(max(map(_last_written, folders.values())))
            self._files = {run: _File(folder, self._clock) for run, folder in folders.items()}
        except Exception as error:
            raise self._cannot_write(error) from error
        if resume_at is not None:
            # Twice, for TensorBoard takes a run's first START for its beginning, and drops nothing.
            log = _proto("event").SessionLog
            start = log(status=log.START)
            for run in [*runs, *runs]:
                step = resume_at if isinstance(resume_at, int) else resume_at[run]
                self._add(run, step=step, session_log=start)
        self._thread = threading.Thread(target=self._write_on, name="summaries", daemon=True)
        self._thread.start()
        atexit.register(self._finish)
        self.flush()

    def scalars(self, step: int, values: Mapping[str, Any], run: str = "") -> None:
        """Writes numbers by tag; a value is anything `float` takes, NaN included."""
        described = _metadata("scalar")
        summary, tensors = _proto("summary").Summary(), _proto("tensor")
        dtype = _proto("types").DT_FLOAT
        for tag, value in values.items():
            # Not by make_tensor_proto, which takes several times as long: every round has scalars.
            tensor = tensors.TensorProto(dtype=dtype, float_val=[float(value)])
            summary.value.add(tag=tag, metadata=described, tensor=tensor)
        self._add(run, step=step, summary=summary)

    def histogram(self, step: int, name: str, values: np.ndarray, run: str = "") -> None:
        """Writes a histogram of an array of any shape; values that are not finite are left out."""
        values = np.asarray(values, np.float64)
        counts, edges = np.histogram(values[np.isfinite(values)], bins=_HISTOGRAM_BINS)
        buckets = np.stack([edges[:-1], edges[1:], counts], axis=-1)
        self._add_tensor(run, step, name, buckets, _metadata("histogram"))

    def image(self, step: int, name: str, images: np.ndarray, run: str = "") -> None:
        """Writes images: uint8 (N, H, W, C) or (H, W, C), of C = 1 (grey), 3 or 4 channels."""
        images = np.asarray(images)
        if (
            images.dtype != np.uint8
            or images.ndim not in (3, 4)
            or images.shape[-1] not in (1, 3, 4)
        ):
            raise ValueError(
                f"image {name!r} must be uint8 ([N,] H, W, C) with C in 1, 3, 4, got "
                f"{images.dtype} {images.shape}"
            )
        images = images if images.ndim == 4 else images[np.newaxis]
        height, width = images.shape[1:3]
        content = [str(width).encode(), str(height).encode(), *map(_png, images)]
        self._add_tensor(run, step, name, np.asarray(content, object), _metadata("image"))

    def text(self, step: int, name: str, markdown: str, run: str = "") -> None:
        """Writes a text, which TensorBoard renders as Markdown."""
        self._add_tensor(run, step, name, np.asarray(markdown.encode(), object), _metadata("text"))

    def hyperparameters(self, values: Mapping[str, bool | float | str], run: str = "") -> None:
        """Makes a run a session of the page HParams; its metrics there are the run's scalars."""
        from tensorboard.plugins.hparams import metadata

        content = _message("tensorboard.plugins.hparams.plugin_data_pb2", "HParamsPluginData")
        session = content.session_start_info
        session.start_time_secs = self._clock.now()
        for name, value in values.items():
            match value:
                case bool():
                    session.hparams[name].bool_value = value
                case str():
                    session.hparams[name].string_value = value
                case _:
                    session.hparams[name].number_value = value
        summary = _proto("summary").Summary()
        tag, described = metadata.SESSION_START_INFO_TAG, metadata.create_summary_metadata(content)
        summary.value.add(tag=tag, metadata=described, tensor=metadata.NULL_TENSOR)
        self._add(run, step=0, summary=summary)

    def layout(self, categories: Mapping[str, Mapping[str, Sequence[str]]]) -> None:
        """Lays out the page Custom Scalars.

        Args:
          categories: title -> title of a chart -> tags that it draws, of all runs.
        """
        from tensorboard.plugins.custom_scalar import metadata

        layout = _message("tensorboard.plugins.custom_scalar.layout_pb2", "Layout")
        for title, charts in categories.items():
            category = layout.category.add(title=title)
            for chart, tags in charts.items():
                patterns = [f"^{re.escape(tag)}$" for tag in tags]
                category.chart.add(title=chart, multiline={"tag": patterns})
        content = np.asarray(layout.SerializeToString(), object)
        described = metadata.create_summary_metadata()
        self._add_tensor("", 0, metadata.CONFIG_SUMMARY_TAG, content, described)

    def flush(self) -> None:
        """Returns when all that was written before is in the files."""
        self._raise_error()
        written = threading.Event()
        self._pending.append(written)
        self._wake.set()
        while not written.wait(0.1) and self._thread.is_alive():  # It is not after `close`.
            pass
        self._raise_error()

    def close(self) -> None:
        """Flushes and closes the files. Closing twice is harmless."""
        self._finish()
        atexit.unregister(self._finish)
        self._raise_error()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except UserError:
            if exc_type is None:
                raise

    def _finish(self) -> None:
        """Has the thread write what is left; at the process's end, too, if `close` was interrupted."""
        self._closed.set()
        self._wake.set()
        self._thread.join()

    def _add_tensor(self, run: str, step: int, tag: str, array: np.ndarray, metadata: Any) -> None:
        from tensorboard.util import tensor_util

        summary = _proto("summary").Summary()
        tensor = tensor_util.make_tensor_proto(array)
        summary.value.add(tag=tag, metadata=metadata, tensor=tensor)
        self._add(run, step=step, summary=summary)

    def _add(self, run: str, **fields: Any) -> None:
        self._raise_error()
        if self._closed.is_set():
            raise ValueError(f"the summary writer of {self._logdir} is closed")
        self._pending.append((run, _event(self._clock.now(), **fields)))

    def _write_on(self) -> None:
        """The thread: writes what is pending, time and again, to the end."""
        seconds = _BUCKET_FLUSH_SECS if paths.is_remote(self._logdir) else _FLUSH_SECS
        last = False
        while not last:
            self._wake.wait(seconds)
            self._wake.clear()
            last = self._closed.is_set()
            self._write_pending()

    def _write_pending(self) -> None:
        waiting, events = [], collections.defaultdict(list)
        while self._pending:
            match self._pending.popleft():
                case threading.Event() as written:
                    waiting.append(written)
                case run, event:
                    events[run].append(event)
        try:
            for run, added in events.items():
                self._files[run].append(added)
        except Exception as error:
            self._error = error
        for written in waiting:
            written.set()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._cannot_write(self._error) from self._error

    def _cannot_write(self, error: Exception) -> UserError:
        return UserError(
            f"Cannot write summaries to {self._logdir}: {error}. Free space there, or choose "
            "another folder."
        )


def confusion_image(matrix: np.ndarray, class_names: Sequence[str]) -> np.ndarray:
    """Draws a confusion matrix, each row divided by its sum.

    Args:
      matrix: (K, K) counts; `matrix[i, j]` examples of class i were taken for class j.
      class_names: K names.

    Returns:
      uint8 (H, W, 3). A class without examples is an empty row.
    """
    from matplotlib import font_manager
    from PIL import Image, ImageDraw, ImageFont

    matrix = np.asarray(matrix, np.float64)
    num_classes = len(class_names)
    if matrix.shape != (num_classes, num_classes):
        raise ValueError(f"{num_classes} class names for a matrix of shape {matrix.shape}")
    percent = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    frame, left, top, cell = _confusion_frame(tuple(class_names))
    image, side = frame.copy(), cell * num_classes
    norm, colors = _share_scale()
    cells = colors(norm(percent), bytes=True)[..., :3]
    image[top : top + side, left : left + side] = cells.repeat(cell, 0).repeat(cell, 1)
    if cell < 15:
        return image
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), _FONT * 100 / 72)
    for true, predicted in np.argwhere(percent >= 0.5).tolist():
        value = percent[true, predicted]
        middle = (left + (predicted + 0.5) * cell, top + (true + 0.5) * cell)
        color = "white" if value > 30 else "black"
        draw.text(middle, f"{value:.0f}", color, font, anchor="mm")
    return np.asarray(picture)


@functools.cache
def _confusion_frame(class_names: tuple[str, ...]) -> tuple[np.ndarray, int, int, int]:
    """All that does not depend on the matrix, which takes a quarter of a second: drawn once.

    Returns:
      The image; the matrix's left and top in it, and the side of a cell, in pixels.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

    # All in pixels: TensorBoard shows images this wide, and leaves pixels out of wider ones.
    longest = max(map(len, class_names))
    margin, right = 12 + max(20, 6 * min(longest, 16) + 4), 8
    cell = max((_IMAGE_PIXELS - margin - right) // len(class_names), 3)
    side = cell * len(class_names)
    width = max(margin + side + right, _IMAGE_PIXELS)
    left, bottom = width - side - right, margin + 8
    height = bottom + side + 46
    figure = Figure(figsize=(width / 100, height / 100), dpi=100)
    canvas = FigureCanvasAgg(figure)
    place = (left / width, bottom / height, side / width, side / height)
    axes = figure.add_axes(place, xlabel="predicted", ylabel="true")
    edges = (-0.5, len(class_names) - 0.5)
    axes.set(xlim=edges, ylim=edges[::-1])
    bar = figure.add_axes((left / width, 1 - 24 / height, (side - 3) / width, 8 / height))
    norm, colors = _share_scale()
    ticks = [0, 1, 5, 10, 20, 50, 100]
    scale = ScalarMappable(norm, colors)
    figure.colorbar(scale, cax=bar, orientation="horizontal", ticks=ticks)
    bar.set_title("% of the true class", fontsize=_FONT, pad=3)
    bar.tick_params(labelsize=_FONT, length=2, pad=1)
    for axis, turned in ((axes.xaxis, 6 * longest > max(cell, _LABEL_PIXELS)), (axes.yaxis, False)):
        _label(axis, [name[:16] for name in class_names], cell, rotation=90 * turned)
        axis.label.set_fontsize(_FONT)
        axis.labelpad = 0
    canvas.draw()
    image = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    return image, left, height - bottom - side, cell


def _share_scale() -> tuple[Any, Any]:
    """Norm and colours of percentages; the square root makes rare confusions visible next to the diagonal."""
    from matplotlib import colormaps
    from matplotlib.colors import PowerNorm

    return PowerNorm(0.5, vmin=0, vmax=100), colormaps["Blues"]


def _label(axis: Any, names: Sequence[str], cell: int, rotation: float) -> None:
    """Writes names along an axis: short ones in two rows where one is too narrow, else as many as fit."""
    every = math.ceil(_LABEL_PIXELS / cell)
    in_two_rows = every == 2 and max(map(len, names)) == 1
    for row, length in ((0, 2), (1, 9)) if in_two_rows else ((0, 2),):
        places = range(row, len(names), every)
        axis.set_ticks(places, [names[i] for i in places], minor=bool(row), rotation=rotation)
        axis.set_tick_params(
            "minor" if row else "major", labelsize=_FONT, length=length, pad=1, color="0.7"
        )


def image_grid(images: np.ndarray, *, columns: int | None = None, padding: int = 1) -> np.ndarray:
    """Lays images out row by row, with white lines between them.

    Args:
      images: uint8 (N, H, W) or (N, H, W, C), N at least 1.
      columns: images in a row; by default as many as make the grid about square.
      padding: the lines' width in pixels.

    Returns:
      uint8 (H', W', C), C = 1 for images without channels. Places left over are white.
    """
    images = images if images.ndim == 4 else images[..., np.newaxis]
    count, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    shape = (rows * columns, height + padding, width + padding, channels)
    cells = np.full(shape, 255, np.uint8)
    cells[:count, :height, :width] = images
    grid = cells.reshape(rows, columns, *shape[1:]).swapaxes(1, 2)
    grid = grid.reshape(rows * shape[1], columns * shape[2], channels)
    return grid[: grid.shape[0] - padding, : grid.shape[1] - padding]


class _Clock:
    """A time that never goes back, not even to before `start`, wherever this machine's clock is set.

    TensorBoard reads a folder's files in the order of their names, which begin with the time.
    """

    def __init__(self, start: float):
        self._last = start
        self._ahead = max(0.0, start - time.time())

    def now(self) -> float:
        self._last = max(self._last + 1e-6, time.time() + self._ahead)
        return self._last


class _File:
    """A run's event file; in a bucket one after another."""

    def __init__(self, folder: str, clock: _Clock):
        self._folder = folder
        self._clock = clock
        self._is_remote = paths.is_remote(folder)
        if not self._is_remote:
            os.makedirs(folder, exist_ok=True)
        self._start()

    def append(self, events: Sequence[bytes]) -> None:
        if len(self._content) > _BUCKET_FILE_BYTES:
            self._start()
        self._append(_records(events))

    def _start(self) -> None:
        now = self._clock.now()
        name = f"events.out.tfevents.{now:017.6f}.{socket.gethostname()}.{os.getpid()}"
        self._path = os.path.join(self._folder, f"{name}.{next(_file_numbers)}")
        self._content = b""
        self._append(_records([_event(now, file_version="brain.Event:2")]))

    def _append(self, records: bytes) -> None:
        if self._is_remote:
            self._content += records
            paths.write(self._path, self._content)
            return
        with open(self._path, "ab") as file:
            file.write(records)


def _last_written(folder: str) -> float:
    """When a folder's last events were written, as far as can be told; 0 if it has none."""
    try:
        if paths.is_remote(folder):
            changed = dict.fromkeys(paths.versions(folder), 0.0)
        else:
            with os.scandir(folder) as entries:
                changed = {entry.name: entry.stat().st_mtime for entry in entries}
    except FileNotFoundError:
        return 0.0
    made = {name: float(match[1]) for name in changed if (match := _MADE.match(name))}
    return max((max(made[name], changed[name]) for name in made), default=0.0)


@functools.cache
def _metadata(plugin: str) -> Any:
    """What tells TensorBoard how to show a tag."""
    module = importlib.import_module(f"tensorboard.plugins.{plugin}.metadata")
    return module.create_summary_metadata(display_name=None, description=None)


@functools.cache
def _proto(name: str) -> Any:
    """TensorBoard's generated module, whose names no type checker sees."""
    return importlib.import_module(f"tensorboard.compat.proto.{name}_pb2")


def _message(module: str, name: str) -> Any:
    """An empty message of a plugin of TensorBoard's."""
    return getattr(importlib.import_module(module), name)()


def _event(wall_time: float, **fields: Any) -> bytes:
    return _proto("event").Event(wall_time=wall_time, **fields).SerializeToString()


def _records(events: Sequence[bytes]) -> bytes:
    """Events as TFRecords stand in a file, each with its length and the checksums of both."""
    parts = []
    for event in events:  # Not by TensorBoard's RecordWriter, whose checksums are made in Python.
        length = struct.pack("<Q", len(event))
        parts += [length, _checksum(length), event, _checksum(event)]
    return b"".join(parts)


def _checksum(data: bytes) -> bytes:
    crc = google_crc32c.value(data)
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    return struct.pack("<I", masked)


def _png(image: np.ndarray) -> bytes:
    from PIL import Image

    encoded = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(encoded, "PNG")
    return encoded.getvalue()
