"""Programs of shipped experiments, compiled for TPUs that are not there.

Data are as large as the published ones, and empty: only clients' sizes matter.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple
from unittest import mock

import gin
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import fedexp.trainer  # noqa: F401  Registers what gin files name.
from benchmarks.round_breakdown import product_flops
from benchmarks.tpu.costs import CHIPS, Chip, Cost, Trips
from fedexp import config
from fedexp.contracts import TRAIN
from fedexp.data import FederatedDataset, FederatedSplits
from fedexp.data.glyphs import example_counts
from fedexp.engine import Engine, Packing, PreparedRound, Strategy
from fedexp.engine.placement import Placement, meshed, one_device, pmapped
from fedexp.errors import UserError
from fedexp.session import Session, Setup
from fedexp.tasks import mean_loss

PLACEMENTS = {"jit": one_device, "pmap": pmapped, "mesh": meshed}

PyTree = Any


# ---- devices that are not there ----


class Described(Placement):
    """Devices of a described topology: what would be put there is only described, too."""

    def split(self, parts: PyTree) -> PyTree:
        sharding = NamedSharding(self.mesh, PartitionSpec(*self.mesh.axis_names))

        def describe(array: np.ndarray) -> jax.ShapeDtypeStruct:
            shape = (self.num_devices, *array.shape[1:])
            return jax.ShapeDtypeStruct(shape, array.dtype, sharding=sharding)

        return jax.tree.map(describe, parts)

    def arguments(self, parts: PyTree) -> PyTree:
        return parts  # A schedule's trips are read from it.

    def replicate(self, tree: PyTree) -> PyTree:
        sharding = NamedSharding(self.mesh, PartitionSpec())
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
        )


def described(topology: str, strategy: str) -> Described:
    """The devices that a strategy takes of a topology, as 'v2:2x2'.

    Raises:
      UserError: libtpu is missing or has no such topology, or there are no figures of the chip.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("TPU programs are compiled by libtpu; pip install 'fedexp[tpu]'")
    if topology.partition(":")[0] not in CHIPS:
        raise UserError(f"--topology must be one of {', '.join(CHIPS)}, as v2:2x2, got {topology}")
    from jax.experimental import topologies

    try:
        devices = topologies.get_topology_desc(topology, "tpu").devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"libtpu has no topology {topology!r}: {error}") from error
    here = PLACEMENTS[strategy]()
    row = np.array(devices[: 1 if strategy == "jit" else None])
    mesh = Mesh(row, here.mesh.axis_names, axis_types=here.mesh.axis_types)
    return Described(mesh, here.transform)


def chip_of(topology: str) -> Chip:
    """What a topology's devices can do."""
    return CHIPS[topology.partition(":")[0]]


def as_on_tpu() -> contextlib.AbstractContextManager[Any]:
    """What fedexp chooses by the backend, it chooses for a TPU."""
    return mock.patch.object(jax, "default_backend", lambda: "tpu")


# ---- what is compiled ----


class Workload(NamedTuple):
    """A shipped experiment, and data of its shape.

    Attributes:
      gin_file: the experiment.
      features: name -> (shape of an example, dtype).
      sizes: (training, test) examples of every client.
    """

    gin_file: str
    features: dict[str, tuple[tuple[int, ...], Any]]
    sizes: Callable[[], Sequence[np.ndarray]]


def log_normal(sigma: float, *splits: tuple[int, int]) -> Callable[[], list[np.ndarray]]:
    """Sizes of (clients, examples) splits, of which no more is published than their means."""

    def sizes() -> list[np.ndarray]:
        rng = np.random.default_rng(0)
        return [
            np.maximum(
                np.rint(examples / clients * rng.lognormal(-(sigma**2) / 2, sigma, clients)), 1
            ).astype(np.int64)
            for clients, examples in splits
        ]

    return sizes


