"""Noise that later rounds take back in part, by a banded matrix."""

from __future__ import annotations

import functools
from typing import Any

import gin
import jax.numpy as jnp

from fedexp.aggregators.noising import noise_on_sum, normal_like
from fedexp.contracts import Aggregator
from fedexp.errors import UserError


@gin.configurable
def banded_noise(
    noise_multiplier: float | None = gin.REQUIRED,
    norm: float = gin.REQUIRED,
    num_rounds: int = gin.REQUIRED,
    bands: int = 16,
    noise_cohort_size: float | None = None,
) -> Aggregator:
    """DP-FTRL by banded matrix factorization (Choquette-Choo et al. 2023, arXiv:2306.08153).

    A link between `clip_by_norm(norm)` and `mean()` that adds C^-1 Z to the rounds' sums, where Z is
    independent and C a lower triangular Toeplitz matrix of `bands` diagonals. Its coefficients have norm 1
    and are optimised for the mean error of sums over rounds, by the library jax-privacy; one band is
    independent noise. Use it with a sampler by which clients take part every `bands` rounds at most, as
    `cyclic`.

    Args:
      noise_multiplier: of Z; None takes what `privacy.epsilon` asks for.
      norm: of the clip before it.
      num_rounds: that C is optimised for, and the most that there may be.
      bands: the memory is bands - 1 times that of the parameters.
      noise_cohort_size: see `gaussian_noise`.

    Raises:
      UserError: a number out of range, or jax-privacy is missing.
    """
    who = "banded_noise"
    if not 1 <= bands <= num_rounds:
        raise UserError(f"{who}.bands must be from 1 to num_rounds, {num_rounds}, got {bands}")
    coefficients = _optimised(int(num_rounds), int(bands))
    inverse = _toeplitz().inverse_as_streaming_matrix(jnp.array(coefficients, jnp.float32))

    return noise_on_sum(
        *(who, noise_multiplier, norm, noise_cohort_size),
        draw=lambda state, value, key: inverse.multiply_next(normal_like(key, value), state),
        init=inverse.init_multiply,
        kind="toeplitz",
        coefficients=coefficients,
        num_rounds=int(num_rounds),
    )


@functools.cache
def _optimised(num_rounds: int, bands: int) -> tuple[float, ...]:
    found = _toeplitz().optimize_banded_toeplitz(n=num_rounds, bands=bands)
    return tuple(found.tolist())


def _toeplitz() -> Any:
    try:
        from jax_privacy.matrix_factorization import toeplitz
    except ImportError as error:
        raise UserError(
            "banded_noise needs the library jax-privacy: pip install 'fedexp[privacy]'"
        ) from error
    return toeplitz
