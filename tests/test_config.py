"""Gin: typos, overrides without effect, and workdirs of another experiment."""

from __future__ import annotations

import logging
import subprocess
import sys

import gin
import pytest

from fedexp import config
from fedexp.errors import UserError
from fedexp.trainer import Experiment

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
        ("csv.path = a.csv", r"csv.path = a.csv \(in a --gin_param\): 'a' is no value; text has q"),
        ("mesh.lanes = 4", "parameter named 'lanes'.*Did you mean 'Packing.lanes'"),
        ("import no_such_module", "No module named 'no_such_module'.*looked for in .* PYTHONPATH"),
    ],
)
def test_a_typo_is_named_with_the_nearest_right_name(binding, message):
    with pytest.raises(UserError, match=message):
        config.load([LINEAR], [binding])


def test_a_missing_file_lists_the_shipped_ones():
    with pytest.raises(UserError, match=r"no_such\.gin.*emnist_fedadam\.gin.*quickstart\.gin"):
        config.load(["no_such.gin"], [])


def test_a_missing_file_is_taken_for_a_mistyped_one(tmp_path):
    (tmp_path / "mine.gin").write_text("train.seed = oops\n")
    with pytest.raises(UserError, match=r"mien\.gin.*Did you mean 'mine\.gin'\?$"):
        config.load([str(tmp_path / "mien.gin")], [])
    with pytest.raises(UserError, match=r"oops \(.*mine\.gin, line 1\): 'oops' is no value"):
        config.load([str(tmp_path / "mine.gin")], [])


def test_included_files_lie_beside_the_including_one(tmp_path, monkeypatch):
    (tmp_path / "mine/parts/deep").mkdir(parents=True)
    (tmp_path / "mine/a.gin").write_text("include 'parts/b.gin'\ntrain.seed = 1\n")
    (tmp_path / "mine/parts/b.gin").write_text("include 'deep/c.gin'\ninclude 'd.gin'\n")
    (tmp_path / "mine/parts/deep/c.gin").write_text("train.num_rounds = 7\n")
    (tmp_path / "mine/parts/d.gin").write_text("uniform.cohort_size = 3\ninclude 'here.gin'\n")
    (tmp_path / "d.gin").write_text("uniform.cohort_size = 4\n")
    (tmp_path / "here.gin").write_text("evaluate.every = 5\n")
    monkeypatch.chdir(tmp_path)
    config.load(["mine/a.gin"], [])
    assert config.bindings() == {
        "train.seed": "1",
        "train.num_rounds": "7",
        "uniform.cohort_size": "3",
        "evaluate.every": "5",
    }
    (tmp_path / "mine/parts/deep/c.gin").write_text("\ntrain.sede = 7\n")
    with pytest.raises(UserError, match=r'mine/parts/deep/c\.gin", line 2.*mine/a\.gin", line 1'):
        config.load([str(tmp_path / "mine/a.gin")], [])


def test_a_file_may_include_a_shipped_one_of_its_own_name(tmp_path, monkeypatch):
    (tmp_path / "quickstart.gin").write_text("include 'quickstart.gin'\ntrain.seed = 123\n")
    for folder, name in ((".", str(tmp_path / "quickstart.gin")), (tmp_path, "quickstart.gin")):
        monkeypatch.chdir(folder)
        gin.clear_config()
        config.load([name], [])
        bound = config.bindings()
        assert bound["train.seed"] == "123" and "train.dataset" in bound


def test_an_ambiguous_name_is_refused():
    for module in ("here", "there"):
        gin.external_configurable(lambda: None, name="of_two_modules", module=module)
    with pytest.raises(UserError, match=r"gin: .*Ambiguous selector 'of_two_modules'"):
        config.load([], ["train.task = @of_two_modules()"])


def test_loading_changes_logging_once_and_no_other_message(caplog):
    root = logging.getLogger()
    config.load([LINEAR], [])
    filters, prefixes = list(root.filters), list(gin.config._LOCATION_PREFIXES)
    gin.clear_config()
    config.load([LINEAR], [])
    assert filters == root.filters and prefixes == gin.config._LOCATION_PREFIXES
    for message in (ValueError("x"), 123, "Path not found: here", "Path found"):
        root.warning(message)
    assert caplog.messages == ["x", "123", "Path found"]


