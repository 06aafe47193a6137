from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import machine
from benchmarks import round_breakdown as breakdown
from benchmarks.round_breakdown import Event, Group, Operation

STEP = "jit(_traced)/while/body/while/body"
PROGRAM = """HloModule jit__traced

FileNames
1 "engine.py"

FunctionNames
1 "client_step"
2 "handwriting"

FileLocations
1 {file_name_id=1 function_name_id=1 line=1 end_line=1 column=1 end_column=2}
2 {file_name_id=1 function_name_id=2 line=1 end_line=1 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=1 parent_frame_id=3}

%bits (a: u32[4]) -> u32[4] {
  ROOT %copy.1 = u32[4]{0} copy(%a)
}

%step (b: f32[2]) -> f32[2] {
  %where.1 = f32[2]{0} fusion(%b), metadata={op_name="STEP/jvp(jit(_where))/select_n" stack_frame_id=3}
  %exp.1 = f32[2]{0} fusion(%b), metadata={op_name="STEP/jvp()/exp" stack_frame_id=1}
  %while.1 = (u32[4], /*index=5*/s32[]) while(%b), body=%bits, metadata={op_name="STEP/jvp(N)/Dropout_0/xor"}
  ROOT %copy.2 = f32[2]{0:T(8)} copy(%exp.1)
}

%client (c: f32[2]) -> f32[2] {
  %while.2 = f32[2]{0} while(%c), body=%step, metadata={op_name="jit(_traced)/while/body/while"}
  ROOT %copy.3 = f32[2]{0} copy(%while.2)
}

ENTRY %main (d: f32[2]) -> f32[2] {
  %while.3 = f32[2]{0} while(%d), condition=%less, body=%client, metadata={op_name="jit(_traced)/while"}
  ROOT %copy.4 = f32[2]{0} copy(%while.3)
}
""".replace("STEP", STEP)


@pytest.mark.parametrize(
    ("path", "group"),
    [
        ("jvp(EmnistCNN)/Conv_1/dot_general", Group("Conv_1", "forward")),
        ("transpose(jvp(EmnistCNN))/Conv_1/dot_general", Group("Conv_1", "backward")),
        ("cond/branch_1_fun/jvp(EmnistCNN)/Conv_1/add", Group("Conv_1", "forward")),
        ("jvp(Net)/LSTM_0/while/body/closed_call/dot_general", Group("LSTM_0", "forward")),
        ("transpose(jvp(EmnistCNN))/select_n", Group("between layers", "backward")),
        ("jvp(Net)/jit(relu)/max;jit(_traced)/other", Group("between layers", "forward")),
        ("jvp(Net)/Dropout_0/while/body/closed_call/xor", Group(breakdown.BITS)),
        ("jvp(Net)/Dropout_0/jit(_where)/select_n", Group("dropout", "forward")),
        ("transpose(jvp(Net))/Dropout_1/mul", Group("dropout", "backward")),
        ("jvp()/exp", Group(breakdown.LOSS, "forward")),
        ("transpose(jvp(jit(_where)))/select_n", Group(breakdown.LOSS, "backward")),
        ("jit(_take)/gather", Group("gather of the batch")),
        ("vmap()/vmap(jit(_threefry_fold_in))/Runner.body/while/body/add", Group("keys")),
        ("add", Group("parameter update, sums of metrics")),
    ],
)
def test_an_operation_of_a_step_is_classified(path, group):
    assert breakdown.classify(f"{STEP}/{path}") == group


def test_operations_around_the_steps_are_classified():
    assert breakdown.classify("jit(_traced)/while/body/sub").part == "a client's init and finish"
    assert breakdown.classify("jit(_traced)/div").part == "server"
    threefry = "jit(_traced)/vmap(vmap(jit(_threefry_fold_in)))/Runner.body/while/body/add"
    assert breakdown.classify(threefry).part == "server"


def test_what_xla_added_belongs_to_the_loop_around_it():
    assert breakdown.groups(PROGRAM) == {
        "where.1": Group(breakdown.INPUT),
        "exp.1": Group(breakdown.LOSS, "forward"),
        "copy.1": Group(breakdown.BITS),
        "copy.2": Group(breakdown.COPIES),
        "copy.3": Group("a client's init and finish"),
        "copy.4": Group("server"),
    }


def test_a_program_that_xla_compiled_is_read():
    def server(x):
        def client(_, x):
            return jax.lax.fori_loop(0, x.argmax(), lambda _, x: jnp.sin(x), x) * 2

        return jax.lax.fori_loop(0, x.argmax(), client, x)

    found = breakdown.groups(jax.jit(server).lower(np.ones(4)).compile().as_text()).values()
    parts = {group.part for group in found}
    assert parts >= {"server", "a client's init and finish", "parameter update, sums of metrics"}


