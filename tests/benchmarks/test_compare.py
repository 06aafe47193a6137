from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from benchmarks import compare
from benchmarks.peers import process, workloads
from benchmarks.peers.process import Library, Peer, PeerError
from benchmarks.peers.protocol import Job

ECHO = """
import sys
sys.path.insert(0, {folder!r})
from protocol import Trainee, serve

def set_up(job):
    print("a library talks")
    def train(rounds):
        print("and talks")
        return sum(len(job.client(c)["y"]) for r in rounds for c in job.cohorts[r])
    return Trainee(int(job.features["y"].sum()), "nowhere", train, lambda: 2.5, ("a note",))

serve(set_up, ("numpy", "no-such-package"))
"""


def small_job(**changes) -> Job:
    job = {
        "workload": "emnist_logistic",
        "num_classes": 10,
        "batch_size": 4,
        "learning_rate": 0.1,
        "seed": 0,
        "cohorts": [[0, 2], [1, 2], [0, 1]],
        "features": {"y": np.arange(11, dtype=np.int32)},
        "offsets": np.array([0, 3, 7, 11]),
    }
    return Job(**job | changes)


def script(tmp_path, text: str) -> Library:
    path = tmp_path / "peer.py"
    path.write_text(text)
    return Library("Other", str(path), sys.executable, None, "other")


def test_ratios():
    # Taken turn by turn: the ratio of the medians would be 1.
    assert compare.ratios([2.0, 4.0, 12.0], [4.0, 2.0, 4.0]) == [0.5, 2.0, 3.0]
    with pytest.raises(ValueError):
        compare.ratios([1.0, 2.0], [1.0])


def test_everyone_begins_equally_often():
    orders = [compare.rotated(["a", "b", "c"], turn) for turn in range(6)]
    assert [order[0] for order in orders] == list("abcabc")
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert compare.rotated([], 2) == []


@pytest.mark.parametrize(
    ("fastest", "rounds"), [(10.0, 1), (0.5, 1), (0.2, 3), (1e-6, compare.MAX_ROUNDS_A_TURN)]
)
def test_rounds_a_turn(fastest, rounds):
    assert compare.rounds_a_turn(0.5, fastest) == rounds


def test_work_is_counted():
    job, both = small_job(), range(0, 2)
    assert compare.real_examples(job, both) == 3 + 4 + 4 + 4
    assert compare.real_examples(job, both, multiple=4) == 16
    compare.check_work(15, job, both)
    compare.check_work(16, job, both)
    with pytest.raises(PeerError, match="trained on 14 examples in rounds 0 to 1; these hold 15"):
        compare.check_work(14, job, both)
    with pytest.raises(PeerError, match="7,851 parameters instead of 7,850"):
        compare.check_parameters(7851, 7850)


def test_a_job_survives_its_folder(tmp_path):
    job = small_job()
    job.write(tmp_path)
    read = Job.read(tmp_path)
    assert read.cohorts == job.cohorts and read.learning_rate == job.learning_rate
    np.testing.assert_array_equal(read.client(1)["y"], [3, 4, 5, 6])


def test_a_peer_answers_though_its_library_prints(tmp_path):
    library = script(tmp_path, ECHO.format(folder=str(process.FOLDER)))
    small_job().write(tmp_path)
    with Peer(library) as peer:
        reply = peer.ask(do="set_up", folder=str(tmp_path))
        assert reply["parameters"] == 55 and reply["notes"] == ["a note"]
        assert reply["versions"]["numpy"] == np.__version__
        assert reply["versions"]["no-such-package"] == "checkout"
        reply = peer.ask(do="train", rounds=[1, 3])
        assert reply["examples"] == 8 + 7 and reply["norm"] == 2.5
        assert reply["seconds"] > 0 and reply["cpu_seconds"] >= 0
        assert 1 << 20 < reply["peak_bytes"] < 1 << 30


def test_a_peer_that_fails_says_why(tmp_path):
    library = script(tmp_path, "import no_such_library")
    with (
        Peer(library) as peer,
        pytest.raises(PeerError, match="code 1.*No module.*no_such_library"),
    ):
        peer.ask(do="set_up", folder=str(tmp_path))


