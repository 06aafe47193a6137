"""Statistics over seeds, and what is written of them."""

from __future__ import annotations

import math

import pytest

from fedexp.sweeps.results import spread


def test_an_interval_is_students():
    """For 1 and 2 degrees of freedom the quantiles have closed forms."""
    n, mean, std, low, high = spread([1.0, 3.0])
    assert (n, mean, std) == (2, 2.0, pytest.approx(math.sqrt(2)))
    half = math.tan(math.pi * 0.475) * math.sqrt(2) / math.sqrt(2)
    assert (low, high) == (pytest.approx(2 - half), pytest.approx(2 + half))

    n, mean, std, low, high = spread([0.5, 0.6, 0.7])
    assert (n, mean, std) == (3, pytest.approx(0.6), pytest.approx(0.1))
    half = 0.95 * math.sqrt(2 / (1 - 0.95**2)) * 0.1 / math.sqrt(3)
    assert (low, high) == (pytest.approx(0.6 - half), pytest.approx(0.6 + half))


def test_one_value_has_no_spread_and_none_no_mean():
    assert spread([0.25]) == (1, 0.25, None, None, None)
    assert spread([]) == (0, None, None, None, None)
