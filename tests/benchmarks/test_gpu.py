"""Everything compiles for GPUs that are not there, by XLA's GPU compiler, where JAX has its CUDA plugin."""

from __future__ import annotations

import contextlib
import importlib.util
from unittest import mock

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from benchmarks.tpu import programs
from benchmarks.tpu.costs import Chip, Program
from tests.support import linear, strategies, tasks
from tests.support.compiled import round_on

# What XLA has of an A100 and an H100 (openxla/xla, backends/gpu/target_config/specs).
TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 {}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 }}
device_description_str: "{}"
"""
A100 = """core_count: 108 fpus_per_core: 64 clock_rate_ghz: 1.41 cuda_compute_capability {major: 8}
  shared_memory_per_core: 167936 shared_memory_per_block_optin: 166912 l2_cache_size: 41943040
  memory_bandwidth: 2039040000000 device_memory_size: 85100068864"""
H100 = """core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 cuda_compute_capability {major: 9}
  shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448 l2_cache_size: 52428800
  memory_bandwidth: 3352320000000 device_memory_size: 84942979072"""
GPUS = {"A100": A100, "H100": H100}
CHIP = Chip(
    flops=1e15, bandwidth=3.35e12, memory=80e9, clock=1e9
)  # Of which only the memory is read.

needs_cuda = pytest.mark.skipif(
    not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)),
    reason="JAX's CUDA plugin is not installed: nothing was compiled for GPUs (pip install 'fedexp[cuda]')",
)


def described(gpu: str, strategy: str) -> programs.Described:
    """The devices that a strategy takes of two GPUs, described to the compiler."""
    from jax.experimental import topologies

    target = TARGET.format(GPUS[gpu], gpu)
    found = topologies.get_topology_desc(platform="cuda", topology="1x1x2", target_config=target)
    here = programs.PLACEMENTS[strategy]()
    row = np.array(found.devices[: 1 if strategy == "jit" else None])
    mesh = Mesh(row, here.mesh.axis_names, axis_types=here.mesh.axis_types)
    return programs.Described(mesh, here.transform)


def as_on_gpu() -> contextlib.AbstractContextManager[object]:
    """What fedexp chooses by the backend, it chooses for a GPU."""
    return mock.patch.object(jax, "default_backend", lambda: "gpu")


def sums(compiled: jax.stages.Compiled) -> list[str]:
    """The sums over devices in a program; none may be inside a loop."""
    found = Program(compiled.as_text(), CHIP).collectives()
    assert [opcode for opcode in found["inside"] if "all-reduce" in opcode] == []
    return [opcode for opcode in found["outside"] if opcode in ("all-reduce", "all-reduce-start")]


def round_of(strategy, gpu, *problem) -> jax.stages.Compiled:
    with as_on_gpu():
        return round_on(described(gpu, strategy), *problem)


@needs_cuda
@pytest.mark.slow
@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("name", tasks.TASKS)
def test_every_task_compiles_with_one_sum_over_the_devices(name, gpu):
    problem = tasks.problem(name)
    assert len(sums(round_of("mesh", gpu, *problem, 2, np.arange(4)))) == 1


LINEAR = linear.task(noise=0.2)


@needs_cuda
@pytest.mark.slow
@pytest.mark.parametrize("name", strategies.algorithms(LINEAR))
def test_every_algorithm_compiles(name):
    algorithm = strategies.algorithms(LINEAR)[name]
    sample = strategies.sampler_for(name).sample(linear.dataset().client_ids, 0, 0)
    params = LINEAR.init(jax.random.key(0), None)
    round_of("mesh", "H100", algorithm, linear.dataset(), params, 2, sample)


@needs_cuda
@pytest.mark.slow
@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("strategy", programs.PLACEMENTS)
def test_every_strategy_compiles(strategy, gpu):
    algorithm = strategies.algorithms(LINEAR)["scaffold1"]
    params = LINEAR.init(jax.random.key(0), None)
    for lanes in (1, 3):
        compiled = round_of(strategy, gpu, algorithm, linear.dataset(), params, lanes, np.arange(5))
        # Its first pass, of the control variates, adds nothing up.
        assert len(sums(compiled)) == (0 if strategy == "jit" else 1)


@needs_cuda
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["jit", "mesh"])
@pytest.mark.parametrize("workload", ["emnist", "stackoverflow"])
def test_the_announced_experiments_compile_at_full_size_and_fit(workload, strategy):
    on_gpu = {
        "described": lambda gpu, strategy: described(gpu, strategy),
        "chip_of": lambda _: CHIP,
    }
    with as_on_gpu(), mock.patch.multiple(programs, **on_gpu):
        session = programs.session_of(workload, "H100", strategy, "auto")
        prepared = session.engine.prepare(0, session.sample(0))
        compiled = programs.compiled_round(session.engine, session.params, prepared)
    stats = compiled.memory_analysis()
    print(f"{workload}, {strategy}, {session.engine.preparer.lanes} lanes: {stats}")
    assert stats.argument_size_in_bytes + stats.temp_size_in_bytes < CHIP.memory / 2
    assert len(sums(compiled)) == (0 if strategy == "jit" else 1)
