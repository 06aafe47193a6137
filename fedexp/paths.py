"""Files of this machine and of buckets: a path such as s3://bucket/run goes through fsspec.

What a bucket's library raises arrives as an OSError whose `strerror` says it in one line, as for local files.
TensorFlow is not involved.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from fedexp.errors import UserError

PathLike = str | os.PathLike[str]

# The libraries that fedexp's extras install.
_EXTRAS = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gcs")}
# What a store says of an object that changes whenever its content does.
_VERSION = ("size", "ETag", "etag", "generation", "LastModified", "mtime", "created")


def is_remote(path: PathLike) -> bool:
    """Whether the path is a URL, as s3://bucket/run; such a path must stay a string."""
    return re.match(r"[a-z][a-z0-9+.-]+://", os.fspath(path)) is not None


def exists(path: PathLike) -> bool:
    """Whether there is such a file or folder."""
    if not is_remote(path):
        return os.path.exists(path)
    with _store(path) as (store, inside):
        return store.exists(inside)


def read_text(path: PathLike) -> str:
    """The content of a UTF-8 file."""
    if not is_remote(path):
        return Path(path).read_text(encoding="utf-8")
    with _store(path) as (store, inside):
        return store.cat_file(inside).decode("utf-8")


def write(path: PathLike, content: str | bytes) -> None:
    """Writes a file; a reader sees all of it or what was there before, also after a power cut."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    if is_remote(path):
        with _store(path) as (store, inside):
            store.pipe_file(inside, data)
        return
    target = Path(path)
    # By a name of this process, for others may write the same file.
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    partial.write_bytes(data)
    replace(partial, target)


def create(path: PathLike, content: str) -> bool:
    """Writes a file unless there is one; returns whether there was none."""
    data = content.encode("utf-8")
    try:
        if not is_remote(path):
            with open(path, "xb") as file:
                file.write(data)
            return True
        with _store(path) as (store, inside):
            if store.exists(inside):  # For stores that take no conditions.
                return False
            with contextlib.suppress(FileExistsError):
                store.pipe_file(inside, data, mode="create")
                return True
    except FileExistsError:
        pass
    return False


def delete(path: PathLike) -> None:
    """Deletes a file, if there is one."""
    with contextlib.suppress(FileNotFoundError):
        if not is_remote(path):
            os.remove(path)
            return
        with _store(path) as (store, inside):
            store.rm_file(inside)


def replace(source: Path, target: Path) -> None:
    """Renames a file or folder of this machine into place, for good.

    All of it is on the disk before it has its new name, so that a power cut leaves nothing in between.
    """
    for path in (*source.rglob("*"), source):
        sync(path)
    os.replace(source, target)
    sync(target.parent)


def sync(path: Path) -> None:
    """Waits until the disk has a file's content, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # Some file systems refuse to sync folders.
            raise
    finally:
        os.close(descriptor)


def versions(url: str) -> dict[str, str]:
    """The files right in a bucket's folder: name -> what tells a file from an edited one."""
    with _store(url) as (store, inside):
        return {
            os.path.basename(info["name"]): " ".join(
                f"{key}={info[key]}" for key in _VERSION if info.get(key) is not None
            )
            for info in store.ls(inside, detail=True)
            if info["type"] == "file"
        }


def find(url: str) -> list[str]:
    """All files below a bucket's folder, by their path from there, as the bucket has it."""
    with _store(url) as (store, inside):
        return [path.removeprefix(f"{inside}/") for path in store.find(inside)]


def upload(folder: Path, names: Sequence[str], url: str) -> None:
    """Copies files below `folder` to the same places below `url`."""
    with _store(url) as (store, inside):
        if names:
            store.put([str(folder / n) for n in names], [f"{inside}/{n}" for n in names])


def download(url: str, names: Sequence[str], folder: Path) -> None:
    """Copies files below `url` to the same places below `folder`.

    Raises:
      UserError: a name that leads out of `folder`, as anything can be called in a bucket.
    """
    for name in names:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise UserError(
                f"the name {name!r} in {url} leads out of its folder; delete that object"
            )
    with _store(url) as (store, inside):
        if names:
            store.get([f"{inside}/{n}" for n in names], [str(folder / n) for n in names])


def remove(url: str, names: Sequence[str]) -> None:
    """Deletes files below `url`."""
    with _store(url) as (store, inside):
        if names:
            store.rm([f"{inside}/{name}" for name in names])


@contextlib.contextmanager
def _store(url: PathLike) -> Iterator[tuple[Any, str]]:
    """The file system of a URL and the path in it, for a body in which that may fail."""
    import fsspec

    url = os.fspath(url)
    scheme = url.partition("://")[0]
    try:
        store, inside = fsspec.core.url_to_fs(url.rstrip("/"), use_listings_cache=False)
        yield store, inside
    except ImportError as error:
        library, extra = _EXTRAS.get(scheme, (None, None))
        raise UserError(
            f"{url} needs {library}, which is not installed: pip install 'fedexp[{extra}]'"
            if library
            else f"{url} cannot be reached: {_one_line(error)}"
        ) from error
    except Exception as error:  # Every store has its own.
        if isinstance(error, FileNotFoundError):
            bucket = url.split("/")[2]
            missing = f"there is no bucket {bucket!r}, or nothing of this name in it"
            raise FileNotFoundError(errno.ENOENT, missing) from error
        raise OSError(getattr(error, "errno", None) or errno.EIO, _one_line(error)) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
