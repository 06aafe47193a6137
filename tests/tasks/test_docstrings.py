from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

from fedexp import models, tasks

MODULES = [
    module.name
    for package in (tasks, models)
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_docstrings(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples():
    assert doctest.testmod(importlib.import_module("fedexp.tasks.metrics")).attempted
