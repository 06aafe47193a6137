"""The sweeps that fedexp ships."""

from __future__ import annotations

import pytest

from fedexp import config
from fedexp.sweeps import description
from fedexp.sweeps.space import points
from fedexp.sweeps.study import HAS_OPTUNA


@pytest.mark.parametrize("path", sorted(config.shipped_configs().glob("sweeps/*.gin")), ids=str)
def test_a_shipped_sweep_can_be_read(path):
    if "study" in path.name and not HAS_OPTUNA:
        pytest.skip("needs Optuna")
    sweep, text = description.load(path.name)
    assert sweep.metric == "test/accuracy" and "sweep.axes" in text
    assert not config.bindings()  # Nothing of it is in force.


def test_the_grid_of_reddi_et_al_has_the_published_learning_rates():
    sweep, _ = description.load("reddi_grid.gin")
    found = points(sweep.axes, None, 0)
    assert len(found) == 8 * 9
    # Their Table 8, EMNIST CR, FedAdam: 10^-1.5 and 10^-2.5.
    best = {"client/sgd.learning_rate": "0.03162278", "server/adam.learning_rate": "0.003162278"}
    assert best in found
    logs = {p["client/sgd.learning_rate"] for p in found}
    assert logs == {f"{10 ** (e / 2):.7g}" for e in range(-6, 2)} - {"1"} | {"1.0"}
