"""A generated data set in the shape of Stack Overflow's next-word prediction; nothing is downloaded.

A word follows from the word before it, from the sentence's topic, or from neither; clients differ in
their topics and in how much they write. docs/synthetic_text.md says what can be learnt from it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence

import gin
import numpy as np

from fedexp.data import conversion
from fedexp.data.dataset import Examples, FederatedDataset, FederatedSplits
from fedexp.errors import UserError

# Part of the cache's key and of every seed: raise it when the data set changes.
VERSION = 1

# TensorFlow Federated's Stack Overflow: clients and examples of the training and the test partition.
_CLIENTS = {"train": 342_477, "test": 204_088}
_EXAMPLES = {"train": 135_818_730, "test": 16_586_035}
# Published are means only. With this spread the largest client has some 30,000 examples.
_SIZE_SIGMA = 1.1
# Words in a sentence, log-normal: 15 on average, and a quarter of them 20 or more.
_LENGTH_MEDIAN, _LENGTH_SIGMA = 12.0, 0.7

# Why a word is where it is: it follows from the word before, belongs to the topic, or is just common.
_SHARES = (0.6, 0.2, 0.2)
_OOV_RATE = 0.045
_NUM_SUCCESSORS = 8
_NUM_TOPICS, _TOPIC_WORDS, _TOPICS_OF_CLIENT = 64, 100, (0.6, 0.3, 0.1)


@gin.configurable
def stackoverflow_synthetic(
    num_clients: int = 2000,
    seed: int = 0,
    vocab_size: int = 10_000,
    sequence_length: int = 20,
    num_workers: int | None = None,
) -> FederatedSplits:
    """Sentences by `num_clients` clients in the shape of Stack Overflow, generated once and cached.

    As in Stack Overflow, clients have 397 training examples on average, three in five have test
    examples, then 81 on average; sizes are log-normal. Client `i` is the same whatever `num_clients`
    is. The whole population of 342,477 can be had too, in bounded memory and 6.4 GB of disk.

    Feature: `tokens` (sequence_length + 1,) uint16; the input is all but the last, the target all but
    the first. A row is begin, up to sequence_length words, end if there is room, padding. Ids are those
    of `vocabulary.Vocabulary`: 0 is padding, 1 to vocab_size the words, roughly from common to rare,
    vocab_size + 1 any other word, + 2 begin, + 3 end.

    Args:
      num_clients: training clients; Stack Overflow has 342,477.
      seed: another seed, another language and other clients.
      vocab_size: words with an id of their own.
      sequence_length: longer sentences are cut.
      num_workers: processes that generate; None for as many as there are CPUs, 0 for this one.

    Returns:
      Memory-mapped splits.

    Raises:
      UserError: an argument out of range, or a full disk.
    """
    for name, value, low, high in (
        ("num_clients", num_clients, 1, 999_999),
        ("seed", seed, 0, 2**64 - 1),
        ("vocab_size", vocab_size, 2 * _TOPIC_WORDS, 2**16 - 4),
        ("sequence_length", sequence_length, 1, 1000),
    ):
        if not isinstance(value, int) or not low <= value <= high:
            raise UserError(
                f"stackoverflow_synthetic.{name} must be a whole number from {low} to {high}, got "
                f"{value!r}"
            )

    def load(split: str) -> FederatedDataset:
        source = _Source(split, num_clients, seed, vocab_size, sequence_length)
        return conversion.load_or_convert(
            f"stackoverflow_synthetic_{split}",
            {"version": VERSION, **dataclasses.asdict(source)},
            lambda: source,
            num_workers=num_workers,
        )

    return FederatedSplits(load("train"), load("test"))


@dataclasses.dataclass(frozen=True)
class Language:
    """How sentences are made, as tables: a uniform index into `*_draws` has the right distribution.

    Attributes:
      vocab_size: number of words; what is no word has the ids of `vocabulary.Vocabulary`.
      cause_draws: (4096,) 0, 1 or 2: a word is drawn from successors, topics or common words.
      successors: (vocab_size + 4, 8) uint16, the words that may follow each id.
      successor_draws: (4096,) columns of `successors`.
      topics: (64, 100) uint16, the words of each topic.
      topic_draws: (4096,) columns of `topics`.
      common_draws: (2**20,) uint16, words by a Zipf-Mandelbrot law, and the word outside.
    """

    vocab_size: int
    cause_draws: np.ndarray
    successors: np.ndarray
    successor_draws: np.ndarray
    topics: np.ndarray
    topic_draws: np.ndarray
    common_draws: np.ndarray

    @classmethod
    @functools.lru_cache(maxsize=2)
    def draw(cls, seed: int, vocab_size: int) -> Language:
        """The language of a seed."""
        rng = np.random.default_rng([VERSION, seed])
        zipf = 1 / (np.arange(vocab_size) + 2.7)
        outside = _OOV_RATE / _SHARES[2]
        weights = np.append(zipf / zipf.sum() * (1 - outside), outside)
        common_draws = (_quantiles(weights, 2**20) + 1).astype(np.uint16)
        words = common_draws[common_draws <= vocab_size]
        # The largest log-weights with Gumbel noise are a weighted sample without replacement.
        noisy = np.log(zipf) + rng.gumbel(size=(_NUM_TOPICS, vocab_size))
        topics = np.argsort(-noisy, axis=1)[:, :_TOPIC_WORDS] + 1
        return cls(
            vocab_size=vocab_size,
            cause_draws=_quantiles(_SHARES, 2**12),
            successors=rng.choice(words, (vocab_size + 4, _NUM_SUCCESSORS)),
            successor_draws=_quantiles((np.arange(_NUM_SUCCESSORS) + 1) ** -1.5, 2**12),
            topics=topics.astype(np.uint16),
            topic_draws=_quantiles(1 / (np.arange(_TOPIC_WORDS) + 1), 2**12),
            common_draws=common_draws,
        )

    def write(self, rng: np.random.Generator, topic: np.ndarray, length: int) -> np.ndarray:
        """A sentence on each of the given topics, (num_sentences, length + 1) uint16."""
        begin, end = self.vocab_size + 2, self.vocab_size + 3
        tokens = np.empty((len(topic), length + 1), np.uint16)
        tokens[:, 0] = begin
        for t in range(length):
            # One draw a word: 56 of its bits are indices into the four tables.
            bits = rng.integers(2**56, size=len(topic))
            follows = self.successors[tokens[:, t], self.successor_draws[bits & 0xFFF]]
            topical = self.topics[topic, self.topic_draws[bits >> 12 & 0xFFF]]
            common = self.common_draws[bits >> 24 & 0xFFFFF]
            tokens[:, t + 1] = np.choose(self.cause_draws[bits >> 44], [follows, topical, common])
        size = np.rint(rng.lognormal(math.log(_LENGTH_MEDIAN), _LENGTH_SIGMA, len(topic)))
        after = np.arange(1, length + 1) - np.maximum(size, 1)[:, None]
        tokens[:, 1:][after == 1] = end
        tokens[:, 1:][after > 1] = 0
        return tokens


@dataclasses.dataclass(frozen=True)
class _Source:
    """One partition, for `conversion.convert`."""

    split: str
    num_clients: int
    seed: int
    vocab_size: int
    sequence_length: int

    def client_ids(self) -> list[str]:
        """Those that have examples: a share that is spread evenly, the first client among them."""
        share = _CLIENTS[self.split] / _CLIENTS["train"]
        before = np.ceil(np.arange(self.num_clients + 1) * share)
        return [f"client_{client:06d}" for client in np.flatnonzero(np.diff(before))]

    def read(self, client_ids: Sequence[str]) -> Iterator[Examples]:
        """Generates these clients, whichever they are."""
        language = Language.draw(self.seed, self.vocab_size)
        for client_id in client_ids:
            entropy = [VERSION, self.seed, int(client_id.removeprefix("client_"))]
            # What a client has in both partitions, and what it has in this one only.
            both, one = (
                np.random.default_rng([*entropy, stream])
                for stream in (1, 2 + list(_CLIENTS).index(self.split))
            )
            favourites = both.integers(_NUM_TOPICS, size=len(_TOPICS_OF_CLIENT))
            topic = favourites[one.choice(_quantiles(_TOPICS_OF_CLIENT, 2**10), self._size(one))]
            yield {"tokens": language.write(one, topic, self.sequence_length)}

    def _size(self, rng: np.random.Generator) -> int:
        mean = _EXAMPLES[self.split] / _CLIENTS[self.split]
        return max(1, round(mean * rng.lognormal(-(_SIZE_SIGMA**2) / 2, _SIZE_SIGMA)))


def _quantiles(weights: np.ndarray | tuple[float, ...], size: int) -> np.ndarray:
    """(size,) indices into `weights`, ascending, each as often as its weight demands."""
    cumulative = np.cumsum(weights)
    middles = (np.arange(size) + 0.5) * (cumulative[-1] / size)
    return np.searchsorted(cumulative, middles)
