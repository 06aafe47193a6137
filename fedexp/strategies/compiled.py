"""The compiled strategies: one device, the devices of a host, or a mesh of all processes."""

from __future__ import annotations

from typing import Literal

import gin
import jax
from absl import logging

from fedexp.strategies.base import Strategy, refuse_processes
from fedexp.strategies.placement import meshed, one_device, pmapped

Lanes = int | Literal["auto"]


@gin.configurable
def jit(
    lanes: Lanes = "auto", max_resident_bytes: int | None = None, batch_sizes: int = 2
) -> Strategy:
    """One device, one XLA program a round; see `Strategy` for the arguments."""
    refuse_processes("jit")
    return Strategy(one_device(), lanes, max_resident_bytes, batch_sizes)


@gin.configurable
def pmap(
    lanes: Lanes = "auto",
    max_resident_bytes: int | None = None,
    batch_sizes: int = 2,
    num_devices: int | None = None,
) -> Strategy:
    """The devices of one host, all if `num_devices` is None, through `jax.pmap`; see `Strategy`."""
    refuse_processes("pmap")
    return Strategy(pmapped(num_devices), lanes, max_resident_bytes, batch_sizes)


@gin.configurable
def mesh(
    lanes: Lanes = "auto",
    max_resident_bytes: int | None = None,
    batch_sizes: int = 2,
    num_devices: int | None = None,
) -> Strategy:
    """`num_devices` devices of every process, all if None, through `jax.shard_map`; see `Strategy`."""
    return Strategy(meshed(num_devices), lanes, max_resident_bytes, batch_sizes)


@gin.configurable
def auto(
    lanes: Lanes = "auto", max_resident_bytes: int | None = None, batch_sizes: int = 2
) -> Strategy:
    """`jit` where there is one device, `mesh` where there are more; see `Strategy`."""
    devices, processes = jax.device_count(), jax.process_count()
    chosen = jit if devices == 1 else mesh
    logging.info(
        "strategy auto takes %s: %d device(s) in %d process(es)",
        chosen.__name__,
        devices,
        processes,
    )
    return chosen(lanes, max_resident_bytes, batch_sizes)
