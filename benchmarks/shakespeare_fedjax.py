"""Next characters of Shakespeare by FedAvg, in fedexp and in FedJAX: same data, cohorts and settings.

    python -m benchmarks.shakespeare_fedjax --library=fedexp --data_dir=DIR
    python -m benchmarks.shakespeare_fedjax --library=fedjax --data_dir=DIR \
        --python=FEDJAX_VENV/bin/python --source=FEDJAX_CHECKOUT
    python -m benchmarks.shakespeare_fedjax --plot

10 clients a round, one local epoch in batches of 4, client and server learning rate 1: the settings of
Reddi et al. (2021) for FedAvg. Both libraries see the same sequences and the same cohorts, round by
round, and as many examples: a client's last batch is filled up from a second pass, as FedJAX does.
Each shuffles on its own, brings its own model, initial parameters and training loss, and is evaluated
by the same few lines: the share of targets, padding aside, that have the largest logit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

COHORT_SIZE, BATCH_SIZE, LEARNING_RATE = 10, 4, 1.0
RESULTS = Path(__file__).parent / "results" / "shakespeare_fedjax.json"
PLOT = Path(__file__).parents[1] / "docs" / "images" / "shakespeare_vs_fedjax.png"

# What a library yields first, and after every round: a jitted (params, inputs) -> logits, and params.
Trained = Iterator[tuple[Callable[[Any, np.ndarray], Any], Any]]


def train_fedexp(data: dict[str, np.ndarray]) -> Trained:
    """Yields the parameters before training and after every round."""
    import jax
    import optax

    from fedexp.algorithms import fedavg
    from fedexp.data import ClientBatching, FederatedDataset
    from fedexp.engine import Engine, Packing, jit
    from fedexp.models.language import LSTMLanguageModel
    from fedexp.tasks.language import next_token

    model = LSTMLanguageModel(vocab_size=90, embedding_size=8, hidden_size=256, num_layers=2)
    task = next_token(model)
    ids = np.arange(len(data["offsets"]) - 1).astype(str)
    dataset = FederatedDataset({"tokens": data["train"]}, data["offsets"], ids)
    params = task.init(jax.random.key(0), dataset.slice(0, 1))
    engine = Engine(
        jit(Packing(lanes=1)),
        fedavg(task, optax.sgd(LEARNING_RATE), optax.sgd(LEARNING_RATE)),
        dataset,
        ClientBatching(batch_size=BATCH_SIZE, remainder="fill"),
        params=params,
        cohort_size=COHORT_SIZE,
        seed=0,
    )
    apply = jax.jit(lambda params, x: model.apply({"params": params}, x))
    state = engine.start(params)
    yield apply, state.params
    for round_, cohort in enumerate(data["cohorts"]):
        state = engine.run(state, engine.prepare(round_, cohort)).state
        yield apply, state.params


def train_fedjax(data: dict[str, np.ndarray]) -> Trained:
    """As `train_fedexp`, in FedJAX's interpreter."""
    import haiku as hk

    # The same steps in a loop: the 80 unrolled ones compile for many minutes on a CPU.
    hk.static_unroll = hk.dynamic_unroll
    import fedjax
    import jax
    import jax.numpy as jnp

    model = fedjax.models.shakespeare.create_lstm_model()

    def loss(params, batch, rng):
        return jnp.mean(model.train_loss(batch, model.apply_for_train(params, batch, rng)))

    algorithm = fedjax.algorithms.fed_avg.federated_averaging(
        jax.grad(loss),
        fedjax.optimizers.sgd(LEARNING_RATE),
        fedjax.optimizers.sgd(LEARNING_RATE),
        fedjax.ShuffleRepeatBatchHParams(batch_size=BATCH_SIZE, seed=0),
    )
    apply = jax.jit(lambda params, x: model.apply_for_eval(params, {"x": x}))
    state = algorithm.init(model.init(jax.random.PRNGKey(0)))
    yield apply, state.params
    for round_, cohort in enumerate(data["cohorts"]):
        clients = []
        for client in cohort:
            tokens = data["train"][data["offsets"][client] : data["offsets"][client + 1]]
            # A seed for all rounds would mean one order for all rounds.
            tokens = np.random.default_rng([round_, client]).permutation(tokens).astype(np.int32)
            examples = fedjax.ClientDataset({"x": tokens[:, :-1], "y": tokens[:, 1:]})
            clients.append((client, examples, jax.random.PRNGKey(round_)))
        state, _ = algorithm.apply(state, clients)
        yield apply, state.params


