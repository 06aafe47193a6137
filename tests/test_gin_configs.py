"""The shipped experiments have the published settings of Reddi et al. 2021 (arXiv:2003.00295)."""

from __future__ import annotations

import dataclasses

import gin
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedexp.trainer  # noqa: F401  Registers what the files name.
from fedexp import config
from fedexp.tasks import mean_loss

# The authors' tables, as they print them: github.com/google-research/federated,
# optimization/docs/hyperparameters.md. Learning rates and epsilons are base-10 logarithms.
DEFAULT_VALUES = """
Task                  | Clients per round | Batch size | Total rounds
cifar100_image        | 10                | 20         | 4000
emnist_autoencoder    | 10                | 20         | 3000
emnist_character      | 10                | 20         | 1500
shakespeare_character | 10                | 4          | 1200
stackoverflow_word    | 50                | 16         | 1500
stackoverflow_tag     | 10                | 100        | 1500
"""
CLIENT_LEARNING_RATES = """
Fed...                | Adagrad | Adam | Yogi | AvgM | Avg
cifar100_image        | -1      | -1.5 | -1.5 | -1.5 | -1
emnist_autoencoder    | 1.5     | 1    | 1    | 0.5  | 1
emnist_character      | -1.5    | -1.5 | -1.5 | -1.5 | -1
shakespeare_character | 0       | 0    | 0    | 0    | 0
stackoverflow_word    | -0.5    | -0.5 | -0.5 | -0.5 | -0.5
stackoverflow_tag     | 2       | 2    | 2    | 2    | 2
"""
SERVER_LEARNING_RATES = """
Fed...                | Adagrad | Adam | Yogi | AvgM | Avg
cifar100_image        | -1      | 0    | 0    | 0    | 0.5
emnist_autoencoder    | -1.5    | -1.5 | -1.5 | 0    | 0
emnist_character      | -1      | -2.5 | -2.5 | -0.5 | 0
shakespeare_character | -0.5    | -2   | -2   | -0.5 | 0
stackoverflow_word    | -1.5    | -2   | -2   | 0    | 0
stackoverflow_tag     | 1       | -0.5 | -0.5 | 0    | 0
"""
EPSILON_VALUES = """
Fed...                | Adagrad | Adam | Yogi
cifar100_image        | -2      | -1   | -1
emnist_autoencoder    | -3      | -3   | -3
emnist_character      | -2      | -4   | -4
shakespeare_character | -1      | -3   | -3
stackoverflow_word    | -4      | -5   | -5
stackoverflow_tag     | -2      | -5   | -5
"""
ROWS = {
    "cifar100": "cifar100_image",
    "emnist": "emnist_character",
    "emnist_autoencoder": "emnist_autoencoder",
    "shakespeare": "shakespeare_character",
    "stackoverflow_nwp": "stackoverflow_word",
    "stackoverflow_tags": "stackoverflow_tag",
}
OPTIMIZERS = ("Adagrad", "Adam", "Yogi", "AvgM", "Avg")
EXAMPLES_PER_CLIENT = {"stackoverflow_nwp": 1000, "stackoverflow_tags": 1000}


@pytest.fixture(autouse=True)
def fresh_gin():
    gin.clear_config()
    yield
    gin.clear_config()


@gin.configurable
def probe(value=None):
    return value


def built(name: str):
    """What the bindings in force give for a parameter, such as the optimizer for @server/adam()."""
    with gin.unlock_config():
        gin.bind_parameter("probe.value", gin.query_parameter(name))
    return probe()


def cell(table: str, task: str, column: str) -> float:
    header, *rows = ([part.strip() for part in line.split("|")] for line in table.split("\n")[1:-1])
    return float(next(row for row in rows if row[0] == ROWS[task])[header.index(column)])


def steps(optimizer, gradients: np.ndarray) -> np.ndarray:
    """The updates that an Optax optimizer makes of successive gradients (T, N)."""
    state, updates = optimizer.init(jnp.zeros(gradients.shape[1])), []
    for gradient in gradients:
        update, state = optimizer.update(jnp.asarray(gradient), state)
        updates.append(update)
    return np.stack(updates)


def published_steps(name: str, rate: float, eps: float | None, gradients: np.ndarray) -> np.ndarray:
    """Algorithm 2 of the paper, and SGD with the momentum 0.9 of Hsu et al. for FedAvgM."""
    beta1 = {"Adagrad": 0.0, "Adam": 0.9, "Yogi": 0.9, "AvgM": 0.9, "Avg": 0.0}[name]
    m = v = np.zeros(gradients.shape[1])
    updates = []
    for g in gradients:
        if name in ("Avg", "AvgM"):
            m = beta1 * m + g
            updates.append(-rate * m)
            continue
        m = beta1 * m + (1 - beta1) * g
        if name == "Adagrad":
            v = v + g**2
        elif name == "Adam":
            v = 0.99 * v + 0.01 * g**2
        else:
            v = v - 0.01 * g**2 * np.sign(v - g**2)
        updates.append(-rate * m / (np.sqrt(v) + eps))
    return np.stack(updates)


