"""What a strategy is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax

from fedexp.errors import UserError
from fedexp.strategies.engine import run_clients
from fedexp.strategies.placement import Placement

_ACCELERATOR_LANES = 32


@dataclasses.dataclass(frozen=True)
class Strategy:
    """Where a cohort runs.

    Attributes:
      placement: the devices.
      lanes: clients that train side by side on each device. 'auto' takes 1 on CPU, where a single
        lane's products keep the cores busy, and up to 32 on accelerators.
      max_resident_bytes: data sets up to this size stay on the devices; of larger ones every cohort's
        examples are transferred. Half of a device's memory if None.
      batch_sizes: how many sizes of batches may be compiled, so that the remainders of small clients
        are not padded to a full batch; one more is taken where it saves 5 % of the computed examples.
      run_clients: runs one device's clients; see `engine.run_clients`.
      compiled: whether a round is compiled to one program.

    Raises:
      UserError: lanes or batch_sizes below 1.
    """

    placement: Placement
    lanes: int | Literal["auto"] = "auto"
    max_resident_bytes: int | None = None
    batch_sizes: int = 2
    run_clients: Callable[..., tuple[Any, Any]] = run_clients
    compiled: bool = True

    def __post_init__(self) -> None:
        if self.lanes != "auto" and (not isinstance(self.lanes, int) or self.lanes < 1):
            raise UserError(f"lanes must be 'auto' or a number from 1, got {self.lanes!r}")
        if self.batch_sizes < 1:
            raise UserError(f"batch_sizes must be at least 1, got {self.batch_sizes}")

    def num_lanes(self, cohort_size: int) -> int:
        """Lanes of each device for cohorts of about this size."""
        if self.lanes != "auto":
            return self.lanes
        if jax.default_backend() == "cpu":
            return 1
        return max(1, min(cohort_size // self.placement.num_devices, _ACCELERATOR_LANES))


def refuse_processes(name: str) -> None:
    """Raises UserError if there is more than one process."""
    if jax.process_count() > 1:
        raise UserError(
            f"the strategy {name} is for one process and there are {jax.process_count()}; "
            "use train.strategy = @mesh()"
        )
