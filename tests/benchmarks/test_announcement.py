from __future__ import annotations

import argparse
import dataclasses
import json

import numpy as np
import pytest

from benchmarks import fedjax_announcement as announcement
from benchmarks import machine, page, scale_curves
from fedexp.data import FederatedDataset
from fedexp.summaries import Writer
from tests.support.tensorboard import tensors

MACHINE = {
    "cpu": "A processor",
    "cores": 2,
    "memory_gib": 23.5,
    "system": "Linux",
    "versions": {"python": "3.11", "jax": "0.10"},
    "environment": {},
    "load_before": 0.1,
}


def point(*seconds, first=3.0):
    return {"seconds": machine.spread(seconds), "first_seconds": first, "examples": 100.0}


def report(**whole):
    rounds = point(0.4, 0.2, 0.3)
    evaluation = point(8.0, 10.0) | {"measured_examples": 1000, "examples": 4000}
    row = {
        "devices": "1 x cpu",
        "cohort_size": 10,
        "curve": {10: rounds, 100: {"left_out": "a round would take about 90 s"}},
        "evaluation": evaluation,
        "whole": announcement.extrapolated(rounds, evaluation, 1500) | whole,
    }
    part = {"clients": 20, "examples": 4000}
    return {
        "date": "2026-01-01",
        "machine": MACHINE,
        "workload": "emnist",
        "seed": 0,
        "settings": {"rounds": 5, "real": False},
        "data": {"train": part, "test": part},
        "strategies": {"jit": row, "mesh": row | {"curve": {10: point(0.6, 0.6)}}},
    }


def test_spread_has_mean_and_extremes():
    found = machine.spread([1.0, 2.0, 6.0])
    assert found == {"mean": 3.0, "median": 2.0, "min": 1.0, "max": 6.0, "all": [1.0, 2.0, 6.0]}


def test_this_machine_is_described():
    found = machine.machine()
    assert found["cpu"] and found["cores"] >= 1 and found["memory_gib"] > 0
    assert {"python", "jax", "numpy"} <= found["versions"].keys()
    assert json.loads(json.dumps(found)) == found
    assert "BUSY" in machine.sentence(found | {"load_before": 2.0 * found["cores"]})
    assert "BUSY" not in machine.sentence(found | {"load_before": 0.0})
    assert "a CPU with AVX2, " in machine.sentence(found | {"cpu": "a CPU", "vectors": "AVX2"})
    assert "a CPU, " in machine.sentence(found | {"cpu": "a CPU", "vectors": None})


@pytest.mark.parametrize(
    ("cpuinfo", "cpu", "vectors"),
    [
        ("model name\t: Fast: 9\nflags\t\t: sse2 avx2 avx512f\n", "Fast: 9", "AVX-512"),
        ("model name\t: Old\nflags\t\t: sse2 avx2\n\nprocessor\t: 1\n", "Old", "AVX2"),
        ("Features\t: fp asimd\n", "by platform", "NEON"),
    ],
)
def test_processors(monkeypatch, cpuinfo, cpu, vectors):
    monkeypatch.setattr(machine.Path, "read_text", lambda path: cpuinfo)
    monkeypatch.setattr(machine.platform, "processor", lambda: "by platform")
    monkeypatch.setattr(machine, "versions", lambda packages: {})
    found = machine.machine()
    assert (found["cpu"], found["vectors"]) == (cpu, vectors)


def test_the_whole_is_the_first_round_the_others_and_one_evaluation():
    whole = report()["strategies"]["jit"]["whole"]
    assert whole["seconds"]["mean"] == pytest.approx(3.0 + 1499 * 0.3 + 9.0)
    assert whole["seconds"]["min"] == pytest.approx(3.0 + 1499 * 0.2 + 8.0)
    assert whole["extrapolated_from"] == 3


def test_cohorts_that_are_too_large_or_take_too_long_are_left_out():
    arguments = argparse.Namespace(rounds=5, seconds_a_point=60)
    assert announcement.left_out(100, 3400, None, arguments) is None
    assert announcement.left_out(500, 3400, (50, 1.0), arguments) is None  # 6 rounds of 10 s.
    slow = announcement.left_out(1000, 3400, (50, 1.0), arguments)
    assert slow == {"left_out": "a round would take about 20 s"}
    late = announcement.left_out(100, 3400, (50, 1.0), arguments, left=11.0)  # It needs 12.
    assert late == {"left_out": "no time was left for it"}
    assert "20 clients" in announcement.left_out(50, 20, None, arguments)["left_out"]


def test_evaluation_takes_whole_clients():
    offsets = np.array([0, 3, 5, 9])
    dataset = FederatedDataset({"x": np.arange(9)}, offsets, np.array(["a", "b", "c"]))
    sizes = {n: announcement.first_clients(dataset, n).num_examples for n in (0, 1, 3, 4, 6, 9, 50)}
    assert sizes == {0: 9, 1: 3, 3: 3, 4: 5, 6: 9, 9: 9, 50: 9}


def test_a_run_s_timings_are_read(tmp_path):
    with Writer(tmp_path) as writer:
        for step in range(1, 30):
            writer.scalars(step, {"training/perf/round_seconds": step / 2, "training/lr": 1.0})
    found = announcement.scalars(str(tmp_path))
    assert found.keys() == {"perf/round_seconds"}
    np.testing.assert_array_equal(found["perf/round_seconds"], np.arange(1, 30) / 2)


