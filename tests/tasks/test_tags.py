from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from fedexp.data.dataset import FederatedDataset
from fedexp.errors import UserError
from fedexp.models import TagLogistic
from fedexp.tasks import mean_loss, measures, tag_prediction
from tests.support.local import in_lanes_and_alone

KEY = jax.random.key(0)
VOCAB, TAGS = 12, 9
RNG = np.random.default_rng(0)
MODEL = TagLogistic(VOCAB, TAGS)
BATCH = {
    # Word 13 is one outside the vocabulary; the last post has more words than were kept.
    "words": np.array([[3, 3, 1, 0], [13, 12, 0, 0], [0, 0, 0, 0], [5, 4, 3, 2]], np.uint16),
    "num_words": np.array([4, 2, 0, 9], np.uint16),
    "tags": np.array([[0, 7, -1], [8, -1, -1], [-1, -1, -1], [2, 1, 0]], np.int16),
}


def bags() -> np.ndarray:
    """The published preprocessing: the mean of one-hot words, without that for other words."""
    bags = np.zeros((4, VOCAB))
    for bag, words, count in zip(bags, BATCH["words"], BATCH["num_words"], strict=True):
        for word in words[(words > 0) & (words <= VOCAB)]:
            bag[word - 1] += 1 / count
    return bags


def labels() -> np.ndarray:
    return np.array([[k in row for k in range(TAGS)] for row in BATCH["tags"]], float)


def noisy_params(task):
    params = task.init(KEY, BATCH)
    return jax.tree.map(lambda p: p + jnp.asarray(RNG.normal(size=p.shape), jnp.float32), params)


def test_parameter_count():
    shapes = jax.eval_shape(TagLogistic().init, KEY, BATCH["words"], BATCH["num_words"])
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 5_000_500


def test_loss_and_gradient_against_numpy():
    task = tag_prediction(MODEL)
    params = noisy_params(task)
    mask = np.array([True, True, True, False])
    (loss, sums), gradient = jax.jit(
        jax.value_and_grad(lambda p: mean_loss(task, p, BATCH, mask, KEY), has_aux=True)
    )(params)

    kernel, bias = (np.asarray(params[name], np.float64) for name in ("kernel", "bias"))
    logits = bags() @ kernel + bias
    np.testing.assert_allclose(task.apply(params, BATCH, None), logits, rtol=1e-4, atol=1e-6)
    chances = 1 / (1 + np.exp(-logits))
    losses = -(labels() * np.log(chances) + (1 - labels()) * np.log(1 - chances)).mean(1)
    np.testing.assert_allclose(loss, losses[:3].sum(), rtol=1e-5)
    np.testing.assert_allclose(sums["loss"], [losses[:3].sum(), 3], rtol=1e-5)
    error = mask[:, None] * (chances - labels()) / TAGS
    np.testing.assert_allclose(gradient["kernel"], bags().T @ error, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(gradient["bias"], error.sum(0), rtol=1e-4, atol=1e-6)


def test_metrics_against_numpy():
    task = tag_prediction(MODEL, recall_at=3)
    logits = RNG.normal(size=(4, TAGS)).astype(np.float32)
    found = measures(task, jnp.asarray(logits), BATCH)
    top = np.argsort(-logits, axis=1)[:, :3]
    hits = np.take_along_axis(labels(), top, axis=1).sum(1)
    np.testing.assert_array_equal(found["recall_at_3"], [hits, labels().sum(1)])
    given = logits > 0
    np.testing.assert_array_equal(
        found["precision"], [(given & (labels() > 0)).sum(1), given.sum(1)]
    )
    assert 0 < hits.sum() < labels().sum()


def test_of_equal_logits_the_first_rank_higher():
    found = measures(tag_prediction(MODEL), jnp.zeros((4, TAGS)), BATCH)
    np.testing.assert_array_equal(found["recall_at_5"].values, [1, 0, 0, 3])


def posts(sizes=(5, 9, 2, 7)) -> FederatedDataset:
    """Posts whose single tag is one of their words, modulo the number of tags."""
    rng = np.random.default_rng(1)
    clients = {}
    for number, size in enumerate(sizes):
        words = rng.integers(1, VOCAB + 1, (size, 3)).astype(np.uint16)
        clients[f"client{number}"] = {
            "words": words,
            "num_words": np.full(size, 3, np.uint16),
            "tags": (words[:, :1] % TAGS).astype(np.int16),
        }
    return FederatedDataset.from_clients(clients)


def test_padded_lanes_learn_as_clients_alone():
    _, losses = in_lanes_and_alone(tag_prediction(MODEL), posts(), optax.sgd(3.0), 10)
    assert (losses[:, -1] < 0.8 * losses[:, 0]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tags": None}, "the data set lacks 'tags'"),
        ({"words": BATCH["words"].astype(float)}, "'words' must hold integers in 2 dim.* float64"),
        ({"tags": BATCH["tags"][:, 0]}, r"shape \(4,\)"),
        (
            {"words": BATCH["words"] + 1},
            r"'words' must have ids in \[0, 14\), got 1 to 14; .*vocab",
        ),
        ({"tags": BATCH["tags"] + 1}, r"'tags' must have ids in \[-1, 9\), got 0 to 9; .*num_tags"),
    ],
)
def test_check_refuses(change, message):
    features = {name: array for name, array in (BATCH | change).items() if array is not None}
    dataset = FederatedDataset(features, np.array([0, 4]), np.array(["a"]))
    with pytest.raises(UserError, match=message):
        tag_prediction(MODEL).check(dataset)


def test_check_accepts():
    tag_prediction(MODEL).check(FederatedDataset(BATCH, np.array([0, 4]), np.array(["a"])))


def test_the_model_must_fit():
    with pytest.raises(
        UserError, match=r"to \(4, 9\), but tag_prediction needs outputs of shape \(4, 5\)"
    ):
        tag_prediction(MODEL, num_tags=5).init(KEY, BATCH)
    with pytest.raises(UserError, match="set tag_prediction.vocab_size; Dense has no such"):
        tag_prediction(nn.Dense(3))
    with pytest.raises(UserError, match="at least 1, got 0"):
        tag_prediction(MODEL, recall_at=0)
