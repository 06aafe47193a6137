"""Statistics of a model that are not trained, sent past the aggregator."""

from __future__ import annotations

import dataclasses
import functools

import jax

from fedexp.aggregators.mean import mean
from fedexp.contracts import Aggregated, Aggregator, Code, Cohort, PyTree, Sent, Update
from fedexp.errors import UserError
from fedexp.promises import kept_client, kept_server
from fedexp.tasks import join_statistics, split_statistics


def carrying_statistics(aggregator: Aggregator) -> Aggregator:
    """Applies an aggregator to what is trained, and the mean to the statistics of updates that have any.

    BatchNorm's running means and variances are on a scale of their own: clipped with the parameters, or among
    the largest entries of both, they would end up wrong. An update without statistics is the aggregator's.

    Raises:
      UserError: from `init`, statistics that a private aggregator would not protect.
    """
    average, of_client = mean(), aggregator.init_client

    def init(value: PyTree) -> PyTree:
        trained, statistics = split_statistics(value)
        if aggregator.noise and jax.tree.leaves(statistics):
            raise UserError(
                f"{', '.join(sorted(statistics))} would be sent without noise, and tell of the clients' "
                "data; keep it local (fedper.local), or take a model with GroupNorm"
            )
        return aggregator.init(trained)

    @functools.wraps(aggregator.client)  # By whose name it is called in errors.
    def client(state: PyTree, update: Update, client_state: PyTree, key: jax.Array) -> Sent:
        trained, statistics = split_statistics(update.value)
        update = update._replace(value=trained)
        sent = kept_client(aggregator, state, update, client_state, key)
        past = average.client((), Update(statistics, update.weight), None, key).total
        assert sent.bits is not None
        bits = sent.bits + Code().bits(statistics)
        return sent._replace(total=(sent.total, past if statistics else ()), bits=bits)

    @functools.wraps(aggregator.server)
    def server(
        state: PyTree, total: PyTree, each: PyTree, later: PyTree, cohort: Cohort, key: jax.Array
    ) -> Aggregated:
        total, past = total
        result = kept_server(aggregator, state, total, each, later, cohort, key)
        statistics = average.server((), past, (), None, cohort, key).update if past else {}
        return result._replace(update=join_statistics(result.update, statistics))

    init_client = of_client and (lambda value: of_client(split_statistics(value)[0]))

    return dataclasses.replace(
        aggregator, client=client, server=server, init=init, init_client=init_client
    )
