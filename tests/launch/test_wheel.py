"""What an installed fedexp has, and that its launchers keep the folder and the modules of who calls them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent.parent
PATIENCE = 200

# A user's own data, task and experiment, in a folder of theirs.
MODULE = """
import gin
import numpy as np
from fedexp.data import FederatedDataset, FederatedSplits
from fedexp.models import DenseClassifier
from fedexp.tasks import classification

@gin.configurable
def my_data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 3)).astype(np.float32)
    clients = {f"c{i}": {"x": x[i::8], "y": (x[i::8, 0] > 0).astype(np.int32)} for i in range(8)}
    dataset = FederatedDataset.from_clients(clients)
    return FederatedSplits(dataset, dataset)
"""
EXPERIMENT = """
import my_experiment
train.dataset = @my_data()
train.task = @classification()
classification.model = @DenseClassifier()
classification.num_classes = 2
classification.preprocess = None
DenseClassifier.num_classes = 2
DenseClassifier.hidden = ()
train.algorithm = @fedavg
fedavg.client_optimizer = @client/sgd()
fedavg.server_optimizer = @server/sgd()
client/sgd.learning_rate = 0.1
server/sgd.learning_rate = 1.0
train.sampler = @uniform()
uniform.cohort_size = 4
train.num_rounds = 2
"""
SWEEP = """
sweep.axes = [@rate/axis()]
rate/axis.binding = 'client/sgd.learning_rate'
rate/axis.values = [0.1, 0.2]
sweep.metric = 'test/loss'
sweep.direction = 'minimize'
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel of a copy, so that nothing is built in the checkout."""
    copy = tmp_path_factory.mktemp("copy")
    for name in ("fedexp", "gin_configs", "launch"):
        shutil.copytree(
            REPOSITORY / name, copy / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("setup.py", "README.md"):
        shutil.copy(REPOSITORY / name, copy)
    build = [sys.executable, "setup.py", "-q", "bdist_wheel"]
    subprocess.run(build, cwd=copy, check=True, capture_output=True, timeout=PATIENCE)
    (built,) = (copy / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> dict[str, str]:
    """An environment in which the wheel's fedexp is found before the checkout's."""
    folder = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(folder)
    return {**os.environ, "PYTHONPATH": str(folder)}


@pytest.fixture
def foreign(tmp_path) -> Path:
    (tmp_path / "my_experiment.py").write_text(MODULE)
    (tmp_path / "my_experiment.gin").write_text(EXPERIMENT)
    (tmp_path / "my_sweep.gin").write_text(SWEEP)
    return tmp_path


def run(folder: Path, environment: dict[str, str], *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_wheel_has_all_that_is_shipped(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = (REPOSITORY / "gin_configs").rglob("*.gin")
    shipped = {f"fedexp/gin_configs/{c.relative_to(REPOSITORY / 'gin_configs')}" for c in configs}
    shipped |= {
        f"fedexp/{m.relative_to(REPOSITORY / 'fedexp')}"
        for m in (REPOSITORY / "fedexp").rglob("*.py")
    }
    shipped |= {"fedexp/py.typed", "fedexp/launch.py"}
    files = ("slurm.sh", "kubernetes.yaml", "kubernetes_sweep.yaml")
    shipped |= {f"fedexp/launch_files/{name}" for name in files}
    others = {name for name in names - shipped if ".dist-info/" not in name}
    assert shipped <= names and others == set()


@pytest.mark.slow
def test_an_installed_fedexp_launches_two_processes_of_a_users_experiment(installed, foreign):
    where = run(foreign, installed, "-m", "fedexp", "launch", "--files").strip()
    assert where.startswith(installed["PYTHONPATH"]) and (Path(where) / "slurm.sh").is_file()
    out = run(
        foreign,
        installed,
        *("-m", "fedexp", "launch", "--processes=2", "--"),
        *("--gin_file=my_experiment.gin", "--workdir=run"),
    )
    assert any(line.startswith("[0] ") for line in out.splitlines())
    assert json.loads((foreign / "run" / "final.json").read_text())["rounds"] == 2


@pytest.mark.slow
def test_an_installed_fedexp_sweeps_a_users_experiment_with_workers(installed, foreign):
    run(
        foreign,
        installed,
        *("-m", "fedexp", "sweep", "--gin_file=my_experiment.gin", "--sweep=my_sweep.gin"),
        *("--workdir=sweep", "--workers=2"),
    )
    finished = sorted((foreign / "sweep" / "trials").glob("*/final.json"))
    assert [file.parent.name for file in finished] == ["000", "001"]
