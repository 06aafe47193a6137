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
from fedexp.aggregators import (
    clip_by_norm,
    coordinate_median,
    gaussian_noise,
    mean,
    quantize,
    top_k,
)
from fedexp.algorithms import (
    apfl,
    ditto,
    fedasync,
    fedavg,
    fedbuff,
    feddyn,
    fednova,
    fedper,
    fedprox,
    fedrep,
    fedsgd,
    fine_tuning,
    hypcluster,
    mime,
    optimizers,
    per_fedavg,
    pfedme,
    q_fedavg,
    scaffold,
)
from fedexp.data import ClientBatching, Clock, Sampler, asynchronous, uniform
from fedexp.engine import Engine, Packing, debug, jit, mesh, pmap
from fedexp.evaluation import ClientEvaluator, Evaluator
from tests.support import linear
from tests.support.measured import numbers

ROUNDS, COHORT = 3, 5

EVERYWHERE = ("fedprox", "scaffold1")
# Compiling takes its time: the other algorithms run under these alone.
WIDE = ("debug:1:1", "jit:1:3", "pmap:2:3", "mesh:2:3", "mesh:4:3")
# Whose clients train from what they have fetched rounds ago.
ASYNCHRONOUS = ("fedbuff", "fedasync")
# Made of the same pieces as others.
FEW = ("debug:1:1", "jit:1:3", "mesh:2:3")
NARROW = {
    name: FEW
    for name in (
        *("scaffold2", "scaffold_chain", "fedper"),
        *(
            "median",
            "mime",
            "frozen",
            "fednova",
            "feddyn",
            "q_fedavg",
            "ditto",
            "hypcluster",
            "kmeans++",
        ),
        *("pfedme", "per_fedavg", "fedrep", "fedsgd", *ASYNCHRONOUS),
    )
}


def algorithms(task):
    sgd, server = optax.sgd(0.05, momentum=0.5), optax.sgd(1.0)
    links = [top_k(0.5), quantize(64), clip_by_norm(0.5), gaussian_noise(0.1, 0.5), mean()]
    return {
        "fedprox": fedprox(
            task, 0.1, sgd, optimizers.adam(0.1, bias_correction=False), mu_step=0.1, mu_patience=1
        ),
        "scaffold1": scaffold(task, 0.05, option=1),
        "scaffold2": scaffold(task, 0.05, optax.adam(0.1), option=2),
        "chain": fedavg(task, sgd, server, aggregator=links),
        "scaffold_chain": scaffold(task, 0.05, aggregator=[top_k(0.5), mean()]),
        "median": fedavg(task, sgd, server, aggregator=coordinate_median()),
        "mime": mime(task, sgd, full_batch_size=5),
        "apfl": apfl(task, sgd, server, 0.3, 0.05),
        "fedper": fedper(task, sgd, server, local="^b$"),
        "frozen": fedper(task, sgd, server, frozen="^b$"),
        "fednova": fednova(task, 0.05, server, 0.5),
        "feddyn": feddyn(task, 0.5, sgd),
        "q_fedavg": q_fedavg(task, 1.0, 0.05, full_batch_size=5),
        "ditto": ditto(task, 0.1, sgd, server),
        "hypcluster": hypcluster(task, 2, sgd, optax.adam(0.1)),
        "kmeans++": hypcluster(task, 3, sgd, server, "kmeans++", full_batch_size=5),
        "pfedme": pfedme(task, 2.0, sgd, 0.2, server, num_steps=2),
        "per_fedavg": per_fedavg(task, 0.05, sgd, server, delta=0.1),
        "fedrep": fedrep(task, "^b$", sgd, sgd, server, ClientBatching(3)),
        "fedsgd": fedsgd(task, optax.adam(0.1)),
        "fedbuff": fedbuff(task, sgd, server, max_staleness=1),
        "fedasync": fedasync(task, 0.6, sgd, rho=0.5),
    }


def runs(algorithm: str, spec: str) -> bool:
    """Whether an algorithm is run under a strategy."""
    return algorithm in EVERYWHERE or spec in NARROW.get(algorithm, WIDE)


def strategy(name: str, devices: int, lanes: int, streamed: bool):
    packing = Packing(lanes=lanes, max_resident_bytes=0 if streamed else None)
    if name == "debug":
        return debug()
    if name == "jit":
        return jit(packing)
    return {"pmap": pmap, "mesh": mesh}[name](packing, devices)


def sampler_for(algorithm: str) -> Sampler:
    """Cohorts of COHORT clients."""
    if algorithm not in ASYNCHRONOUS:
        return uniform(COHORT)
    clock = Clock(seconds_per_example=1.0)
    return asynchronous(clock, len(linear.SIZES), COHORT).bound_to(np.array(linear.SIZES))


def evaluations(algorithm: str, spec: str) -> set[str]:
    """What is measured besides training, whose programs take as long to compile again."""
    some = {"own"} if spec in FEW or (spec in WIDE and algorithm in EVERYWHERE) else set()
    return some | ({"test", "tuned"} if spec in WIDE and algorithm in EVERYWHERE else set())


def run(task, algorithm, chosen, sampler: Sampler, measured: set[str]) -> dict[str, np.ndarray]:
    """Parameters, metrics, evaluations and client states after ROUNDS rounds."""
    dataset = linear.dataset()
    params = task.init(jax.random.key(0), None)
    engine = Engine(
        chosen,
        algorithm,
        {"train": dataset, "test": linear.dataset(seed=1)},
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
    out |= {f"params/{name}": np.asarray(leaf) for name, leaf in state.params.items()}
    if "test" in measured:
        result = Evaluator(task, linear.dataset(seed=1), 4, engine.placement)(state.params)
        out |= {f"test/{name}": np.asarray(value) for name, value in result.metrics.items()}
        out |= {f"test_clients/{name}": value for name, value in result.per_client.items()}
    tuning = fine_tuning(task, optax.sgd(0.05), ClientBatching(3))
    for name, way in {"own": algorithm.personalise, "tuned": tuning}.items():
        if name in measured and way is not None:
            evaluate = ClientEvaluator(task, way, engine, "test", 4, number=0)
            result = evaluate(state, ROUNDS, np.arange(dataset.num_clients))
            out |= {f"{name}/{key}": np.asarray(v) for key, v in result.metrics.items()}
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
            if not runs(algorithm_name, spec):
                continue
            sampler = sampler_for(algorithm_name)
            measured = evaluations(algorithm_name, spec)
            for key, value in run(task, algorithm, chosen, sampler, measured).items():
                results[f"{spec} {algorithm_name} {key}"] = value
    if runtime.is_first():
        np.savez(output, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
