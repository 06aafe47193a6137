"""Draws docs/images/glyphs.png: some characters (columns) in the hands of some writers (rows)."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from fedexp.data.glyphs import CHARACTERS, SIDE, specimen

_WRITERS = range(8)
_CHARACTERS = "22234567890ABDEGMQRabdefghkqty"
_ZOOM = 2
_MARGIN = 6


def contact_sheet() -> Image.Image:
    """One row of `_CHARACTERS` for each of `_WRITERS`."""
    labels = [CHARACTERS.index(character) for character in _CHARACTERS]
    rows = np.stack([specimen(writer, labels) for writer in _WRITERS])
    height, width = len(_WRITERS) * SIDE, len(labels) * SIDE
    sheet = Image.fromarray(rows.swapaxes(1, 2).reshape(height, width))
    sheet = sheet.resize((width * _ZOOM, height * _ZOOM), Image.Resampling.LANCZOS)
    framed = Image.new("L", (sheet.width + 2 * _MARGIN, sheet.height + 2 * _MARGIN), 255)
    framed.paste(sheet, (_MARGIN, _MARGIN))
    return framed


if __name__ == "__main__":
    default = Path(__file__).parent / "images" / "glyphs.png"
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else default
    path.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet().quantize(24).save(path, optimize=True)
    print(f"wrote {path}")
