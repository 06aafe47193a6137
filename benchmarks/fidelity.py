"""Trains FedJAX's algorithms in FedJAX and in fedexp, on the same inputs, and compares what comes out.

    python -m benchmarks.fidelity --fedjax_python=PATH --fedjax_source=PATH

8 clients of 20 examples, a linear model, 4 rounds of 6 clients, three local steps on all examples at once:
nothing is drawn and no order matters, so that the parameters must agree up to rounding. APFL trains all
clients in every round, because FedJAX's v starts at the server's parameters when a client is first sampled,
and the paper's at the first ones; it is compared as it is, and with the factor alpha in v's gradient that
FedJAX leaves out. By k-means++ there are two models: a third one may be the same client's again in FedJAX.
benchmarks/README.md tells how to set FedJAX up.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

CLIENTS, EXAMPLES, DIMENSION, ROUNDS, COHORT, STEPS = 8, 20, 5, 4, 6, 3
CLUSTERS, DOMAINS = 3, 3
RATE, MOMENTUM, SERVER_RATE, MU, DOMAIN_RATE, ALPHA = 0.05, 0.5, 0.1, 0.3, 0.2, 0.4
TOLERANCE = 1e-5
RESULTS = Path(__file__).parent / "results" / "fidelity.json"

# What a library makes of an algorithm: name -> array; and of all: algorithm -> that.
Arrays = dict[str, np.ndarray]
Outcome = dict[str, Arrays]


def problem(seed: int) -> Arrays:
    """Clients of two kinds, cohorts, domains, and where models start."""
    rng = np.random.default_rng(seed)
    true = rng.normal(size=(2, DIMENSION)).repeat(CLIENTS // 2, axis=0)
    x = rng.normal(size=(CLIENTS, EXAMPLES, DIMENSION))
    y = np.einsum("ced,cd->ce", x, true) + rng.normal(scale=0.3, size=(CLIENTS, EXAMPLES))
    return {
        "x": x.astype(np.float32),
        "y": y.astype(np.float32),
        "domain_id": rng.integers(0, DOMAINS, (CLIENTS, EXAMPLES)).astype(np.int32),
        "cohorts": np.stack([rng.permutation(CLIENTS)[:COHORT] for _ in range(ROUNDS)]),
        "w": rng.normal(size=(CLUSTERS, DIMENSION)).astype(np.float32),
        "b": rng.normal(size=CLUSTERS).astype(np.float32),
    }


def of_fedexp(data: Arrays) -> Outcome:
    """Every algorithm, in fedexp."""
    import jax
    import jax.numpy as jnp
    import optax

    from fedexp.algorithms import agnostic, apfl, fedavg, fedprox, hypcluster, mime
    from fedexp.data import ClientBatching, FederatedDataset
    from fedexp.engine import Engine, jit
    from fedexp.tasks import Measure, Task

    dataset = FederatedDataset.from_clients(
        {
            f"client{i}": {name: data[name][i] for name in ("x", "y", "domain_id")}
            for i in range(CLIENTS)
        }
    )
    params = {"w": jnp.asarray(data["w"][0]), "b": jnp.asarray(data["b"][0])}

    def apply(params, batch, key):
        return batch["x"] @ params["w"] + params["b"]

    def loss(outputs, batch):
        return Measure((outputs - batch["y"]) ** 2, jnp.ones_like(outputs))

    task = Task(init=lambda key, batch: params, apply=apply, loss=loss)

    def train(algorithm, cohorts, models=None) -> tuple[Engine, Any]:
        batching = ClientBatching(EXAMPLES, local_epochs=STEPS, shuffle=False)
        size = len(cohorts[0])
        engine = Engine(
            jit(), algorithm, dataset, batching, params=params, cohort_size=size, seed=0
        )
        state = engine.start(params)
        state = state if models is None else state._replace(models=models)
        for number, cohort in enumerate(cohorts):
            state = engine.run(state, engine.prepare(number, cohort)).state
        return engine, jax.device_get(state)

    sgd, one, adam = optax.sgd(RATE, MOMENTUM), optax.sgd(1.0), optax.adam(SERVER_RATE)
    plain = optax.sgd(RATE)
    of_domains = {"domain_learning_rate": DOMAIN_RATE, "domain": "domain_id", "window": 2}
    cohorts, out = data["cohorts"], {}
    for name, algorithm in {
        "fed_avg": fedavg(task, sgd, one),
        "fed_avg, Adam": fedavg(task, sgd, adam),
        "fed_prox": fedprox(task, MU, sgd, one),
        "mime": mime(task, sgd),
        "mime, Adam": mime(task, adam),
        "mime_lite": mime(task, sgd, lite=True),
        "mime_lite, Adam": mime(task, adam, lite=True),
        "agnostic_fed_avg": agnostic(task, DOMAINS, sgd, one, **of_domains),
    }.items():
        state = train(algorithm, cohorts)[1]
        out[name] = dict(state.params)
        if name == "agnostic_fed_avg":
            out[name]["domain_weights"] = state.domain_weights
    everyone = np.arange(CLIENTS)
    mixtures = apfl(task, plain, one, ALPHA, RATE, per_layer=True)
    engine, state = train(mixtures, [everyone] * ROUNDS)
    own = jax.device_get(engine.client_states.gather(everyone, everyone, (CLIENTS,)).own)
    out["apfl"] = state.params | _named(v=own["v"], alpha=own["alpha"])
    out["apfl, with the factor"] = out["apfl"]
    models = {"w": data["w"], "b": data["b"]}
    state = train(hypcluster(task, CLUSTERS, sgd, one), cohorts, models)[1]
    out["hyp_cluster"] = dict(state.models)
    still = hypcluster(task, 2, sgd, optax.sgd(0.0), "kmeans++")
    out["hyp_cluster, k-means++"] = dict(train(still, [everyone])[1].models)
    return out


def of_fedjax(data: Arrays) -> Outcome:
    """As `of_fedexp`, in FedJAX's interpreter."""
    import fedjax
    import jax
    import jax.numpy as jnp
    from fedjax.algorithms import apfl, hyp_cluster

    clip = jnp.clip

    def clip_as_before(x: Any, a_min: Any = None, a_max: Any = None, **kwargs: Any) -> Any:
        return clip(x, a_min, a_max, **kwargs)

    jnp.clip = clip_as_before  # APFL calls it by names that JAX has no longer.
    algorithms, optimizers = fedjax.algorithms, fedjax.optimizers
    clients = [
        (
            f"client{i}".encode(),
            fedjax.ClientDataset({name: data[name][i] for name in ("x", "y", "domain_id")}),
            jax.random.PRNGKey(i),
        )
        for i in range(CLIENTS)
    ]
    params = {"w": jnp.asarray(data["w"][0]), "b": jnp.asarray(data["b"][0])}

    def losses(params, batch, rng):
        return (batch["x"] @ params["w"] + params["b"] - batch["y"]) ** 2

    def mean_loss(params, batch, rng):
        return jnp.mean(losses(params, batch, rng))

    grad = jax.grad(mean_loss)
    local = fedjax.ShuffleRepeatBatchHParams(EXAMPLES, num_epochs=STEPS, skip_shuffle=True)
    whole = fedjax.PaddedBatchHParams(EXAMPLES)

    def train(algorithm, start=params, cohorts=data["cohorts"]):
        state = algorithm.init(start)
        for cohort in cohorts:
            state, _ = algorithm.apply(state, [clients[i] for i in cohort])
        return state

    sgd, one = optimizers.sgd(RATE, MOMENTUM), optimizers.sgd(1.0)
    adam, plain = optimizers.adam(SERVER_RATE), optimizers.sgd(RATE)
    mime, lite = algorithms.mime.mime, algorithms.mime_lite.mime_lite
    averaging = algorithms.fed_avg.federated_averaging
    weights = jnp.full(DOMAINS, 1 / DOMAINS)
    out: dict[str, Any] = {
        "fed_avg": train(averaging(grad, sgd, one, local)).params,
        "fed_avg, Adam": train(averaging(grad, sgd, adam, local)).params,
        "fed_prox": train(algorithms.fed_prox.fed_prox(losses, sgd, one, local, MU)).params,
        "mime": train(mime(losses, sgd, local, whole, 1.0)).params,
        "mime, Adam": train(mime(losses, adam, local, whole, 1.0)).params,
        "mime_lite": train(lite(losses, sgd, local, whole, 1.0)).params,
        "mime_lite, Adam": train(lite(losses, adam, local, whole, 1.0)).params,
    }
    state = train(
        algorithms.agnostic_fed_avg.agnostic_federated_averaging(
            losses, sgd, one, local, whole, weights, DOMAIN_RATE, domain_window_size=2
        )
    )
    out["agnostic_fed_avg"] = {**state.params, "domain_weights": state.domain_weights}

    def mixtures(grad):
        make = apfl.adaptive_personalized_federated_learning
        everyone = [range(CLIENTS)] * ROUNDS
        state = train(make(grad, plain, one, local, ALPHA), cohorts=everyone)
        kept = [state.client_states[name] for name, _, _ in clients]
        v = _stacked([client.params for client in kept])
        alpha = _stacked([client.interpolation_coefficients for client in kept])
        return state.params | _named(v=v, alpha=alpha)

    out["apfl"] = mixtures(grad)
    seen: dict[str, Any] = {}
    interpolate, of_alpha = apfl.interpolate_params, apfl.interpolation_grad_fn

    def interpolated(alpha, v, w):
        seen.update(alpha=alpha, mixture=interpolate(alpha, v, w))
        return seen["mixture"]

    def with_factor(params, batch, rng):
        found = grad(params, batch, rng)
        if params is not seen.get("mixture"):
            return found
        seen["grads"] = found
        return jax.tree_util.tree_map(jnp.multiply, seen["alpha"], found)

    apfl.interpolate_params = interpolated
    apfl.interpolation_grad_fn = lambda grads, v, w: of_alpha(seen["grads"], v, w)
    out["apfl, with the factor"] = mixtures(with_factor)

    starts = [{"w": w, "b": b} for w, b in zip(data["w"], data["b"], strict=True)]
    state = train(hyp_cluster.hyp_cluster(losses, sgd, one, whole, local), starts)
    out["hyp_cluster"] = _stacked(state.cluster_params)
    alone = hyp_cluster.ClientParamsTrainer(grad, sgd)
    measure = fedjax.AverageLossEvaluator(losses)
    begins = [
        hyp_cluster.kmeans_init(
            2, params, clients, alone, local, measure, whole, jax.random.PRNGKey(seed)
        )
        for seed in range(4 * CLIENTS)  # Each draws the first client.
    ]
    out["hyp_cluster, k-means++"] = _stacked([_stacked(begin) for begin in begins])
    return {name: {k: np.asarray(v) for k, v in found.items()} for name, found in out.items()}


