"""Next-token prediction by any Flax module."""

from __future__ import annotations

from collections.abc import Mapping

import gin
import jax
import jax.numpy as jnp
import numpy as np

from fedexp.data.dataset import FederatedDataset
from fedexp.errors import UserError
from fedexp.models.layers import on_tpu
from fedexp.tasks.base import Features, Measure, Metric, Task
from fedexp.tasks.checks import CHECKED_ROWS, check_features, check_ids
from fedexp.tasks.flax_task import Precision, flax_task
from fedexp.tasks.nnx_functions import Model, name_of

_PAD = 0


@gin.configurable
def next_token(
    model: Model,
    vocab_size: int | None = None,
    oov: int | None = None,
    bos: int | None = None,
    eos: int | None = None,
    metrics: Mapping[str, Metric] | None = None,
    compute_dtype: Precision = None,
) -> Task:
    """The task of predicting each token of feature 'tokens' (B, L + 1) from those before it.

    The model sees all ids but the last and is scored on all but the first. Id 0 is padding, which no
    loss and no metric counts.

    The loss is the cross-entropy in nats, and training minimises its mean over a batch's tokens, as
    Reddi et al. 2021 (arXiv:2003.00295) do (Keras' SparseCategoricalCrossentropy with masked padding).
    FedJAX instead averages over sentences their sum of losses (Stack Overflow), or that sum divided by
    the padded length (Shakespeare).

    Metrics, and what others call them:
      accuracy: of all tokens ('accuracy_with_oov' of Reddi et al.).
      accuracy_no_oov: of those in the vocabulary and the ends of sentences.
      accuracy_no_oov_or_eos: of those in the vocabulary alone, the number that Reddi et al. report.
      accuracy_in_vocab: FedJAX's; of all tokens but the ends of sentences, when only words of the
        vocabulary may be predicted. Those outside the vocabulary are therefore all missed.
      oov_rate: the share of tokens outside the vocabulary.
      truncation_rate: the share of sequences without their end.
      perplexity: exp(loss).
    A label counts as predicted if no logit is above its own.

    Args:
      model: maps (tokens), ids (B, L) int32, to logits (B, L, vocab_size); see `flax_task`.
      vocab_size: number of ids; the model's own attribute `vocab_size` if None.
      oov: the id of every token outside the vocabulary; vocab_size - 3 if None, as in TensorFlow
        Federated's preprocessing.
      bos: the id that begins a sequence; vocab_size - 2 if None.
      eos: the id that ends a sequence; vocab_size - 1 if None.
      metrics: name -> metric, in place of those above (the perplexity stays).
      compute_dtype: 'bfloat16' computes the model in that, for accelerators that are faster at it; what is
        trained stays float32. See `flax_task`.

    Raises:
      UserError: special ids that are not different ones in [1, vocab_size), or no vocab_size. The
        task's `init` raises for a model whose logits do not fit; its `check` for a data set without
        tokens, or whose first ones are not integers in [0, vocab_size).
    """
    vocab_size = getattr(model, "vocab_size", None) if vocab_size is None else vocab_size
    if vocab_size is None:
        raise UserError(f"set next_token.vocab_size; {name_of(model)} has no such attribute")
    last = (vocab_size - 3, vocab_size - 2, vocab_size - 1)
    oov, bos, eos = (
        default if given is None else given
        for given, default in zip((oov, bos, eos), last, strict=True)
    )
    special = (_PAD, oov, bos, eos)
    if len(set(special)) < 4 or not all(0 <= i < vocab_size for i in special):
        raise UserError(
            f"next_token needs different ids for oov, bos and eos, in [1, {vocab_size}) because 0 is "
            f"padding, got oov={oov}, bos={bos}, eos={eos}"
        )

    def inputs(batch: Features, key: jax.Array | None) -> tuple[jax.Array]:
        return (jnp.asarray(batch["tokens"]).astype(jnp.int32)[:, :-1],)

    return flax_task(
        "next_token",
        model,
        inputs,
        output_shape=lambda tokens: (*tokens.shape, vocab_size),
        remedy="set the model's vocab_size or next_token.vocab_size",
        compute_dtype=compute_dtype,
        loss=_cross_entropy(special),
        metrics=_metrics(special) if metrics is None else dict(metrics),
        # Float32 ends at e^88; a run that has got there may still come back.
        derived={"perplexity": lambda means: jnp.exp(jnp.minimum(means["loss"], 80))},
        check=lambda dataset: _check_dataset(dataset, vocab_size),
    )


