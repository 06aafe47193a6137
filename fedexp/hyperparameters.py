"""What a run's hyperparameters are, for pages and tables that list them."""

from __future__ import annotations

import dataclasses
import inspect
import math
import numbers
from typing import Any

from gin import config as gin_config

from fedexp import bindings
from fedexp.data import ClientBatching

Value = bool | float | str

# Configurables whose defaults tell as much as what is bound.
_OPTIMIZERS = ("optax.", "optimizers.")
_LONGEST = 100


def of_run(num_rounds: int, seed: int, batching: ClientBatching) -> dict[str, Value]:
    """Name, as Gin has it -> number, bool or text.

    Those are rounds, seed and batching, all of optimizers that have been built, and whatever is bound. None
    and long texts are left out.

    Args:
      num_rounds: of the run.
      seed: of the run.
      batching: of its clients.
    """
    found: dict[str, Any] = {"train.num_rounds": num_rounds, "train.seed": seed}
    found |= {f"ClientBatching.{name}": v for name, v in dataclasses.asdict(batching).items()}
    with gin_config._OPERATIVE_CONFIG_LOCK:
        operative = [*gin_config._OPERATIVE_CONFIG.items()]
    built = [one for one in operative if one[0][1].startswith(_OPTIMIZERS)]
    defaults = [((scope, selector), _defaults(selector)) for (scope, selector), _ in built]
    for (scope, selector), parameters in [*defaults, *built, *gin_config._CONFIG.items()]:
        for parameter, value in parameters.items():
            found[bindings.name_of(scope, selector, parameter)] = value
    plain = {name: _plain(value) for name, value in found.items()}
    return {name: value for name, value in plain.items() if value is not None}


def _defaults(selector: str) -> dict[str, Any]:
    """A configurable's own, also where a wrapper hides them from Gin."""
    parameters = inspect.signature(gin_config._REGISTRY.get_match(selector).wrapped).parameters
    return {
        name: one.default
        for name, one in parameters.items()
        if isinstance(one.default, (bool, str, numbers.Real))
    }


def _plain(value: Any) -> Value | None:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, numbers.Real) and math.isfinite(value):
        return float(value)
    text = value if isinstance(value, str) else bindings.text_of(value)
    return text if len(text) <= _LONGEST else None
