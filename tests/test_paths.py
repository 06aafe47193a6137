"""Runs that live in a bucket: fsspec's `memory://`, and a server that speaks S3, stand in for one."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import stat
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import gin
import h5py
import jax.numpy as jnp
import numpy as np
import pytest

from fedexp import config, paths, summaries, trainer  # noqa: F401  It registers with Gin.
from fedexp.checkpointing import Checkpointer
from fedexp.data import download
from fedexp.errors import UserError
from fedexp.summaries import Writer
from tests.support.disk import assert_safe, recorded
from tests.support.tensorboard import tensors

REPOSITORY = Path(__file__).parent.parent
EXPERIMENT = """
include 'parts/emnist.gin'
train.algorithm = @fedavg
fedavg.client_optimizer = @client/sgd()
fedavg.server_optimizer = @server/sgd()
client/sgd.learning_rate = 0.1
server/sgd.learning_rate = 1.0
emnist.only_digits = True
emnist.data_dir = 's3://bucket/data'
classification.num_classes = 10
classification.model = @EmnistLogistic()
classification.class_names = None
EmnistLogistic.num_classes = 10
uniform.cohort_size = 2
train.sampler = @uniform()
train.num_rounds = 100000
evaluate.every = 40
CheckpointPlan.every = 20
"""


@pytest.fixture
def memory():
    return f"memory://{uuid.uuid4().hex}"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDEXP_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def no_bindings():
    gin.clear_config()
    yield
    gin.clear_config()


def store() -> fsspec.AbstractFileSystem:
    return fsspec.filesystem("memory")


@pytest.mark.parametrize(
    ("path", "remote"),
    [
        ("s3://bucket/run", True),
        ("gs://bucket", True),
        ("runs/s3://x", False),
        ("/runs/a:b", False),
        (Path("runs"), False),
    ],
)
def test_what_is_remote(path, remote):
    assert paths.is_remote(path) is remote


def test_files_are_the_same_here_and_there(tmp_path, memory):
    for folder in (str(tmp_path), memory):
        path = os.path.join(folder, "a.txt")
        assert not paths.exists(path)
        with pytest.raises(FileNotFoundError) as missing:
            paths.read_text(path)
        assert missing.value.strerror
        for text in ("é\n", "second"):
            paths.write(path, text)
            assert paths.exists(path) and paths.read_text(path) == text
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_power_cut_leaves_the_old_file_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    paths.write(path, "old")
    done = recorded(monkeypatch)
    paths.write(path, "new")
    file = os.stat(path).st_ino
    assert done == [("fsync", file), ("replace", path.name), ("fsync", os.stat(tmp_path).st_ino)]


def test_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    (tmp_path / "part" / "sub").mkdir(parents=True)
    for name in ("a", "sub/b"):
        (tmp_path / "part" / name).write_text(name)
    (tmp_path / "part" / "a").chmod(0o400)
    done = recorded(monkeypatch)
    paths.replace(tmp_path / "part", tmp_path / "whole")
    assert_safe(done, tmp_path / "whole")


def test_folders_that_cannot_be_synced_are_renamed_all_the_same(tmp_path, monkeypatch):
    fsync = os.fsync

    def refuse_folders(file):
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(22, "Invalid argument")
        fsync(file)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    paths.write(tmp_path / "a.txt", "a")
    assert (tmp_path / "a.txt").read_text() == "a"
    monkeypatch.setattr(os, "fsync", lambda file: os.write(file, b""))  # Bad file descriptor.
    with pytest.raises(OSError):
        paths.write(tmp_path / "b.txt", "b")
    assert not (tmp_path / "b.txt").exists()


@pytest.mark.parametrize("name", ["../escaped", "1/../../escaped", "/tmp/escaped", "1/.."])
def test_names_that_lead_out_of_a_folder_are_refused(memory, tmp_path, name):
    store().pipe_file(f"{memory}/run/{name}", b"!")
    paths.write(f"{memory}/run/1/a", "a")
    with pytest.raises(UserError, match=rf"name '{name}' in {memory}/run leads out"):
        paths.download(f"{memory}/run", ["1/a", name], tmp_path / "here")
    assert not list(tmp_path.iterdir())


def test_names_are_found_as_the_bucket_has_them(s3, tmp_path):
    for name in ("1/a", "1/../../escaped", "2/../b"):
        s3.pipe_file(f"bucket/names/run/{name}", b"!")
    names = paths.find("s3://bucket/names/run")
    assert sorted(names) == ["1/../../escaped", "1/a", "2/../b"]
    with pytest.raises(UserError, match=r"leads out"):
        paths.download("s3://bucket/names/run", names, tmp_path / "here")
    assert not (tmp_path / "escaped").exists()


@pytest.mark.parametrize("library", ["gcsfs", "s3fs"])
def test_a_missing_library_is_named_with_its_extra(monkeypatch, library):
    scheme, extra = {"gcsfs": ("gs", "gcs"), "s3fs": ("s3", "s3")}[library]
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, scheme, raising=False)
    with pytest.raises(UserError, match=rf"needs {library}, .* pip install 'fedexp\[{extra}\]'"):
        config.prepare_workdir(f"{scheme}://bucket/run")
    with pytest.raises(UserError, match=rf"needs {library}, .* pip install 'fedexp\[{extra}\]'"):
        config.load([f"{scheme}://bucket/a.gin"], [])


def test_an_unknown_scheme_is_refused():
    with pytest.raises(UserError, match=r"--workdir=foo://bucket/run: .*foo"):
        config.prepare_workdir("foo://bucket/run")


def test_gin_files_and_what_they_include(memory):
    includes = f"include '{memory}/parts/b.gin'\ninclude 'parts/c.gin'\n"
    includes += "include 'tests/support/linear.gin'\n"  # Not there, but in the current folder.
    paths.write(f"{memory}/a.gin", f"{includes}uniform.cohort_size = 3")
    paths.write(f"{memory}/parts/b.gin", "train.seed = 7\nuniform.cohort_size = 2")
    paths.write(f"{memory}/parts/c.gin", "evaluate.batch_size = 5")
    config.load(["tests/support/linear.gin"], [])
    linear = config.bindings()
    gin.clear_config()
    config.load([f"{memory}/a.gin"], [])
    own = {"train.seed": "7", "evaluate.batch_size": "5", "uniform.cohort_size": "3"}
    assert config.bindings() == linear | own
    with pytest.raises(UserError, match=rf"there is no {memory}/b.gin, or no such bucket"):
        config.load([f"{memory}/b.gin"], [])


def test_a_workdir_is_claimed_once(memory):
    config.load([], ["train.seed = 7"])
    for _ in range(2):
        config.prepare_workdir(f"{memory}/run")
    paths.write(f"{memory}/run/{config.OPERATIVE}", "")
    gin.clear_config()
    config.load([], ["train.seed = 8"])
    with pytest.raises(UserError, match=r"train.seed: 7 -> 8"):
        config.prepare_workdir(f"{memory}/run")
    assert "train.seed = 7" in paths.read_text(f"{memory}/run/config.gin")


def save(directory: str, rounds: list[int], **options) -> None:
    checkpointer = Checkpointer(directory, keep=2, **options)
    for round_ in rounds:
        checkpointer.save(round_, {"w": jnp.full(3, round_)}, {"round": round_})
    checkpointer.close()


def committed(directory: str) -> set[int]:
    names = [name for name in paths.find(directory) if name.count("/") == 1]
    return {int(name.split("/")[0]) for name in names if name.endswith("/commit_success.txt")}


def test_checkpoints_come_back_and_old_ones_go(memory):
    state = {"w": jnp.arange(5.0) / 7, "n": np.int64(3), "empty": jnp.zeros((0, 2))}
    save(memory, [1, 2, 3])
    assert committed(memory) == {2, 3}
    checkpointer = Checkpointer(memory, keep=2)
    scratch = checkpointer._bucket.folder
    assert checkpointer.latest() == 3
    checkpointer.save(4, state, {"history": [0.1, None]})
    restored, metadata = checkpointer.restore(None, state)
    assert metadata == {"history": [0.1, None]}
    for name, leaf in state.items():
        assert np.asarray(restored[name]).tobytes() == np.asarray(leaf).tobytes()
    checkpointer.close()
    assert committed(memory) == {3, 4} and not scratch.exists()
    assert {name.split("/")[0] for name in paths.find(memory)} == {"3", "4"}


def test_a_checkpoint_may_be_replaced(memory):
    save(memory, [1, 2])
    checkpointer = Checkpointer(memory)
    checkpointer.save(1, {"w": jnp.zeros(3)}, {}, force=True)
    checkpointer.close()
    checkpointer = Checkpointer(memory)
    assert checkpointer.latest() == 1
    assert not checkpointer.restore(None, {"w": jnp.ones(3)})[0]["w"].any()
    checkpointer.close()


def test_an_upload_that_was_killed_is_ignored_and_removed(memory):
    save(memory, [1, 2])
    paths.remove(memory, ["2/commit_success.txt"])
    checkpointer = Checkpointer(memory)
    assert checkpointer.latest() == 1
    checkpointer.close()
    assert {name.split("/")[0] for name in paths.find(memory)} == {"1"}


def test_the_marker_comes_last_and_goes_first(memory, monkeypatch):
    order = []
    for name, done in (("upload", paths.upload), ("remove", paths.remove)):

        def spy(*args, name=name, done=done):
            files = next(arg for arg in args if isinstance(arg, list))
            order.extend((name, file) for file in files)
            done(*args)

        monkeypatch.setattr(paths, name, spy)
    save(memory, [1, 2, 3])
    uploaded = [file for name, file in order if name == "upload" and file.startswith("3/")]
    removed = [file for name, file in order if name == "remove"]
    assert uploaded[-1] == removed[0].replace("1/", "3/") == "3/commit_success.txt"
    assert len(uploaded) > 5 and all(file.startswith("1/") for file in removed)
    assert max(i for i, step in enumerate(order) if step[0] == "upload") < order.index(
        ("remove", removed[0])
    )


def test_a_failed_upload_reaches_the_next_call(memory, monkeypatch):
    checkpointer = Checkpointer(memory)
    checkpointer.save(1, {"w": jnp.zeros(3)}, {})
    checkpointer.wait()

    def refuse(*args):
        raise PermissionError(13, "quota exceeded")

    monkeypatch.setattr(paths, "upload", refuse)
    checkpointer.save(2, {"w": jnp.zeros(3)}, {})
    with pytest.raises(UserError, match=rf"Cannot write checkpoints to {memory}.*quota exceeded"):
        checkpointer.wait()
    checkpointer.close()
    assert committed(memory) == {1}


def test_summaries_are_followed_by_another_file_once_large(memory, monkeypatch):
    monkeypatch.setattr(summaries, "_BUCKET_FILE_BYTES", 500)
    with Writer(f"{memory}/run") as writer:
        for step in range(1, 41):
            writer.scalars(step, {"train/loss": step / 2})
            writer.flush()
    with Writer(f"{memory}/run", resume_at=31) as writer:
        writer.scalars(31, {"train/loss": -1})
    found = tensors(f"{memory}/run")["train/loss"]
    assert found == {step: step / 2 for step in range(1, 31)} | {31: -1}
    sizes = store().glob(f"{memory}/run/*", detail=True)
    assert len(sizes) > 3 and all(info["size"] < 1000 for info in sizes.values())


def test_data_is_copied_once_and_when_it_has_changed(memory, tmp_path, monkeypatch):
    assert download.local_folder(tmp_path, "*.h5") == tmp_path
    copied = []
    fetch = paths.download
    monkeypatch.setattr(
        paths, "download", lambda url, names, to: (copied.extend(names), fetch(url, names, to))
    )
    for name in ("a.h5", "b.h5", "c.txt"):
        paths.write(f"{memory}/data/{name}", name)
    for _ in range(2):
        folder = download.local_folder(f"{memory}/data/", "*.h5")
        assert {path.name for path in folder.iterdir() if path.is_file()} == {"a.h5", "b.h5"}
    assert copied == ["a.h5", "b.h5"] and (folder / "a.h5").read_text() == "a.h5"

    paths.write(f"{memory}/data/a.h5", "new!")
    store().rm(f"{memory}/data/b.h5")
    assert download.local_folder(f"{memory}/data", "*.h5") == folder
    assert copied == ["a.h5", "b.h5", "a.h5"] and (folder / "a.h5").read_text() == "new!"
    assert not (folder / "b.h5").exists()
    assert download.local_file(f"{memory}/data/c.txt").read_text() == "c.txt"


def test_data_that_is_not_there_is_missed_with_what_is(memory):
    paths.write(f"{memory}/data/a.h5", "")
    with pytest.raises(UserError, match=rf"expected b\.h5 in {memory}/data, found a\.h5"):
        download.local_file(f"{memory}/data/b.h5")
    with pytest.raises(UserError, match=rf"cannot copy {memory}/nowhere .*no bucket"):
        download.local_folder(f"{memory}/nowhere", "*.h5")


@pytest.fixture(scope="module")
def s3():
    """A file system on a server that speaks S3, with an empty bucket; its address is in the environment."""
    pytest.importorskip("s3fs", reason="needs s3fs, of the extra 'test'")
    moto = pytest.importorskip("moto.server", reason="needs moto, of the extra 'test'")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "nobody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        files = fsspec.filesystem("s3", use_listings_cache=False, skip_instance_cache=True)
        files.mkdir("bucket")
        yield files
    server.stop()


def test_a_missing_bucket_is_refused_and_not_made(s3):
    with pytest.raises(UserError, match=r"--workdir=s3://nope/run: there is no bucket 'nope'"):
        config.prepare_workdir("s3://nope/run")
    with pytest.raises(UserError, match=r"there is no s3://nope/a.gin, or no such bucket"):
        config.load(["s3://nope/a.gin"], [])
    assert not s3.exists("nope")


def test_s3_tells_an_edited_file_of_the_same_size(s3):
    s3.pipe_file("bucket/edited/a", b"1")
    before = paths.versions("s3://bucket/edited")
    assert paths.versions("s3://bucket/edited") == before
    s3.pipe_file("bucket/edited/a", b"2")
    assert paths.versions("s3://bucket/edited") != before


def test_only_one_creates_an_object_of_s3(s3, monkeypatch):
    assert paths.create("s3://bucket/lock", "first") and not paths.create("s3://bucket/lock", "2nd")
    monkeypatch.setattr(type(s3), "exists", lambda *_: False)  # Another was quicker.
    assert not paths.create("s3://bucket/lock", "third")
    assert paths.read_text("s3://bucket/lock") == "first"
    paths.delete("s3://bucket/lock")
    assert paths.create("s3://bucket/lock", "fourth")


@contextlib.contextmanager
def fedexp(output: Path, *arguments: str) -> Iterator[subprocess.Popen]:
    """A run that says what it imports, with its output in files: a pipe would fill up."""
    command = [sys.executable, "-X", "importtime", "-m", "fedexp.main", *arguments]
    with output.with_suffix(".out").open("w") as out, output.with_suffix(".err").open("w") as err:
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=out, stderr=err)
        yield process
        process.wait(timeout=120)


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_in_the_bucket(s3, tmp_path):
    """Gin file, data and workdir in the bucket; and nothing imports TensorFlow."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        with h5py.File(tmp_path / f"fed_emnist_digitsonly_{split}.h5", "w") as file:
            for client in range(5):
                group = file.create_group(f"examples/f{client}")
                group["pixels"] = rng.random((8, 28, 28), np.float32)
                group["label"] = rng.integers(0, 10, 8, np.int32)
        s3.put_file(
            str(tmp_path / f"fed_emnist_digitsonly_{split}.h5"),
            f"bucket/data/fed_emnist_digitsonly_{split}.h5",
        )
    s3.pipe_file("bucket/experiment.gin", EXPERIMENT.encode())
    flags = ("--gin_file=s3://bucket/experiment.gin", "--workdir=s3://bucket/run")

    with fedexp(tmp_path / "first", *flags) as first:
        deadline = time.monotonic() + 120
        while not committed("s3://bucket/run/checkpoints") and first.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        first.send_signal(signal.SIGTERM)
    errors = (tmp_path / "first.err").read_text()
    assert first.returncode == 128 + signal.SIGTERM, errors[-2000:]
    stopped = int(errors.split("stopped after round ")[1].split(";")[0])
    assert stopped in committed("s3://bucket/run/checkpoints")
    assert not s3.exists("bucket/run/final.json")

    rounds = stopped + 20
    flags += (f"--gin_param=train.num_rounds = {rounds}",)
    flags += ("--gin_param=workdir.allow_config_change = True",)
    with fedexp(tmp_path / "second", *flags) as second:
        pass
    errors = (tmp_path / "second.err").read_text()
    assert second.returncode == 0, errors[-2000:]
    assert f"going on after round {stopped}, from s3://bucket/run" in errors
    imported = {line.split("|")[-1].split(".")[0].strip() for line in errors.splitlines()}
    assert "s3fs" in imported and "tensorflow" not in imported
    assert (tmp_path / "second.out").read_text().endswith("results are in s3://bucket/run\n")

    final = json.loads(s3.cat_file("bucket/run/final.json"))
    assert final["rounds"] == rounds
    evaluated = [*range(40, rounds, 40), rounds]
    assert [row["round"] for row in final["history"]] == evaluated
    assert "emnist.data_dir = 's3://bucket/data'" in s3.cat_file("bucket/run/config.gin").decode()
    assert s3.exists("bucket/run/operative_config.gin")
    assert rounds in committed("s3://bucket/run/checkpoints")
    for run, tag in (("train/", "loss"), ("", "training/update_norm")):
        folder = tmp_path / "events" / tag
        s3.get(s3.glob(f"bucket/run/{run}events*"), f"{folder}/")
        assert list(tensors(folder)[tag]) == list(range(1, rounds + 1))


def test_two_processes_may_write_a_file_at_once(tmp_path):
    code = "from fedexp import paths\nfor _ in range(100): paths.write('a', 'x' * 1000)"
    running = [subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path) for _ in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    assert (tmp_path / "a").read_text() == "x" * 1000
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
