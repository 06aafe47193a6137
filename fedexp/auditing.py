"""An epsilon from below: what canaries in a run have told."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedexp.aggregators.canaries import direction, is_canary
from fedexp.data import FederatedDataset
from fedexp.errors import UserError
from fedexp.session import Round


class Audit(NamedTuple):
    """What was found.

    Attributes:
      epsilon: the least that explains how well canaries can be told from others.
      cosines: (canaries,) float64, of each one's direction with what the parameters have changed by.
      size: of the parameters; directions that were not sent have a deviation of 1 / sqrt(size).
    """

    epsilon: float
    cosines: np.ndarray
    size: int


def audit(round_: Round, fraction: float, seed: int = 0, delta: float = 1e-5) -> Audit:
    """Audits a run with `canaries` once, by its last parameters (Andrew et al. 2023, arXiv:2302.03098,
    Algorithm 1).

    What is told apart are the parameters alone. If epsilon is well above what the accountant says, something
    is wrong; if it is far below, whoever sees every round may still learn more. It is an estimate that takes
    the canaries' cosines for normal and has no confidence bound: it needs hundreds of them, and is too high
    by tenths where they take part a different number of times.

    Args:
      round_: the last one, of an algorithm with server SGD.
      fraction: as in `canaries`.
      seed: likewise.
      delta: of the epsilon.

    Raises:
      UserError: fewer than two canaries among the clients.
    """
    session = round_.session
    change = jax.tree.map(lambda now, first: now - first, round_.params, session.params)
    train: FederatedDataset = session.splits["train"]
    clients = np.arange(train.num_clients, dtype=np.int32)
    found = clients[np.asarray(jax.vmap(lambda c: is_canary(c, fraction, seed))(clients))]
    if len(found) < 2:
        raise UserError(f"an audit needs two canaries or more, and there are {len(found)}")
    length = optax.tree.norm(change)

    @jax.jit
    def cosines(clients: jax.Array) -> jax.Array:
        def cosine(client: jax.Array) -> jax.Array:
            return jnp.divide(optax.tree.vdot(direction(change, client, seed), change), length)

        return jax.lax.map(cosine, clients)

    measured = np.asarray(cosines(found), np.float64)
    size = sum(leaf.size for leaf in jax.tree.leaves(change))
    deviations = 1 / np.sqrt(size), measured.std(ddof=1)
    epsilon = between_normals((0.0, deviations[0]), (measured.mean(), deviations[1]), delta)
    return Audit(epsilon, measured, size)


def between_normals(one: tuple[float, float], other: tuple[float, float], delta: float) -> float:
    """The least epsilon, up to 200, at which two normal distributions are (epsilon, delta)-indistinguishable.

    Args:
      one: mean and standard deviation.
      other: likewise.
      delta: how much may be left over.
    """
    reach = 12 * max(one[1], other[1])
    x = np.linspace(min(one[0], other[0]) - reach, max(one[0], other[0]) + reach, 400_001)
    logs = [
        -(((x - mean) / std) ** 2) / 2 - np.log(std * np.sqrt(2 * np.pi))
        for mean, std in (one, other)
    ]

    def left_over(epsilon: float) -> float:
        pairs = (logs, logs[::-1])
        return max(
            np.trapezoid(np.maximum(np.exp(p) - np.exp(np.minimum(epsilon + q, 700)), 0), x)
            for p, q in pairs
        )

    low, high = 0.0, 200.0
    if left_over(low) <= delta:
        return low
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if left_over(middle) > delta else (low, middle)
    return high
