"""Variables of a model that are carried from step to step instead of trained, as BatchNorm's.

A Flax model with such collections has the variables {'params': ..., 'batch_stats': ...} for its parameter
tree; a model without them has what is under 'params' alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedexp.errors import check

PyTree = Any


def split_statistics(tree: PyTree) -> tuple[PyTree, dict[str, PyTree]]:
    """What is trained of a parameter tree, or of one like it, and its other collections by name.

    >>> split_statistics({"params": {"bias": 1}, "batch_stats": {"mean": 2}})
    ({'bias': 1}, {'batch_stats': {'mean': 2}})
    >>> split_statistics({"bias": 1})
    ({'bias': 1}, {})
    """
    if isinstance(tree, Mapping) and "params" in tree and len(tree) > 1:
        return tree["params"], {name: tree[name] for name in tree if name != "params"}
    return tree, {}


def join_statistics(trained: PyTree, statistics: Mapping[str, PyTree]) -> PyTree:
    """The tree that `split_statistics` parts so."""
    return {"params": trained, **statistics} if statistics else trained


def of_trained(function: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """Shows a function of trees what is trained of them, and gives its result the first one's statistics.

    >>> of_trained(lambda a, b: a + b)({"params": 1, "batch_stats": 2}, {"params": 3, "batch_stats": 4})
    {'params': 4, 'batch_stats': 2}
    """

    def of_whole(tree: PyTree, *others: PyTree) -> PyTree:
        trained, statistics = split_statistics(tree)
        return join_statistics(
            function(trained, *(split_statistics(other)[0] for other in others)), statistics
        )

    return of_whole


def as_optimizer(given: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """An optimizer that may be given what it has no use for.

    Raises:
      UserError: it is none.
    """
    check(
        isinstance(given, optax.GradientTransformation),
        f"an optimizer must be Optax's, as optax.sgd(0.1), got {given!r}",
    )
    return optax.with_extra_args_support(given)


def carrying_statistics(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Applies an optimizer to what is trained, and SGD(1.0) to the statistics of a tree that has any.

    With gradients from `gradient` a client's statistics become those of its last batch; with the negated
    mean of client updates the server's become the clients' mean. A tree without statistics has the
    optimizer's own updates and state; with them, the state is that of the trained part.

    Args:
      optimizer: any; it never sees statistics. Whatever else scales updates, as a schedule, belongs in it.
    """
    optimizer = as_optimizer(optimizer)

    def init(params: PyTree) -> optax.OptState:
        return optimizer.init(split_statistics(params)[0])

    def update(
        updates: optax.Updates, state: optax.OptState, params: PyTree | None = None, **extra: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        grads, statistics = split_statistics(updates)
        updates, state = optimizer.update(grads, state, split_statistics(params)[0], **extra)
        return join_statistics(updates, jax.tree.map(jnp.negative, statistics)), state

    return optax.GradientTransformationExtraArgs(init, update)
