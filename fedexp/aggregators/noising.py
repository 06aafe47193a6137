"""What aggregators that add noise to a sum have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedexp.contracts import Aggregated, Aggregator, Cohort, Mechanism, Noise, Sent
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


def noise_on_sum(
    who: str,
    noise_multiplier: float | None,
    norm: float,
    noise_cohort_size: float | None,
    draw: Callable[[PyTree, PyTree, jax.Array], tuple[PyTree, PyTree]],
    init: Callable[[PyTree], PyTree] = lambda value: (),
    **of_mechanism: Any,
) -> Aggregator:
    """A link that adds noise to the sum of updates, all of which count alike.

    Args:
      who: its name, for messages.
      noise_multiplier: None takes what `privacy.epsilon` asks for.
      norm: of the clip before it.
      noise_cohort_size: see `gaussian_noise`.
      draw: (state, value, key) -> noise like the value, and the next state.
      init: value -> the first state.
      **of_mechanism: what else there is to say of the noise.
    """
    check_noise(who, noise_multiplier, norm, noise_cohort_size)

    def client(state, update, client_state, key):
        del state, client_state, key
        return Sent(update._replace(weight=jnp.float32(1)))

    def server(state, total, each, later, cohort, key):
        del total, each
        noise, state = draw(state, later, key)
        multiplier = multiplier_for(who, noise_multiplier, cohort)
        std = multiplier * norm / (noise_cohort_size or cohort.expected_size)
        return noised_mean(later, noise, std, cohort, state)

    def mechanism(cohort):
        return Mechanism(
            multiplier_for(who, noise_multiplier, cohort),
            cohort_size=noise_cohort_size,
            open=noise_multiplier is None,
            **of_mechanism,
        )

    return Aggregator(client, server, init, noise=Noise(mechanism, norm))
