"""Measures what aggregators cost, and what rules bear of attackers, on real digits.

    python -m benchmarks.aggregators cost                # A round's time over the plain mean's, in turns.
    python -m benchmarks.aggregators hadamard --fedjax_source=CHECKOUT  # A rotation's time over FedJAX's.
    python -m benchmarks.aggregators attacks             # Accuracy of every rule under every attack.
    python -m benchmarks.aggregators table --write       # What has been measured, in the docs.

`cost` trains the EMNIST CNN of 1.2 million parameters on glyphs, 10 clients a round. `attacks` trains a dense
net on the digits of `benchmarks.algorithms`, 84 of 836 writers a round, of whom a fifth attacks; runs that
the result file already has are not repeated.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gin
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

import fedexp.trainer  # noqa: F401  Registers what the files name.
from benchmarks import algorithms
from benchmarks.machine import machine, processor
from benchmarks.rounds import Rounds
from fedexp import config
from fedexp.aggregators.rotations import hadamard, walsh_hadamard
from fedexp.contracts import Update
from fedexp.main import experiment

RESULTS = Path(__file__).parent / "results" / "aggregators.json"
FOLDER = Path(__file__).parent.parent / "fedexp" / "aggregators"
DOCUMENT = Path(__file__).parent.parent / "docs" / "aggregators.md"
BEGIN = "<!-- begin: python -m benchmarks.aggregators table --write -->"
# Of aggregators whose files have another name.
FILES = {"clip_by_norm": "clip", "coordinate_median": "median"}
REFERENCE = "mean"
CNN_SIZE = 1_206_590

# Name -> bindings; all but the last link of a chain, if it compresses.
COST = {
    "mean": ("fedavg.aggregator = @mean()",),
    "clip_by_norm": ("fedavg.aggregator = [@clip_by_norm(), @mean()]", "clip_by_norm.norm = 1.0"),
    "quantize": ("fedavg.aggregator = [@quantize(), @mean()]",),
    "quantize, entropy": (
        "fedavg.aggregator = [@quantize(), @mean()]",
        "quantize.coding = 'entropy'",
    ),
    "rotated_quantize": ("fedavg.aggregator = [@rotated_quantize(), @mean()]",),
    "drive": ("fedavg.aggregator = [@drive(), @mean()]",),
    "qsgd": ("fedavg.aggregator = [@qsgd(), @mean()]",),
    "terngrad": ("fedavg.aggregator = [@terngrad(), @mean()]",),
    "signs": ("fedavg.aggregator = [@signs(), @mean()]",),
    "half_precision": ("fedavg.aggregator = [@half_precision(), @mean()]",),
    "top_k": ("fedavg.aggregator = [@top_k(), @mean()]",),
    "random_k": ("fedavg.aggregator = [@random_k(), @mean()]",),
    "power_sgd": ("fedavg.aggregator = [@power_sgd(), @mean()]",),
    "error_feedback of signs": (
        "fedavg.aggregator = [@error_feedback(), @mean()]",
        "error_feedback.compressor = @signs()",
    ),
    "ef21 of top_k": (
        "fedavg.aggregator = [@ef21(), @mean()]",
        "ef21.compressor = @top_k()",
        "top_k.error_feedback = False",
    ),
    "coordinate_median": ("fedavg.aggregator = @coordinate_median()",),
    "trimmed_mean": ("fedavg.aggregator = @trimmed_mean()", "trimmed_mean.fraction = 0.2"),
    "krum": ("fedavg.aggregator = @krum()", "krum.num_attackers = 1"),
    "bulyan": ("fedavg.aggregator = @bulyan()", "bulyan.num_attackers = 1"),
    "geometric_median": ("fedavg.aggregator = @geometric_median()",),
    "centred_clipping": (
        "fedavg.aggregator = @centred_clipping()",
        "centred_clipping.radius = 1.0",
    ),
    "adaptive_clipping": (
        "fedavg.aggregator = [@adaptive_clipping(), @mean()]",
        "adaptive_clipping.noise_multiplier = 0.5",
    ),
    **{
        name: (
            f"fedavg.aggregator = [@clip_by_norm(), @{name}(), @mean()]",
            "clip_by_norm.norm = 1.0",
            f"{name}.norm = 1.0",
            f"{name}.noise_multiplier = 0.5",
            *more,
        )
        for name, more in {
            "gaussian_noise": (),
            "tree_noise": ("tree_noise.num_rounds = 1024",),
            "banded_noise": ("banded_noise.num_rounds = 128", "banded_noise.bands = 8"),
            "local_noise": (),
        }.items()
    },
}

COHORT, SHARE = 84, 0.2
ASSUMED = (COHORT - 3) // 4  # Attackers of a cohort: the most that Bulyan bears.
_EXPECTED = round(SHARE * COHORT)
_SUPPORTERS = COHORT // 2 + 1 - _EXPECTED
# Baruch et al. 2019, Algorithm 3.
LITTLE = statistics.NormalDist().inv_cdf((COHORT - _EXPECTED - _SUPPORTERS) / (COHORT - _EXPECTED))
# Name -> the rule, and bindings.
RULES = {
    "mean": ("@mean()",),
    "clip_by_norm": ("[@clip_by_norm(), @mean()]", "clip_by_norm.norm = 1.0"),
    "coordinate_median": ("@coordinate_median()",),
    "trimmed_mean": ("@trimmed_mean()", f"trimmed_mean.fraction = {ASSUMED / COHORT}"),
    "krum": ("@krum()", f"krum.num_attackers = {ASSUMED}"),
    "multi-krum": (
        "@krum()",
        f"krum.num_attackers = {ASSUMED}",
        f"krum.num_selected = {COHORT - 2 * ASSUMED}",
    ),
    "bulyan": ("@bulyan()", f"bulyan.num_attackers = {ASSUMED}"),
    "geometric_median": ("@geometric_median()",),
    "centred_clipping": ("@centred_clipping()", "centred_clipping.radius = 1.0"),
}
# Name -> the attack on updates, if it is one, and bindings.
ATTACKS = {
    "none": (None,),
    "label flips": (
        None,
        "train.dataset = @flipped_labels()",
        "flipped_labels.splits = @digits()",
        f"flipped_labels.fraction = {SHARE}",
        "flipped_labels.num_classes = 10",
    ),
    "sign flips": ("@sign_flip()", "sign_flip.scale = 4.0"),
    "noise": ("@gaussian_attack()", "gaussian_attack.deviation = 0.1"),
    "a little is enough": (
        "@a_little_is_enough()",
        f"a_little_is_enough.deviations = {LITTLE}",
    ),
}


def load(name: str) -> Any:
    """FedAvg on the CNN with an aggregator."""
    gin.clear_config()
    rest = [
        "train.dataset = @glyphs()",
        "glyphs.num_writers = 100",
        "train.num_rounds = 1000000",
        "train.privacy = None",
    ]
    config.load(["emnist_fedavg.gin"], [*rest, *COST[name]])
    return experiment()


def measure_cost(args: argparse.Namespace) -> None:
    """Times rounds with each aggregator, the plain mean's before and after: ratios' median over turns."""
    content = _content()
    costs = content.setdefault("cost", {})
    reference = Rounds(load(REFERENCE).rounds())
    for name in args.names or COST:
        measured, ratios = Rounds(load(name).rounds()), []
        for _ in range(args.turns):
            before, own, after = (
                one.seconds(args.per_turn)[0] for one in (reference, measured, reference)
            )
            ratios.append(own / ((before + after) / 2))
        costs[name] = {
            "ratio": statistics.median(ratios),
            "ratios": ratios,
            "temporaries_mib": temporaries(measured.last) / 2**20,
        }
        print(name, f"{costs[name]['ratio']:.2f}, {costs[name]['temporaries_mib']:.0f} MiB")
        _save(content, "cost")


def temporaries(round_: Any) -> int:
    """Bytes that XLA plans for what a round holds besides its arguments and results."""
    program = round_.session.engine.runner.compiled(round_.state, round_.prepared)
    return program.memory_analysis().temp_size_in_bytes


def measure_hadamard(args: argparse.Namespace) -> None:
    """Times the random rotation of as many numbers as the CNN has, in turns with FedJAX's."""
    if args.fedjax_source is None:
        raise SystemExit("--fedjax_source must be a checkout of FedJAX; benchmarks/README.md")
    theirs = _fedjax_rotations(args.fedjax_source)
    values = jnp.asarray(np.random.default_rng(0).normal(size=CNN_SIZE), jnp.float32)
    key = jax.random.key(0)
    rotate: dict[str, Callable[[], Any]] = {
        "fedjax": lambda: theirs.structured_rotation(values, key)[0],
        "whole": lambda: whole(values, key),
        "blocks of 2**15": lambda: blocks(values, key),
    }
    whole, blocks = (_rotation(block) for block in (2**21, 2**15))
    padded = jnp.pad(values, (0, 2**21 - CNN_SIZE))
    own = jax.jit(lambda x: walsh_hadamard(x[None])[0] * 2**10.5)
    np.testing.assert_allclose(theirs.walsh_hadamard_transform(padded), own(padded), atol=0.05)
    times: dict[str, list[float]] = {name: [] for name in rotate}
    for name in [*rotate, *(args.turns * 5 * list(rotate))]:  # The first of each compiles.
        begin = time.perf_counter()
        jax.block_until_ready(rotate[name]())
        times[name].append(time.perf_counter() - begin)
    warm = {name: seconds[1:] for name, seconds in times.items()}
    found = {}
    for name, all_ in warm.items():
        ratios = [own / fedjax for own, fedjax in zip(all_, warm["fedjax"], strict=True)]
        milliseconds = [1e3 * seconds for seconds in all_]
        found[name] = {"ratio": statistics.median(ratios), "milliseconds": milliseconds}
    content = _content()
    content["hadamard"] = {"size": CNN_SIZE, **found}
    for name, one in found.items():
        print(name, f"{one['ratio']:.2f}", f"{statistics.median(one['milliseconds']):.1f} ms")
    _save(content, "hadamard")


