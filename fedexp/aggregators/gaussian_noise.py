"""Gaussian noise on the sum of client updates."""

from __future__ import annotations

import gin

from fedexp.aggregators.noising import noise_on_sum, normal_like
from fedexp.contracts import Aggregator


@gin.configurable
def gaussian_noise(
    noise_multiplier: float | None = gin.REQUIRED,
    norm: float = gin.REQUIRED,
    noise_cohort_size: float | None = None,
) -> Aggregator:
    """The Gaussian mechanism of DP-FedAvg (McMahan et al. 2018, arXiv:1710.06963, Algorithm 1, f_f).

    A link between `clip_by_norm(norm)`, which bounds what one client adds, and `mean()`. Every client counts
    alike, whatever the algorithm says, and the sum of updates plus noise of standard deviation
    noise_multiplier x norm is divided by the expected size of the cohort, since the real one would tell who
    took part. `aggregate/noise_std` is the noise's standard deviation in an entry of the aggregate.

    Args:
      noise_multiplier: None takes what `privacy.epsilon` asks for.
      norm: of the clip before it.
      noise_cohort_size: clients a round of the deployment that is simulated: the noise in the mean is that of
        such a cohort, and so is epsilon (of `privacy.population`). The sampler's cohort if None.

    Raises:
      UserError: a negative multiplier, or a norm or size that is not positive.
    """
    return noise_on_sum(
        *("gaussian_noise", noise_multiplier, norm, noise_cohort_size),
        draw=lambda state, value, key: (normal_like(key, value), state),
    )
