"""fedexp: Gin-configured experiments in federated learning, in JAX."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedexp.snapshots import load_params as load_params

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`load_params`, for which JAX is imported only here."""
    if name != "load_params":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fedexp.snapshots import load_params

    return load_params
