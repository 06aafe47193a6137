"""One device, one XLA program a round."""

from __future__ import annotations

from typing import Literal

import gin
import jax

from fedexp.errors import UserError
from fedexp.strategies.engine import for_each_client
from fedexp.strategies.runner import Runner

_ACCELERATOR_LANES = 32


@gin.configurable
def jit(lanes: int | Literal["auto"] = "auto", max_resident_bytes: int | None = None):
    """Runs a cohort on the first device.

    Args:
      lanes: clients that train side by side. 'auto' takes 1 on CPU, where lanes share the cores that a
        single lane's products fill already, and up to 32 on accelerators.
      max_resident_bytes: data sets up to this size stay on the device; larger ones are transferred
        cohort by cohort. Half of the device's memory if None.

    Raises:
      UserError: lanes below 1.
    """
    if lanes != "auto" and (not isinstance(lanes, int) or lanes < 1):
        raise UserError(f"jit.lanes must be 'auto' or a number from 1, got {lanes!r}")

    def bind(algorithm, dataset, batching, *, params, cohort_size, seed) -> Runner:
        return Runner(
            algorithm,
            dataset,
            batching,
            params=params,
            cohort_size=cohort_size,
            seed=seed,
            lanes=_auto_lanes(cohort_size) if lanes == "auto" else lanes,
            for_each_client=for_each_client,
            max_resident_bytes=max_resident_bytes,
        )

    return bind


def _auto_lanes(cohort_size: int) -> int:
    if jax.default_backend() == "cpu":
        return 1
    return max(1, min(cohort_size, _ACCELERATOR_LANES))
