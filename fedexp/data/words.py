"""Text as ids of its words: a `convert` for whatever reader the text comes by."""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import gin
import numpy as np

from fedexp.data import features as features_lib
from fedexp.data import packed
from fedexp.data.vocabulary import Vocabulary, choose_words
from fedexp.errors import UserError, check


@gin.configurable
def word_ids(
    length: int,
    vocab_size: int = 10_000,
    vocabulary: str | None = None,
    entry: int | None = None,
    pattern: str = r"[\w']+|[.,!?;]",
    lowercase: bool = True,
    sentences: bool = False,
) -> WordIds:
    """A `convert` for text: the ids of its first `length` words, then padding.

    In a gin file: `leaf.features = {'x': ('x', (), 'object', @word_ids()), 'y': ('y', (), 'int32')}`. Ids are
    those of `fedexp.data.vocabulary.Vocabulary`, vocab_size + 4 in all: padding 0, words from 1, then any
    other word, begin and end of a sentence.

    Args:
      length: words that are kept.
      vocab_size: words that have an id.
      vocabulary: file whose lines begin with a word, of which the first `vocab_size` are taken: a list of
        words, one with counts, or word vectors as GloVe's. None takes the most frequent words of the training
        partition's file, in `leaf`, `fedjax_sqlite`, `csv`, `parquet` and `huggingface`.
      entry: where an example is a list, as in LEAF's Sent140 (4), which of its entries is the text.
      pattern: regular expression of a word; by default LEAF's, which tells punctuation marks from words.
        r'\\S+' for what spaces separate.
      lowercase: whether case is ignored. GloVe's words are in lower case.
      sentences: for next words: (n, length + 1), beginning with the id of a begin, and where there is room
        with that of an end.

    Raises:
      UserError: a number below 1, a wrong pattern, or a file that is not there; from the function, an example
        that is no text, or too few different words.
    """
    for name, value in (("length", length), ("vocab_size", vocab_size)):
        check(value >= 1, f"word_ids.{name} must be at least 1, got {value}")
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"word_ids.pattern: {pattern!r} is no regular expression: {error}"
        ) from error
    check(compiled.groups == 0, f"word_ids.pattern: write (?:...) for the groups in {pattern!r}")
    path = None if vocabulary is None else features_lib.existing(vocabulary)
    return WordIds(length, vocab_size, path, entry, compiled, lowercase, sentences)


@dataclasses.dataclass(frozen=True)
class WordIds:
    """What `word_ids` returns, with its arguments; it is given the training examples first by `fit`."""

    length: int
    vocab_size: int
    path: Path | None
    entry: int | None
    pattern: re.Pattern[str]
    lowercase: bool
    sentences: bool
    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    @property
    def key(self) -> list[Any]:
        """What the result depends on, for the cache."""
        file = self.path and packed.fingerprint(self.path)
        arguments = (self.length, self.vocab_size, self.entry, self.pattern.pattern)
        return ["word_ids 1", file, *arguments, self.lowercase, self.sentences]

    def fit(self, values: np.ndarray) -> None:
        """Counts the words of training examples, unless there is a file of words."""
        if self.path is None:
            for words in self._words(values):
                self.counts.update(words)

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """(n,) examples as (n, length) ids, or (n, length + 1) of sentences."""
        rows = [[word.encode() for word in words[: self.length]] for words in self._words(values)]
        encode = self._vocabulary.framed if self.sentences else self._vocabulary.lookup
        return encode(rows, self.length)

    @functools.cached_property
    def _vocabulary(self) -> Vocabulary:
        if self.path is None and not self.counts:
            raise UserError("word_ids has no words; bind word_ids.vocabulary to a file of them")
        binding = "word_ids.vocab_size"
        return Vocabulary(choose_words(self.path, self.vocab_size, binding, lambda: self.counts))

    def _words(self, values: np.ndarray) -> list[list[str]]:
        return [self.pattern.findall(self._text(value)) for value in values]

    def _text(self, value: Any) -> str:
        text = value
        if self.entry is not None and isinstance(value, list) and -1 < self.entry < len(value):
            text = value[self.entry]
        if isinstance(text, bytes):
            text = text.decode(errors="replace")
        if not isinstance(text, str):
            raise UserError(
                f"{str(value)[:80]!r} is no text; bind word_ids.entry to the place of the text in it, or "
                "correct `features`"
            )
        return text.lower() if self.lowercase else text
