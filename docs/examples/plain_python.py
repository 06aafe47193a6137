"""A federated run without a gin file: your arrays, your Flax model, your Optax optimizers."""

import numpy as np
import optax
from flax import linen as nn

from fedexp.algorithms import fedavg
from fedexp.data import ClientBatching, FederatedDataset, FederatedSplits, uniform
from fedexp.tasks import classification
from fedexp.trainer import Experiment


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.Dense(32)(x)))


def clients(seed: int) -> dict[str, dict[str, np.ndarray]]:
    rng, centres = np.random.default_rng(seed), np.random.default_rng(0).normal(size=(3, 8))
    labels = [rng.integers(0, 3, size=rng.integers(10, 100)) for _ in range(50)]
    return {
        f"client {i}": {"x": rng.normal(centres[y]).astype(np.float32), "y": y}
        for i, y in enumerate(labels)
    }


task = classification(Net(), num_classes=3)
experiment = Experiment(
    FederatedSplits(*(FederatedDataset.from_clients(clients(seed)) for seed in (1, 2))),
    task,
    fedavg(task, client_optimizer=optax.sgd(0.1), server_optimizer=optax.adam(0.01)),
    num_rounds=50,
    sampler=uniform(10),
    batching=ClientBatching(batch_size=20),
)
result = experiment.run()
print(f"test accuracy {result.metrics['test/accuracy']:.1%}")
