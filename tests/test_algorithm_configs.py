"""The shipped files of algorithms and aggregators run from end to end, made small, and resume."""

from __future__ import annotations

import gin
import jax
import numpy as np
import pytest

from fedexp import config
from fedexp.trainer import Experiment

SMALL = [
    "train.dataset = @glyphs()",
    "glyphs.num_writers = 12",
    "classification.model = @EmnistLogistic()",
    "EmnistLogistic.num_classes = 62",
    "evaluate.every = 2",
    "CheckpointPlan.every = 2",
    "train.observers = [@tensorboard()]",
]
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
    "emnist_apfl.gin": (),
    "emnist_fedper.gin": ("fedper.local = 'bias'",),
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
}
ON_A_CLOCK = {"emnist_fedavg_clock.gin", "emnist_fedbuff.gin", "emnist_fedasync.gin"}
PERSONAL = {
    "emnist_apfl.gin",
    "emnist_fedper.gin",
    "emnist_fine_tuned.gin",
    "emnist_ditto.gin",
    "emnist_hypcluster.gin",
    "emnist_pfedme.gin",
    "emnist_fedrep.gin",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_it_runs_and_resumes(name, tmp_path):
    def run(folder, num_rounds):
        gin.clear_config()
        cohort = [] if name in ON_A_CLOCK else ["uniform.cohort_size = 3"]
        config.load([name], [*SMALL, *cohort, *FILES[name], f"train.num_rounds = {num_rounds}"])
        return Experiment().run(tmp_path / folder)

    whole = run("whole", 4)
    run("parts", 2)
    parts = run("parts", 4)
    jax.tree.map(np.testing.assert_array_equal, parts.params, whole.params)
    assert parts.metrics == whole.metrics
    assert ("test_personal/accuracy" in whole.metrics) == (name in PERSONAL)
