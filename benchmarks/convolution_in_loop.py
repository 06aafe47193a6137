"""Times ways to write a convolution inside a compiled loop, and the CNN built of the best one.

    python -m benchmarks.convolution_in_loop [--lanes 1 2 4] [--repeats 9]

Training runs in a `lax.fori_loop` whose body is vmapped over lanes, each with kernels of its own, so
that is where the time is taken: forward, backward and an SGD step, on batches of 20. Variants take
turns, so that a busy machine slows all alike; the figures are medians (minima) in ms per example.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from fedexp.models import layers
from fedexp.models.emnist import EmnistCNN
from fedexp.models.layers import Conv, Dropout, convolve, max_pool_2x2

BATCH, STEPS = 20, 8
PATIENCE = 3.0  # Seconds of timing after which a program is not repeated.


class Program(NamedTuple):
    run: Callable
    arguments: tuple
    examples: int


# ---- the second convolution of EmnistCNN: (B, 26, 26, 32) -> (B, 24, 24, 64) ----


def shifts(x):
    height, width = x.shape[1] - 2, x.shape[2] - 2
    return [x[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]


def merged(kernel):
    return kernel.reshape(-1, kernel.shape[-1])


def xla(x, kernel):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=numbers)


def patches(x, kernel):
    return jnp.concatenate(shifts(x), 3) @ merged(kernel)


def stacked_patches(x, kernel):
    return jnp.tensordot(jnp.stack(shifts(x), 3), kernel.reshape(9, *kernel.shape[2:]), 2)


def summed_products(x, kernel):
    return sum(s @ kernel[i // 3, i % 3] for i, s in enumerate(shifts(x)))


def row_patches(x, kernel):
    """Patches along the columns only; one product per row of the kernel."""
    height, width = x.shape[1] - 2, x.shape[2] - 2
    rows = jnp.concatenate([x[:, :, j : j + width] for j in range(3)], 3)
    return sum(rows[:, i : i + height] @ merged(kernel[i]) for i in range(3))


def row_outputs(x, kernel):
    """Patches along the columns only; one product, whose outputs are shifted and summed."""
    height, width, features = x.shape[1] - 2, x.shape[2] - 2, kernel.shape[-1]
    rows = jnp.concatenate([x[:, :, j : j + width] for j in range(3)], 3)
    y = rows @ kernel.transpose(1, 2, 0, 3).reshape(-1, 3 * features)
    return sum(y[:, i : i + height, :, i * features : (i + 1) * features] for i in range(3))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def by_hand(input_gradient, x, kernel):
    """Patches made again for the kernel's gradient; the input's gradient as told."""
    return patches(x, kernel)


def by_hand_forward(input_gradient, x, kernel):
    return patches(x, kernel), (x, kernel)


def by_hand_backward(input_gradient, residuals, g):
    x, kernel = residuals
    kernel_gradient = jnp.tensordot(jnp.concatenate(shifts(x), 3), g, ((0, 1, 2), (0, 1, 2)))
    return input_gradient(x, kernel, g), kernel_gradient.reshape(kernel.shape)


by_hand.defvjp(by_hand_forward, by_hand_backward)


def scattered(x, kernel, g):
    return jax.vjp(lambda x: patches(x, kernel), x)[1](g)[0]


def convolved(x, kernel, g):
    padded = jnp.pad(g, ((0, 0), (2, 2), (2, 2), (0, 0)))
    return patches(padded, kernel[::-1, ::-1].swapaxes(2, 3))


CONVOLUTIONS = {
    "lax.conv_general_dilated": xla,
    "patches x matmul": patches,
    "patches, axes unmerged": stacked_patches,
    "patches remade, scattered": functools.partial(by_hand, scattered),
    "patches remade, convolved": functools.partial(by_hand, convolved),
    "sum of 9 products": summed_products,
    "row patches, 3 products": row_patches,
    "row patches, sum of outputs": row_outputs,
    "fedexp Conv (Winograd)": convolve,
}


def convolution(conv, lanes, size=26, channels=(32, 64)):
    def loss(parameters):
        return 0.5 * jnp.mean(nn.relu(conv(*parameters)) ** 2)

    def step(parameters):
        return jax.tree.map(lambda p, g: p - 0.1 * g, parameters, jax.grad(loss)(parameters))

    @jax.jit
    def run(parameters):
        return lax.fori_loop(0, STEPS, lambda _, p: over(lanes, step)(p), parameters)

    x = jax.random.normal(jax.random.key(0), (lanes, BATCH, size, size, channels[0]))
    kernel = 0.05 * jax.random.normal(jax.random.key(1), (lanes, 3, 3, *channels))
    return Program(run, ((x, kernel),), lanes * BATCH * STEPS)


# ---- small images with many channels, as in the last stages of a ResNet ----

SMALL = {
    "Winograd": lambda x, kernel: layers._convolve_winograd(x, kernel, 1),
    "patches x matmul": patches,
}


# ---- the whole network ----


class PlainCNN(nn.Module):
    """EmnistCNN with one or all of its layers replaced by Flax's."""

    conv: Callable = functools.partial(nn.Conv, padding="VALID")
    pool: Callable = functools.partial(nn.max_pool, window_shape=(2, 2), strides=(2, 2))
    dropout: type[nn.Module] = nn.Dropout

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(self.conv(32, (3, 3))(x))
        x = self.pool(nn.relu(self.conv(64, (3, 3))(x)))
        x = self.dropout(0.25)(x, deterministic=not train).reshape(x.shape[0], -1)
        x = self.dropout(0.5)(nn.relu(nn.Dense(128)(x)), deterministic=not train)
        return nn.Dense(62)(x)