IMAGES = {"x": ((28, 28), np.uint8), "y": ((), np.int32)}
STACKOVERFLOW = log_normal(1.1, (342_477, 135_818_730), (204_088, 16_586_035))
WORKLOADS = {
    "emnist": Workload("emnist_fedadam.gin", IMAGES, example_counts),
    "emnist_autoencoder": Workload("emnist_autoencoder_fedadam.gin", IMAGES, example_counts),
    "cifar100": Workload(
        "cifar100_fedadam.gin",
        {"x": ((32, 32, 3), np.uint8), "y": ((), np.int32)},
        lambda: (np.full(500, 100), np.full(100, 100)),
    ),
    "shakespeare": Workload(
        "shakespeare_fedadam.gin",
        {"tokens": ((81,), np.uint8)},
        log_normal(1.0, (715, 16_068), (715, 2_356)),
    ),
    "stackoverflow": Workload(
        "stackoverflow_nwp_fedadam.gin", {"tokens": ((21,), np.uint16)}, STACKOVERFLOW
    ),
    "stackoverflow_tags": Workload(
        "stackoverflow_tags_fedadam.gin",
        {"words": ((64,), np.uint16), "num_words": ((), np.uint16), "tags": ((5,), np.int16)},
        STACKOVERFLOW,
    ),
}


@gin.configurable
def hollow(workload: str, copies: int = 1) -> FederatedSplits:
    """Data of a workload's shape and sizes, all zeros, which take no memory; every client so often."""
    parts = []
    for sizes in WORKLOADS[workload].sizes():
        sizes = np.tile(sizes, copies)
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        features = {
            name: np.broadcast_to(np.zeros((), dtype), (offsets[-1], *shape))
            for name, (shape, dtype) in WORKLOADS[workload].features.items()
        }
        ids = np.array([f"client{index:06d}" for index in range(len(sizes))])
        parts.append(FederatedDataset(features, offsets, ids, checked=True))
    return FederatedSplits(*parts)


def session_of(
    workload: str,
    topology: str,
    strategy: str,
    lanes: int | Literal["auto"],
    bindings: Sequence[str] = (),
) -> Session:
    """A workload on the devices of a topology, with examples that fit half a device's memory there."""
    placement, chip = described(topology, strategy), chip_of(topology)
    data = ["train.dataset = @hollow()", f"hollow.workload = {workload!r}"]
    gin.clear_config()
    config.load([WORKLOADS[workload].gin_file], [*data, *bindings])
    wanted = {field.name for field in dataclasses.fields(Setup)}
    parts = {name: part for name, part in gin.get_bindings("train").items() if name in wanted}
    packing = Packing(lanes=lanes, max_resident_bytes=int(chip.memory) // 2)
    return Session(Setup(**parts | {"strategy": Strategy(placement, packing)}))


def compiled_round(engine: Engine, params: PyTree, prepared: PreparedRound) -> jax.stages.Compiled:
    """The program of a round, as training runs it."""
    prepared = prepared._replace(by_device=engine.placement.split(prepared.by_device))
    return engine.runner.compiled(engine.start(params), prepared)


def trips(prepared: PreparedRound, batch_sizes: Sequence[int]) -> list[Trips]:
    """How often each device runs the loops of a round."""
    schedule = jax.device_get(prepared.by_device.unpack().passes[TRAIN].schedule)
    found = []
    for bounds, widths, ended, segments in zip(
        schedule.bounds, schedule.widths, schedule.ended, schedule.num_segments, strict=True
    ):
        steps, clients = int(bounds[segments]), int(ended[segments])
        shares = np.bincount(widths[:steps], minlength=len(batch_sizes)) / max(steps, 1)
        found.append(Trips(max(int(segments), 1), steps, shares.tolist(), clients))
    return found


# ---- what comes out ----


def total(parts: dict[str, Cost]) -> Cost:
    return functools.reduce(Cost.plus, parts.values(), Cost())


def memory_of(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Bytes that a program takes on a device."""
    stats: Any = compiled.memory_analysis()
    parts = {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes - stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    return parts | {"all": sum(parts.values())}


def needed_flops(session: Session) -> list[float]:
    """Of a step of each compiled batch size: what its products take, without padding."""
    task, train = session.setup.task, session.splits[TRAIN]

    def of_size(size: int) -> float:
        batch = {
            name: jax.ShapeDtypeStruct((size, *array.shape[1:]), array.dtype)
            for name, array in train.features.items()
        }
        mask, key = jax.ShapeDtypeStruct((size,), bool), jax.random.key(0)
        step = jax.grad(functools.partial(mean_loss, task), has_aux=True)
        # Where a convolution is a product of patches, and nothing but products counts.
        with mock.patch.object(jax, "default_backend", lambda: "gpu"):
            return product_flops(jax.make_jaxpr(step)(session.params, batch, mask, key).jaxpr)

    return [of_size(size) for size in session.engine.preparer.batch_sizes(TRAIN)]
