"""Clients that send what harms the others, to try what a rule bears."""

from __future__ import annotations

from collections.abc import Callable

import gin
import jax
import jax.numpy as jnp

from fedexp.aggregators.chain import Aggregators, as_link
from fedexp.aggregators.every_update import Updates, along
from fedexp.contracts import Aggregator, PyTree, Sent, Update
from fedexp.data.attackers import is_attacker
from fedexp.errors import check
from fedexp.promises import kept_client, kept_server
from fedexp.streams import Stream, derive

# (what the attackers would have sent, the others' rows being zero; a key a row) -> what they send.
Attack = Callable[[Updates, jax.Array], PyTree]


@gin.configurable
def attacked(
    rule: Aggregators = None,
    attack: Attack = gin.REQUIRED,
    fraction: float = gin.REQUIRED,
    seed: int = 0,
) -> Aggregator:
    """Replaces the updates of some clients before a rule sees them.

    Who attacks follows from the seed and the client, and does not change. All updates are kept until the end
    of the round. `aggregate/attackers` says how many the cohort had.

    Args:
      rule: an aggregator or a chain that keeps no client states, `mean()` if None.
      attack: as @sign_flip().
      fraction: of all clients that attack, on average.
      seed: of who does.

    Raises:
      UserError: a fraction outside [0, 1], or a rule with client states.
    """
    check(0 <= fraction <= 1, f"attacked.fraction must be in [0, 1], got {fraction}")
    inner = as_link(rule)
    check(inner.init_client is None, "attacked.rule must keep nothing for a client")

    def client(state, update, client_state, key):
        del state, client_state, key
        return Sent(each=(update.value, update.weight))

    def server(state, total, each, later, cohort, key):
        del total, later
        values, weights = each
        attacks = cohort.real & jax.vmap(lambda i: is_attacker(i, fraction, seed))(
            cohort.clients.index
        )
        theirs = jax.tree.map(lambda leaf: jnp.where(along(attacks, leaf), leaf, 0), values)
        keys = _by_client(derive(key, Stream.SERVER), cohort.clients.index)
        sent = attack(Updates(theirs, attacks, attacks.sum(), cohort.clients.index), keys)
        values = jax.tree.map(
            lambda old, new: jnp.where(along(attacks, old), new, old), values, sent
        )

        def send(value, weight, client, key):
            update = Update(value, weight, client=client)
            sent = kept_client(inner, state, update, None, key)
            return sent.total, sent.each

        keys = _by_client(derive(key, Stream.CLIENT), cohort.clients.index)
        totals, kept = jax.tree.map(
            lambda leaf: jnp.where(along(cohort.real, leaf), leaf, 0),
            jax.vmap(send)(values, weights, cohort.clients.index, keys),
        )
        total = jax.tree.map(lambda leaf: leaf.sum(axis=0), totals)
        own = derive(key, Stream.AGGREGATION)
        result = kept_server(inner, state, total, kept, None, cohort, own)
        metrics = {**result.metrics, "attackers": attacks.sum()}
        return result._replace(metrics=metrics)

    return Aggregator(client, server, inner.init, told=inner.told, reduces=True, noise=inner.noise)


def _by_client(key: jax.Array, clients: jax.Array) -> jax.Array:
    """(C,) keys, which follow clients and not slots."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, clients)


@gin.configurable
def sign_flip(scale: float = 1.0) -> Attack:
    """Each attacker sends its update times -scale (as in Li et al. 2019, arXiv:1811.03761).

    Args:
      scale: 1 turns it round; 0 is an attacker that sends nothing.
    """
    return lambda updates, keys: jax.tree.map(lambda leaf: -scale * leaf, updates.values)


@gin.configurable
def gaussian_attack(deviation: float = gin.REQUIRED) -> Attack:
    """Each attacker sends noise in place of its update (Blanchard et al. 2017, arXiv:1703.02757).

    Args:
      deviation: the standard one, of each of an update's numbers.
    """

    def attack(updates: Updates, keys: jax.Array) -> PyTree:
        return jax.vmap(noise)(updates.values, keys)

    def noise(value: PyTree, key: jax.Array) -> PyTree:
        leaves, structure = jax.tree.flatten(value)
        draws = [
            deviation * jax.random.normal(own, leaf.shape)
            for own, leaf in zip(jax.random.split(key, len(leaves)), leaves, strict=True)
        ]
        return structure.unflatten(draws)

    return attack


@gin.configurable
def a_little_is_enough(deviations: float = gin.REQUIRED) -> Attack:
    """All attackers send mean - z std of what they would have sent (Baruch et al. 2019, arXiv:1902.06156).

    Args:
      deviations: z, small enough to pass for an honest one; of n clients with m attackers the paper takes
        the largest z whose normal quantile is (n - m - s) / (n - m), with s = floor(n / 2 + 1) - m.
    """

    def attack(updates: Updates, keys: jax.Array) -> PyTree:
        del keys
        share = updates.real / jnp.maximum(updates.size, 1)
        mean = updates.combined(share)

        def sent(leaf: jax.Array, mean: jax.Array) -> jax.Array:
            variance = jnp.tensordot(share, (leaf - mean) ** 2, 1)
            one = mean - deviations * jnp.sqrt(jnp.maximum(variance, 0))
            return jnp.broadcast_to(one, leaf.shape)

        return jax.tree.map(sent, updates.values, mean)

    return attack
