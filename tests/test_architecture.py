"""Imports run downwards only, as docs/design.md has it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fedexp"
# A room may import from those after its own floor: nothing upwards, and nothing sideways.
FLOORS = [
    {"__main__", "launch", "reference", "sweep"},
    {"evaluate", "inspect", "sweeps"},
    {"compare", "main", "status"},
    {"plots", "report"},
    {"runs"},
    {"together"},
    {"trainer"},
    {"trackers"},
    {"auditing", "inspection", "reporting", "seeds", "several", "snapshots", "stopping"},
    {"session"},
    {"evaluation"},
    {"evaluators"},
    {
        "engine",
        "algorithms",
        "checkpointing",
        "summaries",
        "profiling",
        "progress",
        "hyperparameters",
    },
    {"aggregators", "mirror", "config", "environment", "runtime"},
    {"bindings"},
    {"promises", "privacy"},
    {"contracts"},
    {"tasks"},
    {"models"},
    {"data"},
    {"cache", "harmless", "kept", "pulse", "sole_use"},
    {"children", "paths", "rates", "streams", "compiling", "traffic", "waiting"},
    {"errors", "shown"},
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def rooms_imported_by(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "fedexp":
            rooms |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fedexp."):
            rooms.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            rooms |= {parts[1] for parts in names if parts[0] == "fedexp" and len(parts) > 1}
    return rooms


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_imports_run_downwards(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room == "__init__":
        return
    imported = rooms_imported_by(path) - {room}
    assert imported <= FLOOR_OF.keys()
    assert all(FLOOR_OF[other] > FLOOR_OF[room] for other in imported), imported
