"""What the tasks of any Flax module, linen or NNX, have in common."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from fedexp.compiling import run_once
from fedexp.errors import UserError
from fedexp.streams import Stream, derive
from fedexp.tasks.base import Features, PyTree, Task
from fedexp.tasks.nnx_functions import Model, NnxFunctions, functions_of
from fedexp.tasks.statistics import join_statistics, split_statistics

Precision = Literal["bfloat16"] | None


def flax_task(
    name: str,
    model: Model,
    inputs: Callable[[Features, jax.Array | None], tuple[jax.Array, ...]],
    output_shape: Callable[..., tuple[int, ...]],
    remedy: str,
    compute_dtype: Precision = None,
    **fields: Any,
) -> Task:
    """The task whose model maps what `inputs` makes of a batch to outputs.

    In training, random layers may use the rng 'dropout', and `__call__` is told so where it takes `train`.
    Collections besides 'params' are statistics (see `fedexp.tasks.statistics`), which training updates and
    evaluation reads. Rows of padding, copies of real ones, count in them unless `__call__` takes `mask`,
    (B,) bool and False on padding, which only training gives:

        def __call__(self, x, train, mask=None):
            mask = None if mask is None else mask[:, None]
            return nn.BatchNorm(use_running_average=not train)(x, mask=mask)

    An NNX model is given as its class, or as any function that makes one of `rngs=`, so that the run's seed
    chooses the first parameters; a module that is already made starts from those that it has. Training and
    evaluation are its `train()` and `eval()`, and dropout draws from the step's key, whatever its own streams
    are. Variables are named as a linen model's (see `NnxFunctions`); all but `nnx.Param` are statistics:

        class Net(nnx.Module):
            def __init__(self, rngs):
                self.norm = nnx.BatchNorm(8, rngs=rngs)
            def __call__(self, x, mask=None):
                return self.norm(x, mask=None if mask is None else mask[:, None])

    With compute_dtype 'bfloat16' the model is given parameters and inputs rounded to that, and its outputs
    are widened to float32: the loss, the gradients, the optimizers, what clients send and all statistics
    stay in float32, and nothing needs scaling (Kalamkar et al. 2019, arXiv:1905.12322). Layers that name a
    dtype of their own keep it.

    Args:
      name: the task's, for messages.
      model: maps the inputs to outputs, an array; a linen module, an NNX one, or an NNX module's class.
      inputs: (batch, key) -> the model's arguments; a key in training, None in evaluation.
      output_shape: maps the inputs to the shape that outputs must have.
      remedy: what to do about outputs of another.
      compute_dtype: 'bfloat16', or None for what the model makes of its float32 parameters.
      **fields: the other fields of `Task`.

    Raises:
      UserError: another compute_dtype. The task's `init` raises for a model whose arguments or outputs do
        not fit.
    """
    if compute_dtype not in ("bfloat16", None):
        raise UserError(
            f"{name}.compute_dtype must be 'bfloat16' or None, got {compute_dtype!r}; float16 would need "
            "its gradients scaled"
        )
    functions: Any = functions_of(model)
    kind = functions.kind if isinstance(functions, NnxFunctions) else type(functions)
    signature = inspect.signature(kind.__call__)
    accepted = signature.parameters

    def options(train: bool, mask: jax.Array | None = None) -> dict[str, Any]:
        given = {"train": train} if mask is None else {"train": train, "mask": mask}
        return {option: value for option, value in given.items() if option in accepted}

    def first(key: jax.Array, batch: Features) -> tuple[Any, Any]:
        return functions.init_with_output(key, *inputs(batch, None), **options(train=False))

    def init(key: jax.Array, batch: Features) -> PyTree:
        args = jax.eval_shape(lambda batch: inputs(batch, None), batch)
        try:
            signature.bind(functions, *args, **options(train=False))
        except TypeError as error:
            raise UserError(
                f"{kind.__name__}.__call__: {error}; {name} gives it {len(args)} input(s), and a bool "
                "`train` if it takes one"
            ) from None
        outputs, _ = jax.eval_shape(first, key, batch)
        found, expected = getattr(outputs, "shape", type(outputs)), output_shape(*args)
        if found != expected:
            shapes = " and ".join(str(arg.shape) for arg in args)
            raise UserError(
                f"{kind.__name__} maps inputs of shape {shapes} to {found}, but {name} needs "
                f"outputs of shape {expected}; {remedy}"
            )
        variables = run_once(lambda key, batch: first(key, batch)[1], key, batch)
        return join_statistics(variables.pop("params", {}), variables)

    def apply_and_update(
        params: PyTree, batch: Features, mask: jax.Array | None, key: jax.Array | None
    ) -> tuple[jax.Array, dict[str, PyTree]]:
        trained, old = split_statistics(params)
        training = key is not None
        args = inputs(batch, derive(key, Stream.AUGMENT) if training else None)
        trained, args = _cast((trained, args), compute_dtype)
        outputs, new = functions.apply(
            {"params": trained, **old},
            *args,
            rngs={"dropout": derive(key, Stream.DROPOUT)} if training else None,
            mutable=list(old) if training else [],
            **options(training, mask),
        )
        return _cast(outputs, jnp.float32 if compute_dtype else None), {**old, **new}

    def apply(params: PyTree, batch: Features, key: jax.Array | None) -> jax.Array:
        return apply_and_update(params, batch, None, key)[0]

    return Task(init=init, apply=apply, apply_and_update=apply_and_update, **fields)


def _cast(tree: PyTree, dtype: jax.typing.DTypeLike | None) -> PyTree:
    """Floating-point leaves in another dtype, if any."""

    def cast(leaf: Any) -> Any:
        is_float = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        return jnp.asarray(leaf, dtype) if is_float else leaf

    return tree if dtype is None else jax.tree.map(cast, tree)
