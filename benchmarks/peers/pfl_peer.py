"""pfl-research with PyTorch: its simulated backend and its own algorithms."""

from __future__ import annotations

import itertools

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints, WeightByUser
from pfl.algorithm.base import (
    FederatedNNAlgorithm,
    NNAlgorithmParams,
    PersonalizedNNAlgorithmParams,
)
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.algorithm.fedprox import AdaptMuOnMetricCallback, FedProx, FedProxParams
from pfl.algorithm.reptile import Reptile
from pfl.algorithm.scaffold import SCAFFOLD, SCAFFOLDParams
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import AbstractDataset, DatasetSplit
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.data.user_state import InMemoryUserStateStorage
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.internal.ops.pytorch_ops import get_default_device
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from protocol import Job, Trainee, serve
from torch import nn
from torch.nn import functional

NEVER = 1 << 30
TRAIN_LOSS = "loss in training"


class Network(nn.Module):
    """What pfl asks of a module, a count of the examples trained on, and what they lost if asked for."""

    examples = 0
    losses: list[tuple[torch.Tensor, int]] | None = None

    def loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.examples += len(x)
        loss = self.mean_loss(x, y)
        if self.losses is not None:
            self.losses.append((loss.detach().clone(), len(x)))
        return loss

    def mean_loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(self(x), y)

    def metrics(self, x: torch.Tensor, y: torch.Tensor) -> dict:
        """None: pfl would evaluate in its first round, and the others do not."""
        return {}


class CNN(Network):
    def __init__(self, num_classes: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 3),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Dropout(0.25),
            nn.Flatten(),
            nn.Linear(64 * 12 * 12, 128),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(128, num_classes),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class Logistic(Network):
    def __init__(self, num_classes: int):
        super().__init__()
        self.layer = nn.Linear(784, num_classes)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.flatten(1))


class LanguageModel(Network):
    def __init__(
        self, vocabulary: int, embedding: int, hidden: int, layers: int, projection: int | None
    ):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, embedding)
        self.lstm = nn.LSTM(embedding, hidden, layers, batch_first=True)
        # PyTorch has two biases where one does: the second stays at zero.
        for name, parameter in self.lstm.named_parameters():
            if name.startswith("bias_hh"):
                parameter.requires_grad = False
                nn.init.zeros_(parameter)
        self.project = nn.Linear(hidden, projection) if projection else nn.Identity()
        self.predict = nn.Linear(projection or hidden, vocabulary)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.predict(self.project(self.lstm(self.embed(x))[0]))

    def mean_loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(self(x).flatten(0, 1), y.flatten(), ignore_index=0)


def build_network(job: Job) -> Network:
    if job.workload == "emnist_cnn":
        return CNN(job.num_classes)
    if job.workload == "emnist_logistic":
        return Logistic(job.num_classes)
    if job.workload == "stackoverflow_lstm":
        return LanguageModel(job.num_classes, 96, 670, 1, 96)
    return LanguageModel(job.num_classes, 8, 256, 2, None)


def tensors(job: Job, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    examples = job.client(index)
    if "tokens" in examples:
        tokens = torch.tensor(examples["tokens"].astype("int64"))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    x = torch.from_numpy(job.ink(index))[:, None]
    return x, torch.tensor(examples["y"].astype("int64"))


class TrainLoss(TrainingProcessCallback):
    """The cohort's loss in training, as a metric: pfl's own would take passes of their own."""

    def __init__(self, network: Network):
        self._network, network.losses = network, []

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        losses, self._network.losses = self._network.losses, []
        total = float(sum(loss * count for loss, count in losses))
        return False, Metrics([(TRAIN_LOSS, Weighted(total, sum(count for _, count in losses)))])


def build_algorithm(
    job: Job, network: Network
) -> tuple[FederatedNNAlgorithm, type[NNAlgorithmParams], dict, list[TrainingProcessCallback]]:
    """pfl's own, what makes its parameters, those that FedAvg has not, and callbacks.

    Numbers are the same with all peers.
    """
    if job.algorithm == "scaffold":
        own = {
            "population": len(job.offsets) - 1,
            "use_gradient_as_control_variate": False,
            "user_state_storage": InMemoryUserStateStorage(),
        }
        return SCAFFOLD(), SCAFFOLDParams, own, []
    if job.algorithm == "fedprox":
        return FedProx(), FedProxParams, {"mu": 0.1}, []
    if job.algorithm == "fedprox_adaptive":
        mu = AdaptMuOnMetricCallback(
            TRAIN_LOSS,
            adapt_frequency=1,
            initial_value=1.0,
            step_size=0.1,
            decrease_mu_after_consecutive_improvements=5,
        )
        return FedProx(), FedProxParams, {"mu": mu}, [TrainLoss(network), mu]
    if job.algorithm == "reptile":
        split = {"val_split_fraction": None, "min_train_size": None, "min_val_size": None}
        return Reptile(), PersonalizedNNAlgorithmParams, split, []
    if job.algorithm != "fedavg":
        raise ValueError(f"pfl has no {job.algorithm}")
    return FederatedAveraging(), NNAlgorithmParams, {}, []


def set_up(job: Job) -> Trainee:
    torch.manual_seed(job.seed)
    network = build_network(job)
    network.train()
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    model = PyTorchModel(
        network,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(trained, lr=1.0),
    )
    members = sorted({client for cohort in job.cohorts for client in cohort})
    data = {client: tensors(job, client) for client in members}
    members_in_turn = itertools.chain.from_iterable(job.cohorts)

    def client_dataset(client: int) -> AbstractDataset:
        own = PyTorchTensorDataset(data[client], user_id=str(client))
        # Reptile asks for a split; all examples are trained on, and no round but the first evaluates.
        return DatasetSplit(own, own) if job.algorithm == "reptile" else own

    dataset = FederatedDataset(client_dataset, lambda: next(members_in_turn))
    alike = job.algorithm in ("scaffold", "reptile")
    weighting = WeightByUser() if alike else WeightByDatapoints()
    backend = SimulatedBackend(dataset, dataset, [weighting])
    algorithm, params, own, callbacks = build_algorithm(job, network)

    def train(rounds: range) -> int:
        network.examples = 0
        algorithm.run(  # Goes on from the round after the last one that it has run.
            params(
                **own,
                central_num_iterations=rounds.stop,
                evaluation_frequency=NEVER,
                train_cohort_size=len(job.cohorts[0]),
                val_cohort_size=None,
            ),
            backend,
            model,
            NNTrainHyperParams(
                local_batch_size=job.batch_size,
                local_num_epochs=1,
                local_learning_rate=job.learning_rate,
            ),
            NNEvalHyperParams(local_batch_size=job.batch_size),
            callbacks=callbacks,
        )
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return network.examples

    def norm() -> float:
        return float(torch.sqrt(sum(parameter.detach().square().sum() for parameter in trained)))

    device = get_default_device()
    where = f"{torch.get_num_threads()} threads" if device.type == "cpu" else str(device)
    num_parameters = sum(parameter.numel() for parameter in trained)
    notes = ["runs a client's last batch short"]
    if job.algorithm == "fedprox_adaptive":
        notes.append("adapts mu to a loss that the benchmark's callback adds up in training")
    return Trainee(num_parameters, where, train, norm, tuple(notes))


if __name__ == "__main__":
    serve(set_up, ("pfl", "torch", "numpy"))