class NoDropout(nn.Module):
    rate: float

    def __call__(self, x, *, deterministic):
        return x


conv = functools.partial(Conv, padding="VALID")
NETWORKS = {
    "Flax": PlainCNN(),
    "fedexp EmnistCNN": EmnistCNN(),
    "... with nn.max_pool": PlainCNN(conv=conv, dropout=Dropout),
    "... with nn.Dropout": PlainCNN(conv=conv, pool=max_pool_2x2),
    "... without dropout": PlainCNN(conv=conv, pool=max_pool_2x2, dropout=NoDropout),
}


def network(model, lanes):
    def step(params, x, y, key):
        def loss(params):
            images = 1 - x[..., None].astype(jnp.float32) / 255
            logits = model.apply({"params": params}, images, train=True, rngs={"dropout": key})
            return -jnp.take_along_axis(nn.log_softmax(logits), y[:, None], 1).mean()

        return jax.tree.map(lambda p, g: p - 0.05 * g, params, jax.grad(loss)(params))

    @jax.jit
    def run(params, x, y, keys):
        def body(t, params):
            return over(lanes, step)(params, x[t], y[t], keys[t])

        return lax.fori_loop(0, STEPS, body, params)

    key = jax.random.key(0)
    x = jax.random.randint(key, (STEPS, lanes, BATCH, 28, 28), 0, 256).astype(jnp.uint8)
    y = jax.random.randint(key, (STEPS, lanes, BATCH), 0, 62)
    params = model.init(key, jnp.zeros((1, 28, 28, 1)), train=False)["params"]
    params = jax.tree.map(lambda p: jnp.broadcast_to(p, (lanes, *p.shape)), params)
    return Program(
        run, (params, x, y, jax.random.split(key, (STEPS, lanes))), lanes * BATCH * STEPS
    )


def over(lanes, step):
    """vmap, or for a single lane the bare step, as the strategies do."""
    if lanes > 1:
        return jax.vmap(step)

    def bare(*arguments):
        out = step(*jax.tree.map(lambda a: a[0], arguments))
        return jax.tree.map(lambda a: a[None], out)

    return bare


def milliseconds(programs, repeats):
    """name -> ms per example of each repeat, the programs taking turns; the slowest get fewer."""
    times = {name: [] for name in programs}
    for program in programs.values():
        jax.block_until_ready(program.run(*program.arguments))
    for _ in range(repeats):
        for name, program in programs.items():
            if sum(times[name]) * program.examples > PATIENCE * 1e3:
                continue
            start = time.perf_counter()
            jax.block_until_ready(program.run(*program.arguments))
            times[name].append((time.perf_counter() - start) / program.examples * 1e3)
    return times


def table(title, build, variants, lanes, repeats):
    columns = [
        milliseconds({name: build(v, count) for name, v in variants.items()}, repeats)
        for count in lanes
    ]
    print(f"\n{title:32s}" + "".join(f"{f'L = {count}':>17s}" for count in lanes))
    for name in variants:
        cells = [f"{statistics.median(c[name]):.3f} ({min(c[name]):.3f})" for c in columns]
        print(f"{name:32s}" + "".join(f"{cell:>17s}" for cell in cells), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lanes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    print(f"{jax.devices()}, jax {jax.__version__}: ms per example, median (minimum)")
    table("convolution", convolution, CONVOLUTIONS, arguments.lanes, arguments.repeats)
    for size in (6, 4, 3, 1):
        build = functools.partial(convolution, size=size + 2, channels=(256, 256))
        title = f"{size} x {size} of 256 channels"
        table(title, build, SMALL, arguments.lanes, arguments.repeats)
    table("training step", network, NETWORKS, arguments.lanes, arguments.repeats)


if __name__ == "__main__":
    main()
