"""What aggregators that add noise to a sum have in common."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedexp.contracts import Aggregated, Cohort
from fedexp.errors import UserError, check

PyTree = Any


def check_noise(
    who: str, noise_multiplier: float | None, norm: float, noise_cohort_size: float | None = None
) -> None:
    """Refuses numbers that no noise has."""
    if noise_multiplier is not None:
        check(
            noise_multiplier >= 0,
            f"{who}.noise_multiplier must not be negative, got {noise_multiplier}",
        )
    check(norm > 0, f"{who}.norm must be positive, got {norm}")
    if noise_cohort_size is not None:
        check(
            noise_cohort_size > 0,
            f"{who}.noise_cohort_size must be positive, got {noise_cohort_size}",
        )


def multiplier_for(who: str, given: float | None, cohort: Cohort) -> float:
    """The noise multiplier that was given, or that the target epsilon asks for.

    Raises:
      UserError: there is neither.
    """
    if given is not None:
        return given
    if cohort.noise_multiplier is None:
        raise UserError(
            f"{who}.noise_multiplier is None, and there is no privacy.epsilon to find it from; bind one of "
            "them"
        )
    return cohort.noise_multiplier


def normal_like(key: jax.Array, tree: PyTree) -> PyTree:
    """Independent standard normal numbers, shaped like a tree."""
    return optax.tree.random_like(key, tree, jax.random.normal)


def noised_mean(
    mean: PyTree, noise: PyTree, std: jax.Array | float, cohort: Cohort, state: PyTree
) -> Aggregated:
    """The sum of a cohort's updates plus noise, over the expected size of a cohort.

    Args:
      mean: of the real cohort; of equal weights.
      noise: like it, of variance 1 where it is independent.
      std: of the noise in the result.
      cohort: of the round.
      state: the aggregator's next one.
    """
    share = cohort.size / cohort.expected_size
    update = jax.tree.map(lambda leaf, drawn: share * leaf + std * drawn, mean, noise)
    return Aggregated(update, state, {"noise_std": jnp.float32(std)})
