"""Stack Overflow as TensorFlow Federated publishes it: next-word prediction and tag prediction."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import gin
import numpy as np

from fedexp import cache, paths
from fedexp.data import conversion, download, packed, tff_hdf5
from fedexp.data.dataset import Examples, FederatedDataset, FederatedSplits
from fedexp.data.features import Feature
from fedexp.data.vocabulary import Vocabulary, fill_rows, read_tag_counts, read_word_counts
from fedexp.errors import UserError

_URL = "https://storage.googleapis.com/tff-datasets-public/"
# Archive and SHA-256 of every file, as in TFF's simulation/datasets/stackoverflow.py.
_EXAMPLES = (
    "stackoverflow.tar.bz2",
    "99eca2f8b8327a09e5fc123979df2d237acbc5e52322f6d86bf523ee47b961a2",
)
_PUBLISHED: dict[str, tuple[str, str]] = {
    "stackoverflow_train.h5": _EXAMPLES,
    "stackoverflow_held_out.h5": _EXAMPLES,
    "stackoverflow_test.h5": _EXAMPLES,
    "stackoverflow.word_count": (
        "stackoverflow.word_count.tar.bz2",
        "1dc00256d6e527c54b9756d968118378ae14e6692c0b3b6cad470cdd3f0c519c",
    ),
    "stackoverflow.tag_count": (
        "stackoverflow.tag_count.tar.bz2",
        "6fe281cec490d9384a290d560072438e7e2b377bbb823876ce7bd6f82696772d",
    ),
}
_FILES = {
    "train": "stackoverflow_train.h5",
    "test": "stackoverflow_test.h5",
    "heldout": "stackoverflow_held_out.h5",
}
_MAX_TAGS = 5  # Stack Overflow's own limit for a question.
# Raised whenever the code changes what is converted.
_VERSION = 1


@gin.configurable
def stackoverflow_nwp(
    data_dir: str | None = None,
    vocab_size: int = 10_000,
    train_length: int = 20,
    test_length: int = 20,
    evaluate_on: Literal["test", "heldout"] = "test",
    num_workers: int | None = None,
) -> FederatedSplits:
    """Stack Overflow's sentences for next-word prediction (Reddi et al., 2021).

    A client is a user. There are 342,477 training clients with 135,818,730 sentences from before 2018;
    'test' are 204,088 of them with 16,586,035 sentences from 2018 on, 'heldout' are 38,758 other users
    with 16,491,230 sentences.

    Feature: `tokens` (length + 1,) uint16: begin, the first `length` words, end if there is room,
    padding; a model's input is all but the last, its target all but the first. Padding is 0, words
    are 1 to vocab_size, then come the word outside the vocabulary, begin and end: see
    `vocabulary.Vocabulary`. All of a client's sentences are there, in the published order.

    The first call converts each partition once and keeps it in the cache, 5.7 GB for the training
    partition at length 20; an interrupted conversion goes on with the next call. Later calls
    memory-map the result. The downloaded files may be deleted from the cache then.

    Args:
      data_dir: folder with the published stackoverflow_train.h5, stackoverflow_test.h5 or
        stackoverflow_held_out.h5, and stackoverflow.word_count; None downloads them.
      vocab_size: the most frequent words that get an id.
      train_length: words of a training sentence.
      test_length: words of an evaluation sentence; FedJAX evaluates on 30.
      evaluate_on: the partition that is returned as `test`.
      num_workers: processes of the conversion; None for as many as there are CPUs.

    Raises:
      UserError: an argument out of range, files that are not there, cannot be downloaded, or are
        not Stack Overflow's, or a full disk.
    """
    _check_positive(vocab_size=vocab_size, train_length=train_length, test_length=test_length)
    files = _Files(data_dir, ("train", evaluate_on), ("stackoverflow.word_count",))

    def load(split: str, length: int) -> FederatedDataset:
        def encode() -> Callable[[Examples], Examples]:
            words = read_word_counts(files.path("stackoverflow.word_count"), vocab_size)
            return _Sentences(Vocabulary(words), length)

        key = {"vocab_size": vocab_size, "length": length}
        return files.load("stackoverflow_nwp", split, key, ("tokens",), encode, num_workers)

    return FederatedSplits(load("train", train_length), load(evaluate_on, test_length))


@gin.configurable
def stackoverflow_tags(
    data_dir: str | None = None,
    vocab_size: int = 10_000,
    num_tags: int = 500,
    max_words: int = 64,
    evaluate_on: Literal["test", "heldout"] = "test",
    num_workers: int | None = None,
) -> FederatedSplits:
    """Stack Overflow's sentences with the tags of their questions (Reddi et al., 2021).

    The published bag of words of a sentence and its question's title is, for each word of the vocabulary,
    its occurrences divided by the number of all words, those outside the vocabulary included.

    Features, from which that bag follows:
      `words` (max_words,) uint16: ids 1 to vocab_size of the words in the vocabulary, first the title's,
        then the sentence's; 0 is padding. Words outside the vocabulary have no id.
      `num_words` () uint16: all words, also those that `words` leaves out. It may be 0.
      `tags` (5,) int16: ids 0 to num_tags - 1 of the tags among the most frequent, then -1.

    A title has at most 150 characters, so at the default max_words some 35 words or more are left for
    the sentence; the end of a longer one is cut off, which weighs each of its words in 1 / num_words.

    The conversion, the clients and the other arguments are those of `stackoverflow_nwp`; the training
    partition takes 19 GB.

    Args:
      data_dir: folder as there, and with stackoverflow.tag_count.
      vocab_size: the most frequent words that get an id, at most 65,535.
      num_tags: the most frequent tags that are predicted, at most 32,767.
      max_words: words of the vocabulary that are kept of an example.
      evaluate_on: the partition that is returned as `test`.
      num_workers: processes of the conversion; None for as many as there are CPUs.

    Raises:
      UserError: as `stackoverflow_nwp`.
    """
    _check_positive(vocab_size=vocab_size, num_tags=num_tags, max_words=max_words)
    for name, value, dtype in (
        ("vocab_size", vocab_size, np.uint16),
        ("num_tags", num_tags, np.int16),
    ):
        if value > np.iinfo(dtype).max:
            raise UserError(f"{name} must be at most {np.iinfo(dtype).max}, got {value}")
    counts = ("stackoverflow.word_count", "stackoverflow.tag_count")
    files = _Files(data_dir, ("train", evaluate_on), counts)

    def load(split: str) -> FederatedDataset:
        def encode() -> Callable[[Examples], Examples]:
            return _BagsOfWords(
                Vocabulary(read_word_counts(files.path("stackoverflow.word_count"), vocab_size)),
                read_tag_counts(files.path("stackoverflow.tag_count"), num_tags),
                max_words,
            )

        key = {"vocab_size": vocab_size, "num_tags": num_tags, "max_words": max_words}
        strings = ("tokens", "title", "tags")
        return files.load("stackoverflow_tags", split, key, strings, encode, num_workers)

    return FederatedSplits(load("train"), load(evaluate_on))


@dataclasses.dataclass(frozen=True)
class _Sentences:
    """Encodes a client's sentences for next-word prediction."""

    vocabulary: Vocabulary
    length: int

    def __call__(self, client: Examples) -> Examples:
        return {"tokens": self.vocabulary.encode(client["tokens"], self.length)}


