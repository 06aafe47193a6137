"""Measuring an accelerator: what is refused, what fits into the time, and what the file has."""

from __future__ import annotations

import json
import time

import pytest

from benchmarks import fedjax_announcement as announcement
from benchmarks import gpu
from fedexp.errors import UserError

ONE_GPU = {"platform": "gpu", "kind": "a GPU", "count": 1, "bytes_limit": 1 << 30, "runtime": "?"}
CPU = ONE_GPU | {"platform": "cpu", "kind": "cpu"}


@pytest.fixture
def found(monkeypatch):
    """Says what JAX finds."""
    monkeypatch.setattr(gpu, "nvidia_smi", lambda: ["a GPU, 580.1, 80 GiB, 700 W"])
    return lambda devices: monkeypatch.setattr(gpu, "look_for_devices", lambda: devices)


def test_a_cpu_is_refused_in_one_line(found, tmp_path, capsys):
    found(CPU)
    assert gpu.main([f"--output={tmp_path / 'figures.json'}"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: JAX finds no accelerator here, only CPUs; install its plugin (docs/gpu.md), or measure them "
        "with --allow_cpu"
    ]
    assert not list(tmp_path.iterdir())


def test_all_devices_are_measured_where_there_are_several():
    one, several = gpu.parts_for(1), gpu.parts_for(8)
    assert [(part.name, part.strategy) for part in one] == [
        ("emnist", "jit"),
        ("stackoverflow", "jit"),
        ("emnist_bfloat16", "jit"),
        ("stackoverflow_bfloat16", "jit"),
    ]
    more = [part for part in several if part not in one]
    assert [(part.name, part.strategy) for part in more] == [
        ("emnist", "mesh"),
        ("stackoverflow", "mesh"),
    ]
    assert {part.strategy for part in one} == {"jit"}


def test_a_part_has_its_share_of_the_time_and_none_begins_without(found, tmp_path, monkeypatch):
    found(ONE_GPU | {"count": 2})
    now, calls = [1000.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def measured(strategy, options, timeout):
        share = float(options[-1].removeprefix("--seconds="))
        calls.append((strategy, share, timeout))
        now[0] += 40 if len(calls) == 1 else 170  # Less than its share, and more.
        if len(calls) == 2:
            raise UserError("no memory")
        return {"data": {}, "curve": {}}

    monkeypatch.setattr(announcement, "in_a_process", measured)
    output = tmp_path / "figures.json"
    arguments = gpu.parse([f"--output={output}", "--budget_s=600"])
    report = gpu.measure(arguments, end=1600.0)

    assert calls == [
        ("jit", 100.0, 600.0),  # Six parts.
        ("jit", 112.0, 560.0),
        ("mesh", 97.5, 390.0),
        ("mesh", 220 / 3, 220.0),
        ("jit", 25.0, 50.0),
    ]
    assert report["left_out"] == {
        "stackoverflow, jit": "no memory",
        "stackoverflow_bfloat16, jit": "0 s were left for it",
    }
    assert list(report["experiments"]["emnist"]["strategies"]) == ["jit", "mesh"]
    assert json.loads(output.read_text()) == report | {"seconds": 720.0}


@pytest.mark.parametrize(
    ("budget", "whole"), [(0.5, False), pytest.param(600, True, marks=pytest.mark.slow)]
)
def test_tiny_experiments_are_measured(found, tmp_path, monkeypatch, capsys, budget, whole):
    found(CPU)
    monkeypatch.setenv("FEDEXP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        announcement,
        "in_a_process",
        lambda strategy, options, timeout: announcement.measure(
            strategy, announcement.parse(options)
        ),
    )
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 0.0)
    output = tmp_path / "figures.json"
    options = ["--allow_cpu", "--smoke", "--only=emnist", f"--output={output}"]
    assert gpu.main([*options, f"--budget_s={budget}"]) == 0

    report = json.loads(output.read_text())
    assert report["accelerator"]["nvidia_smi"] == ["a GPU, 580.1, 80 GiB, 700 W"]
    assert "jax" in report["machine"]["versions"] and report["left_out"] == {}
    row = report["experiments"]["emnist"]["strategies"]["jit"]
    assert row["whole"]["rounds"] == 8
    assert row["whole"]["extrapolated_from"] == (None if whole else 5)
    assert row["curve"].keys() == {"2", "10", "20", "50", "100", "200", "500", "1000"}
    assert row["curve"]["2"]["seconds"]["min"] > 0
    assert row["curve"]["10"] == {"left_out": "the data have 5 clients"}
    assert ("8 rounds, measured" in capsys.readouterr().out) == whole