def test_a_second_launch_finds_what_the_first_one_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")
    log = tmp_path / "log"
    keeping = f"""
import os
from pathlib import Path
kept = Path(os.environ["FEDEXP_CACHE"])
assert "JAX_ENABLE_COMPILATION_CACHE" not in os.environ
with open({str(log)!r}, "a") as file:
    print(*(path.name for path in kept.iterdir()), file=file)
(kept / "program").touch()
"""
    library = script(tmp_path, keeping + ECHO.format(folder=str(process.FOLDER)))
    rows = {compare.OURS: {"missing": "not here"}, "Other": {}}
    small_job().write(tmp_path)
    compare.measure_starts("title", str(tmp_path), [library], 2, {"libraries": rows})
    assert log.read_text().split("\n") == ["", "program", "", "program", ""]
    row = rows["Other"]
    assert len(row["start_seconds"]["all"]) == len(row["restart_peak_mib"]["all"]) == 2
    assert not any("ratio" in name for name in row)


@pytest.mark.parametrize("name", ["stackoverflow_lstm", "shakespeare_lstm"])
def test_generated_text(name):
    options = {"num_clients": 30, "cohort_size": 5, "num_rounds": 4, "seed": 3, "data": "glyphs"}
    job = workloads.build(name, whole_batches=False, **options)
    workload, tokens = workloads.WORKLOADS[name], job.features["tokens"]
    assert tokens.shape == (job.offsets[-1], workload.length + 1) and tokens.dtype == np.uint16
    assert tokens.max() < job.num_classes and tokens[:, :2].min() > 0
    assert np.diff(job.offsets).max() <= workload.max_size and len(job.offsets) == 31
    assert all(len(set(cohort)) == 5 and max(cohort) < 30 for cohort in job.cohorts)
    assert job.num_classes in workload.parameters
    whole = workloads.build(name, whole_batches=True, **options)
    sizes = np.diff(whole.offsets)
    assert sizes.min() > 0 and not (sizes % workload.batch_size).any()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--turns=4", "--turns must be at least 5"),
        ("--workloads=emnist_cnn,mnist", "got mnist"),
        ("--pfl_python=/no/such/python", "--pfl_python: /no/such/python is not an interpreter"),
        ("--fedjax_source=/no/such/folder", "there is no folder /no/such/folder"),
        ("--algorithms=fedavg,feddyn", "got feddyn"),
        ("--algorithms=agnostic", "agnostic needs classes, and stackoverflow_lstm"),
        ("--before=/no/such/folder", "--before: there is no folder /no/such/folder"),
        ("--data=glyphs,letters", "got letters"),
    ],
)
def test_wrong_arguments(capsys, argument, message):
    with pytest.raises(SystemExit):
        compare.main([argument])
    assert message in capsys.readouterr().err


def test_fedavg_takes_part_beside_another_algorithm():
    ours = Library(compare.OURS, "fedexp_peer.py", sys.executable, None, "fedexp")
    libraries = [ours, *(ours._replace(name=name) for name in (compare.FEDJAX, compare.PFL))]
    assert compare.of_algorithm("fedavg", libraries) == libraries
    found = compare.of_algorithm("scaffold", libraries)
    assert [(library.name, library.algorithm, library.missing) for library in found] == [
        ("fedexp", "scaffold", None),
        ("fedexp, FedAvg", "fedavg", None),
        ("FedJAX", "scaffold", "has no scaffold"),
        ("pfl-research", "scaffold", None),
    ]


def test_a_peer_trains_with_the_algorithm_that_it_is_asked_for(tmp_path):
    library = script(tmp_path, ECHO.format(folder=str(process.FOLDER)))
    small_job().write(tmp_path)
    with Peer(library) as peer:
        reply = peer.ask(do="set_up", folder=str(tmp_path), algorithm="mime")
    assert reply["algorithm"] == "mime"
    with pytest.raises(PeerError, match="trains with fedavg instead of mime"):
        compare.check_algorithm("fedavg", "mime")


def test_algorithms_in_markdown():
    def row(value: float) -> dict:
        return {key: {"median": value} for key in ("ratio", "cpu_ratio")}

    ours = {"seconds_a_round": {"median": 0.01}, **row(1), "over_fedavg": {"median": 1.5}}
    rows = {"fedexp": ours, "FedJAX": {"missing": "has no scaffold"}, "pfl-research": row(3.25)}
    report = {"workloads": {"emnist_cnn, scaffold": {"algorithm": "scaffold", "libraries": rows}}}
    assert compare.markdown(report).splitlines()[2] == (
        "| emnist_cnn | scaffold | 10.0 | 1.50 |  |  |  | 3.25 | 3.25 |"
    )


def test_texts_are_measured_once():
    assert compare.jobs(["emnist_cnn", "shakespeare_lstm"], ["glyphs", "digits"]) == {
        "emnist_cnn": ("emnist_cnn", "glyphs"),
        "emnist_cnn, digits": ("emnist_cnn", "digits"),
        "shakespeare_lstm": ("shakespeare_lstm", "glyphs"),
    }


