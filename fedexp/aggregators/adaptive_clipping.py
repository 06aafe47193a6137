"""Client updates clipped to a quantile of their norms, with noise."""

from __future__ import annotations

import gin
import jax
import jax.numpy as jnp

from fedexp.aggregators.clip import clipped
from fedexp.aggregators.noising import check_noise, multiplier_for, noised_mean, normal_like
from fedexp.contracts import Aggregator, Cohort, Mechanism, Noise, Sent
from fedexp.errors import check
from fedexp.streams import Stream, derive


@gin.configurable
def adaptive_clipping(
    noise_multiplier: float | None = gin.REQUIRED,
    quantile: float = 0.5,
    initial_norm: float = 0.1,
    learning_rate: float = 0.2,
    count_noise: float | None = None,
    noise_cohort_size: float | None = None,
) -> Aggregator:
    """DP-FedAvg with adaptive clipping (Andrew et al. 2021, arXiv:1905.03871, Algorithm 1).

    A link right before `mean()` that clips and adds noise: C is multiplied by exp(-learning_rate (b -
    quantile)) after every round, where b is the share of clients whose update was not longer than C. That
    count has noise of its own, and the updates so much more that both together have `noise_multiplier`.
    `aggregate/clip_norm` is C, `aggregate/noise_std` the noise's standard deviation in an entry of the mean.

    Args:
      noise_multiplier: None takes what `privacy.epsilon` asks for.
      quantile: of the norms that C goes to, gamma.
      initial_norm: the first C.
      learning_rate: eta_C.
      count_noise: standard deviation of the noise on the count, sigma_b; a twentieth of the cohort if None.
      noise_cohort_size: see `gaussian_noise`.

    Raises:
      UserError: a number out of range, or a count that takes all noise that there is.
    """
    who = "adaptive_clipping"
    check_noise(who, noise_multiplier, initial_norm, noise_cohort_size)
    check((quantile > 0) & (quantile <= 1), f"{who}.quantile must be in (0, 1], got {quantile}")
    check(learning_rate >= 0, f"{who}.learning_rate must not be negative, got {learning_rate}")
    if count_noise is not None:
        check(count_noise >= 0, f"{who}.count_noise must not be negative, got {count_noise}")

    def deviations(cohort: Cohort) -> tuple[float, float, float]:
        """Noise multiplier of all, that of the updates, and the deviation of the count's noise."""
        both = multiplier_for(who, noise_multiplier, cohort)
        if isinstance(both, float | int) and not both:
            return 0.0, 0.0, 0.0
        size = noise_cohort_size or cohort.expected_size
        of_count = size / 20 if count_noise is None else count_noise
        check(
            2 * of_count > both,
            f"{who}.count_noise = {of_count} must be more than half of the noise multiplier, {both}: "
            "what the count tells has to be hidden, too. Raise it, or the cohort",
        )
        # A client moves the centred count by 1/2.
        of_updates = (both**-2 - (2 * of_count) ** -2) ** -0.5
        return both, of_updates, of_count

    def client(norm, update, client_state, key):
        del client_state, key
        value, length = clipped(update.value, norm)
        return Sent(update._replace(value=value, weight=jnp.float32(1)), (length <= norm) - 0.5)

    def server(norm, total, each, later, cohort, key):
        del each
        _, of_updates, of_count = deviations(cohort)
        size = noise_cohort_size or cohort.expected_size
        drawn = jax.random.normal(derive(key, Stream.SERVER))
        share = total / cohort.expected_size + of_count / size * drawn + 0.5
        next_norm = norm * jnp.exp(-learning_rate * (share - quantile))
        noise = normal_like(derive(key, Stream.CLIENT), later)
        result = noised_mean(later, noise, of_updates * norm / size, cohort, next_norm)
        return result._replace(metrics={**result.metrics, "clip_norm": norm})

    def mechanism(cohort):
        open_ = noise_multiplier is None
        return Mechanism(deviations(cohort)[0], cohort_size=noise_cohort_size, open=open_)

    return Aggregator(
        client,
        server,
        init=lambda value: jnp.float32(initial_norm),
        told=lambda norm: norm,
        noise=Noise(mechanism),
    )
