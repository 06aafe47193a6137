"""Mime and MimeLite against Karimireddy et al. 2021, Algorithm 1, in NumPy."""

from __future__ import annotations

import dataclasses

import numpy as np
import optax
import pytest

from fedexp.algorithms import mime
from fedexp.data import ClientBatching
from fedexp.engine import Packing, jit
from fedexp.errors import UserError
from tests.support import linear
from tests.support.clients import COHORTS, batches, design, first, gradient, run, vector

RATE, BETA = 0.03, 0.8


def reference(lite: bool, epochs: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Heavy-ball momentum m <- beta m + g as the base optimizer; its statistics are m."""
    x, momentum = first(), np.zeros(4)
    for cohort in COHORTS:
        control = np.mean([gradient(*design(client), x) for client in cohort], axis=0)
        after = []
        for client in cohort:
            y = x.copy()
            for _ in range(epochs):
                for xb, yb in batches(client):
                    g = gradient(xb, yb, y)
                    g = g if lite else g - gradient(xb, yb, x) + control
                    y -= RATE * (BETA * momentum + g)
            after.append(y)
        x = np.mean(after, axis=0)
        momentum = BETA * momentum + control
    return x, momentum


@pytest.mark.parametrize("lite", [True, False])
@pytest.mark.parametrize("strategy", [jit, lambda: jit(Packing(lanes=3))])
def test_three_rounds_equal_numpy(lite, strategy):
    algorithm = mime(linear.task(), optax.sgd(RATE, momentum=BETA), lite=lite, full_batch_size=6)
    _, output = run(algorithm, strategy())
    params, momentum = reference(lite)
    np.testing.assert_allclose(vector(output.state.params), params, rtol=1e-5, atol=1e-5)
    trace = output.state.opt_state[0].trace
    np.testing.assert_allclose(vector(trace), momentum, rtol=1e-5, atol=1e-5)


def test_the_full_gradient_is_one_pass_whatever_the_local_epochs():
    algorithm = mime(linear.task(), optax.sgd(RATE, momentum=BETA))
    _, output = run(algorithm, batching=ClientBatching(4, local_epochs=3, shuffle=False))
    params, _ = reference(lite=False, epochs=3)
    np.testing.assert_allclose(vector(output.state.params), params, rtol=1e-5, atol=1e-5)


def test_losses_that_are_sums_are_refused():
    task = dataclasses.replace(linear.task(), sum_loss=True)
    with pytest.raises(UserError, match="a full gradient is a mean"):
        run(mime(task, optax.sgd(RATE)))
