"""Trains trials together on three devices, and alone on one; prints what came out as JSON."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np

from fedexp import runtime
from fedexp.engine import jit, mesh
from fedexp.engine.placement import for_trials
from fedexp.together import Trial, run_together
from tests.test_together import adam, setup

SEEDS = (3, 8)
NUMBERS = [{"client": rate, "server": 0.1} for rate in (0.01, 0.02, 0.03, 0.04, 0.05)]


def main() -> None:
    """Prints which device has had which of six trials, and the parameters of five with two seeds."""
    runtime.start(num_cpu_devices=3)
    placement = for_trials(jax.local_devices())
    device_of = placement.over_trials(lambda _: (jax.lax.axis_index("trials"),), (0,), (0,))
    each = [(seed, numbers) for seed in SEEDS for numbers in NUMBERS]
    trials = [Trial(numbers, seed=seed) for seed, numbers in each]
    together, _ = run_together(setup(strategy=mesh()), adam, trials)
    alone = [setup(strategy=jit(), algorithm=adam(n), seed=seed).run(None) for seed, n in each]
    found = {
        "devices": np.asarray(jax.jit(device_of)(jnp.zeros(6))[0]).tolist(),
        "together": [_flat(one.params) for one in together],
        "alone": [_flat(one.params) for one in alone],
    }
    print(json.dumps(found))


def _flat(params: dict[str, jax.Array]) -> list[float]:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)]).tolist()


if __name__ == "__main__":
    main()
