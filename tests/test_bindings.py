"""Bindings that do not fit, that nobody reads, or that are missing: told before anything is built."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import gin
import jax
import numpy as np
import pytest
from flax import linen as nn

import fedexp.trainer  # noqa: F401  Registers what the files name.
from fedexp import bindings, config
from fedexp.bindings.signatures import annotations_of
from fedexp.data import FederatedDataset, FederatedSplits
from fedexp.errors import UserError
from fedexp.main import experiment
from fedexp.tasks import classification

LINEAR = "tests/support/linear.gin"


@gin.configurable(module="tests")
def without_annotation(what: str = "splits"):
    """A data set as a user may write it, perhaps with a mistake."""
    data = FederatedDataset.from_clients({"a": {"x": np.zeros((2, 3)), "y": np.zeros(2)}})
    return {"splits": FederatedSplits(data, data), "data": data, "nothing": None}[what]


@gin.configurable(module="tests")
def own_algorithm(task, rate: float = 0.1, names: tuple[str, ...] = (), limit: float = None):  # type: ignore  # noqa: RUF013
    """Annotated in part, and as sloppily as users do it."""


def refusal(*params: str, files: tuple[str, ...] = (LINEAR,)) -> str:
    """What a config is refused with; nothing of the data has been built."""
    with pytest.raises(UserError) as caught:
        config.load(files, params)
        experiment()
    line = str(caught.value).splitlines()[0]
    assert "In call to" not in line
    return line


@pytest.mark.parametrize(
    ("param", "message"),
    [
        ("train.num_rounds = 1e1", "num_rounds = 10.0 must be int; write 10"),
        ("train.num_rounds = '10'", "must be int; write 10"),
        ("train.num_rounds = True", "must be int"),
        ("train.num_rounds = 10000000000000000000", "does not fit into 64 bits"),
        ("train.seed = -1", "must not be negative"),
        ("ClientBatching.batch_size = 20.0", "must be int; write 20"),
        ("evaluate.every = 2.5", "must be int"),
        ("evaluate.clients = 'cohorts'", "'cohort' or 'held_out'"),
        ("train.strategy = 'jit'", "must be Strategy or None; write @jit()"),
        ("train.sampler = @uniform", "must be Sampler; write @uniform()"),
        ("train.algorithm = 'fedavg'", "write @fedavg"),
        ("train.algorithm = @fedavg()", "needs task; write @fedavg"),
        ("train.algorithm = @nadam", "must be Algorithm or a function, such as @agnostic"),
        ("train.algorithm = @sgd", "must be Algorithm or a function, such as @agnostic"),
        ("train.evaluations = '[@evaluate()]'", "must be a list of Evaluate"),
        ("train.evaluations = @evaluate()", r"must be a list of Evaluate; write [@evaluate()]"),
        ("fedavg.aggregator = [@top_k(), @mean]", "write [@top_k(), @mean()]"),
        ("fedavg.server_optimizer = 0.1", "must be GradientTransformation, such as @sgd()"),
        ("fedavg.server_optimizer = @server/adam", "write @server/adam()"),
        ("fedavg.weigh_by = 'token'", "'examples' or 'tokens' or 'uniform'"),
        ("client/sgd.learning_rate = '0.1'", "must be float or a function; write 0.1"),
        ("classification.preprocess = @EmnistLogistic()", "must be a function or None"),
        ("classification.preprocess = @crop_and_flip()", "must be a function or None"),
        ("client/sgd.nesterov = 'False'", "must be True or False; write False"),
        ("train.task = @linear_splits()", "must be Task, such as"),
        ("train.dataset = None", "must be FederatedSplits"),
        ("train.dataset = @uniform()", "must be FederatedSplits"),
        ("train.algorithm = @fedprox", "fedprox.mu is not bound; it must be float"),
        ("fedavg.server_optimizer = @other/sgd()", "other/sgd.learning_rate is not bound"),
        ("train.task = @classification()", "classification.model is not bound; it must be Module"),
        ("server/adam.eps = -1.0", "eps must not be negative, got -1.0"),
        ("server/adam.b2 = 2.0", "b2 must be below 1, got 2.0"),
        ("client/sgd.learning_rate = 1e999", "must be finite, got inf"),
        ("sgd.learning_rate = 99", "no effect: client/sgd.learning_rate wins by a narrower scope"),
        ("nun_rounds = 500", "nothing reads %nun_rounds. Did you mean 'train.num_rounds'?"),
        ("yogi.b1 = 0.1", "this experiment never uses it"),
    ],
)
def test_a_mistake_is_one_line(param, message):
    assert message in refusal(param)


def test_int_for_float_and_user_code_without_annotations_pass():
    params = [
        "train.num_rounds = %rounds",
        "rounds = 3",
        "client/sgd.learning_rate = 1",
        "train.dataset = @without_annotation()",
        "own_algorithm.limit = None",
        "own_algorithm.names = ('a',)",
        "train.evaluations = []",
    ]
    config.load([LINEAR], params[:4] + params[6:])
    assert experiment().num_rounds == 3
    gin.clear_config()
    config.load([], params[4:6])


@pytest.mark.parametrize(("what", "got"), [("data", "FederatedDataset"), ("nothing", "None")])
def test_what_an_annotation_does_not_tell_is_looked_at_when_it_is_built(what, got):
    params = ("train.dataset = @without_annotation()", f"without_annotation.what = '{what}'")
    assert "must give FederatedSplits" in (line := refusal(*params))
    assert got in line and "train.dataset = @without_annotation()" in line


@pytest.mark.parametrize("value", ["'fast'", "@uniform", "[1.0]"])
def test_annotations_of_users_count(value):
    message = "own_algorithm.rate = .* must be float"
    with pytest.raises(UserError, match=message):
        config.load([], [f"own_algorithm.rate = {value}"])


def test_annotations_need_not_be_text(tmp_path, monkeypatch):
    """Nor are they without `from __future__ import annotations`; Python 3.14 looks them up late."""
    (tmp_path / "own_code.py").write_text(
        "import dataclasses\n"
        "@dataclasses.dataclass\nclass Plan:\n    size: int = 3\n"
        "@dataclasses.dataclass\nclass Longer(Plan):\n    rate: float = 0.5\n"
        "def made(plan: Plan, of: 'Gone' = None) -> Longer: ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    own = importlib.import_module("own_code")
    assert annotations_of(own.Longer) == {"size": int, "rate": float}
    assert annotations_of(own.made) == {"plan": own.Plan, "return": own.Longer}


def test_a_file_is_held_to_it_too_and_is_named_with_the_line(tmp_path):
    file = tmp_path / "mine.gin"
    file.write_text(f"include '{LINEAR}'\n\nnun_rounds = 500\n")
    assert "nun_rounds = 500 (mine.gin, line 3) has no effect" in refusal(files=(str(file),))
    gin.clear_config()
    file.write_text(f"include '{LINEAR}'\nsgd.momentum = 0.5\nclient/sgd.momentum = 0.9\n")
    assert "sgd.momentum = 0.5 (mine.gin, line 2) has no effect" in refusal(files=(str(file),))


def test_what_only_a_users_code_might_have_called_is_told_at_the_end(tmp_path):
    file = tmp_path / "mine.gin"
    file.write_text(f"include '{LINEAR}'\nown_algorithm.rate = 0.3\n")
    config.load([str(file)], ["train.num_rounds = 1", "train.observers = []"])
    experiment().run()
    (line,) = bindings.had_no_effect()
    assert "own_algorithm.rate = 0.3 (mine.gin, line 2) had no effect" in line


def test_what_an_including_file_replaces_is_no_mistake(tmp_path):
    file = tmp_path / "mine.gin"
    file.write_text(
        f"include '{LINEAR}'\ntrain.algorithm = @mime\nmime.optimizer = @base/sgd()\n"
        "base/sgd.learning_rate = 0.1\n"
    )
    config.load([str(file)], [])
    experiment()
    record = config.as_text()
    gin.clear_config()
    (tmp_path / "config.gin").write_text(record)
    config.load([str(tmp_path / "config.gin")], [])
    experiment()
    assert not config.differences(record)


class Telling(nn.Module):
    """A model that is told otherwise than by `train`."""

    @nn.compact
    def __call__(self, x, deterministic):
        """Raises if it is ever called."""
        raise AssertionError


def test_a_model_that_needs_another_keyword_is_refused():
    examples = FederatedDataset.from_clients({"a": {"x": np.zeros((2, 3)), "y": np.zeros(2, int)}})
    task = classification(Telling(), num_classes=3)
    message = "Telling.__call__: missing a required argument: 'deterministic'; .* 1 input.*`train`"
    with pytest.raises(UserError, match=message):
        task.init(jax.random.key(0), examples.slice(0, 1))


def test_a_users_bug_keeps_its_traceback_and_says_who_called_it(tmp_path):
    (tmp_path / "of_a_user.py").write_text(
        "import gin\n\n@gin.configurable\ndef buggy(): return {}['gone']\n"
    )
    params = ("import of_a_user", "train.dataset = @buggy()")
    done = subprocess.run(
        [sys.executable, "-m", "fedexp.main", f"--gin_file={os.path.abspath(LINEAR)}"]
        + [f"--gin_param={param}" for param in params],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "KeyError: 'gone'" in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("buggy (of_a_user.py, line 4) raised this; fedexp.")
    assert last.endswith("called it for --gin_param=train.dataset = @buggy()")


def test_all_shipped_configs_pass_in_no_time(monkeypatch):
    """Up to their data, which may be far away; time is counted in calls, which no other work adds to."""
    data = FederatedDataset.from_clients({"a": {"x": np.zeros((2, 3)), "y": np.zeros(2)}})
    monkeypatch.setattr(config, "evaluate", lambda *_: FederatedSplits(data, data))
    calls = []

    def count(frame, event, argument):
        calls[-1] += event == "call"

    def counted(check):
        def run(*args, **kwargs):
            sys.setprofile(count)
            try:
                check(*args, **kwargs)
            finally:
                sys.setprofile(None)

        return run

    for name in ("check_types", "check_required", "check_read", "check_fields"):
        monkeypatch.setattr(bindings, name, counted(getattr(bindings, name)))
    files = sorted(path.name for path in config.shipped_configs().glob("*.gin"))
    for file in files:
        gin.clear_config()
        calls.append(0)
        config.load([file], [])
        experiment()
    assert len(files) > 40
    assert min(calls) > 0 and max(calls) < 20_000
