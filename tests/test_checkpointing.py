from __future__ import annotations

import contextlib
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedexp.checkpointing import Checkpointer
from fedexp.errors import UserError
from fedexp.kept import Rows


@flax.struct.dataclass
class ServerState:
    params: Any
    optimizer: Any
    round: Any


@contextlib.contextmanager
def opened(directory: Path, **options: Any) -> Iterator[Checkpointer]:
    checkpointer = Checkpointer(directory, **options)
    try:
        yield checkpointer
    finally:
        checkpointer.close()


def assert_same(actual: Any, expected: Any) -> None:
    """Same structure, and every leaf of the same type, dtype, shape and bytes."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert isinstance(a, jax.Array) == isinstance(e, jax.Array)
        assert isinstance(a, jax.Array) or type(a) is type(e)
        a, e = np.asarray(a), np.asarray(e)
        assert (a.dtype, a.shape, a.tobytes()) == (e.dtype, e.shape, e.tobytes())


def a_state() -> dict[str, Any]:
    params = {
        "Dense_0": {"kernel": jnp.arange(12.0).reshape(3, 4) / 7, "bias": jnp.zeros(4)},
        "half": jnp.array([1.5, -jnp.nan, jnp.inf, 1e-3], jnp.bfloat16),
        "empty": jnp.zeros((0, 3)),
    }
    return {
        "server": ServerState(params, optax.adam(1e-3).init(params), np.int32(5)),
        "rng": jax.random.key_data(jax.random.key(3)),
        "tuple": (jnp.array([True, False]), [np.arange(5, dtype=np.int64)], None, ()),
        "numbers": {"int": 7, "float": 0.1, "bool": True, "scalar": np.float32(0.1)},
        "negative zero": np.array([-0.0, np.nan, 5e-324]),
        "fortran": np.asfortranarray(np.arange(6, dtype=np.uint8).reshape(2, 3)),
        "none of them": np.zeros((2, 0), np.int8),
        "a/b.c": jnp.array(3),
    }


def zeros_like(tree: Any) -> Any:
    def zero(leaf: Any) -> Any:
        match leaf:
            case jax.Array():
                return jnp.zeros_like(leaf)
            case np.ndarray():
                return np.zeros_like(leaf)
            case _:
                return type(leaf)(0)

    return jax.tree.map(zero, tree)


def test_everything_comes_back_bit_for_bit(tmp_path):
    state, metadata = a_state(), {"seed": 3, "history": [0.1, None], "name": "é"}
    with opened(tmp_path / "new" / "folder") as checkpointer:
        assert checkpointer.latest() is None
        checkpointer.save(5, state, metadata)
        assert checkpointer.latest() == 5
    with opened(tmp_path / "new" / "folder") as checkpointer:
        restored, restored_metadata = checkpointer.restore(None, zeros_like(state))
    assert_same(restored, state)
    assert restored_metadata == metadata


def test_arrays_are_named_by_their_path_for_other_readers(tmp_path):
    import orbax.checkpoint as ocp

    state = a_state()
    with opened(tmp_path) as checkpointer:
        checkpointer.save(1, state, {})
    arrays = ocp.PyTreeCheckpointer().restore(tmp_path / "1" / "state")
    kernel = arrays["server.params.Dense_0.kernel"]
    np.testing.assert_array_equal(kernel, state["server"].params["Dense_0"]["kernel"])
    assert "server.optimizer.0.mu.half" in arrays


def test_state_may_be_donated_or_changed_once_save_returns(tmp_path):
    on_device, on_host = jnp.arange(1 << 20, dtype=jnp.float32), np.arange(1 << 20)
    add_one = jax.jit(lambda x: x + 1, donate_argnums=0)
    with opened(tmp_path) as checkpointer:
        for round in range(3):
            checkpointer.save(round, {"device": on_device, "host": on_host}, {})
            on_device = add_one(on_device)
            on_host += 1
        template = {"device": on_device, "host": on_host}
        for round in range(3):
            restored, _ = checkpointer.restore(round, template)
            np.testing.assert_array_equal(restored["device"], np.arange(1 << 20) + round)
            np.testing.assert_array_equal(restored["host"], np.arange(1 << 20) + round)


def test_rows_of_a_size_known_only_to_the_checkpoint(tmp_path):
    rng = np.random.default_rng(0)
    with opened(tmp_path) as checkpointer:
        for round, num_seen in enumerate([0, 3, 11]):
            rows = rng.normal(size=(num_seen, 4)).astype(np.float32)
            clients = {"rows": {"c": rows}, "indices": np.arange(num_seen)}
            checkpointer.save(round, {"w": jnp.ones(2), "clients": clients}, {})
            template = {
                "w": jnp.zeros(2),
                "clients": {
                    "rows": {"c": Rows((4,), np.float32)},
                    "indices": Rows((), np.int64),
                },
            }
            restored, _ = checkpointer.restore(round, template)
            assert_same(restored, {"w": jnp.ones(2), "clients": clients})
        template["clients"]["rows"]["c"] = Rows((5,), np.float32)
        with pytest.raises(
            UserError, match=r"clients.rows.c is float32\[11,4\] .* float32\[\*,5\]"
        ):
            checkpointer.restore(None, template)


def test_arrays_are_placed_as_the_template_is(tmp_path):
    device = jax.devices()[0]
    sharding = jax.sharding.NamedSharding(
        jax.make_mesh((1,), ("clients",)), jax.sharding.PartitionSpec("clients")
    )
    values = np.arange(4.0, dtype=np.float32)
    template = {
        "anywhere": jnp.zeros(4),
        "committed": jax.device_put(jnp.zeros(4), device),
        "sharded": jax.device_put(jnp.zeros(4), sharding),
        "described": jax.ShapeDtypeStruct((4,), jnp.float32, sharding=sharding),
        "host": jax.ShapeDtypeStruct((4,), jnp.float32),
    }
    with opened(tmp_path) as checkpointer:
        checkpointer.save(0, dict.fromkeys(template, values), {})
        restored, _ = checkpointer.restore(0, template)
    assert not restored["anywhere"].committed
    assert restored["committed"].committed
    assert restored["sharded"].sharding == restored["described"].sharding == sharding
    assert type(restored["host"]) is np.ndarray
    for array in restored.values():
        np.testing.assert_array_equal(array, values)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            {"a": np.zeros(3), "b": np.zeros((2, 2))},
            r"b is float64\[2,3\] in it and float64\[2,2\]",
        ),
        ({"a": np.zeros(3), "b": np.zeros(6)}, r"b is float64\[2,3\] in it and float64\[6\] here"),
        (
            {"a": np.zeros(3, np.float32), "b": 0.0},
            r"a is float64\[3\] in it and float32\[3\] here",
        ),
        ({"a": np.zeros(3)}, r"b is float64\[2,3\] in it and missing here"),
        ({"a": np.zeros(3), "b": {"c": 1}}, r"b.c is missing in it and int64\[\] here"),
    ],
)
def test_another_experiments_checkpoint_names_the_first_leaf_that_differs(
    tmp_path, template, message
):
    with opened(tmp_path) as checkpointer:
        checkpointer.save(4, {"a": np.zeros(3), "b": np.zeros((2, 3))}, {})
        with pytest.raises(UserError, match=message) as raised:
            checkpointer.restore(4, template)
    assert str(tmp_path / "4") in str(raised.value)


def test_a_round_that_is_not_there(tmp_path):
    with opened(tmp_path) as checkpointer:
        with pytest.raises(UserError, match="has no checkpoint"):
            checkpointer.restore(None, {"a": 1})
        checkpointer.save(4, {"a": 1}, {})
        with pytest.raises(UserError, match=r"no checkpoint of round 3; it has rounds \[4\]"):
            checkpointer.restore(3, {"a": 1})


@pytest.mark.parametrize(
    ("mode", "accuracies", "best", "kept"),
    [
        ("max", [0.1, 0.9, 0.9, 0.3, 0.2, None, np.nan], 2, [2, 5, 6]),
        ("min", [0.4, 0.1, 0.2, 0.3, 0.2, None, np.nan], 1, [1, 5, 6]),
        ("max", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, np.inf], 6, [5, 6]),
        ("max", [None] * 7, None, [5, 6]),
    ],
)
def test_keeps_the_most_recent_and_the_best(tmp_path, mode, accuracies, best, kept):
    options = {"keep": 2, "best_metric": "accuracy", "best_mode": mode}
    with opened(tmp_path, **options) as checkpointer:
        for round, accuracy in enumerate(accuracies):
            metrics = None if accuracy is None else {"accuracy": accuracy, "loss": 1.0}
            checkpointer.save(round, {"a": round}, {}, metrics)
        assert checkpointer.best() == best
    assert sorted(int(folder.name) for folder in tmp_path.iterdir()) == kept
    with opened(tmp_path, **options) as checkpointer:
        assert (checkpointer.latest(), checkpointer.best()) == (6, best)
        for round in kept:
            assert checkpointer.restore(round, {"a": 0}) == ({"a": round}, {})


def test_without_a_metric_there_is_no_best(tmp_path):
    with opened(tmp_path) as checkpointer:
        checkpointer.save(0, {"a": 1}, {}, {"accuracy": 1.0})
        assert checkpointer.best() is None


def test_an_earlier_round_is_saved_only_by_force(tmp_path):
    with opened(tmp_path) as checkpointer:
        for round in (10, 20, 30):
            checkpointer.save(round, {"a": round}, {})
        for round in (20, 30):
            with pytest.raises(UserError, match=f"already holds .* so round {round} cannot"):
                checkpointer.save(round, {"a": -1}, {})
        checkpointer.save(20, {"a": -1}, {"forced": True}, force=True)
        assert checkpointer.latest() == 20
        assert checkpointer.restore(None, {"a": 0}) == ({"a": -1}, {"forced": True})
        assert checkpointer.restore(10, {"a": 0}) == ({"a": 10}, {})
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["10", "20"]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"keep": 0}, "keep must be at least 1"), ({"best_mode": "most"}, "'max' or 'min'")],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        Checkpointer(tmp_path, **options)


def test_metrics_without_the_best_metric(tmp_path):
    with (
        opened(tmp_path, best_metric="acuracy") as checkpointer,
        pytest.raises(UserError, match=r"'acuracy', but the evaluation gives \['accuracy'\]"),
    ):
        checkpointer.save(0, {"a": 1}, {}, {"accuracy": 1.0})


def test_two_leaves_of_one_name(tmp_path):
    with opened(tmp_path) as checkpointer, pytest.raises(UserError, match="same path"):
        checkpointer.save(0, {"a.b": 1, "a": {"b": 2}}, {})


def test_metadata_that_json_cannot_hold_is_refused_at_once(tmp_path):
    with opened(tmp_path) as checkpointer, pytest.raises(TypeError, match="JSON"):
        checkpointer.save(0, {"a": 1}, {"x": np.float32(1)})


@pytest.mark.parametrize("below", ["", "deeper/folder"])
def test_a_file_in_place_of_the_folder(tmp_path, below):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"Cannot write checkpoints to .*file"):
        Checkpointer(tmp_path / "file" / below)


def test_a_failure_in_the_background_reaches_the_next_call(tmp_path):
    folder = tmp_path / "checkpoints"
    checkpointer = Checkpointer(folder)
    checkpointer.save(1, {"a": np.ones(1000)}, {})
    checkpointer.wait()
    shutil.rmtree(folder)
    folder.touch()
    with pytest.raises(UserError, match=f"Cannot write checkpoints to {folder}: NotADirectory"):
        for round in (2, 3):
            checkpointer.save(round, {"a": np.ones(1000)}, {})
    checkpointer.close()


def _run(program: str, *args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )


def test_a_full_disk(tmp_path):
    program = """
        import resource, signal, sys
        import numpy as np
        from fedexp.checkpointing import Checkpointer
        from fedexp.errors import UserError

        state = {"a": np.random.default_rng(0).normal(size=100_000)}
        checkpointer = Checkpointer(sys.argv[1])
        checkpointer.save(1, state, {})
        checkpointer.wait()
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
        try:
            checkpointer.save(2, state, {})
            checkpointer.wait()
        except UserError as error:
            print(error)
        print(checkpointer.latest(), "is the latest")
        restored, _ = checkpointer.restore(None, state)
        assert np.array_equal(restored["a"], state["a"])
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        checkpointer.save(2, state, {})
        print(checkpointer.latest(), "is the latest")
        checkpointer.close()
    """
    output, errors = _run(program, tmp_path).communicate(timeout=60)
    first, *rest = output.splitlines()
    assert first.startswith(f"Cannot write checkpoints to {tmp_path}: ") and "too large" in first
    assert rest == ["1 is the latest", "2 is the latest"]
    assert errors == ""


def _damage(file: Path, how: str) -> None:
    content = file.read_bytes()
    middle = len(content) // 2
    if how == "delete":
        file.unlink()
    elif how == "truncate":
        file.write_bytes(content[:middle])
    else:
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :])


@pytest.mark.parametrize("how", ["delete", "truncate", "flip a byte"])
def test_damage_is_found_and_the_way_out_named(tmp_path, how):
    # More than a megabyte of noise, so that the largest file holds the array and nothing else.
    state = {"a": np.random.default_rng(0).normal(size=200_000), "b": np.ones(3)}
    whole, damaged = tmp_path / "whole", tmp_path / "damaged"
    with opened(whole) as checkpointer:
        checkpointer.save(1, state, {"round": 1})
        checkpointer.save(2, state, {"round": 2})
    files = sorted(p.relative_to(whole) for p in (whole / "2").rglob("*") if p.is_file())
    largest = max(files, key=lambda file: (whole / file).stat().st_size)
    found = set()
    for file in files:
        if (whole / file).stat().st_size == 0:
            continue
        shutil.copytree(whole, damaged)
        _damage(damaged / file, how)
        with opened(damaged) as checkpointer:
            try:
                restored, metadata = checkpointer.restore(None, state)
                assert_same(restored, state)
                assert metadata == {"round": 2}
            except UserError as error:
                assert f"The checkpoint {damaged / '2'} is damaged" in str(error)
                assert "Delete that folder to go on from round 1." in str(error)
                found.add(file)
        shutil.rmtree(damaged / "2")
        with opened(damaged) as checkpointer:
            assert checkpointer.restore(None, state)[1] == {"round": 1}
        shutil.rmtree(damaged)
    assert {largest, Path("2/about/metadata")} <= found


def test_the_only_checkpoint_damaged(tmp_path):
    with opened(tmp_path) as checkpointer:
        checkpointer.save(1, {"a": 1}, {})
    (tmp_path / "1" / "about" / "metadata").unlink()
    with opened(tmp_path) as checkpointer, pytest.raises(UserError, match="to start over"):
        checkpointer.restore(None, {"a": 1})


@pytest.mark.parametrize("damaged", ["added.json", "about/metadata"])
def test_damaged_metrics_are_found_when_opening(tmp_path, damaged):
    with opened(tmp_path, best_metric="accuracy") as checkpointer:
        checkpointer.save(1, {"a": 1}, {}, {"accuracy": 0.5})
        checkpointer.add(1, {"late": True})
    (tmp_path / "1" / damaged).write_text("{")
    with pytest.raises(UserError, match=f"{tmp_path}/1 is damaged"):
        Checkpointer(tmp_path, best_metric="accuracy")


def test_what_is_found_out_after_saving_is_added(tmp_path):
    options = {"keep": 1, "best_metric": "accuracy"}
    with opened(tmp_path, **options) as checkpointer:
        checkpointer.save(1, {"a": 1}, {"history": [], "kept": 7})
        checkpointer.add(1, {"history": [0.5]}, {"accuracy": 0.5})
        checkpointer.save(2, {"a": 2}, {}, {"accuracy": 0.4})
    with opened(tmp_path, **options) as checkpointer:
        assert checkpointer.best() == 1
        assert checkpointer.restore(1, {"a": 0}) == ({"a": 1}, {"history": [0.5], "kept": 7})
        checkpointer.save(3, {"a": 3}, {})
        checkpointer.add(3, {}, {"accuracy": 0.9})
        checkpointer.save(4, {"a": 4}, {})
    with opened(tmp_path, **options) as checkpointer:
        assert checkpointer.best() == 3
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["3", "4"]


_SAVE_FOREVER = """
    import sys
    import numpy as np
    from fedexp.checkpointing import Checkpointer

    checkpointer = Checkpointer(sys.argv[1], keep=2)
    round = checkpointer.latest() or 0
    while True:
        round += 1
        state = {f"a{i}": np.random.default_rng((round, i)).normal(size=20_000) for i in range(20)}
        checkpointer.save(round, state, {"round": round})
        print(round, flush=True)
