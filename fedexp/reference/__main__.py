"""Writes the reference: python -m fedexp.reference FOLDER."""

from __future__ import annotations

import argparse
from pathlib import Path

from fedexp.reference.pages import write

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m fedexp.reference", description=__doc__)
    parser.add_argument("folder", type=Path, help="of Markdown pages, made if it is missing")
    write(parser.parse_args().folder)
