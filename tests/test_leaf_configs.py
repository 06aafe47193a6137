"""The shipped experiments of LEAF's data sets have the settings of its code."""

from __future__ import annotations

import gin
import pytest

import fedexp.trainer  # noqa: F401  Registers what the files name.
from fedexp import config

# models/baseline_constants.py for 'large' and models/utils/args.py; Reddit's of data/reddit/README.md.
SETTINGS = """
file    | rate   | rounds | clients | batch
celeba  | 0.1    | 400    | 2       | 10
sent140 | 0.0003 | 24     | 2       | 10
reddit  | 5.65   | 100    | 10      | 5
"""
BINDINGS = (
    "client/sgd.learning_rate",
    "train.num_rounds",
    "uniform.cohort_size",
    "ClientBatching.batch_size",
)
# MODEL_PARAMS of the same file: places of words, units, layers. The norm is models/reddit/stacked_lstm.py's.
MODELS = {
    "sent140": {
        "word_ids.length": 25,
        "LSTMClassifier.hidden_size": 100,
        "LSTMClassifier.num_layers": 2,
    },
    "reddit": {
        "LSTMLanguageModel.hidden_size": 256,
        "LSTMLanguageModel.num_layers": 2,
        "clip_gradients.norm": 5.0,
    },
}


@pytest.mark.parametrize("line", SETTINGS.strip().splitlines()[1:])
def test_an_experiment_has_the_published_settings(line):
    name, *values = (part.strip() for part in line.split("|"))
    config.load([f"{name}_fedavg.gin"], [])
    assert [gin.query_parameter(binding) for binding in BINDINGS] == [*map(float, values)]
    assert gin.query_parameter("ClientBatching.local_epochs") == 1
    for binding, value in MODELS.get(name, {}).items():
        assert gin.query_parameter(binding) == value
