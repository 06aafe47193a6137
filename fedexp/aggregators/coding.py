"""What links share that write an update's numbers in fewer bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from fedexp.contracts import Aggregated, Aggregator, Code, PyTree, Sent, Update
from fedexp.errors import UserError
from fedexp.streams import Stream, derive

Coding = Literal["fixed", "entropy"]
# (numbers (n,), (n,) bool which are sent, key) -> (what they are decoded to, int32 symbols).
Quantizer = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
# (update, key) -> (arrays of (rows, n), where they are numbers of the update, the way back).
Rotation = Callable[[Update, jax.Array], tuple[list[jax.Array], list[jax.Array], Callable]]


def passing(state: PyTree, total: PyTree, each: PyTree, later: PyTree, cohort, key) -> Aggregated:
    """The server half of a link that leaves the aggregate as it is."""
    return Aggregated(later, state)


def quantizing(
    quantizer: Quantizer,
    num_symbols: int,
    num_scales: int,
    coding: Coding = "fixed",
    rotation: Rotation | None = None,
) -> Aggregator:
    """A link that writes every array's numbers as symbols, and float32 scales beside them.

    What a link before it does not send stays zero.

    Args:
      quantizer: of one array.
      num_symbols: the symbols are below this.
      num_scales: of an array.
      coding: 'fixed' takes ceil(log2(num_symbols)) bits a number; 'entropy' what `entropy_bits` says.
      rotation: of the whole update first, and back afterwards; its blocks are the arrays then.

    Raises:
      UserError: an unknown coding, or from the round a link before it that has an entropy code, or with a
        rotation one that sends some entries only.
    """
    if coding not in ("fixed", "entropy"):
        raise UserError(f"coding must be 'fixed' or 'entropy', got {coding!r}")

    def client(state, update, client_state, key):
        del client_state
        code = open_code(update)
        rows, masks, back = _arrays(update) if rotation is None else rotation(update, key)
        values, bits = [], jnp.float32(0)
        for i, (row, mask) in enumerate(zip(rows, masks, strict=True)):
            keys = jax.random.split(derive(key, Stream.AGGREGATION, i), len(row))
            value, symbols = jax.vmap(quantizer)(row, mask, keys)
            values.append(jnp.where(mask, value, 0))
            if coding == "entropy":
                bits += jax.vmap(entropy_bits, (0, 0, None))(symbols, mask, num_symbols).sum()
        code = code._replace(
            width=float(math.ceil(math.log2(num_symbols))),
            scales=32.0 * num_scales * sum(map(len, rows)),
        )
        if rotation is not None:
            code = code._replace(sent=sum(row.size for row in rows))
        if coding == "entropy":
            code = code._replace(width=0.0, scales=code.scales + bits, final=True)
        return Sent(update._replace(value=back(values), code=code))

    return Aggregator(client, passing)


def _arrays(update: Update) -> tuple[list[jax.Array], list[jax.Array], Callable]:
    """Every array as a row, which of its entries are sent, and the way back."""
    leaves, structure = jax.tree.flatten(update.value)
    support = (update.code or Code()).support
    everywhere = [jnp.ones((1, leaf.size), bool) for leaf in leaves]
    masks = everywhere if support is None else [m.reshape(1, -1) for m in jax.tree.leaves(support)]

    def back(rows: Sequence[jax.Array]) -> PyTree:
        shaped = [row.reshape(leaf.shape) for row, leaf in zip(rows, leaves, strict=True)]
        return structure.unflatten(shaped)

    return [leaf.reshape(1, -1) for leaf in leaves], masks, back


def entropy_bits(symbols: jax.Array, mask: jax.Array, num_symbols: int) -> jax.Array:
    """() float32, what an adaptive arithmetic code takes for the symbols that are sent.

    The empirical entropy of d symbols of k kinds, their histogram in k log2(e (d + k) / k) bits (Suresh et
    al. 2017, arXiv:1611.00429, Theorem 4), and 2 bits to end with.
    """
    counts = jnp.zeros(num_symbols).at[symbols].add(mask)
    kinds, total = (counts > 0).sum(), jnp.maximum(counts.sum(), 1)
    share = counts / total
    entropy = -jnp.where(counts > 0, share * jnp.log2(jnp.maximum(share, 1e-30)), 0).sum()
    histogram = kinds * jnp.log2(math.e * (total + kinds) / jnp.maximum(kinds, 1))
    return total * entropy + histogram + 2


def open_code(update: Update) -> Code:
    """How an update is written, for a link that changes it.

    Raises:
      UserError: in an entropy code, whose size is of the numbers as they are, or as factors.
    """
    code = update.code or Code()
    if code.final:
        raise UserError(
            "a link with an entropy code, or power_sgd, must be the last that compresses"
        )
    return code


def stochastic_round(place: jax.Array, key: jax.Array) -> jax.Array:
    """One of the two nearest integers, at random such that its expectation is the place."""
    return jnp.floor(place + jax.random.uniform(key, place.shape)).astype(jnp.int32)
