"""What a run may go on with in its workdir."""

from __future__ import annotations

import json
from pathlib import Path

import gin
import jax
import numpy as np
import pytest

from fedexp import config, load_params
from fedexp.errors import UserError
from fedexp.harmless import Effect, effect
from fedexp.trainer import Experiment

LINEAR = "tests/support/linear.gin"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("train.num_rounds", Effect.NONE),
        ("some/CheckpointPlan.every", Effect.NONE),
        ("CheckpointPlan.best_metric", Effect.NUMBERS),
        ("runtime.keep_compiled", Effect.NONE),
        ("runtime.num_cpu_devices", Effect.LAST_BITS),
        ("mesh.num_devices", Effect.LAST_BITS),
        ("train.seed", Effect.NUMBERS),
        ("train.evaluations", Effect.NUMBERS),
        ("my_jit.lanes", Effect.NUMBERS),
        ("rounds", Effect.NONE),
        ("lanes", Effect.LAST_BITS),
        ("more_rounds", Effect.NUMBERS),
    ],
)
def test_of_a_binding(name, expected):
    bound = {
        "train.num_rounds": "%rounds %rounds",
        "rounds": "10 %twice",
        "Packing.lanes": "%lanes 4",
        # A macro of such a name, which is not the one above.
        "tree_noise.num_rounds": "%more_rounds %more_rounds",
        "train.observers": "[@tensorboard(), %rounds_told] []",
    }
    assert effect(name, bound) is expected


def test_rounds_count_where_the_noise_depends_on_their_number():
    for target, expected in (("None None", Effect.NONE), ("None 3.0", Effect.NUMBERS)):
        assert effect("train.num_rounds", {"dp/privacy.epsilon": target}) is expected
    used = {"train.num_rounds": "%n %n", "tree_noise.num_rounds": "%n %n"}
    assert effect("n", used) is Effect.NUMBERS


def go(workdir: Path, *params: str):
    """What `fedexp.main` does."""
    gin.clear_config()
    config.load([LINEAR], [*params, "json_lines.name = 'lines'"])
    config.prepare_workdir(workdir)
    return Experiment().run(workdir)


def test_a_run_of_more_rounds_is_one_from_the_start(tmp_path, caplog):
    caplog.set_level("INFO", "absl")
    plain = ["train.observers = [@json_lines()]", "evaluate.every = 2"]
    whole = go(tmp_path / "whole", *plain, "train.num_rounds = 8", "CheckpointPlan.every = 1")
    go(tmp_path / "parts", *plain, "train.num_rounds = 4")
    operative = (tmp_path / "parts" / config.OPERATIVE).read_text()
    with pytest.raises(UserError, match=r"num_rounds is 3, but the run in .*parts has done 4"):
        go(tmp_path / "parts", *plain, "train.num_rounds = 3")
    assert "num_rounds = 4" in (tmp_path / "parts" / "config.gin").read_text()
    more = ["rounds = 8", "train.num_rounds = %rounds", "CheckpointPlan.every = 1"]
    parts = go(tmp_path / "parts", *plain, *more)
    assert parts.history == whole.history
    jax.tree.map(np.testing.assert_array_equal, parts.params, whole.params)
    finals, lines = [], []
    for name in ("whole", "parts"):
        final = json.loads((tmp_path / name / "final.json").read_text())
        finals.append({key: value for key, value in final.items() if key != "perf"})
        found = [json.loads(line) for line in (tmp_path / name / "lines").open()]
        lines.append([{k: v for k, v in one.items() if "perf" not in k} for one in found])
    assert finals[0] == finals[1] and finals[0]["rounds"] == 8
    assert lines[0] == lines[1]
    jax.tree.map(
        np.testing.assert_array_equal, load_params(tmp_path / "parts", best=False), whole.params
    )
    told = [line for line in caplog.messages if "goes on with" in line]
    assert len(told) == 1 and "train.num_rounds: 4 -> %rounds" in told[0] and "bits" not in told[0]
    record = (tmp_path / "parts" / "config.gin").read_text()
    assert "\nrounds = 8\n" in record and "UTC: train.num_rounds: 4 -> %rounds\n" in record
    assert operative != (tmp_path / "parts" / config.OPERATIVE).read_text()
    # The change stays known.
    config.prepare_workdir(tmp_path / "parts")
    assert (tmp_path / "parts" / "config.gin").read_text() == record


def begun(workdir: Path, *params: str) -> None:
    gin.clear_config()
    config.load([LINEAR], params)
    config.prepare_workdir(workdir)
    (workdir / config.OPERATIVE).touch()


@pytest.mark.parametrize(
    ("params", "words"),
    [
        (["Packing.lanes = 2"], "Packing.lanes: (unset) -> 2; rounds from here on may have other"),
        (["train.strategy = @jit()"], "may have other last bits"),
        (["train.observers = []", "CheckpointPlan.every = 7"], "-> 7, train.observers: (unset)"),
    ],
)
def test_it_is_said_what_a_run_goes_on_with(tmp_path, caplog, params, words):
    caplog.set_level("INFO", "absl")
    begun(tmp_path)
    begun(tmp_path, *params)
    assert len(caplog.messages) == 1 and words in caplog.messages[0]


@pytest.mark.parametrize(
    "params",
    [
        ["train.seed = 2", "train.num_rounds = 99"],
        ["CheckpointPlan.best_mode = 'max'"],
        ["train.num_rounds = 99", "privacy.epsilon = 3.0"],
        ["train.num_rounds = %n", "n = 99", "uniform.cohort_size = %n"],
    ],
)
def test_what_changes_numbers_is_refused(tmp_path, params):
    begun(tmp_path)
    before = (tmp_path / "config.gin").read_text()
    with pytest.raises(UserError, match="holds a run of another config"):
        begun(tmp_path, *params)
    assert (tmp_path / "config.gin").read_text() == before