def _named(**trees: Any) -> dict[str, Any]:
    return {
        f"{name}/{key}": np.asarray(leaf)
        for name, tree in trees.items()
        for key, leaf in tree.items()
    }


def _stacked(models: list[Any]) -> dict[str, np.ndarray]:
    return {name: np.stack([model[name] for model in models]) for name in models[0]}


def differences(ours: Outcome, theirs: Outcome) -> dict[str, dict[str, float]]:
    """Algorithm -> array -> |ours - theirs| over |theirs|, in L2.

    Of FedJAX's starts by k-means++, whose first client is drawn, those that are next to ours.
    """

    def relative(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.linalg.norm(a - b) / np.linalg.norm(b))

    found: dict[str, dict[str, float]] = {}
    for name, arrays in ours.items():
        other = theirs[name]
        if name.endswith("k-means++"):
            gaps = [relative(arrays["w"], begin) for begin in other["w"]]
            other = {key: leaf[int(np.argmin(gaps))] for key, leaf in other.items()}
        found[name] = {key: relative(leaf, other[key]) for key, leaf in arrays.items()}
    return found


def elsewhere(python: str, source: str | None, data: Arrays) -> Outcome:
    """What FedJAX makes of it, in its own interpreter."""
    with tempfile.TemporaryDirectory() as folder:
        given, result = Path(folder) / "data.npz", Path(folder) / "result.npz"
        np.savez(given, **data)
        command = [python, __file__, f"--arrays={given}", f"--output={result}"]
        environment = {"PYTHONPATH": source} if source else {}
        subprocess.run(command, check=True, env=environment)
        out: Outcome = {}
        with np.load(result) as saved:
            for key in saved.files:
                name, _, array = key.partition(": ")
                out.setdefault(name, {})[array] = saved[key]
        return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fedjax_python", help="interpreter of FedJAX's virtual environment")
    parser.add_argument(
        "--fedjax_source", help="a checkout of FedJAX to use instead of the package"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--arrays", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.arrays:
        found = of_fedjax(dict(np.load(arguments.arrays)))
        flat = {f"{name}: {k}": leaf for name, part in found.items() for k, leaf in part.items()}
        np.savez(arguments.output, **flat)
        return 0

    from benchmarks.machine import machine
    from benchmarks.peers.process import Library

    library = Library("FedJAX", "", arguments.fedjax_python, arguments.fedjax_source, "fedjax")
    if library.missing:
        print(f"error: {library.missing}", file=sys.stderr)
        return 2
    data = problem(arguments.seed)
    theirs = elsewhere(arguments.fedjax_python, arguments.fedjax_source, data)
    found = differences(of_fedexp(data), theirs)
    for name, arrays in found.items():
        worst = max(arrays, key=lambda key: arrays[key])
        verdict = "equal" if arrays[worst] <= TOLERANCE else "DIFFERS"
        print(f"{name:26} {verdict:8} {arrays[worst]:.1e} in {worst}")
    report = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "seed": arguments.seed,
        "fedjax_commit": library.commit(),
        "tolerance": TOLERANCE,
        "relative_differences": found,
    }
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
