"""Times ways to multiply a bag of words by a kernel inside a compiled loop.

    python -m benchmarks.tags_in_loop [--lanes 1 2] [--repeats 7]

Forward, backward and an SGD step of tag prediction, on batches of 100 posts of up to 64 words; figures
are those of `lstm_in_loop`.
"""

from __future__ import annotations

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from benchmarks.convolution_in_loop import Program, over
from benchmarks.lstm_in_loop import table
from fedexp.models import TagLogistic
from fedexp.tasks import mean_loss, tag_prediction

STEPS, BATCH, WORDS, VOCAB, TAGS = 4, 100, 64, 10_000, 500


class DenseBag(nn.Module):
    """Scatters each post's words into a bag, for a product with the kernel."""

    vocab_size: int = VOCAB
    num_tags: int = TAGS

    @nn.compact
    def __call__(self, words, num_words):
        rows = jnp.arange(len(words))[:, None]
        counts = jnp.zeros((len(words), self.vocab_size + 2)).at[rows, words].add(1.0)
        bag = counts[:, 1:-1] / jnp.maximum(num_words, 1)[:, None]
        return nn.Dense(self.num_tags)(bag)


def program(model, lanes):
    task = tag_prediction(model)
    rng = np.random.default_rng(0)
    shape = (STEPS, lanes, BATCH)
    sizes = np.clip(rng.lognormal(3.2, 0.5, shape).astype(int), 1, WORDS)
    ranks = np.minimum((20 * rng.pareto(1, (*shape, WORDS))).astype(int) + 1, VOCAB)
    features = {
        "words": np.where(np.arange(WORDS) < sizes[..., None], ranks, 0).astype(np.uint16),
        "num_words": sizes.astype(np.uint16),
        "tags": rng.integers(0, TAGS, (*shape, 3)).astype(np.int16),
    }
    mask = jnp.ones(BATCH, bool)

    def step(params, batch):
        grads, _ = jax.grad(mean_loss, argnums=1, has_aux=True)(task, params, batch, mask, None)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

    @jax.jit
    def run(params, features):
        def body(t, params):
            return over(lanes, step)(params, {name: x[t] for name, x in features.items()})

        return lax.fori_loop(0, STEPS, body, params)

    params = task.init(jax.random.key(0), {name: x[0, 0] for name, x in features.items()})
    params = jax.tree.map(lambda p: jnp.broadcast_to(p, (lanes, *p.shape)), params)
    return Program(run, (params, jax.tree.map(jnp.asarray, features)), lanes * BATCH * STEPS)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lanes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    models = {"dense bag": DenseBag(), "fedexp TagLogistic": TagLogistic()}
    variants = {name: functools.partial(program, model) for name, model in models.items()}
    print(f"{jax.devices()}, jax {jax.__version__}: ms per example, median (minimum)")
    table("tag prediction", variants, arguments.lanes, arguments.repeats)


if __name__ == "__main__":
    main()