def test_operations_end_where_the_profiler_says():
    events = [
        Event("end: dot", 9.0, 0.1),
        Event("dot", 1.0, 2.0),
        Event("dot", 10.0, 1.0),
        Event("end: dot", 11.0, 0.1),
        Event("end: begun before the recording", 0.5, 0.1),
        Event("never ended", 3.0, 1.0),
    ]
    assert breakdown.operations(events) == [
        Operation("dot", 1.0, 3.0, 9.0),
        Operation("dot", 10.0, 11.0, 11.0),
    ]


def test_every_moment_has_its_owner():
    a, b, c = Group("a"), Group("b"), Group("c")
    found = breakdown.shares(
        [
            Operation("a", -5.0, 20.0, 60.0),  # From before the round; 20 to 30 and 50 to 60 alone.
            Operation("b", 30.0, 50.0, 50.0),
            Operation("c", 40.0, 50.0, 50.0),  # Shares 40 to 50 with b.
            Operation("c", 55.0, 55.0, 58.0),  # The last to begin of two that nobody runs.
            Operation("c", 70.0, 70.0, 70.0),
        ],
        {"a": a, "b": b, "c": c},
        begin=0.0,
        end=100.0,
    )
    wanted = {a: 0.37, b: 0.15, c: 0.08, Group(breakdown.NOTHING): 0.40}
    assert found == pytest.approx(wanted)


def test_products_are_counted():
    def step(x, kernel):
        def body(x, _):
            return x @ kernel, None

        x, _ = jax.lax.scan(body, x, length=5)
        x = jax.jit(lambda x: jnp.einsum("bij,bjk->bik", x, x))(x[None])
        return jnp.exp(x)

    jaxpr = jax.make_jaxpr(step)(np.ones((3, 3)), np.ones((3, 3)))
    assert breakdown.product_flops(jaxpr.jaxpr) == 6 * 2 * 3**3


def report():
    parts = [
        ("Conv_1", "forward", [0.3, 0.5, 0.4]),
        ("Conv_1", "backward", [0.4, 0.4, 0.4]),
        ("server", "", [0.199, 0.099, 0.199]),
        ("keys", "", [0.0007, 0.0008, 0.0009]),
    ]
    row = {
        "data": "glyphs: 10 clients",
        "parameters": 1000,
        "batch_sizes": [7, 20],
        "mflop_a_step": [3.5, 10.0],
        "direct_mflop_a_step": [3.5, 15.0],
        "steps_a_round": machine.spread([40.0]),
        "recorded": {
            "slowdown": 1.25,
            "parts": [
                {"part": part, "direction": direction, "share": machine.spread(values)}
                for part, direction, values in parts
            ],
        },
    }
    for name in ("round", "plain", "floor"):
        row[f"{name}_ms_a_step"] = machine.spread([1.0, 2.0, 4.0])
    for name in ("floor_of_round", "floor_of_plain", "direct_floor_of_round"):
        row[name] = machine.spread([0.25])
    for name in ("round_over_plain", "matmul_gflops", "cores_busy"):
        row[name] = machine.spread([1.5])
    about = {
        "cpu": "A processor",
        "cores": 2,
        "memory_gib": 23.5,
        "system": "Linux",
        "versions": {"jax": "0.10"},
        "load_before": 0.1,
    }
    return {
        "date": "2026-01-01",
        "machine": about,
        "seed": 0,
        "settings": {"cohort_size": 10, "repetitions": 5},
        "workloads": {"emnist_cnn": row},
    }


def test_tables_have_the_largest_part_first():
    overview, cnn = breakdown.tables(json.loads(json.dumps(report())))
    assert overview.rows[0][:2] == ["EMNIST CNN", "2 (1 to 4)"]
    assert cnn.rows == [
        ["convolution 3 x 3 x 32 x 64", "40.0 %", "40.0 %", "80.0 % (70.0 to 90.0 %)"],
        ["server", "", "", "19.9 % (9.9 to 19.9 %)"],
        ["all others", "", "", "0.1 % (0.1 to 0.1 %)"],
    ]
    about = breakdown.about("emnist_cnn", report()["workloads"]["emnist_cnn"])
    assert "batches of 7 and 20, 40 steps" in about and "15.0 without Winograd" in about


def test_the_section_replaces_what_is_between_the_markers():
    begin, end = breakdown.MARKERS
    page = breakdown.with_section(f"head\n{begin}\nold\n{end}\ntail\n", "new")
    assert page == f"head\n{begin}\n\nnew\n\n{end}\ntail\n"
    assert breakdown.with_section(page, "new") == page
    with pytest.raises(ValueError, match="lacks the line"):
        breakdown.with_section(f"{begin}\nold\n", "new")


def test_the_page_agrees_with_the_figures():
    figures = json.loads(breakdown.RESULTS.read_text())
    page = breakdown.PAGE.read_text()
    assert breakdown.with_section(page, breakdown.section(figures)) == page, (
        "run `python -m benchmarks.round_breakdown --docs`"
    )
