from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from fedexp.data.dataset import FederatedDataset
from fedexp.errors import UserError
from fedexp.models import LSTMLanguageModel
from fedexp.tasks import mean_loss, measures, next_token, with_derived
from tests.support.local import in_lanes_and_alone

KEY = jax.random.key(0)
# Words 1 to 4, outside 5, begin 6, end 7.
VOCAB, OOV, BOS, EOS = 8, 5, 6, 7
TOKENS = np.array(
    [
        [BOS, 1, 2, 5, EOS, 0, 0],
        [BOS, 4, 3, 1, 1, 5, 2],
        [BOS, 2, EOS, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0],
    ],
    np.uint16,
)
BATCH = {"tokens": TOKENS}
LSTM = LSTMLanguageModel(VOCAB, 3, 4)


class Table(nn.Module):
    """The logits of a bigram model, for any ids."""

    vocab_size: int = VOCAB

    @nn.compact
    def __call__(self, tokens):
        return nn.Embed(self.vocab_size, self.vocab_size)(tokens)


def reference(logits: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Values and weights per sequence, token by token."""
    rows = []
    for sequence, row in zip(logits.astype(np.float64), TOKENS, strict=True):
        sums = {name: np.zeros(2) for name in next_token(LSTM).metrics} | {"loss": np.zeros(2)}
        labels = row[1:]
        for scores, label in zip(sequence, labels, strict=True):
            if label == 0:
                continue
            sums["loss"] += np.log(np.exp(scores).sum()) - scores[label], 1
            sums["accuracy"] += scores.argmax() == label, 1
            sums["oov_rate"] += label == OOV, 1
            if label != OOV:
                sums["accuracy_no_oov"] += scores.argmax() == label, 1
            if label not in (OOV, EOS):
                sums["accuracy_no_oov_or_eos"] += scores.argmax() == label, 1
            if label != EOS:
                sums["accuracy_in_vocab"] += 1 + scores[1:5].argmax() == label, 1
        if labels.any():
            sums["truncation_rate"] += EOS not in labels, 1
        rows.append(sums)
    return {name: np.stack([sums[name] for sums in rows], 1) for name in rows[0]}


@pytest.mark.parametrize("backend", ["cpu", "tpu"])
def test_measures_against_numpy(backend, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    task = next_token(LSTM)
    # Most labels have the highest logit, one of them only among the words.
    logits = np.random.default_rng(0).normal(size=(4, 6, VOCAB)).astype(np.float32)
    np.put_along_axis(logits[:, 1:], TOKENS[:, 2:, None].astype(int), 3.0, axis=2)
    logits[1, 2, EOS] = 4.0
    logits[1, 5, 1] = 4.0
    measured = jax.jit(lambda logits: measures(task, logits, BATCH))
    assert ("gather" in str(jax.make_jaxpr(measured)(logits))) == (backend != "tpu")
    found = measured(logits)
    expected = reference(logits)
    assert found.keys() == expected.keys()
    for name, measure in found.items():
        np.testing.assert_allclose(measure, expected[name], rtol=1e-5, err_msg=name)
    # The metrics tell different things apart.
    means = {name: values.sum() / weights.sum() for name, (values, weights) in expected.items()}
    assert len({round(mean, 6) for mean in means.values()}) == len(means)


@pytest.mark.parametrize("backend", ["cpu", "tpu"])
def test_the_loss_is_the_mean_over_tokens(backend, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    task = next_token(Table())
    params = task.init(KEY, BATCH)
    mask = np.array([True, True, False, True])
    (loss, sums), gradient = jax.value_and_grad(
        lambda p: mean_loss(task, p, BATCH, mask, KEY), has_aux=True
    )(params)

    table = np.asarray(params["Embed_0"]["embedding"], np.float64)
    values, _ = reference(table[TOKENS[:, :-1]])["loss"]
    np.testing.assert_allclose(loss, values[mask].sum() / 10, rtol=1e-5)
    assert sums["loss"].weights == 10
    expected = np.zeros_like(table)
    for row in TOKENS[mask]:
        for before, label in itertools.pairwise(row):
            if label:
                softmax = np.exp(table[before]) / np.exp(table[before]).sum()
                expected[before] += (softmax - np.eye(VOCAB)[label]) / 10
    np.testing.assert_allclose(gradient["Embed_0"]["embedding"], expected, rtol=1e-4, atol=1e-6)


def test_huge_logits_neither_overflow_nor_diverge():
    task = next_token(LSTM)
    logits = np.full((4, 6, VOCAB), -1e4, np.float32)
    logits[..., 1] = 1e4
    loss = task.loss(jnp.asarray(logits), BATCH)
    np.testing.assert_allclose(loss.values[0], 3 * 2e4)  # All labels but one are not the first.
    assert np.isfinite(with_derived(task, {"loss": jnp.float32(2e4)})["perplexity"])


def test_the_perplexity_derives_from_mean_losses_of_any_shape():
    means = with_derived(next_token(LSTM), {"loss": jnp.log(jnp.array([2.0, 5.0]))})
    np.testing.assert_allclose(means["perplexity"], [2, 5], rtol=1e-6)


def corpus(sizes=(5, 9, 2, 7)) -> FederatedDataset:
    """Sentences that count upwards, of a few lengths."""
    rng = np.random.default_rng(0)
    clients = {}
    for number, size in enumerate(sizes):
        tokens = np.zeros((size, 7), np.uint8)
        tokens[:, 0] = BOS
        for row, length in zip(tokens, rng.integers(1, 5, size), strict=True):
            row[1 : length + 1] = np.arange(length) + rng.integers(1, 6 - length)
            row[length + 1] = EOS
        clients[f"client{number}"] = {"tokens": tokens}
    return FederatedDataset.from_clients(clients)


def test_padded_lanes_learn_as_clients_alone():
    _, losses = in_lanes_and_alone(next_token(LSTM), corpus(), optax.sgd(2.0), 20)
    assert (losses[:, -1] < 0.8 * losses[:, 0]).all()


def test_the_compiled_step_reads_the_logits_little():
    """XLA shares the highest logit and the softmax between the loss and all metrics."""

    def passes(metrics):
        task = next_token(LSTM, metrics=metrics)
        run = jax.jit(lambda logits: measures(task, logits, {"tokens": TOKENS}))
        text = run.lower(jnp.zeros((4, 6, VOCAB))).compile().as_text()
        return sum(
            text.count(f"f32[4,6,{VOCAB}]{{2,1,0}} {op}(") for op in ("select", "exponential")
        )

    assert passes(None) == passes({})


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"text": TOKENS}, r"'tokens', the data set lacks 'tokens' \(it has \['text'\]\)"),
        (
            {"tokens": TOKENS[:, :1]},
            r"at least two per example, got \(4, 1\)",
        ),
        ({"tokens": TOKENS.astype(float)}, "got float64"),
        ({"tokens": TOKENS.astype(int) - 1}, r"in \[0, 8\), got -1 to 6"),
        ({"tokens": TOKENS + 1}, "got 1 to 8; set the model's vocab_size"),
    ],
)
def test_check_refuses(features, message):
    with pytest.raises(UserError, match=message):
        next_token(LSTM).check(FederatedDataset(features, np.array([0, 4]), np.array(["a"])))


def test_check_looks_at_the_first_rows_only():
    """A memory-mapped set of 135 million rows must not be read for it."""
    tokens = np.broadcast_to(TOKENS[:1], (10**8, 7))
    dataset = FederatedDataset({"tokens": tokens}, np.array([0, 10**8]), np.array(["a"]))
    next_token(LSTM).check(dataset)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"oov": 0}, r"in \[1, 8\) because 0 is padding, got oov=0, bos=6, eos=7"),
        ({"eos": 8}, "eos=8"),
        ({"bos": 7}, "different ids"),
    ],
)
def test_special_ids_must_be_distinct(arguments, message):
    with pytest.raises(UserError, match=message):
        next_token(LSTM, **arguments)


def test_the_model_must_fit():
    with pytest.raises(UserError, match=r"to \(4, 6, 8\), but next_token needs .* \(4, 6, 10\)"):
        next_token(LSTM, vocab_size=10).init(KEY, BATCH)
    with pytest.raises(UserError, match=r"set next_token.vocab_size; Embed has no such"):
        next_token(nn.Embed(8, 8))
    assert next_token(nn.Embed(8, 8), vocab_size=8).init(KEY, BATCH)
