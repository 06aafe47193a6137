"""Shows where the time of a round goes on each workload, and how far it is from plain SGD and arithmetic.

    python -m benchmarks.round_breakdown [--workloads=emnist_cnn,emnist_logistic]
    python -m benchmarks.round_breakdown --docs

Rounds of the jit strategy take turns with the same steps in one compiled loop that knows no clients, and
with a large matrix product. Then JAX's profiler records some rounds; every operation of the compiled
program is given to the layer and the pass that its metadata names. Figures go to benchmarks/results, and
their tables into docs/performance.md, which is all that --docs does. On CPU only.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import gc
import json
import math
import re
import statistics
import sys
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import machine
from benchmarks.fedjax_announcement import Table
from benchmarks.peers import workloads
from benchmarks.peers.protocol import Job
from fedexp import runtime
from fedexp.compiling import jit
from fedexp.contracts import TRAIN
from fedexp.engine import Engine, PreparedRound
from fedexp.engine.loop import take_batch
from fedexp.models import layers
from fedexp.tasks import Task, mean_loss

PEERS = Path(__file__).parent / "peers"
RESULTS = Path(__file__).parent / "results" / "round_breakdown.json"
PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
MARKERS = "<!-- written by benchmarks.round_breakdown -->", "<!-- until here -->"
MATRIX_SIZE = 2048

Report = dict[str, Any]


class Titles(NamedTuple):
    """A workload's name for readers, and those of its layers."""

    workload: str
    layers: dict[str, str]


TITLES = {
    "emnist_cnn": Titles(
        "EMNIST CNN",
        {
            "Conv_0": "convolution 3 x 3 x 1 x 32",
            "Conv_1": "convolution 3 x 3 x 32 x 64",
            "Dense_0": "dense 9216 x 128",
            "Dense_1": "dense 128 x 62",
            "between layers": "ReLU and pooling",
        },
    ),
    "emnist_logistic": Titles("EMNIST logistic", {"Dense_0": "dense 784 x 62"}),
    "stackoverflow_lstm": Titles(
        "Stack Overflow LSTM",
        {
            "Embed_0": "embedding 10 004 x 96",
            "LSTM_0": "LSTM 96 to 670",
            "Dense_0": "projection 670 x 96",
            "Dense_1": "logits 96 x 10 004",
        },
    ),
    "shakespeare_lstm": Titles(
        "Shakespeare LSTM",
        {
            "Embed_0": "embedding 90 x 8",
            "LSTM_0": "LSTM 8 to 256",
            "LSTM_1": "LSTM 256 to 256",
            "Dense_0": "logits 256 x 90",
        },
    ),
}


# ---- where the time goes: pure functions of the program's text and of recorded events ----

