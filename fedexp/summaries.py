"""TensorBoard summaries, written without TensorFlow."""

from __future__ import annotations

import importlib
import io
import itertools
import math
import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedexp import paths
from fedexp.errors import UserError

_FLUSH_SECS = 1.0
_BUCKET_FLUSH_SECS = 30.0
_BUCKET_FILE_BYTES = 4 << 20
_HISTOGRAM_BINS = 30
_file_numbers = itertools.count()


class Writer:
    """Writes TensorBoard events; a live TensorBoard sees values within about a second.

    Events are collected in memory and appended to the file by a background thread. Buckets have no
    appending: there the file is written anew every half minute, and followed by another once it is large.

    Args:
      logdir: the folder of the run; made if missing. It may be a URL, as s3://bucket/run.
      resume_at: the first step this writer will write. TensorBoard then drops what an earlier,
        killed run wrote for this and for later steps.

    Raises:
      UserError: `logdir` cannot be written, at once. Every method raises it too, if writing in the
        background has failed since.
    """

    def __init__(self, logdir: str | Path, *, resume_at: int | None = None) -> None:
        self._logdir = str(logdir)
        self._is_remote = paths.is_remote(logdir)
        self._pending: list[bytes] = []
        self._pending_lock = threading.Lock()
        self._file_lock = threading.Lock()
        self._error: Exception | None = None
        self._closed = threading.Event()
        try:
            self._start_file()
        except Exception as error:
            raise self._cannot_write(error) from error
        if resume_at is not None:
            # Twice, for TensorBoard takes a run's first START for its beginning, and drops nothing.
            log = _proto("event").SessionLog
            start = log(status=log.START)
            for _ in range(2):
                self._add(step=resume_at, session_log=start)
        self.flush()
        self._thread = threading.Thread(target=self._flush_regularly, name="summaries", daemon=True)
        self._thread.start()

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes numbers by tag; a value is anything `float` takes, NaN included."""
        from tensorboard.plugins.scalar import metadata

        described = metadata.create_summary_metadata(display_name=None, description=None)
        summary, tensors = _proto("summary").Summary(), _proto("tensor")
        dtype = _proto("types").DT_FLOAT
        for tag, value in values.items():
            # Not by make_tensor_proto, which takes several times as long: every round has scalars.
            tensor = tensors.TensorProto(dtype=dtype, float_val=[float(value)])
            summary.value.add(tag=tag, metadata=described, tensor=tensor)
        self._add(step=step, summary=summary)

    def histogram(self, step: int, name: str, values: np.ndarray) -> None:
        """Writes a histogram of an array of any shape; values that are not finite are left out."""
        from tensorboard.plugins.histogram import metadata

        values = np.asarray(values, np.float64)
        counts, edges = np.histogram(values[np.isfinite(values)], bins=_HISTOGRAM_BINS)
        described = metadata.create_summary_metadata(display_name=None, description=None)
        buckets = np.stack([edges[:-1], edges[1:], counts], axis=-1)
        self._add_tensors(step, {name: buckets}, described)

    def image(self, step: int, name: str, images: np.ndarray) -> None:
        """Writes images: uint8 (N, H, W, C) or (H, W, C), of C = 1 (grey), 3 or 4 channels."""
        from tensorboard.plugins.image import metadata

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
        described = metadata.create_summary_metadata(display_name=None, description=None)
        self._add_tensors(step, {name: np.asarray(content, object)}, described)

    def text(self, step: int, name: str, markdown: str) -> None:
        """Writes a text, which TensorBoard renders as Markdown."""
        from tensorboard.plugins.text import metadata

        described = metadata.create_summary_metadata(display_name=None, description=None)
        self._add_tensors(step, {name: np.asarray(markdown.encode(), object)}, described)

    def flush(self) -> None:
        """Returns when all that was written before is in the file."""
        self._raise_error()
        try:
            self._write_pending()
        except Exception as error:
            self._error = error
            self._raise_error()

    def close(self) -> None:
        """Flushes and closes the file. Closing twice is harmless."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._thread.join()
        self.flush()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except UserError:
            if exc_type is None:
                raise

    def _add_tensors(self, step: int, tensors: Mapping[str, np.ndarray], metadata: Any) -> None:
        from tensorboard.util import tensor_util

        summary = _proto("summary").Summary()
        for tag, array in tensors.items():
            tensor = tensor_util.make_tensor_proto(array)
            summary.value.add(tag=tag, metadata=metadata, tensor=tensor)
        self._add(step=step, summary=summary)

    def _add(self, **fields: Any) -> None:
        self._raise_error()
        if self._closed.is_set():
            raise ValueError(f"the summary writer of {self._logdir} is closed")
        event = _event(**fields)
        with self._pending_lock:
            self._pending.append(event)

    def _start_file(self) -> None:
        # TensorBoard reads a folder's files in the order of their names.
        name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        self._path = os.path.join(self._logdir, f"{name}.{next(_file_numbers)}")
        self._content = b""
        if not self._is_remote:
            os.makedirs(self._logdir, exist_ok=True)
        self._append(_records([_event(file_version="brain.Event:2")]))

    def _append(self, records: bytes) -> None:
        if self._is_remote:
            self._content += records
            paths.write(self._path, self._content)
            return
        with open(self._path, "ab") as file:
            file.write(records)

    def _write_pending(self) -> None:
        with self._file_lock:
            with self._pending_lock:
                events, self._pending = self._pending, []
            if not events:
                return
            if len(self._content) > _BUCKET_FILE_BYTES:
                self._start_file()
            self._append(_records(events))

    def _flush_regularly(self) -> None:
        while not self._closed.wait(_BUCKET_FLUSH_SECS if self._is_remote else _FLUSH_SECS):
            try:
                self._write_pending()
            except Exception as error:
                self._error = error
                return

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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    matrix = np.asarray(matrix, np.float64)
    num_classes = len(class_names)
    if matrix.shape != (num_classes, num_classes):
        raise ValueError(f"{num_classes} class names for a matrix of shape {matrix.shape}")
    percent = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    has_room = num_classes <= 20
    long_names = max(map(len, class_names)) > 3
    size = max(5.0, 0.17 * num_classes + 1)
    figure = Figure(figsize=(size + 0.5, size), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="predicted", ylabel="true")
    # The square root makes rare confusions visible next to the diagonal.
    drawn = axes.imshow(percent, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=100))
    figure.colorbar(drawn, ax=axes, label="% of the true class", shrink=0.8)
    fontsize = 9 if has_room else 7
    axes.set_xticks(range(num_classes), class_names, fontsize=fontsize, rotation=90 * long_names)
    axes.set_yticks(range(num_classes), class_names, fontsize=fontsize)
    if has_room:
        for (true, predicted), value in np.ndenumerate(percent):
            if value >= 0.5:
                color = "white" if value > 30 else "black"
                text = axes.text(predicted, true, f"{value:.0f}", color=color, fontsize=8)
                text.set(ha="center", va="center")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


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


def _proto(name: str) -> Any:
    """TensorBoard's generated module, whose names no type checker sees."""
    return importlib.import_module(f"tensorboard.compat.proto.{name}_pb2")


def _event(**fields: Any) -> bytes:
    return _proto("event").Event(wall_time=time.time(), **fields).SerializeToString()


def _records(events: Sequence[bytes]) -> bytes:
    """Events as they stand in a file, each with its length and checksums."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    records = io.BytesIO()
    for event in events:
        RecordWriter(records).write(event)
    return records.getvalue()


def _png(image: np.ndarray) -> bytes:
    from PIL import Image

    encoded = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(encoded, "PNG")
    return encoded.getvalue()
