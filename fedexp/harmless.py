"""What may be bound anew in the middle of a run, because its rounds have the same numbers."""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator, Mapping


class Effect(enum.IntEnum):
    """What a binding can change of a run's numbers."""

    NONE = 0
    LAST_BITS = 1  # Sums are taken in another order.
    NUMBERS = 2


# Of a configurable all parameters, or a single one of it.
_EFFECTS = {
    "train.num_rounds": Effect.NONE,
    "train.observers": Effect.NONE,
    "train.profile": Effect.NONE,
    "CheckpointPlan.every": Effect.NONE,
    "CheckpointPlan.keep": Effect.NONE,
    "ProfilePlan": Effect.NONE,
    "tensorboard": Effect.NONE,
    "progress": Effect.NONE,
    "json_lines": Effect.NONE,
    "wandb": Effect.NONE,
    "mlflow": Effect.NONE,
    "runtime": Effect.NONE,
    "runtime.num_cpu_devices": Effect.LAST_BITS,
    "train.strategy": Effect.LAST_BITS,
    "Packing": Effect.LAST_BITS,
    "jit": Effect.LAST_BITS,
    "pmap": Effect.LAST_BITS,
    "mesh": Effect.LAST_BITS,
    "auto": Effect.LAST_BITS,
    "debug": Effect.LAST_BITS,
}


def effect(name: str, bound: Mapping[str, str]) -> Effect:
    """What a change of a binding can change; of a macro, of all that it is used for.

    Args:
      name: 'scope/configurable.parameter', or a macro's.
      bound: name -> the values before and after the change, as Gin writes them, with a space between.
    """
    if "." not in name:
        return max((effect(user, bound) for user in _users(name, bound)), default=Effect.NONE)
    if name == "train.num_rounds" and _has_target(bound):
        return Effect.NUMBERS  # The noise is chosen for so many rounds.
    parameter = name.rpartition("/")[2]
    configurable = parameter.partition(".")[0]
    return _EFFECTS.get(parameter, _EFFECTS.get(configurable, Effect.NUMBERS))


def _users(macro: str, bound: Mapping[str, str]) -> Iterator[str]:
    used = re.compile(rf"%{re.escape(macro)}(?![\w./])")
    return (name for name, value in bound.items() if name != macro and used.search(value))


def _has_target(bound: Mapping[str, str]) -> bool:
    """Whether `privacy.epsilon` is bound."""
    return any(
        name.rpartition("/")[2] == "privacy.epsilon" and not set(value.split()) <= {"None"}
        for name, value in bound.items()
    )
