"""What a gin file builds: configurables, and a model's parameters."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
from gin import config as gin_config

from fedexp import bindings
from fedexp.bindings.signatures import parameters_of
from fedexp.bindings.statements import references_in

PyTree = Any
_TRAIN = "fedexp.trainer.train"


class Built(NamedTuple):
    """A configurable that has been called.

    Attributes:
      name: what it was called for, and its reference: 'task = @classification()'.
      values: name -> what its parameters were, defaults included, as Gin writes them; without None.
      parts: what its parameters refer to.
    """

    name: str
    values: dict[str, str]
    parts: list[Built]


class Module(NamedTuple):
    """Parameters side by side in a tree.

    Attributes:
      path: where, 'Dense_0'.
      arrays: name -> its shape and dtype.
    """

    path: str
    arrays: dict[str, jax.ShapeDtypeStruct]

    @property
    def size(self) -> int:
        """Numbers in all of its arrays."""
        return sum(math.prod(array.shape) for array in self.arrays.values())


def built() -> list[Built]:
    """What has been called since a gin file was loaded: `train`, and what else is bound."""
    with gin_config._OPERATIVE_CONFIG_LOCK:
        operative = {key: dict(values) for key, values in gin_config._OPERATIVE_CONFIG.items()}
    seen = set()

    def called(name: str, scope: str, selector: str) -> Built:
        seen.add((scope, selector))
        values, parts, order = {}, [], list(parameters_of(selector))
        given = operative.get((scope, selector), {})
        # Those that a wrapper hides come last.
        for parameter in sorted(given, key=[*order, *given].index):
            value = given[parameter]
            references = list(references_in(value))
            if not references and value not in (None, (), [], {}):
                values[parameter] = bindings.text_of(value)
            for one in references:
                within = "/".join(one.scopes) or scope
                name_of_part = f"{parameter} = {bindings.text_of(one)}"
                parts.append(called(name_of_part, within, one.configurable.selector))
        return Built(name, values, parts)

    found = [called("train", "", _TRAIN)]
    for scope, selector in operative:
        is_bound = (scope, selector) in gin_config._CONFIG
        if is_bound and (scope, selector) not in seen and selector != "gin.macro":
            name = gin_config._REGISTRY.minimal_selector(selector)
            found.append(called(f"{scope}/{name}".lstrip("/"), scope, selector))
    return found


def modules(params: PyTree) -> list[Module]:
    """A model's parameters by module, in the order of the tree."""
    found: dict[str, Module] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        where, name = (
            jax.tree_util.keystr(part, simple=True, separator="/")
            for part in (path[:-1], path[-1:])
        )
        module = found.setdefault(where, Module(where, {}))
        module.arrays[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return list(found.values())
