"""The strategies by their Gin names: one device, the devices of a host, or a mesh of all processes.

How clients are packed there is the same for all of them: bind `Packing.lanes` and its like.
"""

from __future__ import annotations

import gin
import jax
from absl import logging

from fedexp.engine import debug as debugging
from fedexp.engine.placement import meshed, one_device, pmapped
from fedexp.engine.strategy import Packing, Strategy
from fedexp.errors import UserError


@gin.configurable
def jit(packing: Packing | None = None) -> Strategy:
    """One device, one XLA program a round.

    Args:
      packing: how clients are laid out on it; `Packing()` as Gin binds it if None.

    Raises:
      UserError: there are several processes.
    """
    _refuse_processes("jit")
    return Strategy(one_device(), packing or Packing())


@gin.configurable
def pmap(packing: Packing | None = None, num_devices: int | None = None) -> Strategy:
    """The devices of one host, through `jax.pmap`.

    Args:
      packing: how clients are laid out on each; `Packing()` as Gin binds it if None.
      num_devices: how many of them, from the first one on; all if None.

    Raises:
      UserError: there are several processes, or not so many devices.
    """
    _refuse_processes("pmap")
    return Strategy(pmapped(num_devices), packing or Packing())


@gin.configurable
def mesh(packing: Packing | None = None, num_devices: int | None = None) -> Strategy:
    """The devices of all processes, through `jax.shard_map`.

    Args:
      packing: how clients are laid out on each; `Packing()` as Gin binds it if None.
      num_devices: how many of every process, from its first one on; all if None.

    Raises:
      UserError: a process has not so many devices.
    """
    return Strategy(meshed(num_devices), packing or Packing())


@gin.configurable
def auto(packing: Packing | None = None) -> Strategy:
    """`jit` where there is one device, `mesh` where there are more.

    Args:
      packing: how clients are laid out on each; `Packing()` as Gin binds it if None.
    """
    devices, processes = jax.device_count(), jax.process_count()
    chosen = jit if devices == 1 else mesh
    logging.info(
        "strategy auto takes %s: %d device(s) in %d process(es)",
        chosen.__name__,
        devices,
        processes,
    )
    return chosen(packing)


@gin.configurable
def debug() -> Strategy:
    """Runs a cohort client by client, eagerly, with the numbers of every other strategy.

    Use it to step through an algorithm with a debugger. It also stops at the first step that makes a
    carry not finite, where compiled strategies only see the round's sums. It has no use for `Packing`.
    """
    _refuse_processes("debug")
    packing = Packing(lanes=1, max_resident_bytes=None)
    return Strategy(one_device(), packing, debugging.run_clients, compiled=False)


def _refuse_processes(name: str) -> None:
    """Raises UserError if there is more than one process."""
    if jax.process_count() > 1:
        raise UserError(
            f"the strategy {name} is for one process and there are {jax.process_count()}; "
            "use train.strategy = @mesh()"
        )
