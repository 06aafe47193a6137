"""Every aggregator gives the same numbers under every strategy, in whatever algorithm."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedexp import aggregators
from tests.support import side_by_side

REPOSITORY = Path(__file__).parent.parent.parent
REFERENCE, OTHERS = "debug:1:1", ("jit:1:3", "mesh:2:3")


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict[str, np.ndarray]]:
    """Strategy -> what came out by name."""
    output = tmp_path_factory.mktemp("equality") / "aggregators.npz"
    command = [sys.executable, "-m", "tests.support.side_by_side", str(output), REFERENCE, *OTHERS]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=dict(os.environ), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    by_strategy: dict[str, dict[str, np.ndarray]] = {spec: {} for spec in (REFERENCE, *OTHERS)}
    with np.load(output) as saved:
        for key, value in saved.items():
            spec, _, name = key.partition("|")
            by_strategy[spec][name] = value
    return by_strategy


def compare(found, spec: str, chosen) -> None:
    names = [name for name in found[REFERENCE] if chosen(name)]
    assert names and found[spec].keys() == found[REFERENCE].keys()
    for name in names:
        np.testing.assert_allclose(
            found[spec][name], found[REFERENCE][name], rtol=2e-5, atol=2e-6, err_msg=name
        )


@pytest.mark.slow
@pytest.mark.parametrize("spec", OTHERS)
@pytest.mark.parametrize("name", side_by_side.NAMES)
def test_an_aggregator_equals_itself_under_debug(found, spec, name):
    own = {f"aggregate/{name} w", f"aggregate/bits of {name}"}
    numbers = {
        key for key in found[REFERENCE] if key.split("|")[-1].startswith(f"aggregate/{name}: ")
    }
    every_round = {f"all|{number}|{key}" for number in range(side_by_side.ROUNDS) for key in own}
    assert every_round <= found[REFERENCE].keys()
    compare(found, spec, (every_round | numbers).__contains__)


@pytest.mark.slow
@pytest.mark.parametrize("spec", OTHERS)
@pytest.mark.parametrize(
    "algorithm", ["all", "scaffold", "ditto", "private_scaffold", "private_ditto"]
)
def test_algorithms_and_what_is_kept_of_clients_equal_debug(found, spec, algorithm):
    compare(found, spec, lambda name: name.startswith(f"{algorithm}|"))


@pytest.mark.slow
def test_aggregators_differ(found):
    """None of them is skipped: each makes something else of the same updates."""
    names = list(side_by_side.NAMES)
    last = side_by_side.ROUNDS - 1
    aggregates = [found[REFERENCE][f"all|{last}|aggregate/{name} w"] for name in names]
    for i, one in enumerate(aggregates):
        for name, other in zip(names[:i], aggregates[:i], strict=True):
            assert not np.allclose(one, other, rtol=1e-4, atol=1e-6), (names[i], name)


@pytest.mark.slow
def test_all_are_there():
    made = {name for name, it in vars(aggregators).items() if callable(it) and name.islower()}
    helpers = {"as_aggregator", "chain", "attacked"}
    assert made - helpers <= set(side_by_side.NAMES)
