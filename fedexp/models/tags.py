"""Logistic regression from a bag of words to tags."""

from __future__ import annotations

import gin
import jax
import jax.numpy as jnp
from flax import linen as nn


@gin.configurable
class TagLogistic(nn.Module):
    """One logistic regression per tag on the words of a post (Reddi et al. 2021, arXiv:2003.00295).

    5 000 500 parameters for 10 000 words and 500 tags, initialised as by the authors: the kernel
    Glorot-normal, the bias zero.

    The bag of words is never made: a post's logits are the mean of the rows of its words. Forward,
    backward and step take less than half a dense bag's time (`python -m benchmarks.tags_in_loop`).

    Attributes:
      vocab_size: V, number of words.
      num_tags: K, number of tags.
    """

    vocab_size: int = 10_000
    num_tags: int = 500

    @nn.compact
    def __call__(self, words: jax.Array, num_words: jax.Array) -> jax.Array:
        """Maps posts to logits.

        Args:
          words: (B, W) of any integer dtype; 1 to V are words, anything else is skipped.
          num_words: (B,), by how many words the rows' sum is divided, those skipped included.

        Returns:
          (B, K).
        """
        shape = (self.vocab_size, self.num_tags)
        kernel = self.param("kernel", nn.initializers.glorot_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.num_tags,))
        words = words.astype(jnp.int32)
        # Negative indices would count from the end; those beyond it are skipped.
        rows = jnp.where(words > 0, words - 1, self.vocab_size)
        total = kernel.at[rows].get(mode="fill", fill_value=0).sum(1)
        return total / jnp.maximum(num_words, 1)[:, None] + bias