def test_tables_mark_what_is_extrapolated():
    bars, curve = announcement.tables(json.loads(json.dumps(report())))  # As after a file.
    jit = bars.rows[0]
    assert jit[:4] == ["jit", "1 x cpu", "3.0", "0.3 (0.2 to 0.4)"]
    assert jit[4].endswith("extrapolated from 1,000 examples")
    assert jit[5] == "7.7 min (1500 rounds, extrapolated from 3 rounds)"
    assert curve.header == ["clients", "jit", "mesh"]
    assert curve.rows == [
        ["10", "0.3 (0.2 to 0.4)", "0.6 (0.6 to 0.6)"],
        ["100", "a round would take about 90 s", ""],
    ]
    measured = report(extrapolated_from=None)
    assert announcement.tables(measured)[0].rows[0][5] == "7.7 min (1500 rounds, measured)"


def test_figures_are_drawn_and_go_to_tensorboard(tmp_path):
    figure = announcement.draw(report())
    announcement.write_summaries(report(), figure, tmp_path)
    jit = tensors(tmp_path / "jit")
    assert {step: float(value) for step, value in jit["round_seconds_by_clients"].items()} == {
        10: pytest.approx(0.3)
    }
    assert jit["whole_experiment_seconds"][0] == pytest.approx(3.0 + 1499 * 0.3 + 9.0)
    both = tensors(tmp_path)
    assert both["announcement/bars_and_curve"][0][2].startswith(b"\x89PNG")
    assert b"| jit | 1 x cpu | 3.0 |" in both["announcement/tables"][0].item()


def test_a_strategy_is_added_to_others_that_were_measured_alike(tmp_path, monkeypatch, capsys):
    path = tmp_path / "figures.json"
    before = json.loads(json.dumps(report()))
    options = ["--add", "--strategies=mesh", f"--output={path}", f"--plot={tmp_path / 'plot.png'}"]
    before["settings"] = announcement.settings(announcement.parse(["--clients_per_round=10"]))
    path.write_text(json.dumps(before))
    figures = before["strategies"]["mesh"] | {"devices": "2 x cpu", "data": before["data"]}
    monkeypatch.setattr(announcement, "in_a_process", lambda *_: dict(figures))
    monkeypatch.setattr(machine, "machine", lambda: MACHINE | {"load_before": 0.9})
    assert announcement.main(options) == 0
    after = json.loads(path.read_text())
    assert after["strategies"]["jit"] == before["strategies"]["jit"]
    assert after["strategies"]["mesh"]["devices"] == "2 x cpu"
    assert after["date"].startswith("2026-01-01, ") and after["machine"]["load_before"] == 0.9

    assert announcement.main([*options, "--seed=1"]) == 2
    assert "has another seed; leave out --add" in capsys.readouterr().err
    assert json.loads(path.read_text()) == after


def test_bad_options_are_refused(capsys):
    for options, message in (
        (["--strategies=jit,tpu"], "tpu"),
        (["--rounds=3"], "at least 5"),
        (["--clients_per_round=ten"], "'ten'"),
    ):
        with pytest.raises(SystemExit):
            announcement.parse(options)
        assert message in capsys.readouterr().err


def scale_report(name):
    curve = scale_curves.CURVES[name]
    lines = {
        line: [
            {
                "x": x,
                "setting": dataclasses.asdict(setting),
                "seconds": machine.spread([0.1 * k, 0.2 * k]),
                "peak_mib": 300.0 + k,
                "model_mib": 4.0 * k,
                "parameters": 1_000_000 * k,
            }
            for k, (x, setting) in enumerate(points, 1)
        ]
        for line, points in curve.lines.items()
    }
    return {"date": "2026-01-01", "machine": MACHINE, "seed": 0, "lines": lines}


@pytest.mark.parametrize("name", scale_curves.CURVES)
def test_scale_curves_are_drawn_and_explained(name, tmp_path):
    scale_curves.draw(name, scale_report(name)).savefig(tmp_path / "curve.png")
    sentence = scale_curves.CURVES[name].sentence(scale_report(name))
    assert sentence.endswith(".") and "bound" in sentence
    assert "nan" not in sentence


def test_the_cohort_s_sentence_has_the_measured_numbers():
    sentence = scale_curves.CURVES["cohort"].sentence(scale_report("cohort"))
    assert "15.0 ms in a cohort of 10 and 0.8 ms in one of 1000" in sentence
    assert "301 MiB and 305 MiB; 1000 updates side by side would take 20,000 MiB" in sentence


def test_a_sparse_population_reads_as_zeros(tmp_path):
    scale_curves.write_sparse(tmp_path / "packed", 30, 20)
    dataset = scale_curves.opened(str(tmp_path / "packed"))
    assert (dataset.num_clients, dataset.num_examples) == (30, 600)
    client = dataset.client(29)
    assert client["x"].shape == (20, 28, 28) and client["x"].dtype == np.uint8
    assert not client["x"].any() and not client["y"].any()


def test_the_page_has_what_was_measured(tmp_path):
    (tmp_path / "announcement_emnist.json").write_text(json.dumps(report()))
    (tmp_path / "scale_cohort.json").write_text(json.dumps(scale_report("cohort")))
    text = page.page(tmp_path)
    assert "| jit | 1 x cpu | 3.0 | 0.3 (0.2 to 0.4) |" in text
    assert "![EMNIST: bars and curve](images/announcement_emnist.png)" in text
    assert "images/scale_cohort.png" in text and "scale_model" not in text
    assert "a few minutes" in text and "Stack Overflow" not in text


def test_the_page_in_docs_is_the_one_of_the_results():
    if not page.PAGE.exists():
        pytest.skip("no page has been written yet")
    assert page.PAGE.read_text() == page.page(page.RESULTS), "run python -m benchmarks.page"
