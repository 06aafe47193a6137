"""glyphs: a generated federated data set of handwriting-like characters; nothing is downloaded.

Characters of typefaces that come with Matplotlib are thinned to the middle of their strokes. Every
writer (client) redraws them with a pen, a slant, a size and letterforms of their own, and no two
examples alike. Sizes of clients follow EMNIST-62, and so do the features' names, shapes and order.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import string
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

import gin
import numpy as np

from fedexp.data import packed
from fedexp.data.dataset import FederatedDataset, FederatedSplits
from fedexp.errors import UserError

CHARACTERS = string.digits + string.ascii_uppercase + string.ascii_lowercase
NUM_CLASSES = len(CHARACTERS)
SIDE = 28

# Part of the cache's key and of every writer's seed: raise it when the data set changes.
VERSION = 1

# EMNIST-62 in TensorFlow Federated: 671 585 + 77 483 examples, 341 873 + 40 832 of them digits.
_MEAN_SIZE = (671_585 + 77_483) / 3400
_TEST_FRACTION = 77_483 / (671_585 + 77_483)
_DIGITS_FRACTION = (341_873 + 40_832) / (671_585 + 77_483)
# FEMNIST in LEAF (Caldas et al., 2018, arXiv:1812.01097), Table 1.
_STD_SIZE = 88.94

# Per cent of the letters of English text, a to z.
_ENGLISH = (8.2, 1.5, 2.8, 4.3, 12.7, 2.2, 2.0, 6.1, 7.0, 0.15, 0.8, 4.0, 2.4)
_ENGLISH += (6.7, 7.5, 1.9, 0.1, 6.0, 6.3, 9.1, 2.8, 1.0, 2.4, 0.15, 2.0, 0.07)

# A field is (_GRID, _GRID) and spans [-1, 1]; a character's longer side spans _SPAN of that.
_GRID = 96
_SPAN = 2 / 3
_REACH = 0.5


def _alphabet(style: str) -> str:
    """The 62 characters of one of Unicode's mathematical alphabets, plain where it has a gap."""

    def variant(character: str) -> str:
        name = unicodedata.name(character).replace("LATIN ", "").replace("LETTER ", "")
        for full_name in (f"MATHEMATICAL {style} {name}", f"{style} {name}"):
            try:
                return unicodedata.lookup(full_name)
            except KeyError:
                continue
        return character

    return "".join(map(variant, CHARACTERS))


_TYPEFACES = (
    ("DejaVuSans", CHARACTERS),
    ("DejaVuSans-Oblique", CHARACTERS),
    ("DejaVuSans-Bold", CHARACTERS),
    ("DejaVuSansMono", CHARACTERS),
    ("DejaVuSansMono-Oblique", CHARACTERS),
    ("DejaVuSerif", CHARACTERS),
    ("DejaVuSerif-Italic", CHARACTERS),
    ("DejaVuSerif-BoldItalic", CHARACTERS),
    ("STIXGeneral", CHARACTERS),
    ("STIXGeneralItalic", CHARACTERS),
    ("STIXGeneral", _alphabet("SANS-SERIF")),
    ("STIXGeneral", _alphabet("SANS-SERIF ITALIC")),
    ("STIXGeneral", _alphabet("MONOSPACE")),
    ("STIXGeneral", _alphabet("ITALIC")[:36] + _alphabet("SCRIPT")[36:]),
    ("cmr10", CHARACTERS),
    ("cmss10", CHARACTERS),
    ("cmti10", CHARACTERS),
    ("cmtt10", CHARACTERS),
)


@gin.configurable
def glyphs(
    num_writers: int = 3400, seed: int = 0, label_concentration: float = 30.0
) -> FederatedSplits:
    """Handwriting-like digits and letters by `num_writers` writers, generated once and cached.

    Both splits have every writer as a client, with at least one example: 198 training and 23 test
    examples on average. Writer `i` is the same whatever `num_writers` is. docs/glyphs.md describes
    the generator, and what models of different strength make of the data.

    Args:
      num_writers: clients; EMNIST-62 has 3400.
      seed: another seed, other writers.
      label_concentration: of the Dirichlet distribution that each writer's class frequencies are
        drawn from; small values skew the labels, large ones (1e6) give all writers the same.

    Returns:
      Memory-mapped splits with the features
        x: (num_examples, 28, 28) uint8, dark ink on white (255), upright;
        y: (num_examples,) int32 in [0, 62): digits, upper case, lower case.

    Raises:
      UserError: an argument out of range, or Matplotlib's fonts or Pillow missing.
    """
    _check(num_writers, seed)
    if not isinstance(label_concentration, int | float) or not 0 < label_concentration < math.inf:
        raise UserError(
            f"glyphs.label_concentration must be positive and finite, got {label_concentration!r}; "
            "1e6 gives all writers the same class frequencies"
        )
    key = {
        "version": VERSION,
        "num_writers": num_writers,
        "seed": seed,
        "label_concentration": float(label_concentration),
    }
    return packed.load_or_build(
        "glyphs", key, lambda: _generate(num_writers, seed, label_concentration)
    )


