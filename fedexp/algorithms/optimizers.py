"""Optax optimizers and schedules by their Gin names, and the adaptive ones as the FL literature has them.

A Gin file tells client and server optimizers apart by scope: `client/sgd.learning_rate = 0.1`,
`server/adam.learning_rate = 0.003`.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import gin
import jax
import jax.numpy as jnp
import optax

from fedexp.errors import UserError, check
from fedexp.rates import Rate

ScalarOrSchedule = float | optax.Schedule

_OPTAX_OPTIMIZERS = ("sgd", "adamw", "rmsprop", "lion", "lamb", "nadam", "adabelief")
_OPTAX_SCHEDULES = (
    "constant_schedule",
    "cosine_decay_schedule",
    "exponential_decay",
    "linear_schedule",
    "piecewise_constant_schedule",
    "polynomial_schedule",
    "warmup_cosine_decay_schedule",
    "join_schedules",
)


# None may be negative or infinite; these are also below 1.
_DECAYS = ("b1", "b2", "b3", "decay", "momentum")
_OTHERS = ("learning_rate", "eps", "eps_root", "weight_decay", "initial_accumulator_value")


def _scoped(name: str) -> str:
    return "/".join([*gin.current_scope(), name])


def _checked(optimizer: Callable[..., optax.GradientTransformation], name: str | None = None):
    """Refuses hyperparameters that are out of range, as a negative learning rate."""
    name = name or optimizer.__name__
    if isinstance(optimizer, functools.partial):  # As Optax's nadam, without annotations.
        optimizer = functools.update_wrapper(functools.partial(optimizer), optimizer.func)
    names = list(inspect.signature(optimizer).parameters)

    @functools.wraps(optimizer)
    def build(learning_rate: ScalarOrSchedule = gin.REQUIRED, *args, **kwargs):
        given = {"learning_rate": learning_rate, **dict(zip(names[1:], args, strict=False))}
        for parameter, value in {**given, **kwargs}.items():
            if value is None or callable(value) or parameter not in (*_DECAYS, *_OTHERS):
                continue
            full = f"{_scoped(name)}.{parameter}"
            why = "; gradients are already descended" if parameter == "learning_rate" else ""
            check(value >= 0, f"{full} must not be negative, got {value}{why}")
            limit, wanted = (1, "below 1") if parameter in _DECAYS else (math.inf, "finite")
            check(value < limit, f"{full} must be {wanted}, got {value}")
        if callable(learning_rate):
            return optimizer(learning_rate, *args, **kwargs)
        return at_rate(lambda rate: optimizer(rate, *args, **kwargs), Rate(learning_rate))

    return build


def at_rate(
    make: Callable[[Any], optax.GradientTransformation], rate: Rate
) -> optax.GradientTransformation:
    """The optimizer that `make` makes of a rate, which compiled rounds take as an argument."""
    first = make(rate.value)

    def update(updates, state, params=None, **extra):
        new, state = make(rate()).update(updates, state, params, **extra)
        return jax.tree.map(lambda u, g: u.astype(g.dtype), new, updates), state

    return type(first)(first.init, update)


def sgd_at(rate: Rate, momentum: float | None = None) -> optax.GradientTransformation:
    """SGD at a rate that an algorithm also has another use for."""
    return at_rate(lambda value: optax.sgd(value, momentum), rate)


def _checked_schedule(schedule: Callable[..., optax.Schedule]):
    """Tells what Optax refuses as a mistake of the user."""

    @functools.wraps(schedule)
    def build(*args, **kwargs):
        try:
            return schedule(*args, **kwargs)
        except ValueError as error:
            raise UserError(f"{_scoped(schedule.__name__)}: {error}") from error

    return build


for _name in _OPTAX_OPTIMIZERS:
    gin.external_configurable(_checked(getattr(optax, _name), _name), name=_name, module="optax")
for _name in _OPTAX_SCHEDULES:
    gin.external_configurable(_checked_schedule(getattr(optax, _name)), name=_name, module="optax")


class AdaptiveState(NamedTuple):
    """First moment m and second moment v, each shaped like the parameters."""

    m: Any
    v: Any


def _algorithm_2(
    learning_rate: ScalarOrSchedule,
    second_moment: Callable[[jax.Array, jax.Array], jax.Array],
    b1: float,
    eps: float,
    initial_accumulator_value: float,
) -> optax.GradientTransformation:
    """Steps by eta m / (sqrt(v) + eps), without bias correction (Reddi et al. 2021, Algorithm 2)."""

    def init(params):
        return AdaptiveState(
            jax.tree.map(jnp.zeros_like, params),
            jax.tree.map(lambda p: jnp.full_like(p, initial_accumulator_value), params),
        )

    def update(updates, state, params=None):
        del params
        m = jax.tree.map(lambda g, m: b1 * m + (1 - b1) * g, updates, state.m)
        v = jax.tree.map(second_moment, updates, state.v)
        # An entry that never had a gradient has m = 0: 0 / max(0 + eps, tiny) stays 0 for eps = 0 too.
        updates = jax.tree.map(
            lambda m, v: m / jnp.maximum(jnp.sqrt(v) + eps, jnp.finfo(v.dtype).tiny), m, v
        )
        return updates, AdaptiveState(m, v)

    return optax.chain(
        optax.GradientTransformation(init, update), optax.scale_by_learning_rate(learning_rate)
    )


@gin.configurable(module="optimizers")
@_checked
def adam(
    learning_rate: ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    bias_correction: bool = True,
    initial_accumulator_value: float = 0.0,
) -> optax.GradientTransformation:
    """Adam; `bias_correction=False` is FedAdam's server step (Reddi et al. 2021, Algorithm 2).

    Args:
      learning_rate: eta, or an Optax schedule of the number of updates made.
      b1: decay of the first moment.
      b2: decay of the second moment; the paper fixes 0.99.
      eps: the paper's adaptivity tau, outside the square root.
      bias_correction: divide the moments by 1 - b**t (Kingma & Ba 2015), as `optax.adam` does.
      initial_accumulator_value: v before the first update; without bias correction only.
    """
    if bias_correction:
        return optax.adam(learning_rate, b1, b2, eps)
    return _algorithm_2(
        learning_rate, lambda g, v: b2 * v + (1 - b2) * g**2, b1, eps, initial_accumulator_value
    )


@gin.configurable(module="optimizers")
@_checked
def adagrad(
    learning_rate: ScalarOrSchedule,
    b1: float = 0.0,
    eps: float = 1e-3,
    initial_accumulator_value: float = 0.0,
) -> optax.GradientTransformation:
    """FedAdagrad's server step: v += g**2 (Reddi et al. 2021, Algorithm 2).

    Args:
      learning_rate: eta, or an Optax schedule of the number of updates made.
      b1: decay of the first moment; the paper fixes 0.
      eps: the paper's adaptivity tau, outside the square root (`optax.adagrad` has it inside).
      initial_accumulator_value: v before the first update.
    """
    return _algorithm_2(learning_rate, lambda g, v: v + g**2, b1, eps, initial_accumulator_value)


@gin.configurable(module="optimizers")
@_checked
def yogi(
    learning_rate: ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.99,
    eps: float = 1e-3,
    initial_accumulator_value: float = 0.0,
) -> optax.GradientTransformation:
    """FedYogi's server step: v -= (1 - b2) g**2 sign(v - g**2) (Reddi et al. 2021, Algorithm 2).

    Args:
      learning_rate: eta, or an Optax schedule of the number of updates made.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: the paper's adaptivity tau, outside the square root.
      initial_accumulator_value: v before the first update (`optax.yogi` starts at 1e-6).
    """
    return _algorithm_2(
        learning_rate,
        lambda g, v: v - (1 - b2) * g**2 * jnp.sign(v - g**2),
        b1,
        eps,
        initial_accumulator_value,
    )


@gin.configurable(module="optimizers")
def clip_gradients(
    optimizer: optax.GradientTransformation, norm: float
) -> optax.GradientTransformation:
    """An optimizer of gradients whose L2 norm, over all arrays, is clipped first.

    So do Pascanu et al. 2013 (arXiv:1211.5063). As `fedavg.client_optimizer` it clips every batch's gradient,
    where the aggregator `clip_by_norm` clips a client's whole update.

    Args:
      optimizer: what is done with the clipped gradients.
      norm: the largest that stays as it is, positive.

    Raises:
      UserError: a norm that is not positive.
    """
    check(norm > 0, f"clip_gradients.norm must be positive, got {norm}")
    return optax.chain(optax.clip_by_global_norm(norm), optimizer)
