"""The examples in docstrings, and those of docs/aggregators.md."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import gin
import jax
import jax.numpy as jnp
import optax
import pytest

from fedexp.aggregators import mean
from fedexp.algorithms import fedavg
from fedexp.contracts import Aggregated, Aggregator, Code, Sent
from tests.support import linear
from tests.support.clients import run

REPOSITORY = Path(__file__).parent.parent
WITH_EXAMPLES = sorted(
    path for path in (REPOSITORY / "fedexp").rglob("*.py") if ">>> " in path.read_text()
)


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: path.stem)
def test_docstrings_show_what_happens(path):
    module = importlib.import_module(".".join(path.relative_to(REPOSITORY).with_suffix("").parts))
    result = doctest.testmod(module)
    assert result.attempted and not result.failed


def test_the_aggregator_of_the_documentation_runs():
    text = (REPOSITORY / "docs" / "aggregators.md").read_text()
    source = re.search(r"```python\n(@gin.*?)```", text, re.DOTALL)[1]
    scope = {"gin": gin, "jax": jax, "jnp": jnp}
    scope |= {"Aggregated": Aggregated, "Code": Code, "Aggregator": Aggregator, "Sent": Sent}
    exec(source, scope)
    algorithm = fedavg(
        linear.task(), optax.sgd(0.1), optax.sgd(1.0), aggregator=[scope["above"](0.0), mean()]
    )
    _, output = run(algorithm)
    assert output.metrics["aggregate/entries"] == 4 * 4
    assert output.metrics["traffic/bits_up"] == 4 * 4 * 64