def _rotation(block: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    rotation = hadamard(block)
    return jax.jit(lambda x, key: rotation(Update({"x": x}, jnp.float32(1)), key)[0][0])


def _fedjax_rotations(source: str) -> Any:
    """FedJAX's module alone: its package imports libraries that need not be here."""
    typing = types.ModuleType("fedjax.core.typing")
    typing.PRNGKey = typing.Params = Any  # type: ignore[attr-defined]
    sys.modules["fedjax.core.typing"] = typing
    for name in ("fedjax", "fedjax.core"):
        sys.modules.setdefault(name, types.ModuleType(name)).__path__ = []
    import scipy.linalg  # noqa: F401  Which theirs uses and does not import.

    path = Path(source) / "fedjax" / "aggregators" / "walsh_hadamard.py"
    spec = importlib.util.spec_from_file_location("fedjax_walsh_hadamard", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measure_attacks(args: argparse.Namespace) -> None:
    """Trains what has not been trained yet, and writes each run as soon as it is done."""
    content = _content()
    settings = {
        "rounds": args.rounds,
        "cohort": COHORT,
        "share": SHARE,
        "assumed": ASSUMED,
        "deviations": LITTLE,
    }
    runs = content.setdefault("attacks", {"settings": settings})
    if runs["settings"] != settings:
        raise SystemExit(f"{RESULTS} holds runs of {runs['settings']}; delete these first")
    for attack in ATTACKS:
        for rule in args.names or RULES:
            of_attack = runs.setdefault(attack, {})
            if rule in of_attack:
                continue
            begin = time.perf_counter()
            of_attack[rule] = train(rule, attack, args.rounds)
            seconds = time.perf_counter() - begin
            print(attack, "|", rule, of_attack[rule], f"{seconds:.0f} s", flush=True)
            _save(content, "attacks")


def train(rule: str, attack: str, rounds: int) -> dict[str, Any]:
    """Accuracy on all test examples, and in how many rounds more attacked than rules were told of."""
    (aggregator, *of_rule), (of_updates, *of_attack) = RULES[rule], ATTACKS[attack]
    chosen = [f"fedavg.aggregator = {aggregator}"]
    if of_updates:
        chosen = [
            "fedavg.aggregator = @attacked()",
            f"attacked.rule = {aggregator}",
            f"attacked.attack = {of_updates}",
            f"attacked.fraction = {SHARE}",
        ]
    given = algorithms.bindings("fedavg", "writers", "dense", rounds, seed=0)
    size = [f"uniform.cohort_size = {COHORT}", "fedavg.weigh_by = 'uniform'"]
    gin.clear_config()
    config.load(["emnist_fedavg.gin"], [*given, *size, *chosen, *of_rule, *of_attack])
    setup, beyond = experiment(), 0
    for round_ in setup.rounds():
        beyond += round_.metrics.get("aggregate/attackers", 0) > ASSUMED
        if not round_.is_finite():
            return {"accuracy": None, "diverged": round_.number}
    results = round_.session.evaluate(round_, [0], full=True)
    return {"accuracy": results["test"].metrics["accuracy"], "rounds_beyond": int(beyond)}


def print_table(args: argparse.Namespace) -> None:
    """Everything measured, as Markdown; with `--write`, between the marks in the docs."""
    content = _content()
    about = content["machines"]["cost"]
    where = f"{processor(about)}, {about['cores']} cores"
    text = "\n\n".join((attacks_table(content["attacks"]), cost_table(content["cost"], where)))
    if args.write:
        algorithms.write_between(DOCUMENT, BEGIN, text)
    else:
        print(text)


def attacks_table(runs: dict[str, Any]) -> str:
    """Rules in rows and attacks in columns, in percent."""
    settings = runs["settings"]
    head = (
        f"Accuracy in percent after {settings['rounds']} rounds of {settings['cohort']} clients, of whom "
        f"{settings['share']:.0%} attack on average; rules are told of {settings['assumed']}. One seed."
    )
    lines = [_row("rule", *ATTACKS), _row("---", *["---:"] * len(ATTACKS))]
    for rule in RULES:
        cells = [_percent(runs.get(attack, {}).get(rule)) for attack in ATTACKS]
        lines.append(_row(f"`{rule}`", *cells))
    beyond = sum(
        one.get("rounds_beyond", 0) for attack in ATTACKS for one in runs.get(attack, {}).values()
    )
    foot = f"In {beyond} rounds of all these runs more attacked than the rules were told of."
    return "\n\n".join((head, "\n".join(lines), foot))


def cost_table(costs: dict[str, Any], where: str) -> str:
    """A row an aggregator."""
    head = (
        "Lines: of the file, and of those the ones with code. Round: time over the plain mean's, the median "
        f"over turns ({where}). Memory: what XLA plans for a round's temporaries, MiB."
    )
    lines = [
        _row("aggregator", "arXiv", "file", "lines", "round", "memory"),
        _row("---", "---", "---", *["---:"] * 3),
    ]
    for name, one in costs.items():
        link = re.split(",| of ", name)[0]
        path = FOLDER / f"{FILES.get(link, link)}.py"
        all_lines, code = algorithms.count_lines(path)
        cells = f"{one['ratio']:.2f}", f"{one['temporaries_mib']:.0f}"
        papers = dict.fromkeys(re.findall(r"arXiv:([\d.]+\d)", path.read_text()))
        lines.append(
            _row(name, ", ".join(papers), f"`{path.name}`", f"{all_lines}, {code}", *cells)
        )
    return "\n\n".join((head, "\n".join(lines)))


def _row(*cells: str) -> str:
    return re.sub(" +", " ", f"| {' | '.join(cells)} |")


def _percent(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    return "diverged" if cell["accuracy"] is None else f"{100 * cell['accuracy']:.1f}"


def _content() -> dict[str, Any]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def _save(content: dict[str, Any], what: str) -> None:
    """Each part has the machine that it was measured on."""
    machines = {**content.get("machines", {}), what: machine()}
    RESULTS.write_text(json.dumps({**content, "machines": machines}, indent=1) + "\n")


def main() -> None:
    """Measures, or prints what was measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("cost", "hadamard", "attacks", "table"))
    parser.add_argument("--names", type=lambda text: text.split("/"), help="as krum/bulyan")
    parser.add_argument("--fedjax_source")
    parser.add_argument("--write", action="store_true", help="the tables into the docs")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--per_turn", type=int, default=3, help="rounds")
    args = parser.parse_args()
    logging.set_verbosity(logging.ERROR)
    {
        "cost": measure_cost,
        "hadamard": measure_hadamard,
        "attacks": measure_attacks,
        "table": print_table,
    }[args.what](args)


if __name__ == "__main__":
    main()