LOSS = "loss and metrics"
INPUT = "input: decoding"
BITS = "dropout's random bits"
COPIES = "copies and zeros that XLA adds"
NOTHING = "no operation under way"
_CONTAINERS = {"while", "call", "conditional"}
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%([\w.\-]+) = .*?[\]})] ([a-z][\w\-]*)\(")
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(?:body|condition|calls|to_apply)=%([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_LOOPS = re.compile(r"jit\([^/]*\)/((?:while/(?:body|cond)/)*)(?:cond/(?:branch_\d+_fun/)?)?(.*)")
_FRAME_ID = re.compile(r"stack_frame_id=(\d+)")
_INPUT_FUNCTIONS = re.compile(r"handwriting|classification\.<locals>\.inputs")
_IN_MODEL = re.compile(r"jvp\((\w+)\)\)?/(.*)")


class Group(NamedTuple):
    """What an operation belongs to; direction is 'forward', 'backward' or ''."""

    part: str
    direction: str = ""


def classify(op_name: str, functions: Iterable[str] = ()) -> Group:
    """The part of a round that an operation's metadata tell: its name, and the functions that made it."""
    found = _LOOPS.match(op_name.partition(";")[0])
    if not found:
        return Group(COPIES)
    loops, path = found[1].count("while/"), found[2]
    if loops < 2:
        return Group("a client's init and finish" if loops else "server")
    if path == COPIES:
        return Group(COPIES)
    if "jvp(" not in path:
        if "jit(_take)" in path:
            return Group("gather of the batch")
        return Group("keys" if "threefry" in path else "parameter update, sums of metrics")
    direction = "backward" if path.startswith("transpose(") else "forward"
    in_model = _IN_MODEL.search(path)
    if not in_model:
        made_input = any(map(_INPUT_FUNCTIONS.match, functions))
        return Group(INPUT) if made_input else Group(LOSS, direction)
    layer, _, rest = in_model[2].partition("/")
    if layer.startswith("Dropout_"):
        applied = rest.startswith("jit(_where)") or rest in ("mul", "select_n", "ge")
        return Group("dropout", direction) if applied or direction == "backward" else Group(BITS)
    if not re.fullmatch(r"[A-Z]\w*_\d+", layer):
        layer = "between layers"
    return Group(layer, direction)


class Instruction(NamedTuple):
    opcode: str
    computation: str
    op_name: str | None
    frame: int


def groups(program: str) -> dict[str, Group]:
    """Instruction -> its group, from a compiled program's text; whatever contains others is left out.

    What XLA added has no metadata: it belongs to the innermost loop around it, and within the loops over
    clients and steps to the copies.
    """
    instructions: dict[str, Instruction] = {}
    caller = {}
    computation = ""
    for line in program.splitlines():
        if found := _INSTRUCTION.match(line):
            op_name, frame = _OP_NAME.search(line), _FRAME_ID.search(line)
            instructions[found[1]] = Instruction(
                found[2], computation, op_name and op_name[1], int(frame[1]) if frame else 0
            )
            called = _CALLED.findall(line)
            for branches in _BRANCHES.findall(line):
                called += re.findall(r"[\w.\-]+", branches)
            caller.update(dict.fromkeys(called, found[1]))
        elif found := _COMPUTATION.match(line):
            computation = found[1]

    def op_name(name: str) -> str:
        if instructions[name].op_name:
            return instructions[name].op_name
        outer = caller.get(instructions[name].computation)
        while outer and not instructions[outer].op_name:
            outer = caller.get(instructions[outer].computation)
        if not outer:
            return "jit()/"
        opcode, _, outer_name, _ = instructions[outer]
        return f"{outer_name}/body/{COPIES}" if opcode == "while" else outer_name

    functions = function_stacks(program)
    return {
        name: classify(op_name(name), functions(one.frame))
        for name, one in instructions.items()
        if one.opcode not in _CONTAINERS
    }


def function_stacks(program: str) -> Callable[[int], list[str]]:
    """A program's tables: a stack frame's number -> the functions that it lies in."""
    tables = {}
    for head in ("FunctionNames", "FileLocations", "StackFrames"):
        _, _, rest = program.partition(f"\n{head}\n")
        rows = re.findall(r"^(\d+) (.*)$", rest.partition("\n\n")[0], re.M)
        tables[head] = {int(row): text for row, text in rows}

    def field(name: str, text: str) -> int:
        return int(re.search(rf"{name}=(\d+)", text)[1])

    @functools.cache
    def functions(frame: int) -> list[str]:
        if frame not in tables["StackFrames"]:
            return []
        text = tables["StackFrames"][frame]
        location = tables["FileLocations"][field("file_location_id", text)]
        name = tables["FunctionNames"][field("function_name_id", location)].strip('"')
        return [name, *functions(field("parent_frame_id", text) - 1)]  # They count parents from 1.

    return functions


class Event(NamedTuple):
    """A recorded event, in nanoseconds."""

    name: str
    start: float
    duration: float


class Operation(NamedTuple):
    """An operation of the program: a thread runs it from `start` to `handed_over`, the pool until `end`."""

    name: str
    start: float
    handed_over: float
    end: float


def operations(events: Iterable[Event]) -> list[Operation]:
    """The profiler marks the end of an operation, on whatever thread, by an event of its own."""
    begun = defaultdict(deque)
    found = []
    for name, start, duration in sorted(events, key=lambda event: event.start):
        if not name.startswith("end: "):
            begun[name].append((start, start + duration))
        elif waiting := begun[name.removeprefix("end: ")]:
            found.append(Operation(name.removeprefix("end: "), *waiting.popleft(), start))
    return found


def shares(
    operations: Iterable[Operation], group_of: Mapping[str, Group], begin: float, end: float
) -> dict[Group, float]:
    """Parts of the time from `begin` to `end`; they sum to 1.

    A moment belongs to the operation that a thread is running; if there are several, in equal parts to
    each; if there are none, to the one that was begun last of those that the pool has yet to finish.
    """
    edges = []
    for index, (name, start, handed_over, stop) in enumerate(operations):
        group = group_of[name]
        edges += [(start, "run", index, group), (min(handed_over, stop), "hand over", index, group)]
        edges.append((stop, "end", index, group))
    edges.sort(
        key=lambda edge: edge[0]
    )  # Stable: an operation without length ends after its start.
    running: dict[int, Group] = {}
    pending: dict[int, Group] = {}
    time_of: dict[Group, float] = defaultdict(float)
    before = begin
    for moment, what, index, group in [*edges, (end, "end", -1, Group(NOTHING))]:
        moment = min(max(moment, begin), end)
        owners = list(running.values()) or list(pending.values())[-1:] or [Group(NOTHING)]
        for owner in owners:
            time_of[owner] += (moment - before) / len(owners) / (end - begin)
        before = moment
        if what == "run":
            running[index] = pending[index] = group
        elif what == "hand over":
            running.pop(index, None)
        else:
            running.pop(index, None)
            pending.pop(index, None)
    return dict(time_of)


def product_flops(jaxpr: Any) -> int:
    """Multiplications and additions in the matrix products of a traced function."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            inner = math.prod(shape[axis] for axis in contracted)
            total += 2 * inner * math.prod(equation.outvars[0].aval.shape)
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += times * product_flops(inner)
    return total


# ---- measuring ----


class Subject(NamedTuple):
    """A workload that is ready to be measured."""

    job: Job
    task: Task
    params: Any
    engine: Engine


def set_up(name: str, cohort_size: int, num_rounds: int, seed: int) -> Subject:
    sys.path.append(str(PEERS))  # A peer imports what lies beside it.
    from fedexp_peer import bind

    job = workloads.build(
        name,
        data="glyphs",
        num_clients=10 * cohort_size,
        cohort_size=cohort_size,
        num_rounds=num_rounds,
        whole_batches=False,
        seed=seed,
    )
    return Subject(job, *bind(job))


class PlainWork(NamedTuple):
    """The steps of a round, with no clients; see `engine.schedule.Schedule` for the leaves."""

    examples: dict[str, jax.Array]
    rows: jax.Array
    widths: jax.Array
    num_steps: jax.Array


def plain_work(prepared: PreparedRound) -> PlainWork:
    inputs = prepared.by_device.unpack().passes[TRAIN]
    schedule = jax.tree.map(lambda leaf: leaf[0], inputs.schedule)
    examples = {name: array[0] for name, array in prepared.examples[TRAIN].items()}
    num_steps = schedule.bounds[schedule.num_segments]
    return PlainWork(examples, schedule.rows[:, 0], schedule.widths, num_steps)


def sgd_step(subject: Subject, params: Any, examples: Any, rows: jax.Array, key: jax.Array) -> Any:
    batch, mask = take_batch(examples, rows)
    gradient = jax.grad(mean_loss, argnums=1, has_aux=True)
    grads, _ = gradient(subject.task, params, batch, mask, key)
    return jax.tree.map(lambda p, g: p - subject.job.learning_rate * g, params, grads)


def plain_loop(subject: Subject) -> Callable[[Any, PlainWork], Any]:
    """The same steps in one loop, compiled as rounds are."""
    step = functools.partial(sgd_step, subject)
    key = jax.random.key(subject.job.seed)

    def train(params, work: PlainWork):
        def body(t, params):
            def of_size(size):
                rows = work.rows[t, :size]
                return lambda p: step(p, work.examples, rows, jax.random.fold_in(key, t))

            sizes = subject.engine.preparer.batch_sizes(TRAIN)
            return jax.lax.switch(work.widths[t], [*map(of_size, sizes)], params)

        return jax.lax.fori_loop(0, work.num_steps, body, params)

    return jit(train, donate_argnums=0)


def step_flops(subject: Subject, work: PlainWork) -> list[int]:
    """Of a step of each compiled batch size."""
    key = jax.random.key(0)
    step = functools.partial(sgd_step, subject)
    return [
        product_flops(
            jax.make_jaxpr(step)(subject.params, work.examples, work.rows[0, :size], key).jaxpr
        )
        for size in subject.engine.preparer.batch_sizes(TRAIN)
    ]


@jax.jit
def matrix_product(matrix: jax.Array) -> jax.Array:
    return matrix @ matrix


class Turns:
    """Trains rounds, the plain loop and a matrix product in turns."""

    def __init__(self, subject: Subject):
        self.subject = subject
        self.state = subject.engine.start(subject.params)
        self.plain = plain_loop(subject)
        self.plain_params = jax.tree.map(jnp.array, subject.params)
        self.matrix = jnp.ones((MATRIX_SIZE, MATRIX_SIZE))
        self.pool = ThreadPoolExecutor(1)
        self.number = 0
        self.upcoming = self.pool.submit(self.prepare, 0)

    def prepare(self, round_: int) -> PreparedRound:
        cohorts = self.subject.job.cohorts
        return self.subject.engine.prepare(round_, np.array(cohorts[round_ % len(cohorts)]))

    def rounds(self, count: int) -> tuple[list[PreparedRound], float, float]:
        """As the trainer runs them, prepared in the background; (them, seconds, CPU seconds)."""
        self.upcoming.result()
        done, metrics = [], None
        begin, cpu = time.perf_counter(), time.process_time()
        for _ in range(count):
            done.append(self.upcoming.result())
            self.number += 1
            self.upcoming = self.pool.submit(self.prepare, self.number)
            output = self.subject.engine.run(self.state, done[-1])
            jax.device_get(metrics)  # Those of the round before.
            self.state, metrics = output.state, (output.metrics, output.per_client)
        jax.device_get(metrics)
        jax.block_until_ready(self.state)
        self.upcoming.result()
        return done, time.perf_counter() - begin, time.process_time() - cpu

    def plain_rounds(self, work: Sequence[PlainWork]) -> float:
        begin = time.perf_counter()
        for one in work:
            self.plain_params = self.plain(self.plain_params, one)
        jax.block_until_ready(self.plain_params)
        return time.perf_counter() - begin

    def matmul_flops(self) -> float:
        """Operations a second of a large product."""
        begin = time.perf_counter()
        matrix_product(self.matrix).block_until_ready()
        return 2 * MATRIX_SIZE**3 / (time.perf_counter() - begin)


def take_turns(turns: Turns, repetitions: int, turn_seconds: float) -> Report:
    subject = turns.subject
    work = plain_work(turns.rounds(1)[0][0])
    turns.plain_rounds([work, work])  # Its own output, committed to a device, compiles once more.
    turns.matmul_flops()
    _, seconds, _ = turns.rounds(1)
    count = max(1, math.ceil(turn_seconds / seconds))
    flops = np.array(step_flops(subject, work))
    with mock.patch.object(layers, "_WINOGRAD_MIN_CHANNELS", sys.maxsize):
        direct_flops = np.array(step_flops(subject, work))
    found = defaultdict(list)
    for _ in range(repetitions):
        # The plain loop needs the rounds' batches, so it comes second; matrix products part the two.
        prepared, seconds, cpu = turns.rounds(count)
        rate = turns.matmul_flops()
        work = [plain_work(one) for one in prepared]
        jax.block_until_ready(work)
        plain = turns.plain_rounds(work)
        rate = statistics.fmean([rate, turns.matmul_flops()])
        widths = np.concatenate([one.widths[: int(one.num_steps)] for one in work])
        steps = len(widths)
        floor = flops[widths].sum() / rate
        for name, value in {
            "round_ms_a_step": 1000 * seconds / steps,
            "plain_ms_a_step": 1000 * plain / steps,
            "floor_ms_a_step": 1000 * floor / steps,
            "round_over_plain": seconds / plain,
            "floor_of_round": floor / seconds,
            "floor_of_plain": floor / plain,
            "direct_floor_of_round": direct_flops[widths].sum() / rate / seconds,
            "matmul_gflops": rate / 1e9,
            "cores_busy": cpu / seconds,
            "steps_a_round": steps / count,
        }.items():
            found[name].append(float(value))
    return {
        "rounds_a_turn": count,
        "batch_sizes": list(subject.engine.preparer.batch_sizes(TRAIN)),
        "mflop_a_step": (flops / 1e6).tolist(),
        "direct_mflop_a_step": (direct_flops / 1e6).tolist(),
        **{name: machine.spread(values) for name, values in found.items()},
    }


def record(turns: Turns, rounds: int) -> Report:
    """Shares of the parts of a round, over some recorded ones."""
    turns.upcoming.result()
    example = turns.prepare(turns.number)
    program = turns.subject.engine.runner.compiled(turns.state, example)
    group_of = groups(program.as_text())
    found: dict[Group, list[float]] = defaultdict(lambda: [0.0] * rounds)
    ms_a_step = []
    for index in range(rounds):
        prepared = turns.prepare(turns.number + index)
        events, (begin, end) = recorded_round(turns, prepared)
        ms_a_step.append((end - begin) / 1e6 / int(plain_work(prepared).num_steps))
        own = [event for event in events if event.name.removeprefix("end: ") in group_of]
        for group, share in shares(operations(own), group_of, begin, end).items():
            found[group][index] = share
    return {
        "rounds": rounds,
        "ms_a_step": machine.spread(ms_a_step),
        "parts": [
            {"part": group.part, "direction": group.direction, "share": machine.spread(values)}
            for group, values in found.items()
        ],
    }


def recorded_round(
    turns: Turns, prepared: PreparedRound
) -> tuple[list[Event], tuple[float, float]]:
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    jax.block_until_ready((turns.state, prepared.by_device))
    with tempfile.TemporaryDirectory() as folder:
        jax.profiler.start_trace(folder, profiler_options=options)
        with jax.profiler.TraceAnnotation("measured round"):
            turns.state = jax.block_until_ready(
                turns.subject.engine.run(turns.state, prepared).state
            )
        jax.profiler.stop_trace()
        (path,) = Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(path))
        events = [
            Event(event.name, event.start_ns, event.duration_ns)
            for plane in profile.planes
            for line in plane.lines
            for event in line.events
            if not event.name.startswith("Threadpool")
        ]
    (whole,) = (event for event in events if event.name == "measured round")
    return events, (whole.start, whole.start + whole.duration)


def measure(name: str, arguments: argparse.Namespace) -> Report:
    subject = set_up(name, arguments.cohort_size, arguments.rounds, arguments.seed)
    turns = Turns(subject)
    times = take_turns(turns, arguments.repetitions, arguments.turn_seconds)
    recorded = record(turns, arguments.recorded)
    turns.upcoming.result()
    turns.pool.shutdown()
    recorded["slowdown"] = recorded["ms_a_step"]["median"] / times["round_ms_a_step"]["median"]
    return {
        "data": workloads.describe(subject.job, "glyphs"),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(subject.params)),
        **times,
        "recorded": recorded,
    }


# ---- showing ----


def tables(report: Report) -> list[Table]:
    found = report["workloads"]
    overview = Table(
        "Milliseconds a step, median (minimum to maximum)",
        [
            "workload",
            "round",
            "plain loop",
            "round / plain loop",
            "arithmetic floor",
            "floor / round",
            "floor / plain loop",
            "cores busy",
        ],
        [
            [
                TITLES[name].workload,
                spread(row["round_ms_a_step"]),
                spread(row["plain_ms_a_step"]),
                spread(row["round_over_plain"]),
                f"{row['floor_ms_a_step']['median']:.3g}",
                spread(row["floor_of_round"], percent),
                spread(row["floor_of_plain"], percent),
                f"{row['cores_busy']['median']:.2f}",
            ]
            for name, row in found.items()
        ],
    )
    return [overview, *(parts(name, row) for name, row in found.items())]


def parts(name: str, row: Report) -> Table:
    """A workload's parts, the largest first; those below a thousandth are summed."""
    by_part: dict[str, dict[str, Report]] = defaultdict(dict)
    for entry in row["recorded"]["parts"]:
        by_part[entry["part"]][entry["direction"]] = entry["share"]["all"]
    whole = {
        part: [sum(values) for values in zip(*directions.values(), strict=True)]
        for part, directions in by_part.items()
    }
    order = sorted(whole, key=lambda part: -statistics.median(whole[part]))
    small = [part for part in order if statistics.median(whole[part]) < 1e-3]

    def median(part: str, direction: str) -> str:
        values = by_part[part].get(direction)
        return percent(statistics.median(values)) if values and part not in small else ""

    rows = [
        [
            TITLES[name].layers.get(part, part),
            median(part, "forward"),
            median(part, "backward"),
            spread(machine.spread(whole[part]), percent),
        ]
        for part in order
        if part not in small
    ]
    if small:
        rest = [sum(values) for values in zip(*(whole[part] for part in small), strict=True)]
        rows.append(["all others", "", "", spread(machine.spread(rest), percent)])
    title = f"{TITLES[name].workload}: shares of a recorded round, median (minimum to maximum)"
    return Table(title, ["part", "forward", "backward", "whole"], rows)


def number(value: float) -> str:
    return f"{value:.3g}"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def spread(values: Report, form: Callable[[float], str] = number) -> str:
    median, low, high = (form(values[part]) for part in ("median", "min", "max"))
    return f"{median} ({low} to {high})".replace(" % to", " to")


def about(name: str, row: Report) -> str:
    """What a workload's figures were taken from."""
    sizes = " and ".join(map(str, row["batch_sizes"]))
    text = (
        f"{row['data']}; {row['parameters']:,} parameters; batches of {sizes}, "
        f"{row['steps_a_round']['median']:.0f} steps a round; {row['mflop_a_step'][-1]:,.1f} MFLOP in a "
        f"step's products"
    )
    if row["direct_mflop_a_step"] != row["mflop_a_step"]:
        text += (
            f", {row['direct_mflop_a_step'][-1]:,.1f} without Winograd's algorithm, whose floor would be "
            f"{percent(row['direct_floor_of_round']['median'])} of the round"
        )
    return f"{text}. Recording made rounds {row['recorded']['slowdown']:.2f} times as long."


def section(report: Report) -> str:
    """What docs/performance.md has between the markers."""
    overview, *others = tables(report)
    rate = statistics.median(row["matmul_gflops"]["median"] for row in report["workloads"].values())
    settings = report["settings"]
    lines = [
        f"{machine.sentence(report['machine'])}. {report['date']}, seed {report['seed']}, "
        f"{settings['cohort_size']} clients a round, {settings['repetitions']} turns; a float32 product of "
        f"size {MATRIX_SIZE} ran at {rate:.0f} GFLOP/s between them.",
        f"{overview.title}:",
        overview.markdown(),
    ]
    for (name, row), table in zip(report["workloads"].items(), others, strict=True):
        lines += [f"### {TITLES[name].workload}", about(name, row), table.markdown()]
    return "\n\n".join(lines)


def with_section(page: str, text: str) -> str:
    """The page with `text` between the markers."""
    begin, end = MARKERS
    head, found, rest = page.partition(begin)
    _, closed, tail = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{PAGE.name} lacks the line {begin} or {end}")
    return f"{head}{begin}\n\n{text}\n\n{end}{tail}"


def write_docs(report: Report) -> None:
    PAGE.write_text(with_section(PAGE.read_text(), section(report)))
    print(f"tables written to {PAGE}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--workloads", default=",".join(TITLES), help="separated by commas")
    add("--cohort_size", type=int, default=10)
    add("--rounds", type=int, default=50, help="cohorts to draw; they repeat")
    add("--repetitions", type=int, default=7, help="turns, at least 5 for figures to publish")
    add("--turn_seconds", type=float, default=0.5, help="rounds in a turn take at least as long")
    add("--recorded", type=int, default=5, help="rounds to record")
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=RESULTS)
    add("--docs", action="store_true", help="only write the tables of docs/performance.md again")
    arguments = parser.parse_args(argv)
    if arguments.docs:
        write_docs(json.loads(arguments.output.read_text()))
        return
    names = [name for name in arguments.workloads.split(",") if name]
    if unknown := sorted(set(names) - set(TITLES)):
        parser.error(f"--workloads takes {', '.join(TITLES)}; got {', '.join(unknown)}")
    report = {
        "date": datetime.date.today().isoformat(),
        "machine": machine.machine(),
        "seed": arguments.seed,
        "settings": {
            name: getattr(arguments, name)
            for name in ("cohort_size", "repetitions", "turn_seconds", "recorded")
        },
        "workloads": {},
    }
    jax.config.update("jax_platforms", "cpu")
    runtime.start(keep_compiled=False)
    for name in names:
        report["workloads"][name] = measure(name, arguments)
        gc.collect()
        overview, *_, last = tables(report)
        overview.print()
        last.print()
        print(about(name, report["workloads"][name]), flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {arguments.output}")
    if arguments.output == RESULTS:
        write_docs(report)


if __name__ == "__main__":
    main()
