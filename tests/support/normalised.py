"""A model with BatchNorm, and clients whose statistics differ."""

from __future__ import annotations

import numpy as np
from flax import linen as nn

from fedexp.data import FederatedDataset


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, x, train=False, mask=None):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(
            nn.Dense(4)(x), mask=None if mask is None else mask[:, None]
        )
        return nn.Dense(3)(nn.relu(x))


def clients_of_other_scales() -> FederatedDataset:
    rng, clients = np.random.default_rng(0), {}
    for i in range(4):
        y = rng.integers(0, 3, 11)
        x = (rng.normal(size=(11, 2)) + y[:, None]) * 3**i
        clients[str(i)] = {"x": x.astype(np.float32), "y": y.astype(np.int32)}
    return FederatedDataset.from_clients(clients)