@dataclasses.dataclass(frozen=True)
class _BagsOfWords:
    """Encodes a client's sentences for tag prediction."""

    vocabulary: Vocabulary
    tags: tuple[str, ...]
    max_words: int

    @functools.cached_property
    def tag_ids(self) -> dict[bytes, int]:
        return {tag.encode(): number for number, tag in enumerate(self.tags)}

    def __call__(self, client: Examples) -> Examples:
        texts = zip(client["title"], client["tokens"], strict=True)
        bags = [title.split() + sentence.split() for title, sentence in texts]
        num_words = np.array([len(bag) for bag in bags], np.int64)
        names = [tags.split(b"|") for tags in client["tags"]]
        return {
            "words": _lookup(self.vocabulary.ids, bags, self.max_words, np.uint16, fill=0),
            "num_words": np.minimum(num_words, np.iinfo(np.uint16).max).astype(np.uint16),
            "tags": _lookup(self.tag_ids, names, _MAX_TAGS, np.int16, fill=-1),
        }


def _lookup(
    ids: Mapping[bytes, int], rows: Sequence[list[bytes]], width: int, dtype: type, *, fill: int
) -> np.ndarray:
    """The ids of each row's first `width` known entries, (len(rows), width)."""
    known = [[ids[entry] for entry in row if entry in ids][:width] for row in rows]
    lengths = np.array([len(row) for row in known], np.int64)
    return fill_rows(itertools.chain.from_iterable(known), lengths, width, dtype, fill)


class _Files:
    """Where the published files are: in a folder of the user's, or on the way into the cache."""

    def __init__(self, data_dir: str | None, splits: Sequence[str], counts: Sequence[str]):
        for split in splits:
            if split not in _FILES:
                raise UserError(f"evaluate_on must be 'test' or 'heldout', got {split!r}")
        wanted = [*(_FILES[split] for split in splits), *counts]
        self._folder = None if data_dir is None else download.local_folder(data_dir, *wanted)
        self._counts = counts
        if self._folder is not None and (
            missing := [name for name in wanted if not (self._folder / name).is_file()]
        ):
            archives = " and ".join(sorted({_URL + _PUBLISHED[name][0] for name in missing}))
            raise UserError(
                f"expected {', '.join(missing)} in {self._folder}; correct data_dir, extract "
                f"{archives} there, or leave data_dir out to have them downloaded"
            )

    def load(
        self,
        name: str,
        split: str,
        key: Mapping[str, object],
        strings: Sequence[str],
        make_encode: Callable[[], Callable[[Examples], Examples]],
        num_workers: int | None,
    ) -> FederatedDataset:
        """Opens one partition, converting it at first: `strings` are read and encoded."""

        def source() -> tff_hdf5.Source:
            encode = make_encode()
            features = {feature: Feature(feature, (), object) for feature in strings}
            return tff_hdf5.Source(self.path(_FILES[split]), features, encode)

        sources = [self._identity(file) for file in (_FILES[split], *self._counts)]
        return conversion.load_or_convert(
            f"{name}_{split}",
            {"version": _VERSION, "sources": sources, **key},
            source,
            num_workers=num_workers,
        )

    def path(self, name: str) -> Path:
        """A published file, downloaded and extracted if need be."""
        if self._folder is not None:
            return self._folder / name
        path = cache.folder() / "stackoverflow" / name
        if not path.exists():
            with cache.lock(path.parent):
                if not path.exists():
                    _extract(*_PUBLISHED[name], path.parent)
        return path

    def _identity(self, name: str) -> object:
        if self._folder is not None:
            return packed.fingerprint(self._folder / name)
        return [name, _PUBLISHED[name][1]]


def _extract(archive: str, sha256: str, folder: Path) -> None:
    """Downloads an archive and leaves its published files in `folder`."""
    path = download.download(_URL + archive, archive, sha256=sha256)
    with download.extracted(path) as scratch, packed.writing(folder):
        folder.mkdir(exist_ok=True)
        for file in scratch.rglob("stackoverflow*"):
            if file.name in _PUBLISHED:
                paths.replace(file, folder / file.name)


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
