"""Downloads, against a local server that misbehaves on request."""

import hashlib
import http.server
import io
import re
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from fedexp.data import download
from fedexp.errors import UserError
from tests.support.disk import assert_safe, recorded

CONTENT = np.random.default_rng(0).bytes(700_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class _Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.content`, truncated, failing or without ranges as the server's fields say."""

    def do_GET(self):
        server = self.server
        server.requests.append(self.headers.get("Range"))
        if server.statuses:
            self.send_error(server.statuses.pop(0))
            return
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked and server.ranges else 0
        body = server.content[start:]
        if asked and server.ranges:
            if start >= len(server.content):
                self.send_error(416)
                return
            self.send_response(206)
            end = len(server.content)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{end}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", server.length or str(len(body)))
        self.end_headers()
        time.sleep(server.delay)
        self.wfile.write(body[: server.truncate.pop(0)] if server.truncate else body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.content, server.requests = CONTENT, []
    server.statuses, server.truncate, server.ranges, server.delay = [], [], True, 0.0
    server.length = None
    server.url = f"http://127.0.0.1:{server.server_port}/data.bin"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDEXP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "_RETRY_DELAYS_S", (0.0, 0.0, 0.0))
    return tmp_path / "cache"


def _get(server, name: str = "data.bin") -> Path:
    return download.download(server.url, name, sha256=SHA256)


def test_downloads_once(server, cache):
    path = _get(server, "sub/data.bin")
    assert path == cache / "sub" / "data.bin"
    assert path.read_bytes() == CONTENT
    assert _get(server, "sub/data.bin") == path
    assert server.requests == [None]
    assert not path.with_name("data.bin.part").exists()


def test_is_on_the_disk_before_it_has_its_name(server, monkeypatch):
    done = recorded(monkeypatch)
    assert_safe(done, _get(server))


def test_resumes_the_part_of_an_earlier_run(server, cache):
    cache.mkdir()
    (cache / "data.bin.part").write_bytes(CONTENT[:1234])
    assert _get(server).read_bytes() == CONTENT
    assert server.requests == ["bytes=1234-"]


def test_a_complete_part_needs_no_further_bytes(server, cache):
    cache.mkdir()
    (cache / "data.bin.part").write_bytes(CONTENT)
    assert _get(server).read_bytes() == CONTENT


@pytest.mark.parametrize("length", ["many", "9" * 5000, "1e3", "\u00b2"])
def test_a_length_that_is_no_number(server, length):
    server.length = length
    assert _get(server).read_bytes() == CONTENT


def test_resumes_truncated_connections(server):
    server.truncate = [300_000, 100_000]
    assert _get(server).read_bytes() == CONTENT
    assert server.requests == [None, "bytes=300000-", "bytes=400000-"]


def test_gives_up_on_a_server_that_always_truncates_and_resumes_later(server, cache):
    server.truncate = [10] * 4
    with pytest.raises(UserError, match="closed after 40 of 700000 bytes") as error:
        _get(server)
    assert server.url in str(error.value)
    assert (cache / "data.bin.part").read_bytes() == CONTENT[:40]
    assert _get(server).read_bytes() == CONTENT
    assert server.requests[-1] == "bytes=40-"


def test_starts_over_when_the_server_ignores_ranges(server, cache):
    server.ranges = False
    server.truncate = [300_000]
    assert _get(server).read_bytes() == CONTENT
    assert server.requests == [None, "bytes=300000-"]


def test_retries_a_server_that_is_busy(server):
    server.statuses = [503, 429]
    assert _get(server).read_bytes() == CONTENT


@pytest.mark.parametrize("status", [404, 403, 410])
def test_other_http_errors_say_what_to_fetch_by_hand(server, cache, status):
    server.statuses = [status]
    with pytest.raises(UserError, match=f"HTTP error {status}") as error:
        _get(server)
    assert f"fetch {server.url} by hand and put it at {cache / 'data.bin'}" in str(error.value)
    assert len(server.requests) == 1


def test_offline_says_what_to_fetch_by_hand(server, cache):
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match=r"[Rr]efused") as error:
        _get(server)
    assert f"fetch {server.url} by hand and put it at {cache / 'data.bin'}" in str(error.value)


def test_a_file_put_by_hand_is_used(server, cache):
    cache.mkdir()
    (cache / "data.bin").write_bytes(CONTENT)
    assert _get(server).read_bytes() == CONTENT
    assert not server.requests


def test_a_wrong_file_put_by_hand_is_reported_and_kept(server, cache):
    cache.mkdir()
    (cache / "data.bin").write_bytes(b"<html>log in first</html>")
    with pytest.raises(UserError, match="is not the published file"):
        _get(server)
    assert (cache / "data.bin").exists()


def test_corrupt_content_is_removed(server, cache):
    server.content = CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])
    with pytest.raises(UserError, match=f"SHA-256 is .*expected {SHA256}"):
        _get(server)
    assert not (cache / "data.bin").exists()
    assert not (cache / "data.bin.part").exists()


def test_a_full_disk_is_not_retried(server, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download, "_fetch_rest", full)
    monkeypatch.setattr(download, "_RETRY_DELAYS_S", (1e6,))
    with pytest.raises(UserError, match="No space left"):
        _get(server)


def test_two_processes_download_once(server, cache):
    server.delay = 0.3
    program = (
        "from fedexp.data.download import download; "
        f"print(download({server.url!r}, 'data.bin', sha256={SHA256!r}))"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=Path(download.__file__).parents[2],
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in processes:
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        assert out.strip() == str(cache / "data.bin")
    assert server.requests == [None]
    assert (cache / "data.bin").read_bytes() == CONTENT


def test_no_progress_bar_outside_a_terminal(server, capfd):
    _get(server)
    assert capfd.readouterr() == ("", "")


def test_a_progress_bar_in_a_terminal(server, capfd, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    _get(server)
    assert "data.bin" in capfd.readouterr().err


def _archive(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:bz2") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_extracted_is_temporary(tmp_path, cache):
    archive = _archive(tmp_path / "a.tar.bz2", {"one": b"1", "sub/two": b"22"})
    with download.extracted(archive) as folder:
        assert folder.parent == cache
        assert (folder / "one").read_bytes() == b"1"
        assert (folder / "sub" / "two").read_bytes() == b"22"
    assert not folder.exists()


def test_extracted_refuses_links(tmp_path, cache):
    archive = tmp_path / "a.tar"
    with tarfile.open(archive, "w") as tar:
        link = tarfile.TarInfo("here")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
        tar.addfile(link)
        below = tarfile.TarInfo("here/escaped")
        tar.addfile(below, io.BytesIO())
    with pytest.raises(UserError, match="here is no file"), download.extracted(archive):
        pass
    assert not (tmp_path / "escaped").exists()


@pytest.mark.parametrize("name", ["/escaped", "sub/../../escaped"])
def test_extracted_checks_names_itself(tmp_path, cache, monkeypatch, name):
    # Python before 3.11.4 has neither.
    lenient = getattr(tarfile, "fully_trusted_filter", None)
    monkeypatch.setattr(tarfile, "data_filter", lenient, raising=False)
    archive = _archive(tmp_path / "a.tar.bz2", {name: b"!"})
    with pytest.raises(UserError, match="escaped is no file or leads"), download.extracted(archive):
        pass


def test_extracted_refuses_to_leave_its_folder(tmp_path, cache):
    archive = _archive(tmp_path / "a.tar.bz2", {"../../escaped": b"!"})
    with pytest.raises(UserError, match="cannot extract"), download.extracted(archive):
        pass
    assert not (tmp_path / "escaped").exists()
    assert not list(cache.iterdir())


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"no", lambda b: b""])
def test_extracted_reports_a_damaged_archive(tmp_path, damage):
    archive = _archive(tmp_path / "a.tar.bz2", {"one": np.random.default_rng(0).bytes(100_000)})
    archive.write_bytes(damage(archive.read_bytes()))
    with (
        pytest.raises(UserError, match=r"cannot extract .*a.tar.bz2"),
        download.extracted(archive),
    ):
        pass
