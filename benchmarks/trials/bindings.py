"""Mutates the bindings of shipped configs, and starts what they describe, up to a round or two.

Each trial loads a config as the command line does. If that is not refused, a forked process builds the
experiment on small embedded data, and runs a round with its evaluation. It ends well ("ok"), is refused in
one line ("refused", exit code 2), gives a traceback ("traceback") or more than a line ("long"), or goes on
("hang").
"""

from __future__ import annotations

import argparse
import ast
import collections
import contextlib
import json
import os
import random
import signal
import time
import traceback
from collections.abc import Iterator
from typing import NamedTuple

import gin
from gin import config as gin_config

from benchmarks.trials import RESULTS, save
from fedexp import bindings, config, main, runtime, trainer  # noqa: F401  Registers what the files name.
from fedexp.errors import UserError

OUTPUT = RESULTS / "trials_bindings.json"
# What makes a trial short; mutations come after it, and win.
SMALL = (
    "train.dataset = @glyphs()",
    "glyphs.num_writers = 12",
    "train.num_rounds = 1",
    "train.observers = []",
    "classification.model = @EmnistLogistic()",
    "uniform.cohort_size = 2",
    "evaluate.clients = 2",
)
CONFIGS = (
    "quickstart.gin",
    "emnist_fedavg.gin",
    "emnist_fedadagrad.gin",
    "emnist_fedyogi.gin",
    "emnist_apfl.gin",
    "emnist_compressed.gin",
    "emnist_fedper.gin",
    "emnist_fedprox.gin",
    "emnist_fine_tuned.gin",
    "emnist_mime.gin",
    "emnist_scaffold.gin",
)
# Parameters that shipped configs leave alone.
MORE = (
    "client/sgd.momentum = 0.5",
    "ClientBatching.local_steps = 2",
    "ClientBatching.max_examples = 20",
    "ClientBatching.shuffle = False",
    "ClientBatching.remainder = 'drop'",
    "CheckpointPlan.keep = 3",
    "Packing.lanes = 2",
    "Packing.batch_sizes = 1",
    "Packing.max_resident_bytes = 0",
    "evaluate.split = 'train'",
    "evaluate.batch_size = 16",
    "evaluate.prefix = 'mine'",
    "glyphs.seed = 1",
    "glyphs.label_concentration = 0.5",
    "train.seed = 3",
    "train.strategy = @mesh()",
    "train.sampler = @hold_out()",
    "hold_out.sampler = @uniform()",
    "hold_out.fraction = 0.3",
)
ODD = """
0 -1 1 2 3 7 -0.5 0.0 0.5 1.0 2.0 20.0 1e1 1e-30 1e30 1e999 -1e999 1000000 100000000000000000000
True False None '' 'False' '1' '0.1' 'jit' 'mesh' 'adam' 'é\\n' b'1' 1+1 . = %nothing @nobody()
[] () {} [1] (1,2) [None] {'a':1} [[]] [True] {1:2} [@mean()] [@top_k()] [@evaluate] [@json_lines()]
@uniform @uniform() @mesh @jit() @EmnistLogistic @ClientBatching @fedavg @fedavg() @scaffold
@server/adam @server/adam() @client/sgd() @client/sgd @mean @mean() @evaluate @evaluate() @glyphs()
@glyphs @handwriting @scale() @constant_schedule() @fine_tuning @classification() @crop_and_flip()
""".split()  # noqa: SIM905
# Seconds.
LIMIT = 120


class Trial(NamedTuple):
    """A config, and the bindings on its command line."""

    file: str
    params: tuple[str, ...]


def mutations(seed: int) -> Iterator[Trial]:
    """Endless trials: wrong types, odd numbers, misspellings, what is left out, missing parentheses."""
    rng = random.Random(seed)
    known = {file: _bindings_of(file) for file in CONFIGS}
    kinds = (_of_any_value, _of_odd_value, _of_other_name, _of_other_reference, _of_other_scope)
    while True:
        file = rng.choice(CONFIGS)
        make = rng.choices(kinds, (5, 3, 3, 3, 1))[0]
        extra = [rng.choice(MORE)] if rng.random() < 0.3 else []
        yield Trial(file, (*SMALL, *extra, make(*rng.choice(known[file]), rng)))


def _bindings_of(file: str) -> list[tuple[str, str]]:
    gin.clear_config()
    config.load([file], SMALL)
    found = sorted(config.bindings().items())
    gin.clear_config()
    return found + [tuple(line.split(" = ", 1)) for line in MORE]  # type: ignore[misc]


def _of_any_value(name: str, value: str, rng: random.Random) -> str:
    return f"{name} = {rng.choice(ODD)}"