def _labels(batch: Features) -> jax.Array:
    return jnp.asarray(batch["tokens"]).astype(jnp.int32)[:, 1:]


def _own(logits: jax.Array, batch: Features) -> jax.Array:
    """The logits of the labels, (B, L); on TPU not by a gather, which takes them one by one."""
    if on_tpu():
        is_label = jnp.arange(logits.shape[-1]) == _labels(batch)[..., None]
        return jnp.where(is_label, logits, 0).sum(-1)
    return jnp.take_along_axis(logits, _labels(batch)[..., None], axis=-1)[..., 0]


def _highest(logits: jax.Array, special: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """The highest logit of the words, and of all ids, (B, L) each.

    Loss and metrics all start from here, so that XLA reads the logits once for all of them; an argmax
    besides would cost as much as a tenth of the training step. On TPU it is the maximum of all again: to take
    the special ones' logits alone, all would be laid out anew.
    """
    logits = jax.lax.stop_gradient(logits)
    is_special = np.isin(np.arange(logits.shape[-1]), special)
    of_words = jnp.where(is_special, -jnp.inf, logits).max(-1)
    if on_tpu():
        return of_words, logits.max(-1)
    return of_words, jnp.maximum(of_words, logits[..., np.array(special)].max(-1))


def _cross_entropy(special: tuple[int, ...]) -> Metric:
    def metric(logits: jax.Array, batch: Features) -> Measure:
        logits = logits.astype(jnp.float32)
        _, highest = _highest(logits, special)
        log_normaliser = jnp.log(jnp.exp(logits - highest[..., None]).sum(-1)) + highest
        return _over_tokens(log_normaliser - _own(logits, batch), _labels(batch) != _PAD)

    return metric


def _metrics(special: tuple[int, ...]) -> dict[str, Metric]:
    _, oov, _, eos = special

    def accuracy(*ignored: int) -> Metric:
        def metric(logits: jax.Array, batch: Features) -> Measure:
            _, highest = _highest(logits, special)
            correct = _own(logits, batch) >= highest
            return _over_tokens(correct, ~_isin(_labels(batch), ignored))

        return metric

    def accuracy_in_vocab(logits: jax.Array, batch: Features) -> Measure:
        labels = _labels(batch)
        highest, _ = _highest(logits, special)
        correct = (_own(logits, batch) >= highest) & ~_isin(labels, special)
        return _over_tokens(correct, ~_isin(labels, (_PAD, eos)))

    def oov_rate(logits: jax.Array, batch: Features) -> Measure:
        labels = _labels(batch)
        return _over_tokens(labels == oov, labels != _PAD)

    def truncation_rate(logits: jax.Array, batch: Features) -> Measure:
        labels = _labels(batch)
        whole, some = (labels == eos).any(1), (labels != _PAD).any(1)
        return Measure((some & ~whole).astype(jnp.float32), some.astype(jnp.float32))

    return {
        "accuracy": accuracy(_PAD),
        "accuracy_no_oov": accuracy(_PAD, oov),
        "accuracy_no_oov_or_eos": accuracy(*special),
        "accuracy_in_vocab": accuracy_in_vocab,
        "oov_rate": oov_rate,
        "truncation_rate": truncation_rate,
    }


def _isin(labels: jax.Array, ids: tuple[int, ...]) -> jax.Array:
    return (labels[..., None] == np.array(ids)).any(-1)


def _over_tokens(values: jax.Array, counted: jax.Array) -> Measure:
    """Values (B, L) of the tokens that are counted (B, L) as one Measure per sequence."""
    return Measure(
        jnp.where(counted, values, 0).astype(jnp.float32).sum(1),
        counted.astype(jnp.float32).sum(1),
    )


def _check_dataset(dataset: FederatedDataset, vocab_size: int) -> None:
    check_features("next_token", dataset, {"tokens": 2})
    tokens = dataset.features["tokens"]
    if tokens.shape[1] < 2:
        raise UserError(f"feature 'tokens' must hold at least two per example, got {tokens.shape}")
    check_ids("tokens", tokens[:CHECKED_ROWS], 0, vocab_size, "set the model's vocab_size")
