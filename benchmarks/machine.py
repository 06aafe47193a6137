"""What figures were measured on, and how they spread: a part of every file in benchmarks/results."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.protocol import versions

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
# The widest of a processor's vector instructions decide what its products take.
VECTORS = {"avx512f": "AVX-512", "avx2": "AVX2", "asimd": "NEON"}
ENVIRONMENT = ("OMP_", "XLA_", "JAX_PLATFORMS", "MKL_", "CUDA_VISIBLE")


def machine(packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """Processor, memory, load, versions, and environment variables that change timings."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    about: dict[str, str] = {}
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        about = dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in lines if ":" in line)
    flags = about.get("flags", about.get("Features", "")).split()
    return {
        "cpu": about.get("model name", platform.processor()),
        "vectors": next((name for flag, name in VECTORS.items() if flag in flags), None),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 1024**3, 1),
        "system": platform.system(),
        "versions": versions(packages),
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(ENVIRONMENT)
        },
        "load_before": round(os.getloadavg()[0], 2),
    }


def devices(count: int | None = None) -> str:
    """The devices that JAX computes on, or `count` of them, as '8 x cpu'."""
    import jax

    found = jax.devices()
    return f"{count or len(found)} x {found[0].device_kind}"


def processor(about: dict[str, Any]) -> str:
    """The CPU that `machine` found, as 'AMD EPYC with AVX-512'; older files do not tell the latter."""
    return f"{about['cpu']} with {about['vectors']}" if about.get("vectors") else about["cpu"]


def sentence(about: dict[str, Any]) -> str:
    """What `machine` found, for a reader."""
    names = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    busy = about["load_before"] > about["cores"] / 4
    return (
        f"{processor(about)}, {about['cores']} cores, {about['memory_gib']:.0f} GiB of memory, "
        f"{about['system']}; {names}; load {about['load_before']} before"
        + ("; the machine was BUSY with other work, so these figures are too high" if busy else "")
    )


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, median and extremes, and all values in their order."""
    return {
        "mean": statistics.fmean(values),
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "all": list(values),
    }
