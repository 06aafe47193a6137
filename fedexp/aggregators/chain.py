"""Aggregators one after another."""

from __future__ import annotations

from collections.abc import Sequence

from fedexp.aggregators.mean import mean
from fedexp.aggregators.statistics import carrying_statistics
from fedexp.contracts import Aggregated, Aggregator, Cohort, Noise, PyTree, Sent, Update
from fedexp.errors import UserError, check
from fedexp.promises import kept_client, kept_server, name_of
from fedexp.streams import Stream, derive

# What algorithms take for an aggregator; several are a chain.
Aggregators = Aggregator | Sequence[Aggregator] | None


def chain(*links: Aggregator) -> Aggregator:
    """Client halves from left to right, then the last link reduces, then server halves from right to left.

    In a gin file, where an aggregator is wanted, a list is a chain:
    `fedavg.aggregator = [@clip_by_norm(), @gaussian_noise(), @mean()]`.

    >>> chain(mean()).reduces
    True

    Raises:
      UserError: no links, a last one that does not reduce, or one before it that does; noise for updates that
        are not bounded, or that is not added to their sum.
    """
    if not links or not links[-1].reduces or any(link.reduces for link in links[:-1]):
        raise UserError(
            "the last link of a chain, and no other, must make one update of many, as mean() does, "
            f"and have `reduces=True`; got {[link.reduces for link in links]} for `reduces`"
        )
    for before, link, after in zip((None, *links), links, links[1:], strict=False):
        if link.noise is not None:
            _check_noise(link.noise, None if before is None else before.bound, after)

    def init(value: PyTree) -> PyTree:
        return tuple(link.init(value) for link in links)

    def init_client(value: PyTree) -> PyTree:
        return tuple(link.init_client(value) if link.init_client else None for link in links)

    def client(state: PyTree, update: Update, client_state: PyTree, key) -> Sent:
        sent, metrics = [], {}
        for i, link in enumerate(links):
            own = None if client_state is None else client_state[i]
            link_key = derive(key, Stream.AGGREGATION, i)
            sent.append(kept_client(link, state[i], update, own, link_key))
            update = sent[-1].update
            metrics.update(sent[-1].metrics)
        return Sent(
            total=tuple(one.total for one in sent),
            each=tuple(one.each for one in sent),
            state=None if client_state is None else tuple(one.state for one in sent),
            metrics=metrics,
            bits=sent[-1].bits,
        )

    def server(state: PyTree, total: PyTree, each: PyTree, later: PyTree, cohort: Cohort, key):
        states, metrics = [], {}
        for i in reversed(range(len(links))):
            link_key = derive(key, Stream.AGGREGATION, i)
            result = kept_server(links[i], state[i], total[i], each[i], later, cohort, link_key)
            later = result.update
            states.append(result.state)
            noise = links[i].noise
            if noise is not None and noise.on_sum:
                cohort = cohort.as_expected()
            metrics = {
                **result.metrics,
                **metrics,
            }  # What a later link says of the same thing holds.
        return Aggregated(later, tuple(reversed(states)), metrics)

    return Aggregator(
        client,
        server,
        init,
        init_client if any(link.init_client for link in links) else None,
        told=lambda state: [link.told(own) for link, own in zip(links, state, strict=True)],
        reduces=True,
        noise=next((link.noise for link in links if link.noise), None),
    )


def _check_noise(noise: Noise, bound: float | None, after: Aggregator) -> None:
    """Refuses noise for updates that may be larger, or that is not added to their sum."""
    if noise.norm is not None and bound is None:
        raise UserError(
            f"noise for updates of norm {noise.norm} hides nobody whose update is larger: put "
            f"clip_by_norm({noise.norm}) right before it"
        )
    if noise.norm is not None:
        check(
            bound <= noise.norm,
            f"clip_by_norm lets updates of norm {bound} through, and the noise after it is for {noise.norm}",
        )
    if noise.on_sum and not after.averages:
        raise UserError("noise hides a client in the sum of updates: put mean() right after it")


def as_aggregator(given: Aggregators) -> Aggregator:
    """What an algorithm makes of its argument: the mean of None, a chain of a sequence.

    What is not trained, as BatchNorm's statistics, goes past it, and is averaged.

    Raises:
      UserError: it does not make one update of many.
    """
    link = as_link(given)
    check(
        link.reduces,
        f"an aggregator alone, {name_of(link.client)}, must make one update of many, as mean() does, and "
        "have `reduces=True`; or put mean() behind it: [@it(), @mean()]",
    )
    return carrying_statistics(link)


def as_link(given: Aggregators) -> Aggregator:
    """The same, of updates without statistics."""
    if given is None:
        given = mean()
    return given if isinstance(given, Aggregator) else chain(*given)
