"""The generated Stack Overflow: its shape, its seeds, and what can be learnt from it."""

import itertools
import math

import numpy as np
import pytest

from fedexp.data import FederatedSplits, stackoverflow_synthetic
from fedexp.data.stackoverflow_synthetic import Language
from fedexp.errors import UserError

CLIENTS, VOCAB, LENGTH = 400, 500, 20
OOV, BOS, EOS, IDS = VOCAB + 1, VOCAB + 2, VOCAB + 3, VOCAB + 4


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDEXP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def splits(cache) -> FederatedSplits:
    return stackoverflow_synthetic(CLIENTS, vocab_size=VOCAB, num_workers=0)


def small(num_clients: int = 3, **kwargs) -> FederatedSplits:
    return stackoverflow_synthetic(num_clients, vocab_size=VOCAB, num_workers=0, **kwargs)


def normal_cdf(x: float) -> float:
    return (1 + math.erf(x / math.sqrt(2))) / 2


def test_rows_are_begin_words_end_padding(splits):
    for dataset in splits.present().values():
        tokens = np.asarray(dataset.features["tokens"])
        assert tokens.dtype == np.uint16 and tokens.shape[1] == LENGTH + 1
        words = (tokens >= 1) & (tokens <= OOV)
        num_words = words.sum(axis=1)
        assert num_words.min() == 1 and num_words.max() == LENGTH
        columns = np.arange(LENGTH + 1)
        end = num_words[:, None] + 1
        np.testing.assert_array_equal(tokens == BOS, np.broadcast_to(columns == 0, tokens.shape))
        np.testing.assert_array_equal(words, (columns > 0) & (columns < end))
        np.testing.assert_array_equal(tokens == EOS, columns == end)
        np.testing.assert_array_equal(tokens == 0, columns > end)


def test_sizes_are_log_normal_with_the_published_means(splits):
    for dataset, mean in zip(
        splits[:2], (135_818_730 / 342_477, 16_586_035 / 204_088), strict=True
    ):
        logs = np.log(dataset.client_sizes)
        assert abs(logs.mean() - (math.log(mean) - 1.1**2 / 2)) < 4 * 1.1 / len(logs) ** 0.5
        assert abs(logs.std() - 1.1) < 0.2


def test_three_in_five_clients_have_test_examples(splits):
    assert splits.train.num_clients == CLIENTS
    assert splits.test.num_clients == math.ceil(CLIENTS * 204_088 / 342_477)
    assert set(splits.test.client_ids) < set(splits.train.client_ids)


def test_sentence_lengths_and_words_outside_the_vocabulary(splits):
    tokens = np.asarray(splits.train.features["tokens"])
    uncut = (tokens == EOS).any(axis=1).mean()
    assert uncut == pytest.approx(normal_cdf(math.log(19.5 / 12) / 0.7), abs=0.01)
    assert (tokens == OOV).sum() / ((tokens > 0) & (tokens <= OOV)).sum() == pytest.approx(
        0.045, abs=0.001
    )


def test_words_are_zipf_distributed():
    tokens = np.asarray(
        stackoverflow_synthetic(100, vocab_size=10_000, num_workers=0).train.features["tokens"]
    )
    counts = np.sort(np.bincount(tokens.ravel(), minlength=10_004)[1:10_001])[::-1]
    rank = np.arange(10, 1000)
    slope = np.polyfit(np.log(rank), np.log(counts[rank]), 1)[0]
    assert -1.3 < slope < -0.8


def test_a_client_is_the_same_in_any_population(splits):
    few = small(3)
    for dataset, whole in zip(few[:2], splits[:2], strict=True):
        for client, client_id in enumerate(dataset.client_ids):
            np.testing.assert_array_equal(
                dataset.client(client)["tokens"],
                whole.client(whole.client_ids.tolist().index(client_id))["tokens"],
            )


def test_seeds_and_clients_and_partitions_differ():
    rows = {}
    for seed in (0, 1):
        for name, dataset in small(3, seed=seed).present().items():
            for client in range(dataset.num_clients):
                rows[seed, name, client] = np.asarray(dataset.client(client)["tokens"][:1])
    for one, other in itertools.combinations(rows, 2):
        assert not np.array_equal(rows[one], rows[other]), (one, other)


def test_one_client_is_enough():
    train, test, _ = small(1)
    assert train.num_clients == test.num_clients == 1


def test_worker_processes_generate_the_same(splits, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDEXP_CACHE", str(tmp_path))
    train, *_ = stackoverflow_synthetic(2, vocab_size=VOCAB, num_workers=1)
    np.testing.assert_array_equal(
        train.client(1)["tokens"], np.asarray(splits.train.client(1)["tokens"])
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_clients", 0),
        ("num_clients", 1.5),
        ("seed", -1),
        ("vocab_size", 10),
        ("vocab_size", 65_533),
        ("sequence_length", 0),
    ],
)
def test_arguments_out_of_range_are_named(name, value):
    with pytest.raises(UserError, match=f"stackoverflow_synthetic.{name} must be .* got {value}"):
        stackoverflow_synthetic(**{name: value})


