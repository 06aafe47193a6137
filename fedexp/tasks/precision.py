"""Computing a model in fewer bits than its parameters have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from fedexp.errors import UserError

Precision = Literal["bfloat16"] | None


def in_precision(model: nn.Module, compute_dtype: Precision) -> Callable[..., Any]:
    """What applies a model to (params, *inputs) and returns its outputs.

    With 'bfloat16' it is given parameters and inputs rounded to that, and its outputs are widened to
    float32: the loss, the gradients, the optimizers and what clients send stay in float32, and nothing
    needs scaling (Kalamkar et al. 2019, arXiv:1905.12322). Layers that name a dtype of their own keep it.

    Args:
      model: its inputs may be of any dtype; only floating-point ones are rounded.
      compute_dtype: 'bfloat16', or None for what the model makes of its float32 parameters.

    Raises:
      UserError: another dtype. Float16 is none, because its gradients underflow without scaling.
    """
    if compute_dtype not in ("bfloat16", None):
        raise UserError(f"compute_dtype must be 'bfloat16' or None, got {compute_dtype!r}")

    def apply(params: Any, *inputs: Any, **kwargs: Any) -> Any:
        if compute_dtype is None:
            return model.apply({"params": params}, *inputs, **kwargs)
        params, inputs = _cast((params, inputs), compute_dtype)
        return _cast(model.apply({"params": params}, *inputs, **kwargs), jnp.float32)

    return apply


def _cast(tree: Any, dtype: jax.typing.DTypeLike) -> Any:
    def cast(leaf: Any) -> Any:
        is_float = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        return jnp.asarray(leaf, dtype) if is_float else leaf

    return jax.tree.map(cast, tree)
