"""Functions for the `convert` of a feature: they make numbers of text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import gin
import numpy as np

from fedexp.errors import UserError, check

Convert = Callable[[np.ndarray], np.ndarray]


@gin.configurable
def label_ids(names: Sequence[str]) -> Convert:
    """A `convert` for labels that are text: the place in `names` that each has, int32.

    In a gin file: `csv.features = {'y': ('diagnosis', (), 'object', @label_ids())}` with
    `label_ids.names = ['benign', 'malignant']`. It raises UserError for any other label.
    """
    id_of = {name: i for i, name in enumerate(names)}

    def convert(labels: np.ndarray) -> np.ndarray:
        if unknown := sorted(set(labels.flat) - id_of.keys()):
            raise UserError(
                f"the label {unknown[0]!r} is none of {list(names)}; add it to label_ids.names"
            )
        return np.array([id_of[label] for label in labels.flat], np.int32).reshape(labels.shape)

    return convert


@gin.configurable
def image_files(folder: str, size: int) -> Convert:
    """A `convert` for names of image files: the images as uint8 (n, size, size, 3), scaled to that.

    In a gin file: `leaf.features = {'x': ('x', (), 'object', @image_files()), 'y': ('y', (), 'int32')}`.

    Args:
      folder: where the files are.
      size: height and width. Images of another shape are stretched, bicubically, as LEAF does.

    Raises:
      UserError: a size below 1; from the function, a file that is not there or is no image.
    """
    check(size >= 1, f"image_files.size must be at least 1, got {size}")
    root = Path(folder).expanduser()

    def convert(names: np.ndarray) -> np.ndarray:
        return np.stack([_picture(root / str(name), size) for name in names])

    return convert


def _picture(path: Path, size: int) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return np.asarray(image.resize((size, size)).convert("RGB"))
    except Exception as error:  # Damaged images make Pillow raise nearly anything.
        raise UserError(
            f"{path} is no image ({type(error).__name__}); correct image_files.folder, or the file"
        ) from error
