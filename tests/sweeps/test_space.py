"""What is varied: values, points, and mistakes in them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedexp.errors import UserError
from fedexp.main import without_gin_frames
from fedexp.sweeps.space import (
    Axis,
    examples,
    grid,
    log_grid,
    points,
    random_choice,
    random_integer,
    random_log_uniform,
    random_uniform,
)


def test_a_log_grid_has_its_ends_and_seven_digits():
    half_decades = (0.001, 0.003162278, 0.01, 0.03162278, 0.1)
    assert log_grid(1e-3, 1e-1, per_decade=2).values == half_decades
    assert log_grid(1e-3, 1e-1, count=5).values == half_decades
    assert log_grid(0.5, 2.0, count=3).values == (0.5, 1.0, 2.0)
    assert log_grid(0.03162278, 1.0, per_decade=2).values == (0.03162278, 0.1, 0.3162278, 1.0)


def test_grids_span_all_combinations_in_order():
    axes = [
        Axis("client/sgd.learning_rate", [0.1, 1]),
        Axis(["a.x", "b.x"], grid([(1, "one"), "both"])),
        Axis("train.algorithm", expressions=["@fedavg", "@fedprox"]),
    ]
    found = points(axes, None, 0)
    by_hand = [
        {"client/sgd.learning_rate": rate, "a.x": a, "b.x": b, "train.algorithm": algorithm}
        for rate in ("0.1", "1")
        for a, b in (("1", "'one'"), ("'both'", "'both'"))
        for algorithm in ("@fedavg", "@fedprox")
    ]
    assert found == by_hand and len(found) == 8


def test_draws_are_within_bounds_and_spread_as_they_should_be():
    axes = [
        Axis("a.log", random_log_uniform(1e-4, 1.0)),
        Axis("a.flat", random_uniform(2.0, 4.0)),
        Axis("a.whole", random_integer(1, 3)),
        Axis("a.of", random_choice(["x", "y"])),
    ]
    found = points(axes, 2000, 0)
    logs, flat = (np.array([float(p[name]) for p in found]) for name in ("a.log", "a.flat"))
    assert logs.min() >= 1e-4 and logs.max() <= 1 and flat.min() >= 2 and flat.max() <= 4
    # Means of uniform numbers: their standard deviation is the width / sqrt(12 n).
    assert abs(np.log10(logs).mean() + 2) < 5 * 4 / math.sqrt(12 * 2000)
    assert abs(flat.mean() - 3) < 5 * 2 / math.sqrt(12 * 2000)
    for name, values in (("a.whole", "123"), ("a.of", ["'x'", "'y'"])):
        counts = [sum(p[name] == value for p in found) for value in values]
        assert sum(counts) == 2000 and min(counts) > 2000 / len(values) - 5 * math.sqrt(500)


def test_more_draws_change_nothing_before_and_another_seed_does():
    axes = [Axis("a.x", random_uniform(0.0, 1.0)), Axis("b.y", [1, 2])]
    few, many, other = (points(axes, n, seed) for n, seed in ((3, 0), (5, 0), (3, 1)))
    assert len(few) == 6 and len(many) == 10 and many[:6] == few and few != other
    # Every draw is tried at all points of the grid.
    assert few[0]["a.x"] == few[1]["a.x"] != few[2]["a.x"]


def test_no_point_is_drawn_twice():
    axes = [Axis("a.x", random_choice([1, 2, 3])), Axis("a.y", random_choice([1, 2]))]
    found = points(axes, 6, 0)
    assert len({tuple(p.items()) for p in found}) == 6
    with pytest.raises(UserError, match="num_points = 7, but the random axes have fewer points"):
        points(axes, 7, 0)


def test_examples_meet_every_value_and_both_ends():
    axes = [Axis("a.x", random_uniform(0.0, 1.0)), Axis("b.y", [1, 2, 3])]
    assert examples(axes) == [
        {"a.x": "0.0", "b.y": "1"},
        {"a.x": "1.0", "b.y": "2"},
        {"a.x": "0.0", "b.y": "3"},
    ]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Axis("a.x", []), "axis.values of a.x is empty"),
        (lambda: Axis("a.x"), "axis.values of a.x is not bound"),
        (lambda: Axis("", [1]), "axis.binding is not bound"),
        (lambda: Axis("a.x", [1], ["@b"]), "one of axis.values and axis.expressions"),
        (lambda: Axis(["a.x", "b.x"], [(1, 2, 3)]), "not one value each"),
        (lambda: Axis("a.x", [max]), "no command can hold"),
        (lambda: Axis("a.x", [float("nan")]), "no command can hold"),
        (lambda: log_grid(1e-3, 2.0, per_decade=1), "no whole number of steps of 1/1 decade"),
        (lambda: log_grid(0.0, 1.0, count=3), "needs 0 < low < high"),
        (lambda: log_grid(0.1, 1.0), "one of per_decade and count"),
        (lambda: log_grid(0.1, 1.0, count=1), "count must be at least 2"),
        (lambda: random_uniform(1.0, 1.0), "needs low < high"),
        (
            lambda: points([Axis("a.x", [1, 2, 1])], None, 0),
            "trials 0 and 2 would be the same, a.x",
        ),
        (
            lambda: points([Axis("a.x", [1])], 3, 0),
            "needs an axis of @random_...() or a sweep.study",
        ),
        (lambda: points([Axis("a.x", random_integer(1, 2))], None, 0), "how often a.x is drawn"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(UserError) as caught:
        make()
    said = without_gin_frames(str(caught.value))
    assert message in said and "\n" not in said
