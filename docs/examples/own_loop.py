"""A round loop of one's own: it watches, changes a learning rate, stops, and goes on."""

import dataclasses

import optax
from plain_python import experiment, task

from fedexp.algorithms import fedavg

server = optax.inject_hyperparams(optax.sgd)(learning_rate=1.0)
algorithm = fedavg(task, client_optimizer=optax.sgd(0.1), server_optimizer=server)
own = dataclasses.replace(experiment, algorithm=algorithm)

for round in own.rounds():
    print(round.number, round.metrics["train/loss"], round.per_client["clients/loss"].max())
    if round.number == 2:
        round.state.opt_state.hyperparams["learning_rate"] *= 0.5
    if round.metrics["train/loss"] < 0.5:
        break

for later in own.rounds(after=round):  # Or at any time in another cell.
    if later.number % 10 == 0:
        print(later.number, later.evaluate()["test/accuracy"])