@pytest.mark.parametrize(
    ("code", "error"), [("import os; os.no_such", AttributeError), ("open('/gone')", OSError)]
)
def test_a_bug_in_an_imported_module_keeps_its_traceback(tmp_path, monkeypatch, code, error):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "module_with_a_bug.py").write_text(f"def run():\n    {code}\n\nrun()\n")
    with pytest.raises(error) as caught:
        config.load([], ["import module_with_a_bug"])
    assert not isinstance(caught.value, UserError)


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
    config.prepare_workdir(tmp_path)
    config.prepare_workdir(tmp_path)


def test_a_workdir_of_another_config_is_refused_with_the_differences(tmp_path):
    config.load([LINEAR], ["train.seed = 1"])
    config.prepare_workdir(tmp_path)
    (tmp_path / config.OPERATIVE).touch()
    gin.clear_config()
    config.load([LINEAR], ["server/adam.learning_rate = 0.2"])
    with pytest.raises(UserError) as caught:
        config.prepare_workdir(tmp_path)
    lines = str(caught.value).splitlines()
    assert lines[1:3] == [
        "  server/adam.learning_rate: 0.1 -> 0.2",
        "  train.seed: 1 -> (unset)",
    ]
    assert "--gin_param=workdir.allow_config_change=True" in lines[3]


def test_a_run_that_never_began_leaves_its_workdir_to_the_next(tmp_path):
    config.load([LINEAR], ["train.seed = 1"])
    config.prepare_workdir(tmp_path)
    gin.clear_config()
    config.load([LINEAR], ["train.seed = 2"])
    config.prepare_workdir(tmp_path)
    assert "train.seed = 2\n" in (tmp_path / "config.gin").read_text()


def test_a_config_change_can_be_allowed(tmp_path):
    config.load([LINEAR], ["train.seed = 1"])
    config.prepare_workdir(tmp_path)
    (tmp_path / config.OPERATIVE).touch()
    gin.clear_config()
    config.load([LINEAR], ["train.seed = 2", "workdir.allow_config_change = True"])
    config.prepare_workdir(tmp_path)
    assert "train.seed = 2\n" in (tmp_path / "config.gin").read_text()
    assert "allow_config_change" not in (tmp_path / "config.gin").read_text()


def test_the_recorded_config_can_be_loaded_again(tmp_path):
    config.load([LINEAR], ["train.seed = 5"])
    before = config.bindings()
    config.prepare_workdir(tmp_path)
    gin.clear_config()
    config.load([str(tmp_path / "config.gin")], [])
    assert config.bindings() == before


@pytest.mark.parametrize("record", ["", "\n \n"])
def test_a_blank_record_refuses_nothing(tmp_path, record):
    (tmp_path / config.OPERATIVE).touch()
    (tmp_path / "config.gin").write_text(record)
    config.load([LINEAR], ["train.seed = 5"])
    config.prepare_workdir(tmp_path)
    assert "train.seed = 5\n" in (tmp_path / "config.gin").read_text()


def test_an_unwritable_workdir_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to --workdir=.*file/run: Not a directory"):
        config.prepare_workdir(tmp_path / "file" / "run")


def test_an_override_that_nothing_reads_is_refused():
    overrides = ["client/adam.learning_rate = 0.3"]
    config.load([LINEAR], overrides)
    with pytest.raises(UserError, match=r"client/adam.learning_rate = 0.3 has no effect"):
        Experiment(observers=()).run(overrides=overrides)


def test_an_override_that_is_read_is_accepted():
    overrides = ["client/sgd.learning_rate = %rate", "train.num_rounds = 1", "rate = 0.01"]
    config.load([LINEAR], overrides)
    assert Experiment(observers=()).run(overrides=overrides).rounds == 1


def test_a_workdirs_config_that_is_no_text_is_refused(tmp_path):
    (tmp_path / config.OPERATIVE).write_text("")
    (tmp_path / "config.gin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=f"{tmp_path}/config.gin is no text"):
        config.prepare_workdir(tmp_path)


def test_a_config_is_loaded_where_nothing_else_of_fedexp_was_imported():
    code = "from fedexp import config; config.load(['quickstart.gin'], []); print(config.as_text())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "train.algorithm = @fedavg" in done.stdout, done.stderr
