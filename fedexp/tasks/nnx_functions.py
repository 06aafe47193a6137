"""Flax NNX modules as pure functions of their variables, which linen modules are as they stand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn
from flax import nnx, traverse_util

from fedexp.errors import UserError

Model = nn.Module | nnx.Module | Callable[..., nnx.Module]
Variables = Mapping[str, Any]


class NnxFunctions:
    """What `flax_task` asks of a linen module, of an NNX one.

    Variables are a dict of collections, as linen's: 'params' holds all `nnx.Param`, 'batch_stats' all
    `nnx.BatchStat`, and any other type of variable has a collection of its name. Below these are the
    attributes by which the module holds its parts, as in {'params': {'layers': {'0': {'kernel': ...}}}}. The
    states of random streams are in none: in training each is made anew of the step's key.

    Attributes:
      kind: the module's class.
    """

    def __init__(self, model: nnx.Module | Callable[..., nnx.Module]) -> None:
        """Takes a module, which starts as it is, or what makes one when it is called with `rngs`.

        Raises:
          UserError: something else.
        """
        if isinstance(model, nnx.Module):
            graph, state = nnx.split(model)
            self._make = lambda rngs: nnx.merge(graph, state, copy=True)
        elif callable(model):
            self._make = model
        else:
            raise UserError(f"a model is a Flax module, or the class of an NNX one, got {model!r}")
        try:
            module = nnx.eval_shape(lambda: self._make(rngs=nnx.Rngs(0)))
        except TypeError as error:
            first, *_ = str(error).splitlines()
            if not first.startswith(
                f"{getattr(model, '__qualname__', None)}."
            ):  # A bug of its own.
                raise
            raise UserError(
                f"a model that is no linen module is called with rngs=..., to make an NNX module: {first}"
            ) from None
        self.kind = type(module)
        if not isinstance(module, nnx.Module):
            raise UserError(f"{name_of(model)}(rngs=...) must make an NNX module, got {module!r}")
        self._abstract = nnx.split(module)

    def init_with_output(
        self, key: jax.Array, *args: jax.Array, **options: Any
    ) -> tuple[Any, dict[str, Any]]:
        """The outputs in evaluation and the variables of a new module."""
        variables = _collections(dict(_variables(self._make(rngs=nnx.Rngs(key)))))
        return self.apply(variables, *args, **options)[0], variables

    def apply(
        self,
        variables: Variables,
        *args: jax.Array,
        rngs: Mapping[str, jax.Array] | None = None,
        mutable: Sequence[str] = (),
        **options: Any,
    ) -> tuple[Any, dict[str, Any]]:
        """The outputs for these variables, and the collections `mutable` as they are afterwards.

        Args:
          variables: all collections.
          *args: inputs.
          rngs: {'dropout': key} in training, of which all random streams are made; None in evaluation.
          mutable: names of collections.
          **options: further arguments of `__call__`.

        Raises:
          UserError: a module that draws at random in evaluation.
        """
        module = nnx.merge(*self._abstract, copy=True)
        old = traverse_util.flatten_dict(variables)
        for place, variable in _variables(module):
            variable.set_value(old[place])
        if rngs is None:
            module.eval()
        else:
            module.train()
            _reseed(module, rngs["dropout"])
        try:
            outputs = module(*args, **options)
        except TypeError as error:
            if rngs is not None or "ShapeDtypeStruct" not in str(error):
                raise
            raise UserError(
                f"{self.kind.__name__} draws at random in evaluation, for which there is no key; let it look "
                "at an attribute `deterministic`, as nnx.Dropout does"
            ) from None
        # What a module sows is in no collection.
        new = {
            place: value
            for place, value in _variables(module)
            if place in old and place[0] in mutable
        }
        return outputs, _collections(new)


def functions_of(model: Model) -> nn.Module | NnxFunctions:
    """A linen module itself, or the functions of an NNX one."""
    return model if isinstance(model, nn.Module) else NnxFunctions(model)


def name_of(model: Model) -> str:
    """A model's class, or the function that makes it."""
    return getattr(model, "__name__", type(model).__name__)


def _variables(module: nnx.Module) -> Iterator[tuple[tuple[str, ...], nnx.Variable]]:
    """Variables with their collections and paths; those that are shared once."""
    for path, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Variable) and not isinstance(node, nnx.RngState):
            yield (_collection(node), *map(str, path)), node


def _collection(variable: nnx.Variable) -> str:
    named = {"params": nnx.Param, "batch_stats": nnx.BatchStat}
    matching = [name for name, kind in named.items() if isinstance(variable, kind)]
    return matching[0] if matching else type(variable).__name__


def _collections(variables: Mapping[tuple[str, ...], nnx.Variable]) -> dict[str, Any]:
    return traverse_util.unflatten_dict({k: v.get_value() for k, v in variables.items()})


def _reseed(module: nnx.Module, key: jax.Array) -> None:
    """Gives every random stream of a module a key of its own."""
    streams = [node for _, node in nnx.iter_graph(module) if isinstance(node, nnx.RngStream)]
    tags = sorted({stream.tag for stream in streams})
    keys: dict[str, Any] = {tag: jax.random.fold_in(key, number) for number, tag in enumerate(tags)}
    nnx.reseed(module, policy="match_shape", **keys)