def accuracy(apply: Callable, params: Any, tokens: np.ndarray, batch_size: int = 100) -> float:
    """The share of targets other than padding that have the largest of all 90 logits."""
    correct = total = 0
    for begin in range(0, len(tokens), batch_size):
        batch = tokens[begin : begin + batch_size].astype(np.int32)
        padded = np.zeros((batch_size, tokens.shape[1]), np.int32)
        padded[: len(batch)] = batch
        targets = padded[:, 1:]
        guesses = np.asarray(apply(params, padded[:, :-1])).argmax(-1)
        correct += int(((guesses == targets) & (targets != 0)).sum())
        total += int((targets != 0).sum())
    return correct / total


def run(library: str, data: dict[str, np.ndarray], every: int) -> dict[str, Any]:
    """Trains through all cohorts, evaluating every so many rounds on all test sequences."""
    import jax

    sizes = np.diff(data["offsets"])
    curve, started = [], time.perf_counter()
    trained = {"fedexp": train_fedexp, "fedjax": train_fedjax}[library](data)
    for round_, (apply, params) in enumerate(trained):
        if round_ % every == 0 or round_ == len(data["cohorts"]):
            curve.append({"round": round_, "accuracy": accuracy(apply, params, data["test"])})
            print(library, curve[-1], f"{time.perf_counter() - started:.0f} s", flush=True)
    return {
        "jax": jax.__version__,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "examples": int((-(-sizes[data["cohorts"]] // BATCH_SIZE) * BATCH_SIZE).sum()),
        "test_sequences": len(data["test"]),
        "curve": curve,
    }


def prepare(data_dir: str | None, rounds: int) -> dict[str, np.ndarray]:
    """Sequences, clients and cohorts, for either library."""
    from fedexp.data import shakespeare, uniform

    train, test = shakespeare(data_dir)
    sample = uniform(COHORT_SIZE).sample
    return {
        "train": np.asarray(train.features["tokens"]),
        "offsets": train.offsets,
        "test": np.asarray(test.features["tokens"]),
        "cohorts": np.stack(
            [sample(train.client_ids, 0, round_).clients for round_ in range(rounds)]
        ),
    }


def run_elsewhere(python: str, source: str, data: dict[str, np.ndarray], every: int) -> dict:
    """Runs FedJAX in its own interpreter, which needs nothing of fedexp."""
    with tempfile.TemporaryDirectory() as folder:
        arrays, result = Path(folder) / "data.npz", Path(folder) / "result.json"
        np.savez(arrays, **data)
        command = [python, __file__, "--library=fedjax", f"--every={every}"]
        command += [f"--arrays={arrays}", f"--out={result}"]
        subprocess.run(command, check=True, env={"PYTHONPATH": source})
        return json.loads(result.read_text())


def plot(results: dict[str, Any]) -> None:
    """Draws both curves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), dpi=150)
    for library, colour in (("fedexp", "tab:blue"), ("fedjax", "tab:orange")):
        curve = results[library]["curve"]
        rounds, values = zip(*((row["round"], row["accuracy"]) for row in curve), strict=True)
        axes.plot(rounds, values, "o-", ms=3, color=colour, label=library)
    axes.set(xlabel="round", ylabel="test accuracy, next character", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(PLOT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--library", dest="name", choices=("fedexp", "fedjax"))
    parser.add_argument("--data_dir")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--source", default="")
    parser.add_argument("--plot", action="store_true")
    parser.add_argument("--arrays", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()

    if args.arrays:
        result = run(args.name, dict(np.load(args.arrays)), args.every)
        args.out.write_text(json.dumps(result))
        return
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    if args.name:
        data = prepare(args.data_dir, args.rounds)
        if args.name == "fedjax":
            result = run_elsewhere(args.python, args.source, data, args.every)
        else:
            result = run("fedexp", data, args.every)
        results[args.name] = result
        args.out.write_text(json.dumps(results, indent=2) + "\n")
    if args.plot:
        plot(results)


if __name__ == "__main__":
    main()
