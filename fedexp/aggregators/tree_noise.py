"""Noise on sums over rounds, from a binary tree."""

from __future__ import annotations

from typing import NamedTuple

import gin
import jax
import jax.numpy as jnp
import numpy as np

from fedexp.aggregators.noising import PyTree, noise_on_sum, normal_like
from fedexp.contracts import Aggregator
from fedexp.errors import UserError


class Tree(NamedTuple):
    """The complete subtrees of the rounds so far.

    Attributes:
      round: () int32, rounds so far; its binary digits are the subtrees.
      levels: pytree of (L, ...), the noise in the sum of the latest 2^l rounds that are a subtree.
    """

    round: jax.Array
    levels: PyTree


@gin.configurable
def tree_noise(
    noise_multiplier: float | None = gin.REQUIRED,
    norm: float = gin.REQUIRED,
    num_rounds: int = gin.REQUIRED,
    noise_cohort_size: float | None = None,
) -> Aggregator:
    """The noise of DP-FTRL (Kairouz et al. 2021, arXiv:2103.00039, Algorithm 1 and Appendix B).

    A link between `clip_by_norm(norm)` and `mean()`. Rounds are the leaves of a binary tree whose every node
    has noise of standard deviation noise_multiplier x norm. The sum of the first t rounds' updates has that
    of at most log2(t) + 1 nodes, estimated with that of the nodes below (Honaker 2015), and a round adds what
    this has changed by. With server SGD the parameters are such a sum. Needs no random cohorts, but a
    sampler by which clients take part seldom, as `cyclic`. The tree is never started afresh.

    Args:
      noise_multiplier: of a node; None takes what `privacy.epsilon` asks for.
      norm: of the clip before it.
      num_rounds: that it must be good for; the memory is log2(num_rounds) + 1 times that of the parameters.
      noise_cohort_size: see `gaussian_noise`.

    Raises:
      UserError: a number out of range.
    """
    who = "tree_noise"
    if num_rounds < 1:
        raise UserError(f"{who}.num_rounds must be at least 1, got {num_rounds}")
    num_levels = int(num_rounds).bit_length()
    # Of a subtree's noise: its own, of variance 1, and that of both halves, each by its inverse variance.
    own = np.ones(num_levels, np.float32)
    for level in range(1, num_levels):
        own[level] = 1 / (1 + 1 / (2 * own[level - 1]))

    def init(value):
        empty = jax.tree.map(lambda leaf: jnp.zeros((num_levels, *leaf.shape), leaf.dtype), value)
        return Tree(jnp.int32(0), empty)

    def draw(state, value, key):
        number = state.round + 1
        height = jax.lax.population_count((number & -number) - 1)

        def joined(level, noise_and_gone):
            """The subtree so far and its left neighbour as one."""
            noise, gone = noise_and_gone
            neighbour = jax.tree.map(lambda leaf: leaf[level], state.levels)
            fresh = normal_like(jax.random.fold_in(key, level + 1), value)
            weight = jnp.asarray(own)[level + 1]
            noise = jax.tree.map(
                lambda fresh, right, left: weight * fresh + (1 - weight) * (left + right),
                *(fresh, noise, neighbour),
            )
            return noise, jax.tree.map(jnp.add, gone, neighbour)

        leaf = normal_like(jax.random.fold_in(key, 0), value)
        nothing = jax.tree.map(jnp.zeros_like, value)
        noise, gone = jax.lax.fori_loop(0, height, joined, (leaf, nothing))
        levels = jax.tree.map(lambda all_, one: all_.at[height].set(one), state.levels, noise)
        return jax.tree.map(jnp.subtract, noise, gone), Tree(number, levels)

    return noise_on_sum(
        *(who, noise_multiplier, norm, noise_cohort_size),
        draw=draw,
        init=init,
        kind="tree",
        num_rounds=int(num_rounds),
    )
