"""What TensorBoard makes of a log folder, for tests: its reader's values, and a real server."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import subprocess
import sys
import tempfile
import time
import types
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

# With TensorFlow installed, TensorBoard imports it (many seconds, 700 MB) unless this module exists.
sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("notf"))
_START = """
import sys, types
sys.modules["tensorboard.compat.notf"] = types.ModuleType("notf")
from tensorboard import main
main.run_main()
"""
_FLAGS = ("--host=127.0.0.1", "--port=0", "--reload_interval=1")


def tensors(logdir: Path | str) -> dict[str, dict[int, np.ndarray]]:
    """What TensorBoard reads in a run's folder: tag -> step -> value."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.util import tensor_util

    accumulator = EventAccumulator(str(logdir), size_guidance={"tensors": 0})
    accumulator.Reload()
    return {
        tag: {e.step: tensor_util.make_ndarray(e.tensor_proto) for e in accumulator.Tensors(tag)}
        for tag in accumulator.Tags()["tensors"]
    }


@dataclasses.dataclass(frozen=True)
class TensorBoard:
    """A server that runs; `url` has no slash at its end."""

    url: str

    def read(self, route: str, **params: str) -> bytes:
        """The body of a route of TensorBoard's HTTP API, such as `scalars/tags`."""
        query = urllib.parse.urlencode(params)
        with urllib.request.urlopen(f"{self.url}/data/plugin/{route}?{query}", timeout=10) as reply:
            return reply.read()

    def get(self, route: str, **params: str) -> Any:
        """The JSON of a route; None where the server knows no such run or tag (yet)."""
        try:
            return json.loads(self.read(route, **params))
        except urllib.error.HTTPError as error:
            if error.code in (400, 404):
                return None
            raise

    def scalars(self, tag: str, run: str = ".") -> dict[int, float]:
        """A scalar's values by step; empty if there is no such tag (yet)."""
        rows = self.get("scalars/scalars", tag=tag, run=run) or []
        return {step: value for _, step, value in rows}

    def tags(self, plugin: str, run: str = ".") -> set[str]:
        """The tags of a run in `scalars`, `histograms`, `images` or `text`."""
        tags = self.get(f"{plugin}/tags") or {}
        return set(tags.get(run, ()))


@contextlib.contextmanager
def serve(logdir: Path | str, *flags: str) -> Iterator[TensorBoard]:
    """Starts a TensorBoard that looks for new data every second, and ends it with the block."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", _START, f"--logdir={logdir}", *_FLAGS, *flags],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:

            def address() -> re.Match[str] | None:
                log.seek(0)
                written = log.read()
                assert process.poll() is None, f"TensorBoard ended: {written}"
                return re.search(r"at (http://127\.0\.0\.1:\d+)/", written)

            yield TensorBoard(eventually(address, timeout=60).group(1))
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def eventually(value: Callable[[], Any], *, timeout: float = 20) -> Any:
    """Calls `value` until it is true, and returns it; an AssertionError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not (result := value()):
        assert time.monotonic() < deadline, f"still {result!r} after {timeout} s"
        time.sleep(0.1)
    return result
