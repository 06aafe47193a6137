"""The one exception that fedexp raises for bad input."""

from __future__ import annotations

import sys
from typing import Any


class UserError(ValueError):
    """Bad input: the message names the culprit and the way out.

    `fedexp.main` prints it without a traceback and exits with code 2.
    """


def check(holds: Any, message: str) -> None:
    """Raises UserError unless a condition holds.

    A condition on traced values passes: hyperparameters may be tracers, as when trials are vmapped.

    Args:
      holds: a bool, or what comparing a JAX value gives.
      message: names the culprit and the way out.
    """
    jax = sys.modules.get("jax")  # Not imported here: processes that convert data do without.
    if jax is not None and isinstance(holds, jax.core.Tracer):
        return
    if not holds:
        raise UserError(message)
