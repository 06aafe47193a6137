"""Downloads into the cache folder, from the web and from buckets."""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import glob
import hashlib
import http.client
import os
import re
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from absl import logging

from fedexp import cache, paths
from fedexp.errors import UserError

Report = Callable[[int, int | None], None]

_RETRY_DELAYS_S = (0.5, 1.0, 2.0, 4.0)
_TIMEOUT_S = 30.0
_CHUNK_BYTES = 1 << 18
_RETRIABLE_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})


def download(url: str, name: str, *, sha256: str) -> Path:
    """Downloads `url` into the cache, unless it is there already.

    An interrupted download is resumed, also by a later run. Of several processes that ask for the
    same file one downloads it and the others wait. The file appears under its name only when
    complete and correct; its checksum is verified on every call.

    Args:
      url: where the file is published.
      name: path of the file relative to `cache.folder()`.
      sha256: the file's SHA-256 checksum, 64 hexadecimal digits.

    Returns:
      The path of the file.

    Raises:
      UserError: the file cannot be fetched (offline, HTTP error, disk full) or is not the expected
        one. The message says which file to fetch by hand, and where to put it.
    """
    target = cache.folder() / name
    with cache.lock(target):
        if target.exists():
            if (found := _sha256(target)) != sha256:
                raise UserError(
                    f"{target} is not the published file: its SHA-256 is {found}, expected "
                    f"{sha256}; delete it to download {url} again"
                )
            return target
        part = target.with_name(f"{target.name}.part")
        by_hand = f"try again, or fetch {url} by hand and put it at {target}"
        _fetch(url, part, by_hand)
        if (found := _sha256(part)) != sha256:
            part.unlink()
            raise UserError(
                f"what {url} sent is not the published file: its SHA-256 is {found}, expected "
                f"{sha256}; {by_hand}"
            )
        paths.replace(part, target)
    return target


@contextlib.contextmanager
def extracted(archive: Path) -> Iterator[Path]:
    """A temporary folder in the cache with the contents of a tar archive, gone on exit.

    Raises:
      UserError: a damaged archive, one that reaches outside its folder, or a full disk.
    """
    with cache.scratch(cache.folder(), "extract-") as folder:
        try:
            with tarfile.open(archive) as tar:
                # As an attribute: Python has known the argument `filter` since 3.11.4 only.
                tar.extraction_filter = getattr(tarfile, "data_filter", None)
                tar.extractall(folder, _plain_members(tar))
        except (OSError, EOFError, tarfile.TarError) as error:
            raise UserError(
                f"cannot extract {archive}: {error}; free disk space, or delete it to download it "
                "again"
            ) from error
        yield folder


def _plain_members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in tar:
        path = PurePosixPath(member.name)
        if path.is_absolute() or ".." in path.parts or not (member.isfile() or member.isdir()):
            raise tarfile.TarError(f"{member.name} is no file or leads out of the folder")
        yield member


def local_file(path: str | os.PathLike[str]) -> Path:
    """The file itself, or for one in a bucket its copy in the cache; see `local_folder`."""
    if not paths.is_remote(path):
        return Path(path).expanduser()
    folder, _, name = os.fspath(path).rpartition("/")
    return local_folder(folder, glob.escape(name)) / name


def local_folder(folder: str | os.PathLike[str], *patterns: str) -> Path:
    """The folder itself, or for one in a bucket a folder of the cache with copies of its files.

    Files are copied once, and again when the bucket has other ones under their names. Of several
    processes that need the same folder one copies and the others wait.

    Args:
      folder: of this machine (~ is expanded) or a URL, as s3://bucket/data.
      patterns: which files right in it are needed, as "*.json".

    Raises:
      UserError: a bucket's folder that cannot be read, or in which no file has such a name.
    """
    if not paths.is_remote(folder):
        return Path(folder).expanduser()
    url = os.fspath(folder).rstrip("/")

    def is_wanted(name: str) -> bool:
        return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)

    copies = cache.folder() / "buckets" / url.replace("://", "/")
    try:
        versions = paths.versions(url)
        wanted = {name: version for name, version in versions.items() if is_wanted(name)}
        if not wanted:
            listing = ", ".join(sorted(versions)[:10]) or "nothing"
            raise UserError(f"expected {' and '.join(patterns)} in {url}, found {listing}")
        with cache.lock(copies):
            for path in copies.glob("*"):
                if path.is_file() and is_wanted(path.name) and path.name not in wanted:
                    path.unlink()
            for name, version in wanted.items():
                _copy(url, name, version, copies)
    except OSError as error:
        raise UserError(f"cannot copy {url} into the cache: {error.strerror or error}") from error
    return copies


def _copy(url: str, name: str, version: str, folder: Path) -> None:
    """Copies one file of a bucket, unless this version of it is there already."""
    note = folder / ".versions" / name
    if (folder / name).exists() and note.exists() and note.read_bytes() == version.encode():
        return
    logging.info("copying %s/%s into the cache once", url, name)
    with cache.scratch(folder.parent, ".copying-") as scratch:
        paths.download(url, [name], scratch)
        note.parent.mkdir(parents=True, exist_ok=True)
        note.unlink(missing_ok=True)
        paths.replace(scratch / name, folder / name)
    paths.write(note, version)


def _fetch(url: str, part: Path, by_hand: str) -> None:
    """Completes `part` from `url`, resuming after every interruption up to a limit."""
    with _progress_bar(part.stem) as report:
        for delay in (*_RETRY_DELAYS_S, None):
            try:
                return _fetch_rest(url, part, report)
            except urllib.error.HTTPError as error:
                error.close()
                reason = f"HTTP error {error.code} ({error.reason})"
                retriable = error.code in _RETRIABLE_STATUS
            except (OSError, http.client.HTTPException) as error:
                reason = str(getattr(error, "reason", error)) or type(error).__name__
                retriable = getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT)
            if delay is None or not retriable:
                raise UserError(f"cannot download {url}: {reason}; {by_hand}")
            logging.info("download of %s interrupted: %s; retrying in %s s", url, reason, delay)
            time.sleep(delay)


def _fetch_rest(url: str, part: Path, report: Report) -> None:
    """Appends what is missing to `part`; raises ConnectionError if the server stops early."""
    start = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "fedexp", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    request = urllib.request.Request(url, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        # Nothing is left to send: a run was killed between its last byte and the rename.
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and start:
            error.close()
            return
        raise
    with response:
        content_range = response.headers.get("Content-Range", "")
        partial = response.status == http.HTTPStatus.PARTIAL_CONTENT
        resumed = re.match(r"bytes (\d{1,18})-", content_range) if partial else None
        if resumed and int(resumed[1]) != start:
            raise ConnectionError(f"asked for bytes from {start}, got {resumed[0]}")
        done = start if resumed else 0
        length = response.headers.get("Content-Length", "")
        # What is no number is no length: the checksum tells whether all has come.
        total = done + int(length) if re.fullmatch(r"[0-9]{1,18}", length) else None
        with part.open("ab" if resumed else "wb") as file:
            while chunk := response.read(_CHUNK_BYTES):
                file.write(chunk)
                done += len(chunk)
                report(done, total)
    if total is not None and done < total:
        raise ConnectionError(f"the connection closed after {done} of {total} bytes")


@contextlib.contextmanager
def _progress_bar(name: str) -> Iterator[Report]:
    """Yields report(bytes done, bytes in total), which draws a bar in a terminal only."""
    from rich import console, progress

    terminal = console.Console(stderr=True)
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=terminal, disable=not terminal.is_terminal) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
