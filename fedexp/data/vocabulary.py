"""Vocabularies of words and tags, and sentences as their ids."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from fedexp.errors import UserError, check


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The words of a language model, and the ids of what is not a word.

    Ids are TensorFlow Federated's: padding 0, words 1 to V in their order, then the word outside the
    vocabulary, begin and end of sentence. (FedJAX publishes the same preprocessing with other numbers:
    begin 1, end 2, words from 3, outside V + 3. A model learns the same from either.)

    Attributes:
      words: the most frequent first.
    """

    words: tuple[str, ...]

    pad = 0

    @property
    def oov(self) -> int:
        """The id of every word outside the vocabulary."""
        return len(self.words) + 1

    @property
    def bos(self) -> int:
        """The id that begins a sentence."""
        return len(self.words) + 2

    @property
    def eos(self) -> int:
        """The id that ends a sentence."""
        return len(self.words) + 3

    @property
    def size(self) -> int:
        """How many ids there are: what a model calls its vocab_size."""
        return len(self.words) + 4

    @property
    def dtype(self) -> np.dtype:
        """The smallest storage for ids: uint16, or int32 for more than 65,536 of them."""
        return np.dtype(np.uint16 if self.size <= 1 << 16 else np.int32)

    @functools.cached_property
    def ids(self) -> dict[bytes, int]:
        """Word -> id, of the words alone."""
        return {word.encode(): number for number, word in enumerate(self.words, start=1)}

    def encode(self, sentences: Sequence[bytes] | np.ndarray, length: int) -> np.ndarray:
        """Sentences as ids, each cut to its first `length` words.

        As in Reddi et al. (Adaptive Federated Optimization, 2021): begin, the words, end of sentence
        where fewer than `length` words leave it room, padding. Words are what single spaces separate.

        Returns:
          (len(sentences), length + 1), `dtype`.
        """
        return self.framed([s.split(b" ", length)[:length] for s in sentences], length)

    def framed(self, rows: Sequence[Sequence[bytes]], length: int) -> np.ndarray:
        """The same of sentences that are lists of at most `length` words."""
        tokens = np.empty((len(rows), length + 1), self.dtype)
        tokens[:, 0] = self.bos
        tokens[:, 1:] = self.lookup(rows, length)
        lengths = np.array([len(row) for row in rows], np.int64)
        short = np.flatnonzero(lengths < length)
        tokens[short, lengths[short] + 1] = self.eos
        return tokens

    def lookup(self, rows: Sequence[Sequence[bytes]], length: int) -> np.ndarray:
        """Words as ids, each row with at most `length` of them and then padding, (len(rows), length)."""
        lengths = np.array([len(row) for row in rows], np.int64)
        words = itertools.chain.from_iterable(rows)
        ids = map(self.ids.get, words, itertools.repeat(self.oov))
        return fill_rows(ids, lengths, length, self.dtype)


def fill_rows(
    values: Iterable[int], lengths: np.ndarray, width: int, dtype: DTypeLike, fill: int = 0
) -> np.ndarray:
    """Lays out consecutive values row by row.

    Args:
      values: sum(lengths) of them.
      lengths: (n,) values of each row, at most `width`.
      width: of the result.
      dtype: of the result.
      fill: what follows a row's values.

    Returns:
      (n, width).
    """
    rows = np.full((len(lengths), width), fill, dtype)
    rows[np.arange(width) < lengths[:, None]] = np.fromiter(values, dtype, int(lengths.sum()))
    return rows


def read_word_counts(path: Path, size: int) -> tuple[str, ...]:
    """The first `size` words of a file with a word and its count on each line, the top ones first.

    Raises:
      UserError: no such file, fewer words, a line of another form, or a word that comes twice.
    """
    try:
        with path.open(encoding="utf-8") as file:
            lines = list(itertools.islice(file, size))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    words = []
    for number, line in enumerate(lines, start=1):
        match line.split():
            case [word, count] if count.isdecimal():
                words.append(word)
            case _:
                raise UserError(
                    f"{path}, line {number}: expected a word and its count, got {line.strip()!r}; is "
                    "it the right file?"
                )
    return _checked(path, words, size)


def choose_words(
    path: Path | None, size: int, binding: str, count: Callable[[], Mapping[str, int]]
) -> tuple[str, ...]:
    """The words of a file, or without one the most frequent ones.

    Args:
      path: a file whose lines begin with a word, of which the first `size` are taken; lines without any are
        skipped.
      size: how many.
      binding: what says that in a Gin file, for messages.
      count: counts words where there is no file. Of equally frequent ones those come first that do in the
        order of their code points.

    Raises:
      UserError: no such file, fewer words, or a word that comes twice.
    """
    if path is None:
        counts = count()
        check(
            len(counts) >= size,
            f"{binding} is {size}, but there are {len(counts)} different words; bind it to that or less, and "
            "the model's vocab_size to 4 more",
        )
        return tuple(sorted(counts, key=lambda word: (-counts[word], word))[:size])
    try:
        with path.open(encoding="utf-8") as file:
            fields = (line.split(maxsplit=1) for line in file)
            words = [first for first, *_ in itertools.islice(filter(None, fields), size)]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    return _checked(path, words, size)


def read_tag_counts(path: Path, size: int) -> tuple[str, ...]:
    """The `size` most frequent tags of a JSON file {tag: count}; of equal ones the first.

    Raises:
      UserError: no such file, fewer tags, or another form.
    """
    try:
        counts = json.loads(path.read_text(encoding="utf-8"))
        ranked = [tag for tag, _ in sorted(counts.items(), key=lambda item: -item[1])]
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path}: expected JSON of the form {{tag: count}} ({error}); is it the right file?"
        ) from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from error
    return _checked(path, ranked[:size], size)


def _checked(path: Path, entries: list[str], size: int) -> tuple[str, ...]:
    if len(entries) < size:
        raise UserError(f"{path} has {len(entries)} entries, {size} are asked for; ask for fewer")
    if len(set(entries)) < size:
        twice = next(entry for i, entry in enumerate(entries) if entry in entries[:i])
        raise UserError(f"{path} has {twice!r} twice; is it the right file?")
    return tuple(entries)
