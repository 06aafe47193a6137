"""Splitting a tree of parameters by the paths of its leaves, into what travels and what stays."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, NamedTuple

import jax

from fedexp.errors import UserError
from fedexp.tasks import Task, split_statistics

PyTree = Any


class Parts(NamedTuple):
    """Trees like the whole one, each with None in the places of the others' leaves."""

    travelling: PyTree
    local: PyTree
    frozen: PyTree


def split(params: PyTree, local: str | None = None, frozen: str | None = None) -> Parts:
    """Parts a tree by regular expressions, searched for in each leaf's path, as 'Dense_1/kernel'.

    Raises:
      UserError: an expression that matches no leaf, a leaf that both match, or nothing left to travel.

    >>> split({"body": 1, "head": 2}, local="head")
    Parts(travelling={'body': 1, 'head': None}, local={'body': None, 'head': 2}, \
frozen={'body': None, 'head': None})
    """
    paths, structure = jax.tree_util.tree_flatten_with_path(params)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
    kinds = [
        tuple(pattern is not None and bool(re.search(pattern, name)) for pattern in (local, frozen))
        for name in names
    ]
    known = f"; the parameters are {', '.join(names)}"
    for number, pattern in enumerate((local, frozen)):
        if pattern is not None and not any(kind[number] for kind in kinds):
            raise UserError(f"the pattern {pattern!r} matches none of the parameters{known}")
    if (True, True) in kinds:
        raise UserError(f"{local!r} and {frozen!r} match the same parameters{known}")
    if (False, False) not in kinds:
        raise UserError(
            f"{local!r} and {frozen!r} match all parameters: none is left to travel{known}"
        )
    return Parts(
        *(
            structure.unflatten(
                leaf if kind == wanted else None
                for kind, (_, leaf) in zip(kinds, paths, strict=True)
            )
            for wanted in ((False, False), (True, False), (False, True))
        )
    )


def merge(*parts: PyTree) -> PyTree:
    """Puts together what `split` has parted.

    >>> merge({"body": None, "head": 2}, {"body": 1, "head": None})
    {'body': 1, 'head': 2}
    """
    return jax.tree.map(
        lambda *leaves: next((leaf for leaf in leaves if leaf is not None), None),
        *parts,
        is_leaf=_is_none,
    )


def without(task: Task, frozen: PyTree) -> Task:
    """The task of the other parameters, in which the frozen ones are constants."""

    def apply(params, batch, key):
        return task.apply(merge(params, frozen), batch, key)

    updating: Any = task.apply_and_update

    def apply_and_update(params, batch, mask, key):
        outputs, new = updating(merge(params, frozen), batch, mask, key)
        _, old = split_statistics(params)
        kept = jax.tree.map(lambda o, n: None if o is None else n, old, new, is_leaf=_is_none)
        return outputs, kept

    return dataclasses.replace(task, apply=apply, apply_and_update=updating and apply_and_update)


def _is_none(leaf: Any) -> bool:
    return leaf is None
