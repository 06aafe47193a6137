"""Updates in numbers of 16 bits."""

from __future__ import annotations

from typing import Literal

import gin
import jax
import jax.numpy as jnp

from fedexp.aggregators.coding import open_code, passing
from fedexp.contracts import Aggregator, Sent


@gin.configurable
def half_precision(dtype: Literal["bfloat16", "float16"] = "bfloat16") -> Aggregator:
    """Rounds every entry to the nearest number of 16 bits.

    Args:
      dtype: bfloat16 has float32's range and 8 bits of precision, float16 has 11 and ends at 65504.
    """

    def client(state, update, client_state, key):
        del state, client_state, key
        value = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)).astype(x.dtype), update.value)
        code = open_code(update)._replace(width=16.0, scales=0.0)
        return Sent(update._replace(value=value, code=code))

    return Aggregator(client, passing)
