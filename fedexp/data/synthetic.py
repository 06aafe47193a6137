"""synthetic(alpha, beta): a generated classification whose clients differ in models and in features."""

from __future__ import annotations

import gin
import numpy as np

from fedexp.data.dataset import FederatedDataset, FederatedSplits
from fedexp.errors import check

DIMENSION = 60
NUM_CLASSES = 10
# Standard deviations of the features about their client's mean, whose squares are j^-1.2.
_SPREAD = np.arange(1, DIMENSION + 1) ** -0.6


@gin.configurable
def synthetic(
    alpha: float = 1.0,
    beta: float = 1.0,
    num_clients: int = 30,
    iid: bool = False,
    test_fraction: float = 0.1,
    seed: int = 0,
) -> FederatedSplits:
    """FedProx's data (Li et al. 2020, arXiv:1812.06127, section 5.1), after Shamir et al. 2014.

    Client k has a model of its own, y = argmax(W_k x + b_k), with entries of W_k and b_k from N(u_k, 1) and
    u_k ~ N(0, alpha^2); and features of its own, x ~ N(v_k, diag(j^-1.2)), with entries of v_k from N(B_k, 1)
    and B_k ~ N(0, beta^2). alpha and beta are standard deviations, as in the authors' code. Sizes are 50 plus
    a lognormal number of parameters 4 and 2, rounded down. The published settings are (0, 0), (0.5, 0.5),
    (1, 1) and `iid`.

    Features: `x` (60,) float32; `y` int32 in [0, 10).

    Args:
      alpha: how much clients' models differ.
      beta: how much clients' features differ.
      num_clients: 30 in FedProx.
      iid: all clients have one W and b, of entries from N(0, 1), and v_k = 0. alpha and beta do nothing then.
      test_fraction: of each client's examples.
      seed: of all draws.

    Raises:
      UserError: a number out of range.
    """
    for name, value in (("alpha", alpha), ("beta", beta)):
        check(0 <= value < np.inf, f"synthetic.{name} must be 0 or above, and finite, got {value}")
    check(num_clients >= 1, f"synthetic.num_clients must be at least 1, got {num_clients}")
    rng = np.random.default_rng(seed)
    sizes = 50 + rng.lognormal(4, 2, num_clients).astype(int)
    shared = rng.normal(size=(DIMENSION + 1, NUM_CLASSES))
    clients = {}
    for k, size in enumerate(sizes):
        model = shared if iid else rng.normal(rng.normal(0, alpha), 1, shared.shape)
        mean = 0 if iid else rng.normal(rng.normal(0, beta), 1, DIMENSION)
        x = mean + _SPREAD * rng.normal(size=(size, DIMENSION))
        y = (x @ model[:-1] + model[-1]).argmax(1)
        clients[f"{k:05}"] = {"x": x.astype(np.float32), "y": y.astype(np.int32)}
    dataset = FederatedDataset.from_clients(clients)
    return FederatedSplits(*dataset.split_examples(1 - test_fraction, seed=seed))
