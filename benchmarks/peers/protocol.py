"""What the harness and a peer say to each other: JSON objects, one a line, a reply to each request.

Peers import this module in interpreters of their own, so it needs nothing but NumPy.

    {"do": "set_up", "folder": ..., "algorithm": "fedavg"}
                                       -> {"parameters", "versions", "device", "notes", "algorithm"}
    {"do": "train", "rounds": [0, 2]}  -> {"seconds", "cpu_seconds", "examples", "norm"}
The second number of `rounds` is the first round not to run.
Every reply has the peer's "peak_bytes". The end of its input ends a peer.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

FEDAVG = "fedavg"


@dataclasses.dataclass(frozen=True)
class Job:
    """A workload with its data, as the harness leaves it in a folder for all peers.

    Attributes:
      workload: a name of `workloads.WORKLOADS`.
      num_classes: classes, or words in the vocabulary.
      batch_size: examples of a local step.
      learning_rate: of the clients' SGD; the server's is 1.
      seed: of the initial parameters and dropout.
      cohorts: client indices of every round.
      features: name -> (num_examples, ...), in the order in which the clients train on them.
      offsets: client i owns the rows offsets[i]:offsets[i + 1].
      algorithm: what trains it. Not in the folder: that is the same for all.
    """

    workload: str
    num_classes: int
    batch_size: int
    learning_rate: float
    seed: int
    cohorts: list[list[int]]
    features: dict[str, np.ndarray]
    offsets: np.ndarray
    algorithm: str = FEDAVG

    def write(self, folder: Path) -> None:
        names = [field.name for field in dataclasses.fields(self)]
        apart = ("features", "offsets", "algorithm")
        plain = {name: getattr(self, name) for name in names if name not in apart}
        (folder / "job.json").write_text(json.dumps(plain))
        for name, array in {**self.features, "offsets": self.offsets}.items():
            np.save(folder / f"{name}.npy", array)

    @classmethod
    def read(cls, folder: Path, algorithm: str = FEDAVG) -> Job:
        """Maps the arrays into memory: a peer holds what it touches."""
        arrays = {path.stem: np.load(path, mmap_mode="r") for path in folder.glob("*.npy")}
        offsets = np.asarray(arrays.pop("offsets"))
        return cls(
            **json.loads((folder / "job.json").read_text()),
            features=arrays,
            offsets=offsets,
            algorithm=algorithm,
        )

    def client(self, index: int) -> dict[str, np.ndarray]:
        """The examples of one client."""
        rows = slice(self.offsets[index], self.offsets[index + 1])
        return {name: array[rows] for name, array in self.features.items()}

    def ink(self, index: int) -> np.ndarray:
        """A client's images as float32, paper 0 and ink 1, (num_examples, 28, 28)."""
        return 1 - self.client(index)["x"].astype(np.float32) / 255


class Trainee(NamedTuple):
    """A job in the hands of a library.

    Attributes:
      parameters: number of trained parameters.
      device: what the library computes on.
      train: (rounds) -> examples that the clients trained on, repetitions counted. Returns when the
        device is done.
      norm: the L2 norm of the parameters.
      notes: what a reader of the figures should know.
    """

    parameters: int
    device: str
    train: Callable[[range], int]
    norm: Callable[[], float]
    notes: tuple[str, ...] = ()


def serve(set_up: Callable[[Job], Trainee], packages: Sequence[str]) -> None:
    """Answers the harness until it closes the peer's standard input.

    Args:
      set_up: builds the model and takes the data in.
      packages: distributions whose versions are reported.
    """
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What libraries print must not mix with the replies.
    trainee: Trainee | None = None
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "set_up":
            job = Job.read(Path(request["folder"]), request.get("algorithm", FEDAVG))
            trainee = set_up(job)
            reply = {
                "parameters": trainee.parameters,
                "device": trainee.device,
                "versions": versions(packages),
                "notes": trainee.notes,
                "algorithm": job.algorithm,
            }
        else:
            begin, cpu_begin = time.perf_counter(), time.process_time()
            examples = trainee.train(range(*request["rounds"]))
            reply = {
                "seconds": time.perf_counter() - begin,
                "cpu_seconds": time.process_time() - cpu_begin,
                "examples": examples,
                "norm": trainee.norm(),
            }
        print(json.dumps({**reply, "peak_bytes": peak_bytes()}), file=replies, flush=True)


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of Python and of the given distributions; a checkout on the path may have none."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            module = sys.modules.get(name)
            found[name] = getattr(module, "__version__", "checkout")
    return found


def peak_bytes() -> int:
    """The most memory this process has held.

    On Linux not getrusage's maximum, which starts from that of the process that launched this one.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
