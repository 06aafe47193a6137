"""What a strategy is: where a cohort runs, and how it is packed there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import gin
import jax

from fedexp.engine.loop import run_clients
from fedexp.engine.placement import Placement
from fedexp.errors import UserError

_GPU_LANES = 32
_DEFAULT_RESIDENT_BYTES = 4 << 30


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Packing:
    """How clients and their examples are laid out on the devices of any strategy.

    Attributes:
      lanes: clients that train side by side on each device. 'auto' takes 1 on CPU, where a single
        lane's products keep the cores busy, and on TPU, and up to 32 on GPUs.
      batch_sizes: how many sizes of batches may be compiled, so that the remainders of small clients
        are not padded to a full batch; one more is taken where it saves 5 % of the computed examples.
      max_resident_bytes: splits up to this size together stay on the devices; of others every cohort's
        examples are transferred. If None, half of a device's memory, where it tells; virtual CPU devices
        share 4 GiB.

    Raises:
      UserError: lanes or batch_sizes out of range.
    """

    lanes: int | Literal["auto"] = "auto"
    batch_sizes: int = 2
    max_resident_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.lanes != "auto" and not (isinstance(self.lanes, int) and 1 <= self.lanes <= 4096):
            raise UserError(f"lanes must be 'auto' or a number from 1 to 4096, got {self.lanes!r}")
        if self.batch_sizes < 1:
            raise UserError(f"batch_sizes must be at least 1, got {self.batch_sizes}")

    def resident_bytes(self) -> int:
        """Bytes of examples that may stay on a device."""
        if self.max_resident_bytes is not None:
            return self.max_resident_bytes
        stats = jax.local_devices()[0].memory_stats() or {}
        if "bytes_limit" in stats:
            return stats["bytes_limit"] // 2
        return _DEFAULT_RESIDENT_BYTES // jax.local_device_count()


@dataclasses.dataclass(frozen=True)
class Strategy:
    """Where a cohort runs.

    Attributes:
      placement: the devices.
      packing: how clients are laid out on them; `Packing()` as Gin binds it if None.
      run_clients: runs one device's clients; see `loop.run_clients`.
      compiled: whether a round is compiled to one program.
    """

    placement: Placement
    packing: Packing = dataclasses.field(default_factory=lambda: Packing())
    run_clients: Callable[..., tuple[Any, Any]] = run_clients
    compiled: bool = True

    def num_lanes(self, cohort_size: int) -> int:
        """Lanes of each device for cohorts of about this size."""
        if self.packing.lanes != "auto":
            return self.packing.lanes
        if jax.default_backend() in ("cpu", "tpu"):
            return 1
        return max(1, min(cohort_size // self.placement.num_devices, _GPU_LANES))
