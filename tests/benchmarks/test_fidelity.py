"""The comparison of parameters with FedJAX's, without FedJAX."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from benchmarks import fidelity


def test_differences_are_relative_and_starts_are_those_next_to_ours():
    ours = {
        "apfl": {"w": np.array([3.0, 4.0])},
        "hyp, k-means++": {"w": np.ones(2), "b": np.ones(1)},
    }
    starts = {"w": np.array([[5.0, 5.0], [1.0, 1.0]]), "b": np.array([[9.0], [2.0]])}
    found = fidelity.differences(
        ours, {"apfl": {"w": np.array([3.0, 5.0])}, "hyp, k-means++": starts}
    )
    assert found["apfl"] == {"w": pytest.approx(1 / 34**0.5)}
    assert found["hyp, k-means++"] == {"w": 0.0, "b": pytest.approx(0.5)}


def test_without_fedjax_it_says_how_to_set_it_up(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fidelity"])
    assert fidelity.main() == 2
    assert "--fedjax_python is not given; benchmarks/README.md tells" in capsys.readouterr().err