@pytest.mark.parametrize("task", ROWS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_experiment_has_the_published_settings(task, optimizer):
    config.load([f"{task}_fed{optimizer.lower()}.gin"], [])

    assert gin.query_parameter("train.num_rounds") == cell(DEFAULT_VALUES, task, "Total rounds")
    assert built("train.sampler").cohort_size == cell(DEFAULT_VALUES, task, "Clients per round")
    batching = built("train.batching")
    assert batching.batch_size == cell(DEFAULT_VALUES, task, "Batch size")
    assert (batching.local_epochs, batching.local_steps, batching.remainder) == (1, None, "mask")
    assert batching.max_examples == EXAMPLES_PER_CLIENT.get(task)

    gradients = np.array([[0.3, -1e-3, 2.0], [-0.1, -2e-3, 5.0], [0.2, 1e-5, -0.5]], np.float32)
    rate = 10 ** cell(CLIENT_LEARNING_RATES, task, optimizer)
    np.testing.assert_allclose(
        steps(built("fedavg.client_optimizer"), gradients), -rate * gradients, rtol=1e-6
    )
    rate = 10 ** cell(SERVER_LEARNING_RATES, task, optimizer)
    adaptive = optimizer in ("Adagrad", "Adam", "Yogi")
    eps = 10 ** cell(EPSILON_VALUES, task, optimizer) if adaptive else None
    np.testing.assert_allclose(
        steps(built("fedavg.server_optimizer"), gradients),
        published_steps(optimizer, rate, eps, gradients),
        rtol=1e-5,
    )


def published_objective(task: str, outputs: np.ndarray, batch: dict[str, np.ndarray]) -> float:
    """What the authors' code minimises on a batch: Keras' losses, two of them with Reduction.SUM."""
    if task == "emnist_autoencoder":
        x = 1 - batch["x"][..., None] / 255
        return ((outputs - x) ** 2).mean((1, 2, 3)).sum()
    if task == "stackoverflow_tags":
        present = np.zeros(outputs.shape, bool)
        for row, tags in enumerate(batch["tags"]):
            present[row, tags[tags >= 0]] = True
        probability = 1 / (1 + np.exp(-outputs))
        return -np.log(np.where(present, probability, 1 - probability)).mean(1).sum()
    labels = batch["tokens"][:, 1:] if "tokens" in batch else batch["y"]
    log_softmax = outputs - np.log(np.exp(outputs).sum(-1, keepdims=True))
    return -np.take_along_axis(log_softmax, labels[..., None].astype(int), -1).mean()


def random_batch(task: str, size: int, rng: np.random.Generator):
    """A full batch and outputs of a model, of the task's shapes."""
    if task.startswith("emnist") or task == "cifar100":
        shape = (size, 28, 28) if task.startswith("emnist") else (size, 32, 32, 3)
        num_classes = 100 if task == "cifar100" else 62
        x = rng.integers(0, 256, shape).astype(np.uint8)
        batch = {"x": x, "y": rng.integers(0, num_classes, size).astype(np.int32)}
        outputs = (*shape, 1) if task == "emnist_autoencoder" else (size, num_classes)
    elif task == "stackoverflow_tags":
        tags = np.array([rng.permutation(500)[:5] for _ in range(size)])
        tags[::2, 3:] = -1
        words = rng.integers(1, 10_001, (size, 8))
        batch = {"words": words, "num_words": np.full(size, 9), "tags": tags}
        outputs = (size, 500)
    else:
        length, vocabulary = (80, 90) if task == "shakespeare" else (4, 10_004)
        batch = {"tokens": rng.integers(1, vocabulary, (size, length + 1)).astype(np.uint16)}
        outputs = (size, length, vocabulary)
    return batch, rng.normal(size=outputs).astype(np.float32)


@pytest.mark.parametrize("task", ROWS)
def test_clients_minimise_what_the_learning_rates_were_tuned_for(task):
    config.load([f"{task}_fedavg.gin"], [])
    size = built("train.batching").batch_size
    batch, outputs = random_batch(task, size, np.random.default_rng(0))
    of_outputs = dataclasses.replace(
        built("train.task"), apply=lambda params, batch, key: params, metrics={}
    )
    mask = np.ones(size, bool)
    objective = jax.jit(lambda *data: mean_loss(of_outputs, *data, mask, None)[0])(outputs, batch)
    expected = published_objective(task, outputs.astype(np.float64), batch)
    np.testing.assert_allclose(objective, expected, rtol=1e-4)