"""


@pytest.mark.parametrize("kills", [1, pytest.param(6, marks=pytest.mark.slow)])
def test_killed_while_saving(tmp_path, kills):
    delays = random.Random(kills)
    latest = 0
    for _ in range(kills):
        process = _run(_SAVE_FOREVER, tmp_path)
        try:
            started = [int(process.stdout.readline()) for _ in range(2)]
            time.sleep(delays.uniform(0, 0.2))
        finally:
            process.send_signal(signal.SIGKILL)
            output, _ = process.communicate(timeout=30)
        started += map(int, output.split())
        with opened(tmp_path) as checkpointer:
            # A save starts when the one before is complete; the last may not have been announced.
            assert started[0] == latest + 1
            latest = checkpointer.latest()
            assert started[-1] - 1 <= latest <= started[-1] + 1
            expected = {
                f"a{i}": np.random.default_rng((latest, i)).normal(size=20_000) for i in range(20)
            }
            restored, metadata = checkpointer.restore(None, zeros_like(expected))
            assert_same(restored, expected)
            assert metadata == {"round": latest}
            checkpointer.save(latest + 1, expected, {})
        assert not [folder for folder in tmp_path.iterdir() if "tmp" in folder.name]
        shutil.rmtree(tmp_path / str(latest + 1))


def test_log_stays_quiet_and_import_stays_cheap(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    logging.getLogger("absl").setLevel(logging.DEBUG)
    with opened(tmp_path, best_metric="accuracy") as checkpointer:
        checkpointer.save(1, {"a": 1}, {})
        checkpointer.restore(1, {"a": 1})
    assert not [record for record in caplog.records if "orbax" in record.pathname]
    program = """
        import sys
        from fedexp.checkpointing import Checkpointer
        print("orbax.checkpoint" in sys.modules)
        Checkpointer(sys.argv[1])
        print("tensorflow" in sys.modules)
    """
    assert _run(program, tmp_path).communicate(timeout=60)[0] == "False\nFalse\n"
