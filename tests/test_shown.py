"""What prints in a notebook fits a screen and holds no numbers of arrays."""

from __future__ import annotations

import dataclasses

import numpy as np
import optax
import pytest

from fedexp import shown
from fedexp.aggregators import mean
from fedexp.algorithms import fedavg
from fedexp.data import Batch, FederatedDataset, FederatedSplits, uniform
from fedexp.evaluation import Evaluation
from fedexp.session import Round
from fedexp.trainer import Experiment, TrainResult
from tests.support import linear

IMAGES = FederatedDataset(
    {"x": np.full((5, 28, 28), 77, np.uint8), "y": np.full(5, 77, np.int32)}, [0, 2, 5], ["a", "b"]
)
PARAMS = {
    f"Dense_{i}": {"kernel": np.full((4, 3), 77.0), "bias": np.full(3, 77.0)} for i in range(9)
}


def test_a_data_set_shows_its_sizes_and_features():
    expected = "2 clients, 5 examples, 2 to 3 a client: x uint8 (28, 28), y int32 ()"
    assert repr(IMAGES) == f"FederatedDataset({expected})"


def test_parameters_are_counted():
    assert shown.short(PARAMS) == "135 numbers in 18 arrays"


@pytest.mark.parametrize(
    ("value", "lines", "has"),
    [
        (FederatedSplits(IMAGES, IMAGES), 5, "test: FederatedDataset(2 clients"),
        (Batch(IMAGES.features, np.ones(5, bool)), 4, "mask: bool (5,)"),
        (
            Evaluation({"accuracy": 0.51}, {"accuracy": np.full(9999, 77.0)}),
            5,
            "per_client: {'accuracy': float64 (9999,)}",
        ),
        (
            TrainResult(
                PARAMS, {"test/loss": 0.25}, [{"round": 1.0, "test/loss": 0.5}] * 400, 400, None
            ),
            8,
            "history: 400 entries, the last {'round': 1, 'test/loss': 0.5}",
        ),
        (
            Experiment(linear.splits(), linear.task(), lambda task: None, num_rounds=7),
            20,
            "num_rounds: 7",
        ),
        (linear.task(), 14, "init: "),
        (uniform(3), 7, "cohort_size: 3"),
        (fedavg(linear.task(), optax.sgd(0.5), optax.sgd(1.0)), 12, "round: averaging"),
        (mean(), 11, "reduces: True"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_each_field_has_a_line(value, lines, has):
    text = repr(value)
    assert has in text and "77" not in text and " at 0x" not in text
    assert len(text.splitlines()) == lines and max(map(len, text.splitlines())) <= 120


def test_a_round_shows_its_number_and_parameters():
    @dataclasses.dataclass
    class State:
        params: dict

    assert repr(Round(None, 3, State(PARAMS))) == "Round(number=3, params=135 numbers in 18 arrays)"
