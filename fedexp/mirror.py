"""A bucket's folder of checkpoints, seen through a temporary folder of this machine.

Orbax writes arrays to this machine's disk, or with Google's own library to gs://, but not to s3://. So for
every bucket it works in a temporary folder here, whose finished checkpoints are copied to and fro.
"""

from __future__ import annotations

import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from fedexp import paths
from fedexp.kept import finished, is_commit, round_of


class Mirror:
    """A bucket's folder of checkpoints, and the temporary folder in which Orbax sees them.

    Of several processes every one has such a folder, and the first one writes to the bucket.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._scratch = tempfile.TemporaryDirectory(prefix="fedexp-checkpoints-")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="upload")
        self._upload: Future[None] | None = None
        self.folder = Path(self._scratch.name)

    def pull(self) -> None:
        """Fetches all finished checkpoints, and deletes what a killed upload left."""
        files = paths.find(self._url)
        whole = set(map(str, finished(files)))
        paths.download(self._url, [f for f in files if round_of(f) in whole], self.folder)
        if jax.process_index() == 0:
            self._remove([f for f in files if round_of(f) not in whole])

    def push(self, round: int, manager: Any) -> None:
        """Copies a checkpoint once it is finished, then deletes those gone here; in the background."""
        if jax.process_index() == 0:
            self._upload = self._thread.submit(self._push, round, manager)

    def wait(self) -> None:
        """Returns when the bucket is up to date; raises what went wrong."""
        if self._upload is not None:
            upload, self._upload = self._upload, None
            upload.result()

    def close(self) -> None:
        """Ends the thread and deletes the temporary folder."""
        self._thread.shutdown()
        self._scratch.cleanup()

    def _push(self, round: int, manager: Any) -> None:
        manager.wait_until_finished()
        old = paths.find(self._url)
        self._remove([file for file in old if round_of(file) == str(round)])
        found = [path for path in (self.folder / str(round)).rglob("*") if path.is_file()]
        files = [path.relative_to(self.folder).as_posix() for path in found]
        paths.upload(self.folder, [file for file in files if not is_commit(file)], self._url)
        paths.upload(self.folder, [file for file in files if is_commit(file)], self._url)
        self._remove([file for file in old if not (self.folder / round_of(file)).exists()])

    def _remove(self, files: list[str]) -> None:
        paths.remove(self._url, [file for file in files if is_commit(file)])
        paths.remove(self._url, [file for file in files if not is_commit(file)])
