"""Runs every aggregator on the same client updates under some strategies, and saves what came out.

    python -m tests.support.side_by_side OUTPUT [STRATEGY:DEVICES:LANES ...]

One algorithm gives its updates to all of them, so that they share one program a strategy.
"""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedexp import runtime
from fedexp.aggregators import (
    a_little_is_enough,
    adaptive_clipping,
    as_aggregator,
    attacked,
    banded_noise,
    bulyan,
    canaries,
    centred_clipping,
    clip_by_norm,
    coordinate_median,
    drive,
    ef21,
    error_feedback,
    gaussian_attack,
    gaussian_noise,
    geometric_median,
    half_precision,
    krum,
    local_noise,
    mean,
    power_sgd,
    qsgd,
    quantize,
    random_k,
    rotated_quantize,
    sign_flip,
    signs,
    terngrad,
    top_k,
    tree_noise,
    trimmed_mean,
)
from fedexp.algorithms import ditto, fedavg, scaffold
from fedexp.contracts import Aggregated, Aggregator, Sent
from fedexp.data import ClientBatching, uniform
from fedexp.engine import Engine
from fedexp.promises import kept_client, kept_server
from fedexp.streams import Stream, derive
from fedexp.tasks import Measure, Task
from tests.support import linear
from tests.support.measured import numbers
from tests.support.strategies import strategy

ROUNDS, COHORT, SIZES = 3, 7, (*linear.SIZES, 4, 6)
OUTPUTS = 4

COMPRESSORS = {
    "quantize": [quantize(8, "entropy")],
    "rotated_quantize": [rotated_quantize(8, block=8)],
    "drive": [drive(block=8)],
    "qsgd": [qsgd(2)],
    "terngrad": [terngrad()],
    "signs": [signs(scaled=False, majority_vote=True)],
    "half_precision": [half_precision()],
    "top_k": [top_k(0.3)],
    "random_k": [random_k(0.3)],
    "power_sgd": [power_sgd(1)],
    "error_feedback": [error_feedback(signs())],
    "ef21": [ef21(top_k(0.3, error_feedback=False))],
    "clip_by_norm": [clip_by_norm(0.3)],
}
RULES = {
    "mean": mean(),
    "coordinate_median": coordinate_median(),
    "trimmed_mean": trimmed_mean(0.2),
    "krum": krum(1),
    "bulyan": bulyan(1),
    "geometric_median": geometric_median(),
    "centred_clipping": centred_clipping(0.1),
    "sign_flip": attacked(None, sign_flip(), 0.6),
    "gaussian_attack": attacked([random_k(0.5), mean()], gaussian_attack(1.0), 0.6),
    "a_little_is_enough": attacked(None, a_little_is_enough(1.5), 0.6),
}


def private() -> dict[str, list[Aggregator]]:
    """Links that hide clients; made late, because a matrix is optimised on the devices."""
    return {
        "gaussian_noise": [clip_by_norm(0.3), gaussian_noise(0.5, 0.3)],
        "adaptive_clipping": [adaptive_clipping(0.5, count_noise=1.0)],
        "tree_noise": [clip_by_norm(0.3), tree_noise(0.5, 0.3, num_rounds=4)],
        "banded_noise": [clip_by_norm(0.3), banded_noise(0.5, 0.3, num_rounds=4, bands=2)],
        "local_noise": [clip_by_norm(0.3), local_noise(0.1, 0.3)],
        "canaries": [canaries(0.5), clip_by_norm(0.3)],
    }


PRIVATE = (
    "gaussian_noise",
    "adaptive_clipping",
    "tree_noise",
    "banded_noise",
    "local_noise",
    "canaries",
)
NAMES = (*RULES, *COMPRESSORS, *PRIVATE)


def several_outputs() -> Task:
    """The linear problem with a matrix of weights, each column from a start of its own."""

    def apply(params, batch, key):
        return batch["x"] @ params["w"]

    def init(key, batch):
        return {"w": jax.random.normal(key, (linear.DIMENSION, OUTPUTS))}

    def loss(outputs, batch):
        error = ((outputs - batch["y"][:, None]) ** 2).mean(axis=1)
        return Measure(error, jnp.ones_like(error))

    return Task(init=init, apply=apply, loss=loss, metrics={})


