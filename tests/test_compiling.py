from __future__ import annotations

import ctypes
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedexp import compiling


def test_jit_donates_and_compiles_once():
    traces = []

    def add(x, y):
        traces.append(x.shape)
        return x + y

    compiled = compiling.jit(add, donate_argnums=0)
    x = jnp.arange(3.0)
    np.testing.assert_array_equal(compiled(x, 1), [1, 2, 3])
    assert x.is_deleted()
    compiled(jnp.ones(3), 1)
    assert traces == [(3,)]


def test_the_level_is_for_cpus_only_and_xla_flags_win(monkeypatch):
    given = []
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setattr(jax, "jit", lambda function, **options: given.append(options) or function)
    compiling.jit(abs)
    compiling.jit(abs, level=0)
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=2")
    compiling.jit(abs)
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    compiling.jit(abs)
    options = [one["compiler_options"] for one in given]
    levels = [one and one["xla_backend_optimization_level"] for one in options]
    assert levels == [1, 0, None, None]


def test_run_once_is_the_function():
    assert compiling.run_once(lambda x, y: x * y, 3, jnp.float32(2)) == 6


@pytest.mark.parametrize("library", [OSError("no library"), object()])
def test_memory_stays_where_the_c_library_cannot_release_it(monkeypatch, library):
    def load(name):
        if isinstance(library, Exception):
            raise library
        return library

    compiling.release_memory()
    monkeypatch.setattr(ctypes, "CDLL", load)
    compiling.release_memory()


def test_only_what_this_thread_compiles_meanwhile_is_counted():
    compilations, x = compiling.Compilations(), np.zeros(3)
    jax.jit(lambda x: x + 1)(x)
    with compilations.counted():
        increase = jax.jit(lambda x: x + 2)
        increase(x)
        increase(x)
        other = threading.Thread(target=lambda: jax.jit(lambda x: x + 3)(x))
        other.start()
        other.join()
    assert compilations.count == 1
    with compilations.counted():
        increase(np.zeros(4))
    assert compilations.count == 2