def test_digits_that_are_not_there(monkeypatch, capsys):
    monkeypatch.delenv("FEDEXP_TEST_DATA", raising=False)
    assert compare.main(["--data=digits", "--workloads=emnist_logistic"]) == 2
    assert "set FEDEXP_TEST_DATA" in capsys.readouterr().err


@pytest.mark.slow
def test_missing_and_failing_libraries_are_reported(tmp_path, monkeypatch, capsys):
    """fedexp alone, really measured, beside one library that is missing and one that fails."""
    monkeypatch.setenv("FEDEXP_CACHE", str(tmp_path / "cache"))
    output, drawing = tmp_path / "figures.json", tmp_path / "figures.png"
    arguments = "--workloads=emnist_logistic --clients=4 --cohort_size=2 --turns=5 --measure=rounds"
    arguments += f" --turn_seconds=1e-9 --output={output} --plot={drawing} --pfl_python=/bin/false"
    arguments += " --algorithms=fedavg,mime"
    assert compare.main(arguments.split()) == 1
    report = json.loads(output.read_text())
    assert list(report["workloads"]) == ["emnist_logistic", "emnist_logistic, mime"]
    of_mime = report["workloads"]["emnist_logistic, mime"]["libraries"]
    assert of_mime["fedexp"]["over_fedavg"]["median"] > 0 and "norm" in of_mime["fedexp, FedAvg"]
    assert of_mime["pfl-research"]["missing"] == "has no mime"
    figures = report["workloads"]["emnist_logistic"]
    ours, fedjax, pfl = figures["libraries"].values()

    assert "--fedjax_python is not given" in fedjax["missing"]
    assert "code 1" in pfl["failed"]
    seconds = ours["seconds_a_round"]
    assert len(seconds["all"]) == 5 and figures["rounds_a_turn"] == 1
    assert 0 < seconds["min"] <= seconds["median"] <= seconds["max"]
    assert ours["ratio"]["all"] == [1.0] * 5
    assert ours["cpu_seconds_a_round"]["min"] > 0
    assert ours["trained_examples_a_round"] == figures["examples_a_round"]
    assert figures["parameters"] == 48_670
    assert report["libraries"]["fedexp"]["versions"].keys() > {"python", "jax", "flax"}
    assert report["machine"].keys() >= {"cpu", "cores", "memory_gib", "load_before"}
    assert str(tmp_path) not in output.read_text()
    assert drawing.read_bytes().startswith(b"\x89PNG")
    printed = " ".join(capsys.readouterr().out.split())
    assert "FedJAX │ missing" in printed and "pfl-research │ failed" in printed
    assert "FedJAX missing: --fedjax_python is not given" in printed


@pytest.mark.slow
def test_an_earlier_checkout_is_run_with_its_own_peer_and_package(tmp_path, monkeypatch, capsys):
    """This fedexp, really measured, beside one whose peer wants a package that only its checkout has."""
    monkeypatch.setenv("FEDEXP_CACHE", str(tmp_path / "cache"))
    checkout, output = tmp_path / "checkout", tmp_path / "figures.json"
    peers = checkout / "benchmarks" / "peers"
    peers.mkdir(parents=True)
    (checkout / "fedexp").mkdir()
    (checkout / "fedexp" / "__init__.py").write_text("PARAMETERS = 48_670")
    text = ECHO.replace('int(job.features["y"].sum())', "fedexp.PARAMETERS")
    (peers / "fedexp_peer.py").write_text("import fedexp" + text.format(folder=str(process.FOLDER)))
    arguments = "--workloads=emnist_logistic --clients=4 --cohort_size=2 --turns=5 --starts=1"
    arguments += f" --turn_seconds=1e-9 --output={output} --before={checkout}"
    assert compare.main(arguments.split()) == 0
    report = json.loads(output.read_text())
    assert list(report["libraries"]) == [compare.OURS, compare.BEFORE]
    assert len(report["libraries"][compare.OURS]["commit"]) == 40
    ours, before = report["workloads"]["emnist_logistic"]["libraries"].values()
    for over, seconds in (
        ("over_before", "seconds_a_round"),
        ("cpu_over_before", "cpu_seconds_a_round"),
        ("restart_over_before", "restart_seconds"),
    ):
        found = [a / b for a, b in zip(ours[seconds]["all"], before[seconds]["all"], strict=True)]
        assert ours[over]["all"] == found
    assert str(tmp_path) not in output.read_text()
    assert "fedexp, times fedexp before" in capsys.readouterr().out
