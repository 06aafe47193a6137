"""The shipped files of algorithms and aggregators run from end to end, made small, and resume.

Nearly all of the time is tracing and compiling, so that there is as little as possible of both.
"""

from __future__ import annotations

import shutil

import gin
import jax
import numpy as np
import pytest

from fedexp import config
from fedexp.trainer import Experiment

SMALL = [
    "train.dataset = @glyphs()",
    "glyphs.num_writers = 8",
    "classification.model = @EmnistLogistic()",
    "EmnistLogistic.num_classes = 62",
    "evaluate.every = 2",
    "CheckpointPlan.every = 2",
    "CheckpointPlan.keep = 2",
    "Packing.batch_sizes = 1",
    "train.observers = []",
    "train.num_rounds = 4",
]
OTHER_CLASSES = ("classification.num_classes = 62", "classification.class_names = None")
FILES = {
    "emnist_fedavg.gin": (),
    "emnist_scaffold.gin": (),
    "emnist_fedprox.gin": (),
    "emnist_fedprox_adaptive.gin": (),
    "emnist_ema.gin": (),
    "emnist_early_stopping.gin": (
        "train.dataset = @split_validation()",
        "split_validation.splits = @glyphs()",
    ),
    "emnist_mime.gin": (),
    "emnist_mimelite.gin": (),
    "emnist_fedsgd.gin": (),
    "emnist_reptile.gin": (),
    "emnist_per_fedavg.gin": (),
    "emnist_apfl.gin": (),
    "emnist_fedper.gin": ("fedper.local = 'bias'",),
    "emnist_lg_fedavg.gin": ("fedper.local = 'bias'",),
    "emnist_fine_tuned.gin": (),
    "emnist_compressed.gin": (),
    "emnist_fednova.gin": (),
    "emnist_feddyn.gin": (),
    "emnist_q_fedavg.gin": (),
    "emnist_ditto.gin": (),
    "emnist_hypcluster.gin": ("hypcluster.start = 'kmeans++'",),
    "emnist_agnostic.gin": (),
    "emnist_pfedme.gin": (),
    "emnist_fedrep.gin": ("fedrep.head = 'bias'",),
    "emnist_fedavg_clock.gin": ("synchronous.cohort_size = 3", "synchronous.asked = 4"),
    "emnist_fedbuff.gin": ("asynchronous.concurrency = 6", "asynchronous.arrivals = 3"),
    "emnist_fedasync.gin": ("asynchronous.concurrency = 6",),
    "emnist_digits_dp_fedavg.gin": ("poisson.expected_cohort_size = 3", *OTHER_CLASSES),
    "emnist_digits_dp_ftrl.gin": ("cyclic.cohort_size = 3", *OTHER_CLASSES),
}
PRIVATE = {"emnist_digits_dp_fedavg.gin", "emnist_digits_dp_ftrl.gin"}
OWN_SAMPLER = PRIVATE | {"emnist_fedavg_clock.gin", "emnist_fedbuff.gin", "emnist_fedasync.gin"}
PERSONAL = {
    "emnist_apfl.gin",
    "emnist_fedper.gin",
    "emnist_lg_fedavg.gin",
    "emnist_per_fedavg.gin",
    "emnist_reptile.gin",
    "emnist_fine_tuned.gin",
    "emnist_ditto.gin",
    "emnist_hypcluster.gin",
    "emnist_pfedme.gin",
    "emnist_fedrep.gin",
}


@pytest.fixture
def _compiled_once():
    """What the resumed run compiles is there from the whole one."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, 0.0)
    yield
    jax.config.update(name, before)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
@pytest.mark.usefixtures("_compiled_once")
def test_it_runs_and_resumes(name, tmp_path):
    """From a copy that has no later checkpoint than round 2's, as a killed run leaves it."""

    def run(folder):
        gin.clear_config()
        cohort = [] if name in OWN_SAMPLER else ["uniform.cohort_size = 3"]
        config.load([name], [*SMALL, *cohort, *FILES[name]])
        return Experiment().run(folder)

    whole = run(tmp_path / "whole")
    killed = shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(killed / "checkpoints" / "4")
    assert (killed / "checkpoints" / "2").exists()
    parts = run(killed)
    jax.tree.map(np.testing.assert_array_equal, parts.params, whole.params)
    assert parts.metrics == whole.metrics
    assert ("test_personal/accuracy" in whole.metrics) == (name in PERSONAL)
    assert ("privacy/epsilon" in whole.metrics) == (name in PRIVATE)
