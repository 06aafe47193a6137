"""Gin: typos, overrides without effect, and workdirs of another experiment."""

from __future__ import annotations

import gin
import pytest

import fedexp.trainer
from fedexp import config
from fedexp.errors import UserError

LINEAR = "tests/support/linear.gin"


@pytest.fixture(autouse=True)
def fresh_gin():
    gin.clear_config()
    yield
    gin.clear_config()


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("trian.seed = 1", "No configurable matching 'trian'.*Did you mean 'train'"),
        ("train.sede = 1", "parameter named 'sede'.*Did you mean 'seed'"),
        ("client/sgd.learing_rate = 1", "parameter named 'learing_rate'.*'learning_rate'"),
        ("train.algorithm = @fedvag()", "reference '@fedvag.*Did you mean 'fedavg'"),
        ("train.task = %taks", "'taks/gin.macro'"),
        ("clinet/sgd.learning_rate = 1", "scope of clinet/sgd.*Did you mean 'client'"),
        ("train.seed = = 1", "malformed|parse|invalid|Unable"),
        ("import no_such_module", "No module named 'no_such_module'"),
    ],
)
def test_a_typo_is_named_with_the_nearest_right_name(binding, message):
    with pytest.raises(UserError, match=message):
        config.load([LINEAR], [binding])


def test_a_missing_file_lists_the_shipped_ones():
    with pytest.raises(UserError, match=r"no_such\.gin.*emnist_fedadam\.gin.*quickstart\.gin"):
        config.load(["no_such.gin"], [])


def test_every_shipped_config_parses():
    names = sorted(path.name for path in config.shipped_configs().glob("*.gin"))
    assert "quickstart.gin" in names
    for name in names:
        gin.clear_config()
        config.load([name], ["train.seed = 3"])
        assert config.bindings()["train.seed"] == "3"


def test_a_file_of_the_current_folder_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart.gin").write_text("train.seed = 77\n")
    config.load(["quickstart.gin"], [])
    assert config.bindings() == {"train.seed": "77"}


def test_a_workdir_of_the_same_config_is_taken_up(tmp_path):
    config.load([LINEAR], [])
    config.claim(tmp_path)
    config.claim(tmp_path)


def test_a_workdir_of_another_config_is_refused_with_the_differences(tmp_path):
    config.load([LINEAR], ["train.seed = 1"])
    config.claim(tmp_path)
    (tmp_path / config.OPERATIVE).touch()
    gin.clear_config()
    config.load([LINEAR], ["server/adam.learning_rate = 0.2"])
    with pytest.raises(UserError) as caught:
        config.claim(tmp_path)
    lines = str(caught.value).splitlines()
    assert lines[1:3] == [
        "  server/adam.learning_rate: 0.1 -> 0.2",
        "  train.seed: 1 -> (unset)",
    ]
    assert "--gin_param=workdir.allow_config_change=True" in lines[3]


def test_a_run_that_never_began_leaves_its_workdir_to_the_next(tmp_path):
    config.load([LINEAR], ["train.seed = 1"])
    config.claim(tmp_path)
    gin.clear_config()
    config.load([LINEAR], ["train.seed = 2"])
    config.claim(tmp_path)
    assert "train.seed = 2\n" in (tmp_path / "config.gin").read_text()


def test_a_config_change_can_be_allowed(tmp_path):
    config.load([LINEAR], ["train.seed = 1"])
    config.claim(tmp_path)
    (tmp_path / config.OPERATIVE).touch()
    gin.clear_config()
    config.load([LINEAR], ["train.seed = 2", "workdir.allow_config_change = True"])
    config.claim(tmp_path)
    assert "train.seed = 2\n" in (tmp_path / "config.gin").read_text()
    assert "allow_config_change" not in (tmp_path / "config.gin").read_text()


def test_the_recorded_config_can_be_loaded_again(tmp_path):
    config.load([LINEAR], ["train.seed = 5"])
    before = config.bindings()
    config.claim(tmp_path)
    gin.clear_config()
    config.load([str(tmp_path / "config.gin")], [])
    assert config.bindings() == before


def test_an_unwritable_workdir_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to --workdir=.*file/run: Not a directory"):
        config.claim(tmp_path / "file" / "run")


def test_an_override_that_nothing_reads_is_refused():
    overrides = ["client/adam.learning_rate = 0.3"]
    config.load([LINEAR], overrides)
    with pytest.raises(UserError, match=r"client/adam.learning_rate = 0.3 has no effect"):
        fedexp.trainer.train(overrides=overrides, quiet=True)


def test_an_override_that_is_read_is_accepted():
    overrides = ["client/sgd.learning_rate = 0.01", "train.num_rounds = 1", "task = 3"]
    config.load([LINEAR], overrides)
    assert fedexp.trainer.train(overrides=overrides, quiet=True).rounds == 1
