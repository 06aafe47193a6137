"""Settings of all tests."""

import importlib.metadata
import os
import tempfile

import gin
import pytest
from hypothesis import settings

# A busy machine makes single examples slow; what is tested is not their speed.
settings.register_profile("fedexp", deadline=None)
settings.load_profile("fedexp")

# Many tests start a process that compiles what another one has compiled. JAX reads it on import.
_compiled = os.path.join(tempfile.gettempdir(), f"fedexp-tests-compiled-{os.getuid()}")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _compiled)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
# Most of what tests do is compiling: programs that are optimised less are there in 0.4 of the time.
_fast = "--xla_backend_optimization_level=0"
# Later versions do not know the flag, and end a process that is given it.
if importlib.metadata.version("jaxlib").startswith(("0.10.", "0.11.")):
    _fast += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", _fast)


@pytest.fixture(autouse=True)
def _no_bindings_from_other_tests():
    yield
    gin.clear_config()
