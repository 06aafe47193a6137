"""Matrices of low rank in place of an update's."""

from __future__ import annotations

import functools
import math

import gin
import jax
import jax.numpy as jnp

from fedexp.aggregators.coding import open_code
from fedexp.contracts import Aggregated, Aggregator, Code, PyTree, Sent
from fedexp.errors import check
from fedexp.streams import Stream, derive

_product = functools.partial(jnp.matmul, precision="highest")


@gin.configurable
def power_sgd(rank: int = 2, seed: int = 0) -> Aggregator:
    """PowerSGD's power iteration (Vogels et al. 2019, arXiv:1905.13727), taken by each client on its own.

    Of each matrix M (n, m) of its update a client sends P = orthonormal(M Q) and M^T P, of `rank` columns,
    which stand for P P^T M. Q (m, rank) is shared, and starts warm: the server takes the same iteration
    on the aggregate, and tells the next cohort.

    Algorithm 1 of the paper sums M Q over all workers, makes that orthonormal, and sums M^T P: two sums, and
    one P for all. Here a round has one sum, each client a P of its own, and the aggregate is the mean of
    their products, which is of a higher rank. With one client both are the same. It is biased, and wants
    `error_feedback.compressor = @power_sgd()`, as in Algorithm 2 of the paper.

    All axes of an array but the last are the matrix's rows. Vectors, and matrices whose factors would be no
    smaller, are sent whole.

    Args:
      rank: columns of the factors.
      seed: of the first Q, which is Gaussian.

    Raises:
      UserError: a rank below 1, or from the round a link before or after it that has a code which does not
        go with factors.
    """
    check(rank >= 1, f"power_sgd.rank must be at least 1, got {rank}")

    def factored(value: PyTree) -> list[bool]:
        shapes = [_matrix_shape(leaf) for leaf in jax.tree.leaves(value)]
        return [rank * (n + m) < n * m for n, m in shapes]

    def init(value: PyTree) -> PyTree:
        key = jax.random.key(seed)
        widths = [
            leaf.shape[-1]
            for leaf, is_factored in zip(jax.tree.leaves(value), factored(value), strict=True)
            if is_factored
        ]
        return tuple(
            jax.random.normal(derive(key, Stream.AGGREGATION, i), (width, rank))
            for i, width in enumerate(widths)
        )

    def client(state, update, client_state, key):
        del client_state, key
        open_code(update)
        leaves, structure = jax.tree.flatten(update.value)
        shared, sent = iter(state), 0
        for i, is_factored in enumerate(factored(update.value)):
            if not is_factored:
                sent += leaves[i].size
                continue
            shape = leaves[i].shape
            matrix = leaves[i].reshape(_matrix_shape(leaves[i]))
            basis = _orthonormal(_product(matrix, next(shared)))
            leaves[i] = _product(basis, _product(basis.T, matrix)).reshape(shape)
            sent += rank * sum(matrix.shape)
        code = Code(sent=sent, final=True)
        return Sent(update._replace(value=structure.unflatten(leaves), code=code))

    def server(state, total, each, later, cohort, key):
        del total, each, key
        matrices = [
            leaf.reshape(_matrix_shape(leaf))
            for leaf, is_factored in zip(jax.tree.leaves(later), factored(later), strict=True)
            if is_factored
        ]
        turned = tuple(
            _orthonormal(_product(matrix.T, _orthonormal(_product(matrix, factor))))
            for matrix, factor in zip(matrices, state, strict=True)
        )
        known = jax.tree.map(lambda new, old: jnp.where(cohort.size > 0, new, old), turned, state)
        return Aggregated(later, known)

    return Aggregator(client, server, init, told=lambda state: state)


def _matrix_shape(leaf: jax.Array) -> tuple[int, int]:
    """Rows and columns; a vector is one column."""
    if leaf.ndim < 2:
        return leaf.size, 1
    return math.prod(leaf.shape[:-1]), leaf.shape[-1]


def _orthonormal(columns: jax.Array) -> jax.Array:
    return jnp.linalg.qr(columns)[0]
