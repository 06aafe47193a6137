"""The Dockerfile, which no test can build, copies what an installation needs, and may see it."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
SETUP = (ROOT / "setup.py").read_text()
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()


def test_it_copies_what_setup_reads_and_nothing_is_hidden_from_it():
    copied = {
        name
        for line in DOCKERFILE.splitlines()
        if line.startswith("COPY ")
        for name in line.split()[1:-1]
    }
    (folders,) = re.findall(r"package_dir=\{(.*?)\}", SETUP, re.S)
    needed = {"setup.py", "fedexp", *re.findall(r': "(.*?)"', folders)}
    needed |= set(re.findall(r'Path\("(.*?)"\)', SETUP))
    assert copied == needed
    shown = (ROOT / ".dockerignore").read_text().splitlines()
    assert {line[1:] for line in shown if line.startswith("!")} == copied
    assert all((ROOT / name).exists() for name in copied)


def test_what_it_installs_is_an_extra():
    (extra,) = re.findall(r"^ARG EXTRA=(.*)$", DOCKERFILE, re.M)
    extras = SETUP[SETUP.index("extras_require") :]
    assert all(f'"{name}": ' in extras for name in (extra, "cuda12", "tpu"))
