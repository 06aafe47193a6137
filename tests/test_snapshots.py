"""What others get from a run's checkpoints."""

from __future__ import annotations

import os
import re
import uuid
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedexp
from fedexp import checkpointing
from fedexp.algorithms import ema, fedavg, hypcluster
from fedexp.checkpointing import CheckpointPlan, Saved, Saver
from fedexp.contracts import Algorithm
from fedexp.data import uniform
from fedexp.errors import UserError
from fedexp.evaluation import Evaluate
from fedexp.session import Session
from fedexp.trainer import Experiment
from tests.support import linear

REPOSITORY = Path(__file__).parent.parent
TASK = linear.task()


def experiment(algorithm: Algorithm, **options: Any) -> Experiment:
    given = {
        "num_rounds": 6,
        "sampler": uniform(3),
        "checkpoints": CheckpointPlan(every=2, keep=1),
        "evaluations": [Evaluate(every=2)],
        "observers": [],
    }
    return Experiment(linear.splits(), TASK, algorithm, **(given | options))


def too_fast() -> Algorithm:
    """Its loss is least in the second round, and grows from then on."""
    return fedavg(TASK, optax.sgd(0.05), optax.sgd(optax.linear_schedule(1.0, -1.0, 3)))


def assert_same(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def all_files(folder: Path) -> dict[str, float]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("where", ["local", "memory"])
def test_the_best_and_the_latest_parameters_are_those_of_the_run(tmp_path, where):
    workdir = str(tmp_path) if where == "local" else f"memory://{uuid.uuid4().hex}/run"
    setup = experiment(too_fast())
    result = setup.run(workdir)
    losses = [row["test/loss"] for row in result.history]
    assert losses[0] == min(losses)
    before = all_files(tmp_path)
    assert_same(fedexp.load_params(workdir, best=False), result.params)
    of_second = next(round_.params for round_ in setup.rounds() if round_.number == 2)
    assert_same(fedexp.load_params(workdir), of_second)
    assert all_files(tmp_path) == before


@pytest.mark.parametrize(
    "make",
    [
        lambda: ema(TASK, fedavg(TASK, optax.sgd(0.05), optax.sgd(1.0)), decay=0.5),
        lambda: hypcluster(TASK, 2, optax.sgd(0.05), optax.sgd(1.0)),
    ],
)
def test_parameters_that_are_made_of_the_state_are_found(tmp_path, make):
    """An average is within the state; one of several models is not, and is saved besides."""
    first = Session(experiment(make())).first
    saver = Saver(tmp_path, CheckpointPlan(best_metric=None), None, {})
    saver.save(Saved(1, first.state, [], None))
    saver.close()
    assert_same(fedexp.load_params(tmp_path, best=False), jax.device_get(first.params))
    again = Saver(tmp_path, CheckpointPlan(best_metric=None), None, {})
    restored = again.restore(first.state)
    again.close()
    assert restored is not None
    assert_same(restored.state, first.state)


class Own(NamedTuple):
    kernel: Any
    parts: tuple[Any, ...]


class State(NamedTuple):
    params: Any


def test_other_classes_than_dicts_and_lists_come_back_by_an_example(tmp_path):
    own = Own(jnp.arange(3, dtype=jnp.bfloat16), (jnp.ones(()), None, {"a.b": jnp.zeros((0, 2))}))
    saver = Saver(tmp_path, CheckpointPlan(best_metric=None), None, {})
    saver.save(Saved(3, State(own), [], None))
    saver.close()
    plain = {"kernel": own.kernel, "parts": [own.parts[0], None, own.parts[2]]}
    assert_same(fedexp.load_params(tmp_path, best=False), plain)
    assert_same(fedexp.load_params(tmp_path, best=False, like=own), own)
    with pytest.raises(UserError, match=r"kernel is bfloat16\[3\] in it and float32\[3\] here"):
        fedexp.load_params(tmp_path, best=False, like=own._replace(kernel=jnp.ones(3)))
    with pytest.raises(UserError, match=r"no best checkpoint.*CheckpointPlan\.best_metric"):
        fedexp.load_params(tmp_path)


def test_what_is_not_there_is_said_and_not_made(tmp_path):
    with pytest.raises(UserError, match=f"there is no folder {tmp_path}/no"):
        fedexp.load_params(tmp_path / "no")
    with pytest.raises(UserError, match=f"there is no checkpoint in {tmp_path}"):
        fedexp.load_params(tmp_path)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("file", ["about/metadata", "state/_METADATA"])
def test_a_damaged_checkpoint_is_named(tmp_path, file):
    saver = Saver(tmp_path, CheckpointPlan(best_metric=None), None, {})
    saver.save(Saved(3, State({"w": np.ones(3)}), [], None))
    saver.close()
    (tmp_path / "checkpoints/3" / file).write_text("{")
    with pytest.raises(UserError, match=f"checkpoint {tmp_path}/checkpoints/3 is damaged"):
        fedexp.load_params(tmp_path, best=False)


class Inner(NamedTuple):
    inner: State

    @property
    def params(self):
        return self.inner.params


@pytest.mark.parametrize(
    ("state", "is_found"),
    [
        (State({"a": {"w": np.ones(3)}, "b": np.zeros(2)}), True),
        (State([np.ones(3)]), False),
        (Inner(State({"w": np.ones(3)})), False),
    ],
)
def test_a_checkpoint_of_an_older_fedexp_is_read_or_told(state, is_found, tmp_path, monkeypatch):
    saver = Saver(tmp_path, CheckpointPlan(best_metric=None), None, {})
    monkeypatch.setattr(
        checkpointing.Checkpointer,
        "save",
        lambda self, round, state, about, *rest, save=checkpointing.Checkpointer.save, **more: save(
            self, round, state, {k: v for k, v in about.items() if k != "params"}, *rest, **more
        ),
    )
    saver.save(Saved(3, state, [], None))
    saver.close()
    if is_found:
        assert_same(fedexp.load_params(tmp_path, best=False), state.params)
    else:
        with pytest.raises(UserError, match="of an older fedexp"):
            fedexp.load_params(tmp_path, best=False)


def test_the_example_of_the_documentation_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (REPOSITORY / "docs" / "resume.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code
    exec(code[1], {})
    one, other = capsys.readouterr().out.split(" is ")
    assert float(one) == float(other)