def pairs(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All (token, next token) whose next token is not padding."""
    tokens = np.asarray(tokens).astype(np.int64)
    before, after = tokens[:, :-1].ravel(), tokens[:, 1:].ravel()
    return before[after > 0], after[after > 0]


def unigram_and_bigram_accuracy(splits: FederatedSplits, num_ids: int) -> tuple[float, float]:
    """Test accuracy of the most frequent target, and of each token's most frequent successor."""
    before, after = pairs(splits.train.features["tokens"])
    frequent = np.bincount(after, minlength=num_ids).argmax()
    successor = np.full(num_ids, frequent)
    kinds, counts = np.unique(before * num_ids + after, return_counts=True)
    order = np.argsort(counts, kind="stable")
    successor[kinds[order] // num_ids] = kinds[order] % num_ids  # The last, largest count stays.
    before, after = pairs(splits.test.features["tokens"])
    return float((after == frequent).mean()), float((after == successor[before]).mean())


def oracle(vocab_size: int, num_sentences: int) -> tuple[float, float]:
    """Accuracy and entropy (nats a token) for one who knows the generator and each sentence's topic."""
    num_ids, end = vocab_size + 4, vocab_size + 3
    language, rng = Language.draw(0, vocab_size), np.random.default_rng(9)
    topic = rng.integers(len(language.topics), size=num_sentences)
    tokens = language.write(rng, topic, LENGTH).astype(np.int64)

    def share(draws: np.ndarray, size: int) -> np.ndarray:
        return np.bincount(draws, minlength=size) / len(draws)

    shares = share(language.cause_draws, 3)
    common = share(language.common_draws, num_ids)
    topical = np.zeros((len(language.topics), num_ids))
    np.add.at(topical, (np.arange(64)[:, None], language.topics), share(language.topic_draws, 100))
    correct = nats = total = 0
    for t in range(LENGTH):
        there = tokens[:, t + 1] > 0
        before, after = tokens[there, t], tokens[there, t + 1]
        ends = (after == end).mean()  # Ending depends on nothing but the length so far.
        p = shares[1] * topical[topic[there]] + shares[2] * common
        np.add.at(
            p,
            (np.arange(len(p))[:, None], language.successors[before]),
            shares[0] * share(language.successor_draws, 8),
        )
        p *= 1 - ends
        p[:, end] = ends
        correct += (p.argmax(axis=1) == after).sum()
        nats -= np.log(p[np.arange(len(p)), after]).sum()
        total += len(after)
    return correct / total, nats / total


def test_a_bigram_model_beats_the_most_frequent_word_and_not_the_oracle(splits):
    unigram, bigram = unigram_and_bigram_accuracy(splits, IDS)
    best, _ = oracle(VOCAB, 5000)
    assert unigram < 0.08
    assert bigram > 4 * unigram
    assert bigram < best + 0.01


def test_clients_have_topics_of_their_own(splits):
    """A client's own words predict its test words better than everybody's."""

    def frequencies(tokens: np.ndarray) -> np.ndarray:
        return np.bincount(np.asarray(tokens).ravel(), minlength=IDS)[1 : OOV + 1] + 1.0

    everybody = frequencies(splits.train.features["tokens"])
    everybody /= everybody.sum()
    gains = []
    for client, client_id in enumerate(splits.test.client_ids):
        own = splits.train.client(splits.train.client_ids.tolist().index(client_id))["tokens"]
        words = np.asarray(splits.test.client(client)["tokens"])
        words = words[(words > 0) & (words <= OOV)]
        if len(own) > 300:
            mixed = (frequencies(own) / frequencies(own).sum() + everybody) / 2
            gains.append(np.log(mixed[words - 1] / everybody[words - 1]).mean())
    assert len(gains) > 50
    assert np.mean(np.array(gains) > 0) > 0.9


@pytest.mark.slow
def test_the_documented_figures():
    """docs/synthetic_text.md, at the default size."""
    splits = stackoverflow_synthetic()
    assert (splits.train.num_examples, splits.test.num_examples) == (795_041, 93_357)
    unigram, bigram = unigram_and_bigram_accuracy(splits, 10_004)
    best, entropy = oracle(10_000, 4_000)
    assert unigram == pytest.approx(0.057, abs=0.001)
    assert bigram == pytest.approx(0.296, abs=0.001)
    assert best == pytest.approx(0.298, abs=0.004)
    assert math.exp(entropy) == pytest.approx(39.5, abs=1)
