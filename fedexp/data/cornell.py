"""The Cornell movie dialogs: what characters of films say, by character."""

from __future__ import annotations

import collections
import re
import string
from pathlib import Path

import gin
import numpy as np

from fedexp.data import download, packed
from fedexp.data import features as features_lib
from fedexp.data.dataset import FederatedDataset, FederatedSplits
from fedexp.data.partition import by_client
from fedexp.data.vocabulary import Vocabulary, choose_words
from fedexp.errors import UserError, check

_FILE = "movie_lines.txt"
_SEPARATOR = " +++$+++ "
_NUM_FIELDS = 5
_URL = "http://www.cs.cornell.edu/~cristian/data/cornell_movie_dialogs_corpus.zip"
# Raised whenever the code changes what is read.
_VERSION = 1

_TAG = re.compile(r"</?.>")
_NUMBER = re.compile(r"(?<= )\d+(?:,\d{3})*(?:\.\d+)?")
NUMERIC = "<NUMERIC>"


@gin.configurable
def cornell_movie_dialogs(
    data_dir: str,
    vocab_size: int = 10_000,
    vocabulary: str | None = None,
    length: int = 20,
    test_fraction: float = 0.1,
    seed: int = 0,
) -> FederatedSplits:
    """Next words of film characters (Danescu-Niculescu-Mizil & Lee 2011, arXiv:1106.3077).

    A client is a character, by the id that the corpus has for it, as u0. What is kept is what FedJAX's script
    for this data set keeps: lines are in lower case, without tags and without punctuation but within words, a
    number after a space is `<NUMERIC>`, and lines that are empty or say `CONTINUED:` are left out.

    Feature: `tokens` (length + 1,), uint16 up to 65,536 ids: begin, the first `length` words, end if there is
    room, padding; a model's input is all but the last, its target all but the first. Padding is 0, words are
    1 to vocab_size, then come any other word, begin and end: see `fedexp.data.vocabulary.Vocabulary`.

    The first call packs the result into the cache; later ones memory-map it.

    Args:
      data_dir: folder with movie_lines.txt, from the published archive.
      vocab_size: words that have an id.
      vocabulary: file whose lines begin with a word, of which the first `vocab_size` are taken, as FedJAX's
        vocab.txt; None takes the most frequent ones of the training partition.
      length: words of a line that are kept.
      test_fraction: of each character's lines. Who has one line has it in the training partition.
      seed: of which lines these are.

    Raises:
      UserError: a number out of range, no such file, or a line of another form; the message names it.
    """
    for name, value in (("vocab_size", vocab_size), ("length", length)):
        check(value >= 1, f"cornell_movie_dialogs.{name} must be at least 1, got {value}")
    file = download.local_folder(data_dir, _FILE) / _FILE
    check(
        file.is_file(),
        f"expected {_FILE} in {file.parent}; correct cornell_movie_dialogs.data_dir, or extract {_URL} there",
    )
    words_from = None if vocabulary is None else features_lib.existing(vocabulary)

    def build() -> FederatedSplits:
        characters, lines = _read(file)
        numbered = by_client({"line": np.arange(len(lines))}, np.array(characters))
        parts = numbered.split_examples(1 - test_fraction, seed=seed)

        def count() -> collections.Counter[str]:
            train = parts[0].features["line"]
            return collections.Counter(word for i in train for word in lines[i])

        binding = "cornell_movie_dialogs.vocab_size"
        encoder = Vocabulary(choose_words(words_from, vocab_size, binding, count))

        def encoded(part: FederatedDataset) -> FederatedDataset:
            rows = [[word.encode() for word in lines[i][:length]] for i in part.features["line"]]
            tokens = encoder.framed(rows, length)
            return FederatedDataset({"tokens": tokens}, part.offsets, part.client_ids)

        return FederatedSplits(*map(encoded, parts))

    key = {
        "version": _VERSION,
        "file": packed.fingerprint(file),
        "vocabulary": words_from and packed.fingerprint(words_from),
        "numbers": [vocab_size, length, test_fraction, seed],
    }
    return packed.load_or_build("cornell_movie_dialogs", key, build)


def _read(file: Path) -> tuple[list[str], list[list[str]]]:
    """Character and words of every line that has any."""
    characters, lines = [], []
    # ISO 8859-1, in which any byte is a character. Lines end at LF alone: some hold other separators.
    with file.open(encoding="iso-8859-1", newline="\n") as rows:
        for number, row in enumerate(rows, start=1):
            fields = row.rstrip("\r\n").split(_SEPARATOR)
            if len(fields) != _NUM_FIELDS:
                raise UserError(
                    f"{file}, line {number}: expected line, character, film, name and text, with "
                    f"{_SEPARATOR!r} between, got {len(fields)} fields; extract {_URL} again"
                )
            _, character, _, _, text = fields
            if " CONTINUED:" not in text and (words := normalized(text).split()):
                characters.append(character)
                lines.append(words)
    check(bool(lines), f"{file} has no lines; extract {_URL} again")
    return characters, lines


def normalized(text: str) -> str:
    """A line in lower case, without tags and punctuation, its numbers replaced; see the data set."""
    words = _TAG.sub("", text).lower().split(" ")
    text = " ".join(word.strip(string.punctuation) for word in words)
    text = re.sub(r"\.{2,}|--", " ", text)
    return " ".join(_NUMBER.sub(f"{NUMERIC} ", text).split())
