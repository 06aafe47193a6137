"""Trials of what may go wrong, many times over: `python -m benchmarks.trials --help`."""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent / "results"


def save(path: Path, content: Any) -> None:
    """Writes outcomes as JSON, without the folders of this machine that tracebacks name."""
    text = json.dumps(content, indent=1)
    for folder in (Path(__file__).parents[2], Path(sys.prefix), Path(sys.base_prefix)):
        text = text.replace(f"{folder}/", "")
    text = re.sub(rf"{re.escape(tempfile.gettempdir())}/[\w.-]+/", "", text)
    path.write_text(text + "\n")
