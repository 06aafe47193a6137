"""Times ways to write the language models inside a compiled loop, and what their metrics cost.

    python -m benchmarks.lstm_in_loop [--lanes 1 2] [--repeats 7] [--only "Stack Overflow"]

As in `convolution_in_loop`, training runs in a `lax.fori_loop` whose body is vmapped over lanes, each
with parameters of its own: forward, backward and an SGD step. Variants take turns, so that a busy
machine slows all alike. Figures are medians (minima) in ms per example, first of the wall clock, then of
the time that all threads of the process spent, which other processes disturb less.
"""

from __future__ import annotations

import argparse
import statistics
import time
from unittest import mock

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.convolution_in_loop import Program, over
from fedexp.algorithms.local import zero_sums
from fedexp.models import LSTMLanguageModel, TransformerLanguageModel, language
from fedexp.tasks import Measure, mean_loss, next_token

STEPS = 4

# ---- the recurrence: inputs (T, 4 H, B), kernel (H, 4 H) -> outputs (T, H, B) ----


def gates(z, axis):
    i, f, g, o = jnp.split(z, 4, axis)
    return jax.nn.sigmoid(i), jax.nn.sigmoid(f), jnp.tanh(g), jax.nn.sigmoid(o)


def cells(product, inputs, zeros, axis):
    def step(state, x):
        output, cell = state
        i, f, g, o = gates(x + product(output), axis)
        cell = f * cell + i * g
        output = o * jnp.tanh(cell)
        return (output, cell), output

    return lax.scan(step, (zeros, zeros), inputs)[1]


def plain_scan(inputs, kernel):
    """Batch-major and differentiated by JAX: what a loop over nn.LSTMCell amounts to."""
    inputs = inputs.transpose(0, 2, 1)
    zeros = jnp.zeros((inputs.shape[1], len(kernel)))
    return cells(lambda h: h @ kernel, inputs, zeros, -1).transpose(0, 2, 1)


def feature_major_scan(inputs, kernel):
    """As fedexp's, but differentiated by JAX."""
    zeros = jnp.zeros((len(kernel), inputs.shape[2]))
    return cells(lambda h: kernel.T @ h, inputs, zeros, 0)


@jax.custom_vjp
def batch_major(inputs, kernel):
    """As fedexp's, but with states (B, H)."""
    return batch_major_forward(inputs, kernel)[0]


def batch_major_forward(inputs, kernel):
    inputs = inputs.transpose(0, 2, 1)
    zeros = jnp.zeros((inputs.shape[1], len(kernel)))

    def step(state, x):
        output, cell = state
        i, f, g, o = gates(x + output @ kernel, -1)
        cell = f * cell + i * g
        output = o * jnp.tanh(cell)
        return (output, cell), (output, cell, (i, f, g, o))

    _, (outputs, cells, saved) = lax.scan(step, (zeros, zeros), inputs)
    return outputs.transpose(0, 2, 1), (kernel, outputs, cells, saved)


def batch_major_backward(residuals, d_outputs):
    kernel, outputs, cells, saved = residuals

    def step(state, inputs):
        d_output, d_cell = state
        d_above, before, cell, (i, f, g, o) = inputs
        d_output += d_above
        squashed = jnp.tanh(cell)
        d_cell += d_output * o * (1 - squashed**2)
        d_gates = jnp.concatenate(
            [
                d_cell * g * i * (1 - i),
                d_cell * before * f * (1 - f),
                d_cell * i * (1 - g**2),
                d_output * squashed * o * (1 - o),
            ],
            -1,
        )
        return (d_gates @ kernel.T, d_cell * f), d_gates

    def delayed(states):
        return jnp.concatenate([jnp.zeros_like(states[:1]), states[:-1]])

    zeros = jnp.zeros_like(cells[0])
    inputs = (d_outputs.transpose(0, 2, 1), delayed(cells), cells, saved)
    _, d_inputs = lax.scan(step, (zeros, zeros), inputs, reverse=True)
    d_kernel = jnp.einsum("tbh,tbg->hg", delayed(outputs), d_inputs)
    return d_inputs.transpose(0, 2, 1), d_kernel


batch_major.defvjp(batch_major_forward, batch_major_backward)

RECURRENCES = {
    "scan, differentiated by JAX": plain_scan,
    "... feature-major": feature_major_scan,
    "gradient by hand, batch-major": batch_major,
    "fedexp (by hand, feature-major)": language.lstm,
}

# ---- training steps ----


