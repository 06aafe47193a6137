"""Functions for the `convert` of a feature: they make numbers of labels and of images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import gin
import numpy as np

from fedexp.errors import UserError, check

Convert = Callable[[np.ndarray], np.ndarray]


@gin.configurable
def label_ids(names: Sequence[Any]) -> Convert:
    """A `convert` for labels: the place in `names` that each has, int32.

    In a gin file: `csv.features = {'y': ('diagnosis', (), 'object', @label_ids())}` with
    `label_ids.names = ['benign', 'malignant']`. It raises UserError for any other label.

    Args:
      names: of all labels, in the order of their numbers from 0.
    """
    return _LabelIds(tuple(names))


@dataclasses.dataclass(frozen=True)
class _LabelIds:
    names: tuple[Any, ...]

    @property
    def key(self) -> list[str]:
        return ["label_ids 1", *map(repr, self.names)]

    def __call__(self, labels: np.ndarray) -> np.ndarray:
        id_of = {name: i for i, name in enumerate(self.names)}
        for label in labels.flat:
            if not isinstance(label, Hashable) or label not in id_of:
                raise UserError(
                    f"the label {label!r} is none of {list(self.names)}; add it to label_ids.names"
                )
        return np.array([id_of[label] for label in labels.flat], np.int32).reshape(labels.shape)


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
