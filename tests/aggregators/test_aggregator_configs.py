"""The shipped files of aggregators run, made small, and count what they say."""

from __future__ import annotations

import math

import gin
import pytest

from fedexp import config
from fedexp.trainer import Experiment

SMALL = [
    "train.dataset = @glyphs()",
    "glyphs.num_writers = 12",
    "classification.model = @EmnistLogistic()",
    "EmnistLogistic.num_classes = 62",
    "train.num_rounds = 1",
    "train.observers = []",
]
ROWS, COLUMNS, BIAS = 784, 62, 62
SIZE = ROWS * COLUMNS + BIAS
INDEX = math.ceil(math.log2(SIZE))
# File -> (cohort, bits of a client, more bindings).
FILES = {
    "emnist_compressed.gin": (3, math.ceil(0.01 * SIZE) * (32 + INDEX), ()),
    "emnist_quantized.gin": (3, math.ceil(0.05 * SIZE) * (4 + INDEX) + 2 * 64, ()),
    "emnist_signs.gin": (3, SIZE + 2 * 32, ()),
    "emnist_drive.gin": (3, 2 * 2**15 + 2 * 32, ()),
    "emnist_ef21.gin": (3, math.ceil(0.01 * SIZE) * (32 + INDEX), ()),
    "emnist_power_sgd.gin": (3, 32 * (2 * (ROWS + COLUMNS) + BIAS), ()),
    "emnist_krum.gin": (12, 32 * SIZE, ("krum.num_attackers = 4", "krum.num_selected = 5")),
    "emnist_flipped_labels.gin": (
        3,
        32 * SIZE,
        ("train.dataset = @flipped_labels()", "flipped_labels.splits = @glyphs()"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_it_runs(name):
    cohort, bits, bindings = FILES[name]
    gin.clear_config()
    config.load([name], [*SMALL, f"uniform.cohort_size = {cohort}", *bindings])
    result = Experiment().run()
    assert result.metrics["traffic/total_bits_up"] == pytest.approx(cohort * bits, rel=1e-6)
    assert math.isfinite(result.metrics["test/loss"])
