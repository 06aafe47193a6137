from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedexp.engine.packed_tree import PackedMapping
from fedexp.engine.preparing import _words
from fedexp.tasks import Measure

METRICS = {
    "loss": Measure(np.float32(1.5), np.float32(4.0)),
    "steps": np.arange(6, dtype=np.int32).reshape(2, 3),
    "half": np.array([0.5, 2.0], jnp.bfloat16),
    "took_part": np.array([True, False]),
    "nothing": np.zeros((0, 2), np.float32),
    "number": 7,
}


def test_a_packed_mapping_comes_back_as_it_was():
    packed = jax.jit(PackedMapping.of)(METRICS)
    assert len(jax.tree.leaves(packed)) == 4  # One of each dtype.
    for found in (dict(packed), dict(jax.device_get(packed))):
        assert list(found) == sorted(METRICS)
        jax.tree.map(np.testing.assert_array_equal, found, METRICS)
        dtypes = jax.tree.map(lambda leaf: str(leaf.dtype), found)
        assert dtypes["loss"] == Measure("float32", "float32")
        assert dtypes["half"] == "bfloat16" and dtypes["took_part"] == "bool"
    with pytest.raises(KeyError):
        packed["none of them"]


def test_an_empty_mapping_is_packed_too():
    assert dict(jax.device_get(jax.jit(PackedMapping.of)({}))) == {}


@pytest.mark.parametrize("seed", [0, 17, 2**32, 2**40 + 5, 2**64 + 2**33])
def test_seeds_are_split_into_words_as_numpy_does(seed):
    numbers = (4, seed, 0, 2**31, 0)
    wanted = np.random.SeedSequence(numbers).generate_state(4)
    found = np.random.SeedSequence(_words(*numbers)).generate_state(4)
    np.testing.assert_array_equal(found, wanted)