def side_by_side(chosen: dict[str, Aggregator]) -> Aggregator:
    """EF21's aggregate, with what each of the aggregators would have made of the updates as a metric."""
    numbered = dict(zip(chosen, range(len(chosen)), strict=True))

    def client(state, update, kept, key):
        sent = {
            name: kept_client(one, state[name], update, kept[name], own(key, name))
            for name, one in chosen.items()
        }
        return Sent(
            total={name: (one.total, one.bits) for name, one in sent.items()},
            each={name: one.each for name, one in sent.items()},
            state={name: one.state for name, one in sent.items()},
            metrics={},
            bits=sent["ef21"].bits,
        )

    def server(state, total, each, later, cohort, key):
        results = {
            name: kept_server(
                one, state[name], total[name][0], each[name], None, cohort, own(key, name)
            )
            for name, one in chosen.items()
        }
        metrics = {f"bits of {name}": bits for name, (_, bits) in total.items()}
        for name, result in results.items():
            metrics |= {f"{name} {key}": leaf for key, leaf in result.update.items()}
            metrics |= {f"{name}: {key}": value for key, value in result.metrics.items()}
        states = {name: result.state for name, result in results.items()}
        return Aggregated(results["ef21"].update, states, metrics)

    def own(key, name):
        return derive(key, Stream.AGGREGATION, numbered[name])

    def init(value):
        return {name: one.init(value) for name, one in chosen.items()}

    def init_client(value):
        return {
            name: one.init_client(value) if one.init_client else None
            for name, one in chosen.items()
        }

    # Without `jit` the eager strategy would take most of the time.
    return Aggregator(jax.jit(client), jax.jit(server), init, init_client, reduces=True)


def algorithms(task: Task) -> dict:
    """All aggregators at once in FedAdam, and some where more is sent, or more kept."""
    sgd, server = optax.sgd(0.05), optax.sgd(1.0)
    hiding = {name: [*links, mean()] for name, links in private().items()}
    compressing = {name: [*links, mean()] for name, links in COMPRESSORS.items()}
    given = RULES | compressing | hiding
    everything = side_by_side({name: as_aggregator(one) for name, one in given.items()})
    return {
        "all": fedavg(task, sgd, optax.adam(0.1), aggregator=everything),
        "scaffold": scaffold(task, 0.05, aggregator=[error_feedback(power_sgd(1)), krum(1, 3)]),
        "ditto": ditto(
            task, 0.1, sgd, server, aggregator=[top_k(0.5), quantize(16), coordinate_median()]
        ),
        "private_scaffold": scaffold(task, 0.05, aggregator=hiding["tree_noise"]),
        "private_ditto": ditto(task, 0.1, sgd, server, aggregator=hiding["adaptive_clipping"]),
    }


def main(output: str, *specs: str) -> None:
    jax.config.update("jax_num_cpu_devices", 2)
    runtime.start()
    task, results = several_outputs(), {}
    dataset = linear.dataset(SIZES)
    params = task.init(jax.random.key(0), None)
    for spec in specs:
        name, devices, lanes = spec.split(":")
        for algorithm_name, algorithm in algorithms(task).items():
            engine = Engine(
                strategy(name, int(devices), int(lanes), streamed=False),
                algorithm,
                dataset,
                ClientBatching(8),
                params=params,
                cohort_size=COHORT,
                seed=0,
            )
            state = engine.start(params)
            for number in range(ROUNDS):
                sample = uniform(COHORT).sample(dataset.client_ids, 0, number)
                prepared = engine.prepare(number, sample)
                result = engine.run(state, prepared)
                state = result.state
                found = {
                    key: value
                    for key, value in numbers(result, prepared).items()
                    if key.startswith(("aggregate/", "traffic/"))
                }
                found |= {f"params/{key}": np.asarray(leaf) for key, leaf in state.params.items()}
                if engine.client_states is not None:
                    saved = engine.client_states.save()
                    order = np.argsort(saved["clients"])
                    found |= {f"client/{i}": row[order] for i, row in enumerate(saved["rows"])}
                for key, value in found.items():
                    results[f"{spec}|{algorithm_name}|{number}|{key}"] = value
    if runtime.is_first():
        np.savez(output, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
