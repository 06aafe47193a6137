"""fedexp, as its shipped files run it: the auto strategy, and a background thread a round ahead."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gin
import jax
import numpy as np
from protocol import Job, Trainee, serve

import fedexp.trainer  # noqa: F401  What every user's process imports counts.
from fedexp import models, runtime, tasks
from fedexp.algorithms import agnostic, apfl, fedavg, fedprox, hypcluster, mime, scaffold
from fedexp.contracts import Algorithm
from fedexp.data import ClientBatching, FederatedDataset, FederatedSplits, fixed
from fedexp.engine import Engine, auto
from fedexp.session import Session, Setup

WINDOW = 10  # Rounds of agnostic averaging: a class that none of them meets weighs infinitely.
# Workloads and classes whose shipped files take a device for each core.
SMALL = {("emnist_logistic", 62), ("shakespeare_lstm", 90)}


def build_task(job: Job) -> tasks.Task:
    if job.workload.startswith("emnist"):
        model = {"emnist_cnn": models.EmnistCNN, "emnist_logistic": models.EmnistLogistic}
        return tasks.classification(
            model[job.workload](num_classes=job.num_classes),
            num_classes=job.num_classes,
            preprocess=tasks.handwriting,
        )
    sizes = {
        "stackoverflow_lstm": {
            "embedding_size": 96,
            "hidden_size": 670,
            "num_layers": 1,
            "projection_size": 96,
        },
        "shakespeare_lstm": {"embedding_size": 8, "hidden_size": 256, "num_layers": 2},
    }
    model = models.LSTMLanguageModel(vocab_size=job.num_classes, **sizes[job.workload])
    return tasks.next_token(model)


def build_algorithm(job: Job, task: tasks.Task) -> Algorithm:
    """The job's algorithm; its numbers are the same with all peers."""
    sgd = gin.get_configurable("optax.sgd")
    client, server = sgd(job.learning_rate), sgd(1.0)
    base = sgd(job.learning_rate / 10, 0.9)
    domains = {"domain": "y", "domain_learning_rate": 0.01, "window": WINDOW}
    made = {
        "fedavg": lambda: fedavg(task, client, server),
        "fedprox": lambda: fedprox(task, 0.1, client, server),
        "fedprox_adaptive": lambda: fedprox(task, 1.0, client, server, mu_step=0.1),
        "scaffold": lambda: scaffold(task, job.learning_rate),
        "reptile": lambda: fedavg(task, client, server, weigh_by="uniform"),
        "mime": lambda: mime(task, base),
        "mimelite": lambda: mime(task, base, lite=True),
        "agnostic": lambda: agnostic(task, job.num_classes, client, server, **domains),
        "hypcluster": lambda: hypcluster(task, 2, client, server),
        "apfl": lambda: apfl(task, client, server, alpha_rate=job.learning_rate, per_layer=True),
    }
    return made[job.algorithm]()


def bind(job: Job) -> tuple[tasks.Task, Any, Engine]:
    """The task, its first parameters and what runs its rounds, as a run of a Gin file has them."""
    client_ids = np.array([f"client{index}" for index in range(len(job.offsets) - 1)])
    dataset = FederatedDataset(job.features, job.offsets, client_ids)
    task = build_task(job)
    params = task.init(jax.random.key(job.seed), dataset.slice(0, 1))
    if job.workload == "emnist_logistic" and job.algorithm != "hypcluster":
        params = jax.tree.map(np.zeros_like, params)
    setup = Setup(
        FederatedSplits(dataset, dataset),
        dataclasses.replace(task, init=lambda key, batch: params),
        lambda task: build_algorithm(job, task),
        sampler=fixed([[int(client) for client in cohort] for cohort in job.cohorts]),
        batching=ClientBatching(job.batch_size, shuffle=False),
        strategy=auto(),
        evaluations=[],
        seed=job.seed,
    )
    return task, params, Session(setup).engine


def set_up(job: Job) -> Trainee:
    small = (job.workload, job.num_classes) in SMALL
    runtime.start(num_cpu_devices="cores" if small else None)
    task, params, engine = bind(job)
    passes = 1 + len(build_algorithm(job, task).passes)  # Each meets every example once.
    num_parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    state = engine.start(params)
    pool = ThreadPoolExecutor(1)

    def prepare(round_: int):
        return engine.prepare(round_, np.array(job.cohorts[round_ % len(job.cohorts)]))

    upcoming = pool.submit(prepare, 0)

    def train(rounds: range) -> int:
        nonlocal state, upcoming
        examples, metrics = 0, None
        for round_ in rounds:
            prepared = upcoming.result()
            upcoming = pool.submit(prepare, round_ + 1)
            output = engine.run(state, prepared)
            jax.device_get(metrics)  # Those of the round before, while this one runs.
            state, metrics = output.state, (output.metrics, output.per_client)
            examples += prepared.num_examples // passes
        jax.device_get(metrics)
        jax.block_until_ready(state)
        upcoming.result()  # No round is prepared while another library's clock runs.
        return examples

    def norm() -> float:
        # In NumPy: JAX would compile it, in a second that no round takes.
        flat = [np.asarray(leaf).ravel() for leaf in jax.tree.leaves(state.params)]
        return float(np.linalg.norm(np.concatenate(flat)))

    return Trainee(num_parameters, str(jax.devices()[0]), train, norm)


if __name__ == "__main__":
    serve(set_up, ("fedexp", "jax", "jaxlib", "flax", "optax", "numpy"))