def example_counts(num_writers: int = 3400, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Training and test examples of every writer, two (num_writers,) int64; draws no image."""
    _check(num_writers, seed)
    counts = [_draw_counts(_writer_rng(seed, writer)) for writer in range(num_writers)]
    train, test = np.array(counts, np.int64).T
    return train, test


def specimen(writer: int, labels: Sequence[int] | np.ndarray, *, seed: int = 0) -> np.ndarray:
    """New examples of the given labels in the hand of `writer`, (num_labels, 28, 28) uint8."""
    rng = _writer_rng(seed, writer)
    _draw_counts(rng)
    return _draw_images(rng, _draw_hand(rng), np.asarray(labels))


def class_frequencies() -> np.ndarray:
    """Expected frequency of each class over all writers, (62,) float64.

    51 % digits as in EMNIST-62, alike; letters half upper and half lower case, each half in equal
    numbers and half as in English text, as on a form with the alphabet and a paragraph to copy.
    """
    english = np.array(_ENGLISH) / sum(_ENGLISH)
    letters = (english + 1 / 26) / 2
    return np.concatenate(
        [np.full(10, _DIGITS_FRACTION / 10), np.tile(letters * (1 - _DIGITS_FRACTION) / 2, 2)]
    )


def _check(num_writers: int, seed: int) -> None:
    if not isinstance(num_writers, int) or num_writers < 1:
        raise UserError(f"glyphs.num_writers must be a whole number above 0, got {num_writers!r}")
    if not isinstance(seed, int) or seed < 0:
        raise UserError(f"glyphs.seed must be a whole number, 0 or more, got {seed!r}")


def _generate(num_writers: int, seed: int, label_concentration: float) -> FederatedSplits:
    from rich.console import Console
    from rich.progress import track

    _strokes()  # fails at once if the fonts are missing
    frequencies = class_frequencies()
    client_ids = np.array([f"writer_{writer:05d}" for writer in range(num_writers)])
    splits = []
    for sizes in example_counts(num_writers, seed):
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        x = np.empty((offsets[-1], SIDE, SIDE), np.uint8)
        splits.append(({"x": x, "y": np.empty(offsets[-1], np.int32)}, offsets))
    for writer in track(
        range(num_writers),
        f"drawing glyphs by {num_writers} writers",
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
        transient=True,
    ):
        rng = _writer_rng(seed, writer)
        num_train, num_test = _draw_counts(rng)
        hand = _draw_hand(rng)
        probabilities = rng.dirichlet(label_concentration * frequencies)
        labels = rng.choice(NUM_CLASSES, num_train + num_test, p=probabilities)
        images = _draw_images(rng, hand, labels)
        for (features, offsets), rows in zip(
            splits, (slice(num_train), slice(num_train, None)), strict=True
        ):
            features["x"][offsets[writer] : offsets[writer + 1]] = images[rows]
            features["y"][offsets[writer] : offsets[writer + 1]] = labels[rows]
    return FederatedSplits(*(FederatedDataset(f, offsets, client_ids) for f, offsets in splits))


def _writer_rng(seed: int, writer: int) -> np.random.Generator:
    return np.random.default_rng([VERSION, seed, writer])


def _draw_counts(rng: np.random.Generator) -> tuple[int, int]:
    shape = (_MEAN_SIZE / _STD_SIZE) ** 2
    total = max(2, round(rng.gamma(shape, _MEAN_SIZE / shape)))
    test = max(1, round(total * _TEST_FRACTION))
    return total - test, test


class _Hand(NamedTuple):
    """What distinguishes a writer. Lengths are in half image sides (14 pixels), or as stated.

    Attributes:
      face: (62,) int, the typeface each character is modelled on.
      letterform: (62, 2, num_waves), how the writer bends each character, in grid units of fields.
      slant, tilt: horizontal shear; rotation in radians.
      aspect, size: width over height, relative to the typeface; half the height of an "H".
      pen, blur: radius of the pen, width of its soft edge; pixels.
      ink: darkness of the ink, at most 1.
      looseness: scales how much the writer's examples of one character differ.
    """

    face: np.ndarray
    letterform: np.ndarray
    slant: float
    tilt: float
    aspect: float
    size: float
    pen: float
    blur: float
    ink: float
    looseness: float


def _draw_hand(rng: np.random.Generator) -> _Hand:
    usual, other = rng.choice(len(_TYPEFACES), 2, replace=False)
    return _Hand(
        face=np.where(rng.random(NUM_CLASSES) < 0.8, usual, other),
        letterform=rng.normal(0, 0.045, (NUM_CLASSES, 2, len(_waves()))),
        slant=rng.normal(0.12, 0.2),
        tilt=rng.normal(0, 0.06),
        aspect=math.exp(rng.normal(-0.05, 0.1)),
        size=rng.uniform(0.58, 0.74),
        pen=rng.uniform(0.75, 1.7),
        blur=rng.uniform(0.7, 1.4),
        ink=rng.uniform(0.8, 1.0),
        looseness=rng.uniform(0.6, 1.4),
    )


def _draw_images(rng: np.random.Generator, hand: _Hand, labels: np.ndarray) -> np.ndarray:
    """Draws one image for each label, (num_labels, 28, 28) uint8.

    Where a pixel looks in its character's distance field, and how far the pen reaches there, are
    linear in a plane and a few waves: all pixels of a writer are a matrix product and a look-up.
    """

    def jitter(std: float, *shape: int) -> np.ndarray:
        return rng.normal(0, std * hand.looseness, (len(labels), *shape))

    strokes, waves = _strokes(), _waves()
    face = hand.face[labels]
    angle, shear = hand.tilt + jitter(0.035), hand.slant + jitter(0.04)
    aspect = hand.aspect * np.exp(jitter(0.03))
    # EMNIST scales every character to fill its box; going half of the way keeps "o" below "O".
    scale = hand.size * np.sqrt(strokes.extent[face, labels]) * np.exp(jitter(0.03)) / _SPAN
    sin, cos = np.sin(angle) / scale, np.cos(angle) / scale
    linear = np.array(
        [
            [cos / aspect - shear * sin, sin / aspect + shear * cos],
            [-aspect * sin, aspect * cos],
        ]
    ).transpose(2, 0, 1)
    shift = linear @ jitter(0.03, 2, 1)
    bend = hand.letterform[labels] + jitter(0.014, 2, len(waves))
    source = np.concatenate([-shift, linear, bend], axis=2) * (_GRID / 2)
    source[:, :, 0] += _GRID / 2
    reach = np.zeros((len(labels), 1, source.shape[2]))
    reach[:, 0, 0] = (hand.pen + jitter(0.1)) / hand.blur + 0.5
    reach[:, 0, 3:] = jitter(0.12, len(waves)) / hand.blur

    coefficients = np.concatenate([source, reach], axis=1).astype(np.float32)
    fields = coefficients.reshape(-1, source.shape[2]) @ np.concatenate([_plane(), waves])
    column, row, reach = fields.reshape(len(labels), 3, -1).swapaxes(0, 1)
    column, row = (np.clip(at, 0, _GRID - 1).astype(np.int32) for at in (column, row))
    start = ((face * NUM_CLASSES + labels) * _GRID**2).astype(np.int32)
    distance = strokes.distance.ravel()[start[:, None] + row * _GRID + column]
    unit = scale * (SIDE / 2 * _REACH / 255 / hand.blur)
    ink = np.clip(reach - distance * unit.astype(np.float32)[:, None], 0, 1)
    pixels = 255 - ink * np.float32(255 * hand.ink)
    return pixels.astype(np.uint8).reshape(-1, SIDE, SIDE)


@functools.cache
def _plane() -> np.ndarray:
    """1, x and y at every pixel, (3, 784) float32; x and y in (-1, 1)."""
    axis = (np.arange(SIDE, dtype=np.float32) + 0.5) * 2 / SIDE - 1
    y, x = np.meshgrid(axis, axis, indexing="ij")
    return np.stack([np.ones_like(x), x, y]).reshape(3, -1)


@functools.cache
def _waves() -> np.ndarray:
    """Smooth waves along the sides and the diagonals, (8, 784) float32."""
    _, x, y = _plane()
    phases = np.float32(np.pi) * np.stack([x, y, x + y, x - y])
    return np.concatenate([np.sin(phases), np.cos(phases)])


class _Strokes(NamedTuple):
    """All characters of all typefaces, as the middle lines of their strokes.

    Attributes:
      distance: (num_typefaces, 62, _GRID, _GRID) uint8, distance to the nearest stroke; 255 stands
        for _REACH and beyond.
      extent: (num_typefaces, 62) float64, longer side over that of the typeface's "H".
    """

    distance: np.ndarray
    extent: np.ndarray


@functools.cache
def _strokes() -> _Strokes:
    from PIL import Image, ImageDraw, ImageFont
    from scipy import ndimage

    folder = _font_folder()
    ink = np.zeros((len(_TYPEFACES), NUM_CLASSES, _GRID, _GRID), bool)
    extent = np.zeros(ink.shape[:2])
    for face, (name, alphabet) in enumerate(_TYPEFACES):
        font = ImageFont.truetype(folder / f"{name}.ttf", _GRID)
        for label, character in enumerate(alphabet):
            left, top, right, bottom = font.getbbox(character)
            extent[face, label] = max(right - left, bottom - top)
            sized = font.font_variant(size=_SPAN * _GRID * _GRID / extent[face, label])
            left, top, right, bottom = sized.getbbox(character)
            corner = ((_GRID - left - right) / 2, (_GRID - top - bottom) / 2)
            image = Image.new("L", (_GRID, _GRID))
            ImageDraw.Draw(image).text(corner, character, fill=255, font=sized)
            ink[face, label] = np.asarray(image) > 127
        extent[face] /= extent[face, CHARACTERS.index("H")]
    distance = np.empty(ink.shape, np.uint8)
    for index in np.ndindex(extent.shape):
        cells = np.asarray(ndimage.distance_transform_edt(~thin(ink[index])))
        distance[index] = np.minimum(cells * (2 / _GRID / _REACH * 255), 255)
    return _Strokes(distance, extent)


def thin(image: np.ndarray) -> np.ndarray:
    """The skeleton of a (height, width) bool image: lines a pixel wide, as connected as its shapes.

    Zhang and Suen's algorithm, "A fast parallel algorithm for thinning digital patterns" (1984).
    """
    from scipy import ndimage

    padded = np.pad(image, 1).astype(np.uint8)
    width = padded.shape[1]
    around = (-width, -width + 1, 1, width + 1, width, width - 1, -1, -width - 1)
    flat = padded.ravel()
    shape = np.flatnonzero(flat)
    remaining = None
    while remaining != len(shape):
        remaining = len(shape)
        for removable in _removable():
            neighbours = sum(flat[shape + step] << bit for bit, step in enumerate(around))
            remove = removable[neighbours]
            flat[shape[remove]] = 0
            shape = shape[~remove]
    skeleton = padded[1:-1, 1:-1].astype(bool)
    # The algorithm erases what has become a square of 2 x 2 pixels, as a dot does.
    parts, num_parts = cast("tuple[np.ndarray, int]", ndimage.label(image, np.ones((3, 3))))
    erased = np.setdiff1d(np.arange(1, num_parts + 1), parts[skeleton])
    if len(erased):
        depth = ndimage.distance_transform_edt(image)
        for deepest in ndimage.maximum_position(depth, parts, erased):
            skeleton[deepest] = True
    return skeleton


@functools.cache
def _removable() -> tuple[np.ndarray, np.ndarray]:
    """Whether a pixel goes in the two halves of a pass, by the bits of its neighbours (256,) bool.

    Bits run clockwise from the pixel above.
    """
    bits = np.arange(256)[:, None] >> np.arange(8) & 1
    north, east, south, west = bits[:, ::2].T.astype(bool)
    edges = ((bits == 0) & (np.roll(bits, -1, axis=1) == 1)).sum(axis=1)
    border = (bits.sum(axis=1) >= 2) & (bits.sum(axis=1) <= 6) & (edges == 1)
    return (
        border & ~(north & east & south) & ~(east & south & west),
        border & ~(north & east & west) & ~(north & south & west),
    )


def _font_folder() -> Path:
    spec = importlib.util.find_spec("matplotlib")  # finds its folder without importing it
    if spec is not None and spec.origin is not None:
        folder = Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf"
        if all((folder / f"{name}.ttf").exists() for name, _ in _TYPEFACES):
            return folder
    raise UserError(
        "glyphs draws with Matplotlib's fonts, which are missing: pip install matplotlib"
    )
