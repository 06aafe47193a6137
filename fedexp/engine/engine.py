"""An algorithm bound to data and a strategy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from fedexp.contracts import TRAIN, Algorithm, Pass, RoundOutput
from fedexp.data import ClientBatching, FederatedDataset, Sample
from fedexp.engine.client_data import ClientData
from fedexp.engine.client_states import ClientStates
from fedexp.engine.preparing import PreparedRound, Preparer
from fedexp.engine.runner import Population, Runner, first_state
from fedexp.engine.strategy import Strategy
from fedexp.errors import UserError
from fedexp.promises import kept_round
from fedexp.rates import Rate
from fedexp.streams import Stream, derive

PyTree = Any


class Engine:
    """What a round loop needs: a first state, rounds prepared on the host, rounds run on the devices.

    With several processes, all make the same calls.

    Args:
      strategy: where cohorts run.
      algorithm: what clients and server do.
      splits: name -> data set, 'train' among them, or the training split alone.
      batching: of the pass 'train'.
      params: the model's first parameters.
      cohort_size: clients that a round samples, on average.
      seed: of the run.
      population: clients that cohorts are drawn from; all if None.
      data: of another engine with the same splits and strategy, to share what is on the devices.
      rates: that the algorithm was made with, for whose values nothing is compiled.

    Attributes:
      data: the clients' examples.
      client_states: what the algorithm keeps for each client; None if nothing.
      preparer: see `Preparer`.
      runner: see `Runner`.
      rates: the same.
      model_bytes: of the parameters.
    """

    def __init__(
        self,
        strategy: Strategy,
        algorithm: Algorithm,
        splits: Mapping[str, FederatedDataset] | FederatedDataset,
        batching: ClientBatching,
        *,
        params: PyTree,
        cohort_size: float,
        seed: int,
        population: int | None = None,
        data: ClientData | None = None,
        rates: Sequence[Rate] = (),
    ):
        if isinstance(splits, FederatedDataset):
            splits = {TRAIN: splits}
        if TRAIN in algorithm.passes:
            raise UserError(
                f"an algorithm's passes may not be called {TRAIN!r}: that is the trainer's"
            )
        algorithm.check(splits[TRAIN])
        self.strategy = strategy
        self.placement = strategy.placement
        self.seed = seed
        self.rates = rates
        self.model_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        self._algorithm = algorithm
        self.data = data or ClientData(splits, self.placement, strategy.packing.resident_bytes())
        self.preparer = Preparer(
            strategy,
            self.data,
            {TRAIN: Pass(batching), **algorithm.passes},
            cohort_size=math.ceil(cohort_size),
            seed=seed,
        )
        self.client_states: ClientStates | None = None
        if algorithm.init_client is not None:
            first = first_state(algorithm.init_client, params)
            self.client_states = ClientStates(first, self.data.local_clients)
        self.population = Population(
            float(cohort_size), self.data.num_clients if population is None else population
        )
        self.root = jax.random.key(seed)
        self.runner = Runner(
            strategy,
            kept_round(algorithm.round),
            self.preparer,
            self.population,
            root=self.root,
            client_ids=self.data.client_ids,
            client_states=self.client_states,
            rates=rates,
        )

    def start(self, params: PyTree) -> PyTree:
        """The algorithm's first server state, on all devices."""
        key = derive(self.root, Stream.SERVER)
        return self.placement.replicate(first_state(self._algorithm.init, params, key))

    def prepare(self, round_: int, sample: Sample | np.ndarray) -> PreparedRound:
        """Does a round's host work; may run in a background thread a round ahead."""
        if not isinstance(sample, Sample):
            sample = Sample(np.asarray(sample, np.int64))
        return self.preparer.prepare(round_, sample)

    def run(self, state: PyTree, prepared: PreparedRound) -> RoundOutput:
        """Runs a round; `state` is donated and must not be used afterwards."""
        return self.runner.run(state, prepared)[0]
