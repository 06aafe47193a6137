from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from fedexp.models import CelebaCNN


def test_the_parameter_count_is_that_of_leaf():
    params = jax.eval_shape(CelebaCNN().init, jax.random.key(0), jnp.zeros((1, 84, 84, 3)))[
        "params"
    ]
    convolutions = 9 * 3 * 32 + 32 + 3 * (9 * 32 * 32 + 32)
    expected = convolutions + 4 * 2 * 32 + 6 * 6 * 32 * 2 + 2
    assert sum(p.size for p in jax.tree.leaves(params)) == expected == 31_202


@pytest.mark.slow
def test_it_is_the_same_network_in_plain_flax():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 10, 12, 3)), jnp.float32)
    variables = CelebaCNN(5).init(jax.random.key(1), x)
    p = variables["params"]
    out, _ = CelebaCNN(5).apply(variables, x, train=True, mutable=["batch_stats"])
    for i in range(4):
        x = nn.Conv(32, (3, 3)).apply({"params": p[f"Conv_{i}"]}, x)
        x = (x - x.mean((0, 1, 2))) / jnp.sqrt(x.var((0, 1, 2)) + 1e-3)
        x = nn.relu(nn.max_pool(x, (2, 2), (2, 2), "SAME"))
    x = x.reshape(3, -1) @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"]
    np.testing.assert_allclose(out, x, rtol=1e-3, atol=1e-4)
