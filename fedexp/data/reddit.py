"""LEAF's Reddit: comments cut into pieces, by the user who wrote them."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import gin
import numpy as np

from fedexp.data import features as features_lib
from fedexp.data import packed
from fedexp.data.dataset import FederatedDataset, FederatedSplits
from fedexp.data.leaf import shards_of, users_of
from fedexp.data.vocabulary import Vocabulary, choose_words
from fedexp.errors import UserError, check

_PAD, _BOS, _EOS = "<PAD>", "<BOS>", "<EOS>"
_LAYOUT = (
    "LEAF's Reddit has pieces of tokens in x, and in y as many 'target_tokens', those one later"
)
Piece = tuple[str, ...]
# Raised whenever the code changes what is read.
_VERSION = 1


@gin.configurable
def reddit(
    train_dir: str,
    test_dir: str,
    validation_dir: str | None = None,
    vocab_size: int = 9_996,
    vocabulary: str | None = None,
) -> FederatedSplits:
    """Next words of comments of December 2017 (LEAF: Caldas et al. 2018, arXiv:1812.01097).

    A client is a user. LEAF publishes comments in lower case, as tokens between `<BOS>` and `<EOS>`, cut into
    pieces of 10, the last one padded; 60 % of a user's are for training, the next 20 % for validation, the
    latest 20 % for the test.

    Feature: `tokens` (11,), uint16 up to 65,536 ids: a piece and the token after it, so that a model's input
    is all but the last, its target all but the first. Padding is 0, words are 1 to vocab_size, then come any
    other word, begin and end: 10,000 ids by default, as many as LEAF has. Left out are pieces that begin with
    the end, after which nothing follows, and users who have none besides. `num_samples`, which in these files
    counts comments of all partitions, is not looked at.

    The first call packs the result into the cache; later ones memory-map it. Reading needs the memory of the
    result three times, and that of the largest shard's parsed JSON.

    Args:
      train_dir: folder of *.json shards, LEAF's data/train.
      test_dir: LEAF's data/test.
      validation_dir: LEAF's data/val.
      vocab_size: words that have an id.
      vocabulary: file whose lines begin with a word, of which the first `vocab_size` are taken; None takes
        the most frequent ones of the training partition, as LEAF's build_vocab.py does.

    Raises:
      UserError: a vocab_size below 1 or above the number of words, no shards, or another layout. The message
        names file and user.
    """
    check(vocab_size >= 1, f"reddit.vocab_size must be at least 1, got {vocab_size}")
    folders = {"train": train_dir, "test": test_dir, "validation": validation_dir}
    shards = {part: shards_of(path) for part, path in folders.items() if path is not None}
    words_from = None if vocabulary is None else features_lib.existing(vocabulary)

    def build() -> FederatedSplits:
        words = choose_words(
            words_from, vocab_size, "reddit.vocab_size", lambda: _counted(shards["train"])
        )
        encoder = Vocabulary(words)
        ids = {word: number for number, word in enumerate(words, start=1)}
        ids |= {_PAD: encoder.pad, _BOS: encoder.bos, _EOS: encoder.eos}
        return FederatedSplits(
            **{part: _read(paths, ids, encoder) for part, paths in shards.items()}
        )

    key = {
        "version": _VERSION,
        "vocab_size": vocab_size,
        "vocabulary": words_from and packed.fingerprint(words_from),
        "shards": {part: [*map(packed.fingerprint, paths)] for part, paths in shards.items()},
    }
    return packed.load_or_build("reddit", key, build)


def _counted(shards: Sequence[Path]) -> collections.Counter[str]:
    counts: collections.Counter[str] = collections.Counter()
    for _, pieces in _users(shards):
        for piece in pieces:
            counts.update(piece[:-1])
    for special in (_PAD, _BOS, _EOS):
        del counts[special]
    return counts


def _read(
    shards: Sequence[Path], ids: Mapping[str, int], vocabulary: Vocabulary
) -> FederatedDataset:
    clients = {}
    for user, pieces in _users(shards):
        if pieces:
            rows = [[ids.get(token, vocabulary.oov) for token in piece] for piece in pieces]
            clients[user] = {"tokens": np.array(rows, vocabulary.dtype)}
    return features_lib.dataset(shards[0].parent, clients, drop_empty=False)


def _users(shards: Sequence[Path]) -> Iterator[tuple[str, list[Piece]]]:
    """Every user's pieces, each with the token that follows it."""
    length = None
    for where, user, _, data in users_of(shards):
        try:
            pieces = list(_pieces(data["x"], data["y"]))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{where}: {type(error).__name__}: {error}; {_LAYOUT}") from error
        for piece in pieces:
            length = length or len(piece)
            check(
                len(piece) == length,
                f"{where}: a piece has {len(piece) - 1} tokens, others have {length - 1}; mend the file",
            )
        yield user, pieces


def _pieces(comments: list, labels: list) -> Iterator[Piece]:
    for comment, label in zip(comments, labels, strict=True):
        for piece, target in zip(comment, label["target_tokens"], strict=True):
            texts = all(isinstance(token, str) for token in (*piece, *target))
            if not piece or not texts or piece[1:] != target[:-1]:
                raise ValueError(f"the target of {str(piece)[:80]} is {str(target)[:80]}")
            if target[0] != _PAD:
                yield (*piece, target[-1])
