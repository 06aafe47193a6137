"""What is compared: models of a known size, and the federated data that they are trained on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.peers.protocol import Job
from fedexp.data import FederatedDataset, emnist, glyphs, uniform
from fedexp.errors import UserError


class Workload(NamedTuple):
    """A model and its batches.

    Attributes:
      batch_size: examples of a local step.
      parameters: number of classes or words -> trained parameters.
      learning_rate: of the clients' SGD.
      length: tokens of an example; 0 for images.
      mean_size: examples of a generated client, on average.
      max_size: examples that a client is cut to, so that a round on CPUs takes seconds.
    """

    batch_size: int
    parameters: dict[int, int]
    learning_rate: float
    length: int = 0
    mean_size: float = 0
    max_size: int | None = None


# Sizes: Reddi et al. 2021 (arXiv:2003.00295), table 1; Stack Overflow's mean client has 397 sentences.
WORKLOADS = {
    "emnist_cnn": Workload(20, {62: 1_206_590, 10: 1_199_882}, 0.1),
    "emnist_logistic": Workload(20, {62: 48_670, 10: 7_850}, 0.1),
    "stackoverflow_lstm": Workload(16, {10_004: 4_050_748}, 0.3, 20, 397, max_size=32),
    "shakespeare_lstm": Workload(4, {90: 820_522}, 0.3, 80, 22.5, max_size=32),
}
_SENTENCE = 13.3  # Words of a Stack Overflow sentence, on average.
_SIZE_SIGMA = 1.0  # Of the logarithm of a generated client's examples.


def build(
    name: str,
    *,
    data: str,
    num_clients: int,
    cohort_size: int,
    num_rounds: int,
    whole_batches: bool,
    seed: int,
) -> Job:
    """A workload with its data and the cohorts of all rounds.

    Args:
      name: of the workload.
      data: 'glyphs' or 'digits', for the EMNIST workloads.
      num_clients: population of generated data.
      cohort_size: clients of a round.
      num_rounds: rounds to draw cohorts for.
      whole_batches: cut every client to whole batches, so that all libraries compute the same.
      seed: of the data, the cohorts and the initial parameters.

    Raises:
      UserError: the digits are not there, or the cohort exceeds the population.
    """
    workload = WORKLOADS[name]
    num_classes = next(iter(workload.parameters))
    if workload.length:
        dataset = _text(workload, num_classes, num_clients, seed)
    elif data == "digits":
        num_classes, dataset = 10, emnist(only_digits=True, data_dir=_digits_folder()).train
    else:
        dataset = glyphs(num_clients).train
    dataset = _cut(dataset, workload.max_size, workload.batch_size if whole_batches else 1)
    sampler = uniform(cohort_size)
    return Job(
        workload=name,
        num_classes=num_classes,
        batch_size=workload.batch_size,
        learning_rate=workload.learning_rate,
        seed=seed,
        cohorts=[
            sampler.sample(dataset.client_ids, seed, round_).clients.tolist()
            for round_ in range(num_rounds)
        ],
        features=dict(dataset.features),
        offsets=dataset.offsets,
    )


def describe(job: Job, data: str) -> str:
    """Where a job's data come from and how large they are."""
    workload = WORKLOADS[job.workload]
    source = f"generated tokens, length {workload.length}" if workload.length else data
    sizes = np.diff(job.offsets)
    cut = f", cut to {workload.max_size}" if workload.max_size else ""
    return f"{source}: {len(sizes)} clients of {sizes.mean():.1f} examples{cut}"


def _digits_folder() -> str:
    folder = os.environ.get("FEDEXP_TEST_DATA")
    path = Path(folder or "") / "mnist_by_writer"
    if not folder or not path.is_dir():
        raise UserError(
            "--data=digits reads $FEDEXP_TEST_DATA/mnist_by_writer, which is not there; set "
            "FEDEXP_TEST_DATA, or take --data=glyphs"
        )
    return str(path)


def _text(workload: Workload, vocabulary: int, num_clients: int, seed: int) -> FederatedDataset:
    """Zipf-distributed tokens; client sizes are log-normal, and sentences end in padding (id 0)."""
    rng = np.random.default_rng(seed)
    location = np.log(workload.mean_size) - _SIZE_SIGMA**2 / 2
    sizes = np.maximum(rng.lognormal(location, _SIZE_SIGMA, num_clients).round().astype(int), 1)
    sizes = np.minimum(sizes, workload.max_size or sizes)
    shape = (sizes.sum(), workload.length + 1)
    frequencies = 1 / np.arange(1, vocabulary)
    tokens = 1 + rng.choice(vocabulary - 1, shape, p=frequencies / frequencies.sum())
    if workload.length < 80:  # Sentences; Shakespeare's windows are full.
        lengths = rng.geometric(1 / _SENTENCE, shape[0]) + 1
        tokens[np.arange(shape[1]) > lengths[:, None]] = 0
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    ids = np.array([f"client{index:06d}" for index in range(num_clients)])
    return FederatedDataset({"tokens": tokens.astype(np.uint16)}, offsets, ids)


def _cut(dataset: FederatedDataset, max_size: int | None, multiple: int) -> FederatedDataset:
    """Cuts clients to `max_size` examples and to whole multiples; those without one are dropped."""
    sizes = np.minimum(dataset.client_sizes, max_size or dataset.num_examples)
    sizes = sizes // multiple * multiple
    keep = np.flatnonzero(sizes)
    if not len(keep):
        raise UserError(
            f"no client has {multiple} examples, a whole batch; leave --whole_batches out"
        )
    rows = [np.arange(dataset.offsets[i], dataset.offsets[i] + sizes[i]) for i in keep]
    offsets = np.concatenate([[0], np.cumsum(sizes[keep])])
    return FederatedDataset(dataset.gather(np.concatenate(rows)), offsets, dataset.client_ids[keep])
