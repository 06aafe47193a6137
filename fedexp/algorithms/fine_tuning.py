"""Personal parameters by some local steps on the server's (FedAvg with fine-tuned evaluation)."""

from __future__ import annotations

from collections.abc import Callable

import gin
import optax

from fedexp.algorithms.local import PyTree, Shared, local_training
from fedexp.contracts import ClientWork, Pass, Personalisation
from fedexp.data import ClientBatching
from fedexp.tasks import Task


@gin.configurable
def fine_tuning(
    task: Task,
    optimizer: optax.GradientTransformation = gin.REQUIRED,
    batching: ClientBatching | None = None,
) -> Personalisation:
    """Measures each client with parameters fine-tuned on its own training examples.

    What FedAvg's model is worth as a start (Yu et al. 2020, arXiv:2002.04758; Cheng et al. 2021,
    arXiv:2108.07313). It goes with any algorithm whose server state has parameters:
    `personal/evaluate.personalise = @fine_tuning`.

    Args:
      task: the model and its loss.
      optimizer: starts afresh on every client.
      batching: of the client's training examples; one epoch of batches of 20 if None.
    """
    return personal_training(local_training(task, optimizer), lambda carry: carry.params, batching)


def personal_training(
    work: ClientWork,
    parameters: Callable[[PyTree], PyTree],
    batching: ClientBatching | None = None,
) -> Personalisation:
    """Measures each client with what it trains from the server's parameters.

    Args:
      work: its `shared` is like `Shared`.
      parameters: the work's last carry -> the personal parameters.
      batching: of the client's training examples; one epoch of batches of 20 if None.
    """

    def init(state, client):
        return work.init(Shared(state.params), client)

    def step(state, carry, batch, key):
        return work.step(Shared(state.params), carry, batch, key)

    def finish(state, carry, client):
        return (), parameters(carry)

    return Personalisation(ClientWork(init, step, finish), Pass(batching or ClientBatching()))
