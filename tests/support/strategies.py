"""Runs every algorithm under many strategies in one process, and saves what came out.

    python -m tests.support.strategies OUTPUT [STRATEGY:DEVICES:LANES ...]

Meant to be started as a process of its own, or as several with JAX_COORDINATOR_ADDRESS and the like set.
"""

from __future__ import annotations

import sys

import jax
import numpy as np
import optax

from fedexp import runtime
from fedexp.algorithms import fedprox, optimizers, scaffold
from fedexp.data import ClientBatching, uniform
from fedexp.engine import Engine, Packing, debug, jit, mesh, pmap
from fedexp.evaluation import Evaluator
from tests.support import linear
from tests.support.measured import numbers

ROUNDS, COHORT = 4, 5


def algorithms(task):
    sgd = optax.sgd(0.05, momentum=0.5)
    return {
        "fedprox": fedprox(task, 0.1, sgd, optimizers.adam(0.1, bias_correction=False)),
        "scaffold1": scaffold(task, 0.05, option=1),
        "scaffold2": scaffold(task, 0.05, optax.adam(0.1), option=2),
    }


def strategy(name: str, devices: int, lanes: int, streamed: bool):
    packing = Packing(lanes=lanes, max_resident_bytes=0 if streamed else None)
    if name == "debug":
        return debug()
    if name == "jit":
        return jit(packing)
    return {"pmap": pmap, "mesh": mesh}[name](packing, devices)


def run(task, algorithm, chosen) -> dict[str, np.ndarray]:
    """Parameters, metrics, evaluation and client states after ROUNDS rounds."""
    dataset, sampler = linear.dataset(), uniform(COHORT)
    params = task.init(jax.random.key(0), None)
    engine = Engine(
        chosen,
        algorithm,
        dataset,
        ClientBatching(4, local_epochs=2),
        params=params,
        cohort_size=COHORT,
        seed=0,
    )
    state, out = engine.start(params), {}
    for number in range(ROUNDS):
        prepared = engine.prepare(number, sampler.sample(dataset.client_ids, 0, number))
        output = engine.run(state, prepared)
        state = output.state
        out[f"clients/{number}"] = prepared.clients
    out |= {f"metrics/{name}": value for name, value in numbers(output, prepared).items()}
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(state)):
        out[f"state/{jax.tree_util.keystr(path)}"] = np.asarray(leaf)
    result = Evaluator(task, linear.dataset(seed=1), 4, engine.placement)(state.params)
    out |= {f"test/{name}": np.asarray(value) for name, value in result.metrics.items()}
    out |= {f"test_clients/{name}": value for name, value in result.per_client.items()}
    if engine.client_states is not None:
        saved = engine.client_states.save()
        # Which process holds a client decides the order, and nothing else.
        order = np.argsort(saved["clients"])
        out["client_states/clients"] = saved["clients"][order]
        out |= {f"client_states/{i}": row[order] for i, row in enumerate(saved["rows"])}
    return out


def main(output: str, *specs: str) -> None:
    jax.config.update("jax_num_cpu_devices", 8)
    runtime.start()
    task, results = linear.task(noise=0.2), {}
    for spec in specs:
        name, devices, lanes = spec.split(":")
        chosen = strategy(name, int(devices), int(lanes), streamed=int(lanes) == 3)
        for algorithm_name, algorithm in algorithms(task).items():
            for key, value in run(task, algorithm, chosen).items():
                results[f"{spec} {algorithm_name} {key}"] = value
    if runtime.is_first():
        np.savez(output, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
