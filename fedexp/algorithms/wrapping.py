"""Algorithms that are made of another one."""

from __future__ import annotations

from collections.abc import Callable

from fedexp.contracts import Algorithm
from fedexp.errors import UserError
from fedexp.tasks import Task

# As `train.algorithm` is: an algorithm, or what makes one for a task.
GivenAlgorithm = Algorithm | Callable[[Task], Algorithm]


def made(given: GivenAlgorithm, task: Task, who: str = "an algorithm") -> Algorithm:
    """The algorithm that was given as `who`, or that the given function makes for a task.

    Raises:
      UserError: it is, or makes, something else.
    """
    algorithm = given if isinstance(given, Algorithm) else given(task)
    if not isinstance(algorithm, Algorithm):
        raise UserError(f"{who} must be, or make, an Algorithm; got {algorithm!r}")
    return algorithm