def _of_odd_value(name: str, value: str, rng: random.Random) -> str:
    """A value of another type that looks the same, or of the same type and another order."""
    options = [repr(value), f"[{value}]", f"({value},)", f"{{'x': {value}}}"]
    with contextlib.suppress(ValueError, SyntaxError):
        number = ast.literal_eval(value)
        if isinstance(number, int | float):
            options += [str(-number), str(float(number)), f"{number}e5", str(number * 10**6)]
            options += [str(number / 3), str(bool(number)), str(int(number) // 2)]
        elif isinstance(number, str):
            options += [repr(number[:-1]), repr(number.upper()), repr(number + "s"), f"[{value}]"]
    return f"{name} = {rng.choice(options)}"


def _of_other_name(name: str, value: str, rng: random.Random) -> str:
    place = rng.randrange(len(name))
    misspelt = rng.choice(
        [
            name[:place] + name[place + 1 :],
            name[:place] + name[place] + name[place:],
            name[:place] + rng.choice("abcxyz_/.") + name[place + 1 :],
            name.rpartition(".")[2],
            name.rpartition("/")[2],
            name.swapcase(),
        ]
    )
    return f"{misspelt} = {value}"


def _of_other_reference(name: str, value: str, rng: random.Random) -> str:
    if "@" not in value:
        return _of_any_value(name, value, rng)
    selectors = [s.split(".")[-1] for s, _ in gin_config._REGISTRY.items() if "gin." not in s]
    other = rng.choice(selectors)
    reference = rng.choice(
        [
            value.replace("()", ""),
            value.replace("]", "(), ]") if "[" in value else value + "()",
            f"@{other}()",
            f"@{other}",
            f"[{value}, {value}]",
            value.replace("@", "%").replace("()", ""),
            value.replace("@", "@other/"),
        ]
    )
    return f"{name} = {reference}"


def _of_other_scope(name: str, value: str, rng: random.Random) -> str:
    scope = rng.choice(["server/", "client/", "personal/", "other/", "a/b/"])
    return f"{scope}{name.rpartition('/')[2]} = {value}"


def attempt(trial: Trial) -> tuple[str, str]:
    """Runs a trial, from the building on in a process of its own; returns its outcome and what it said."""
    if (early := checked(trial))[0] != "ok":
        return early
    receiving, sending = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receiving)
        signal.alarm(LIMIT)
        with open(os.devnull, "w") as nowhere, open(sending, "w") as answer:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
            json.dump(_outcome(trial), answer)
        os._exit(0)
    os.close(sending)
    with open(receiving) as answers:
        answer = answers.read()
    _, status = os.waitpid(child, 0)
    if not answer:
        ended = os.WTERMSIG(status)
        return ("hang", f"after {LIMIT} s") if ended == signal.SIGALRM else ("killed", str(ended))
    outcome, said = json.loads(answer)
    return outcome, said


def checked(trial: Trial) -> tuple[str, str]:
    """The outcome of what is checked before anything is built, here."""
    return _outcome(trial, only_checked=True)


def _outcome(trial: Trial, only_checked: bool = False) -> tuple[str, str]:
    gin.clear_config()
    try:
        config.load([trial.file], trial.params)
        bindings.check_required()
        if only_checked:
            return "ok", ""
        runtime.start()  # Which keeps what is compiled for the other trials.
        experiment = main.experiment()
        object.__setattr__(experiment, "num_rounds", min(experiment.num_rounds, 2))
        experiment.run(overrides=trial.params[len(SMALL) :])
    except UserError as error:
        said = main.without_gin_frames(str(error))
        return ("refused" if len(said.splitlines()) == 1 else "long"), said
    except BaseException:  # That is the question.
        return "traceback", traceback.format_exc()[-3000:]
    return "ok", ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this trial's flags."""
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="begin none after these"
    )


def run(args: argparse.Namespace) -> None:
    """Runs the trials, prints their outcomes, and writes them down."""
    counts, bad, begin = collections.Counter(), [], time.monotonic()
    made = mutations(args.seed)
    attempt(Trial(CONFIGS[0], SMALL))  # Compiles, and makes the data, for all others.
    while counts.total() < args.trials and time.monotonic() - begin < args.seconds:
        trial = next(made)
        outcome, said = attempt(trial)
        counts[outcome] += 1
        if outcome not in ("ok", "refused"):
            bad.append({"file": trial.file, "params": trial.params[len(SMALL) :], "said": said})
            print(outcome, trial.file, *trial.params[len(SMALL) :], "->", said.splitlines()[-1:])
    for outcome, count in counts.most_common():
        print(f"{outcome:10} {count:6}")
    result = {
        "trials": counts.total(),
        "seed": args.seed,
        "outcomes": dict(counts),
        "seconds": round(time.monotonic() - begin),
        "bad": bad,
    }
    save(OUTPUT, result)
