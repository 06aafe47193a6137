"""Imports run downwards only, as docs/design.md has it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fedexp"
# A module may import from its own level and from those after it.
LEVELS = [
    {"main"},
    {"trainer"},
    {"algorithms", "strategies", "evaluation", "config", "runtime"},
    {"checkpointing", "summaries", "progress", "profiling"},
    {"aggregators", "tasks"},
    {"models", "data"},
    {"compiling", "errors", "paths"},
]
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}


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
    assert imported <= LEVEL_OF.keys()
    assert all(LEVEL_OF[other] >= LEVEL_OF[room] for other in imported), imported