def program(model, batch_size, length, lanes, recurrence=language.lstm, metrics=None):
    task = next_token(model, metrics=metrics)
    tokens = jax.random.randint(
        jax.random.key(0), (STEPS, lanes, batch_size, length + 1), 1, model.vocab_size
    ).astype(jnp.uint16)
    mask = jnp.ones(batch_size, bool)

    def step(params, sums, tokens, key):
        gradient = jax.grad(mean_loss, argnums=1, has_aux=True)
        grads, added = gradient(task, params, {"tokens": tokens}, mask, key)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
        return params, jax.tree.map(jnp.add, sums, added)

    def run(params, tokens, keys):
        # Sums of the metrics are kept, or XLA would leave the metrics out.
        state = (params, jax.tree.map(lambda zero: jnp.full(lanes, zero), zero_sums(task)))
        body = over(lanes, step)
        return lax.fori_loop(0, STEPS, lambda t, s: body(*s, tokens[t], keys[t]), state)

    params = task.init(jax.random.key(0), {"tokens": tokens[0, 0]})
    params = jax.tree.map(lambda p: jnp.broadcast_to(p, (lanes, *p.shape)), params)
    arguments = (params, tokens, jax.random.split(jax.random.key(0), (STEPS, lanes)))
    with mock.patch.object(language, "lstm", recurrence):
        compiled = jax.jit(run).lower(*arguments).compile()
    return Program(compiled, arguments, lanes * batch_size * STEPS)


def argmax_accuracies():
    """The accuracies as an argmax each would give them."""

    def accuracy(words_only):
        def metric(logits, batch):
            labels = batch["tokens"][:, 1:].astype(jnp.int32)
            logits = logits.at[..., -3:].add(-jnp.inf) if words_only else logits
            correct = (logits.argmax(-1) == labels).astype(jnp.float32).sum(1)
            return Measure(correct, jnp.full(len(labels), labels.shape[1], jnp.float32))

        return metric

    return {"accuracy": accuracy(False), "accuracy_in_vocab": accuracy(True)}


STACK_OVERFLOW = LSTMLanguageModel(projection_size=96)
SHAKESPEARE = LSTMLanguageModel(90, 8, 256, num_layers=2)


def milliseconds(programs, repeats):
    """name -> (wall, all threads), ms per example of each repeat, the programs taking turns."""
    times = {name: ([], []) for name in programs}
    for program in programs.values():
        jax.block_until_ready(program.run(*program.arguments))
    for _ in range(repeats):
        for name, program in programs.items():
            starts = time.perf_counter(), time.process_time()
            jax.block_until_ready(program.run(*program.arguments))
            ends = time.perf_counter(), time.process_time()
            for column, start, end in zip(times[name], starts, ends, strict=True):
                column.append((end - start) / program.examples * 1e3)
    return times


def table(title, variants, lanes, repeats):
    """`variants`: name -> a function of the number of lanes that makes a Program."""
    columns = [
        milliseconds({name: build(count) for name, build in variants.items()}, repeats)
        for count in lanes
    ]
    print(f"\n{title:36s}" + "".join(f"{f'L = {count}, wall, threads':>32s}" for count in lanes))
    for name in variants:
        cells = [
            ", ".join(f"{statistics.median(t):.2f} ({min(t):.2f})" for t in column[name])
            for column in columns
        ]
        print(f"{name:36s}" + "".join(f"{cell:>32s}" for cell in cells), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lanes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", default="", help="titles that contain this")
    arguments = parser.parse_args()

    def recurrences(model, batch_size, length):
        return {
            name: lambda lanes, r=r: program(model, batch_size, length, lanes, r, metrics={})
            for name, r in RECURRENCES.items()
        }

    def models(**variants):
        return {
            name.replace("_", " "): lambda lanes, v=v: program(*v[:3], lanes, metrics=v[3])
            for name, v in variants.items()
        }

    tables = {
        "Stack Overflow, B = 16, T = 20": recurrences(STACK_OVERFLOW, 16, 20),
        "Shakespeare, B = 4, T = 80": recurrences(SHAKESPEARE, 4, 80),
        "metrics, Stack Overflow": models(
            loss_alone=(STACK_OVERFLOW, 16, 20, {}),
            two_argmaxes=(STACK_OVERFLOW, 16, 20, argmax_accuracies()),
            all_metrics_of_next_token=(STACK_OVERFLOW, 16, 20, None),
        ),
        "Transformer, B = 16, T = 20": models(
            TransformerLanguageModel=(TransformerLanguageModel(), 16, 20, None)
        ),
    }
    print(f"{jax.devices()}, jax {jax.__version__}: ms per example, median (minimum)")
    for title, variants in tables.items():
        if arguments.only in title:
            table(title, variants, arguments.lanes, arguments.repeats)


if __name__ == "__main__":
    main()
