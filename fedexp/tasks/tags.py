"""Prediction of a post's tags from its words."""

from __future__ import annotations

import gin
import jax
import jax.numpy as jnp
from flax import linen as nn

from fedexp.data.dataset import FederatedDataset
from fedexp.errors import UserError
from fedexp.tasks.base import Features, Measure, Metric, Task
from fedexp.tasks.checks import CHECKED_ROWS, check_features, check_ids
from fedexp.tasks.flax_task import Precision, flax_task
from fedexp.tasks.nnx_functions import Model, name_of


@gin.configurable
def tag_prediction(
    model: Model,
    vocab_size: int | None = None,
    num_tags: int | None = None,
    recall_at: int = 5,
    compute_dtype: Precision = None,
) -> Task:
    """The task of predicting feature 'tags' of a post from 'words' and 'num_words'.

    Features: words (B, W), ids 1 to vocab_size, 0 for padding and vocab_size + 1, if it occurs, for any
    other word; num_words (B,), the number of all words, those outside the vocabulary included; tags
    (B, T), ids 0 to num_tags - 1, or -1 for none.

    As in the code of Reddi et al. 2021 (arXiv:2003.00295), an example's loss is the mean over the tags of
    their binary cross-entropies, and training minimises the sum over a batch's examples: their client
    learning rate of 100 is for that sum.

    Metrics: recall_at_5, the share of all tags that are among their post's five highest logits (Keras'
    Recall(top_k=5); of equal logits the first rank higher), and precision, the share of correct tags
    among all that are given a probability above a half.

    Args:
      model: maps (words, num_words) to logits (B, num_tags); see `flax_task`.
      vocab_size: number of words; the model's own attribute if None.
      num_tags: number of tags; the model's own attribute if None.
      recall_at: how many of the highest logits count for the recall, and in its name.
      compute_dtype: 'bfloat16' computes the model in that, for accelerators that are faster at it; what is
        trained stays float32. See `flax_task`.

    Raises:
      UserError: recall_at below 1, or a number that neither the model nor the caller gives. The task's
        `init` raises for a model whose logits do not fit; its `check` for a data set without these
        features, or whose first rows do not fit.
    """
    vocab_size = _number(model, "vocab_size", vocab_size)
    num_tags = _number(model, "num_tags", num_tags)
    if recall_at < 1:
        raise UserError(f"tag_prediction.recall_at must be at least 1, got {recall_at}")

    def inputs(batch: Features, key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        return jnp.asarray(batch["words"]), jnp.asarray(batch["num_words"])

    def check(dataset: FederatedDataset) -> None:
        check_features("tag_prediction", dataset, {"words": 2, "num_words": 1, "tags": 2})
        first = dataset.slice(0, CHECKED_ROWS)
        check_ids("words", first["words"], 0, vocab_size + 2, "set the model's vocab_size")
        check_ids("tags", first["tags"], -1, num_tags, "set the model's num_tags")

    return flax_task(
        "tag_prediction",
        model,
        inputs,
        output_shape=lambda words, num_words: (words.shape[0], num_tags),
        remedy="set the model's num_tags or tag_prediction.num_tags",
        compute_dtype=compute_dtype,
        loss=_binary_cross_entropy,
        sum_loss=True,
        metrics={f"recall_at_{recall_at}": _recall(recall_at), "precision": _precision},
        check=check,
    )


def _number(model: Model, name: str, given: int | None) -> int:
    number = getattr(model, name, None) if given is None else given
    if number is None:
        raise UserError(f"set tag_prediction.{name}; {name_of(model)} has no such attribute")
    return number


def _own(logits: jax.Array, batch: Features) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The post's tags, their logits and which of them are there, (B, T) each."""
    tags = jnp.asarray(batch["tags"]).astype(jnp.int32)
    present = tags >= 0
    tags = jnp.where(present, tags, 0)
    return tags, jnp.take_along_axis(logits, tags, axis=1), present


def _binary_cross_entropy(logits: jax.Array, batch: Features) -> Measure:
    logits = logits.astype(jnp.float32)
    _, own, present = _own(logits, batch)
    total = nn.softplus(logits).sum(1) - jnp.where(present, own, 0).sum(1)
    return Measure(total / logits.shape[1], jnp.ones_like(total))


def _recall(k: int) -> Metric:
    def metric(logits: jax.Array, batch: Features) -> Measure:
        tags, own, present = _own(logits, batch)
        others, own, tags = logits[:, None], own[..., None], tags[..., None]
        earlier = jnp.arange(logits.shape[1]) < tags
        ahead = ~(others <= own) | ((others == own) & earlier)
        return _counts(present & (ahead.sum(-1) < k), present)

    return metric


def _precision(logits: jax.Array, batch: Features) -> Measure:
    _, own, present = _own(logits, batch)
    return _counts(present & (own > 0), logits > 0)


def _counts(values: jax.Array, weights: jax.Array) -> Measure:
    return Measure(*(part.sum(1).astype(jnp.float32) for part in (values, weights)))
