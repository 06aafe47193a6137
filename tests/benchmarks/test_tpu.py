"""What compiled TPU programs cost, by hand; and that everything compiles for TPUs, where libtpu is."""

from __future__ import annotations

import importlib.util
import os

import jax
import numpy as np
import pytest

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

from benchmarks.tpu.costs import CHIPS, ONCE, Chip, Program, Trips
from benchmarks.tpu.programs import (
    as_on_tpu,
    described,
    needed_flops,
    session_of,
    trips,
)
from benchmarks.tpu.scaling import busy_devices
from fedexp.errors import UserError
from tests.support import linear, strategies, tasks
from tests.support.compiled import round_on

CHIP = Chip(flops=1e12, bandwidth=1e9, memory=1e9, clock=1e6)

# Two loops of the engine around a loop of five, a switch of two batch sizes, and a sum over devices.
PROGRAM = """
%gathering (p.0: u8[1000,28,28], p.1: s32[4]) -> u8[4,28,28] {
  %p.0 = u8[1000,28,28]{2,1,0:T(8,128)(4,1)} parameter(0)
  %p.1 = s32[4]{0:T(128)} parameter(1)
  ROOT %g = u8[4,28,28]{2,1,0:T(8,128)(4,1)} gather(%p.0, %p.1), offset_dims={1,2}
}

%product (p.0: f32[4,6], p.1: f32[6,8]) -> f32[4,8] {
  %p.0 = f32[4,6]{1,0} parameter(0)
  %p.1 = f32[6,8]{1,0} parameter(1)
  ROOT %c = f32[4,8]{1,0} convolution(%p.0, %p.1), dim_labels=bf_io->bf
}

%five (s: (s32[])) -> pred[] {
  %s = (s32[]) parameter(0)
  %limit = s32[]{:T(128)} constant(5)
  %i = s32[]{:T(128)S(6)} get-tuple-element(%s), index=0
  ROOT %less = pred[]{:T(1024)S(6)} compare(%i, %limit), direction=LT
}

%scan (s: (s32[])) -> (s32[]) {
  %s = (s32[]) parameter(0)
  %x = f32[4,6]{1,0} get-tuple-element(%s), index=0
  %w = f32[6,8]{1,0} get-tuple-element(%s), index=0
  %f = f32[4,8]{1,0} fusion(%x, %w), calls=%product, backend_config={"estimated_cycles":"30"}
  ROOT %t = (s32[]) tuple(%s)
}

%small (s: (s32[])) -> (s32[]) {
  %s = (s32[]) parameter(0)
  %x = f32[10,30]{1,0:T(8,128)} get-tuple-element(%s), index=0
  %y = f32[10,30]{1,0:T(8,128)} copy(%x), backend_config={"estimated_cycles":"1"}
  ROOT %t = (s32[]) tuple(%s)
}

%large (s: (s32[])) -> (s32[]) {
  %s = (s32[]) parameter(0)
  %d = u8[1000,28,28]{2,1,0:T(8,128)(4,1)} get-tuple-element(%s), index=0
  %rows = s32[4]{0:T(128)S(6)} get-tuple-element(%s), index=1
  %b = u8[4,28,28]{2,1,0:T(8,128)(4,1)} fusion(%d, %rows), calls=%gathering
  ROOT %w.0 = (s32[]) while(%s), condition=%five, body=%scan
}

%data (s: (s32[])) -> pred[] {
  %s = (s32[]) parameter(0)
  %i = s32[]{:T(128)S(6)} get-tuple-element(%s), index=0
  %n = s32[]{:T(128)S(6)} get-tuple-element(%s), index=1
  ROOT %less = pred[]{:T(1024)S(6)} compare(%i, %n), direction=LT
}

%step (s: (s32[])) -> (s32[]) {
  %s = (s32[]) parameter(0)
  %i = s32[]{:T(128)S(6)} get-tuple-element(%s), index=0
  ROOT %c = (s32[]) conditional(%i, %s, %s), branch_computations={%small, %large}
}

%client (s: (s32[])) -> (s32[]) {
  %s = (s32[]) parameter(0)
  %z = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%s), index=0
  ROOT %c = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} copy(%z), backend_config={"estimated_cycles":"2"}
}

%segment (s: (s32[])) -> (s32[]) {
  %s = (s32[]) parameter(0)
  %x = bf16[3,200]{0,1:T(8,128)(2,1)} get-tuple-element(%s), index=0
  %y = bf16[3,200]{0,1:T(8,128)(2,1)S(1)} copy(%x), backend_config={"estimated_cycles":"7"}
  %c = (s32[]) while(%s), condition=%data, body=%client, metadata={op_name="jit(f)/while/over_clients/while"}
  ROOT %w = (s32[]) while(%s), condition=%data, body=%step, metadata={op_name="jit(f)/while/while"}
}

ENTRY %main (s: (s32[])) -> f32[16] {
  %s = (s32[]) parameter(0)
  %w = (s32[]) while(%s), condition=%data, body=%segment
  %x = f32[16]{0} get-tuple-element(%w), index=0
  ROOT %sum = f32[16]{0} all-reduce(%x), to_apply=%add, backend_config={"estimated_cycles":"100"}
}
"""


def test_loops_and_branches_count_by_the_trips_of_the_schedule():
    trips = Trips(segments=3, steps=12, shares=[0.25, 0.75], clients=6)
    parts = Program(PROGRAM, CHIP).cost(trips)

    scans, copies = 12 * 0.75 * 5, 12 * 0.25
    products = 2 * 4 * 6 * 8
    tile = 16 * 128 * 4  # 10 x 30 floats, in tiles of 8 x 128.
    images = 4 * 32 * 128  # Of 28 x 28 bytes; the other 996 are not read.
    operands = 4 * (4 * 6 + 6 * 8 + 4 * 8)
    assert parts["steps"].flops == pytest.approx(scans * products)
    assert parts["steps"].cycles == pytest.approx(scans * 30 + copies * 1)
    bytes_of_steps = scans * operands + copies * 2 * tile + 12 * 0.75 * 2 * images
    assert parts["steps"].bytes == pytest.approx(bytes_of_steps)
    # 200 x 3 of two bytes, padded to 200 x 128; what it is copied to is no memory of the chip.
    assert parts["clients"].bytes == 3 * 200 * 128 * 2 + 6 * 8 * 128 * 2
    assert (parts["clients"].cycles, parts["server"].cycles) == (21 + 6 * 2, 100)
    assert parts["server"].bytes == 2 * 16 * 4


def test_instructions_of_steps_are_told_apart_by_products():
    parts = Program(PROGRAM, CHIP).of_steps(Trips(segments=3, steps=12, shares=[0.25, 0.75]))

    assert parts["products"].cycles == pytest.approx(12 * 0.75 * 5 * 30)
    assert parts["products"].flops == pytest.approx(12 * 0.75 * 5 * 2 * 4 * 6 * 8)
    assert (parts["others"].cycles, parts["others"].flops) == (12 * 0.25, 0)


def test_a_computation_takes_its_cycles_or_its_bytes():
    parts = Program(PROGRAM, CHIP).cost(Trips(1, 1, [1, 0], clients=0))

    assert parts["clients"].seconds == pytest.approx(200 * 128 * 2 / 1e9)  # 7 us of cycles.
    assert parts["server"].seconds == pytest.approx(100 / 1e6)  # 0.1 us of bytes.


def test_collectives_are_told_apart_by_loops():
    inside = PROGRAM.replace(
        "f32[10,30]{1,0:T(8,128)} copy(", "f32[10,30]{1,0:T(8,128)} all-gather("
    )

    assert Program(PROGRAM, CHIP).collectives() == {"outside": ["all-reduce"], "inside": []}
    assert Program(inside, CHIP).collectives()["inside"] == ["all-gather"]


def valid_products(size: int, taps: int, outputs: int, low: int, stride=1, gap=1, spread=1) -> int:
    """Pairs of an output and a tap that meet an input, by looking at every one."""
    dilated = np.zeros(2000, bool)
    dilated[500 : 500 + size * gap : gap] = True
    places = [500 + o * stride + t * spread - low for o in range(outputs) for t in range(taps)]
    return int(dilated[places].sum())


@pytest.mark.parametrize(
    ("window", "size", "outputs", "options"),
    [
        ("size=3x3", 10, 8, {}),
        ("size=3x3 pad=1_1x1_1", 10, 10, {"low": 1}),
        ("size=3x3 pad=2_2x2_2", 8, 10, {"low": 2}),  # The gradient of the input.
        ("size=3x3 stride=2x2", 9, 4, {"stride": 2}),
        ("size=3x3 pad=2_2x2_2 lhs_dilate=2x2", 4, 9, {"low": 2, "gap": 2}),
        ("size=3x3 rhs_dilate=2x2", 9, 5, {"spread": 2}),
    ],
)
def test_convolutions_count_products_with_inputs_alone(window, size, outputs, options):
    attributes = f"window={{{window}}}, dim_labels=b01f_01io->b01f"
    program = f"""
ENTRY %main (x: f32[2,{size},{size},5], k: f32[3,3,5,7]) -> f32[2,{outputs},{outputs},7] {{
  %x = f32[2,{size},{size},5]{{3,2,1,0}} parameter(0)
  %k = f32[3,3,5,7]{{3,2,1,0}} parameter(1)
  ROOT %c = f32[2,{outputs},{outputs},7]{{3,2,1,0}} convolution(%x, %k), {attributes}
}}
"""
    pairs = valid_products(size, 3, outputs, **{"low": 0, **options})
    assert Program(program, CHIP).cost(ONCE)["server"].flops == 2 * 2 * 5 * 7 * pairs**2


def test_without_libtpu_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'fedexp\[tpu\]'"):
        described("v2:2x2", "jit")


# ---- with the compiler ----

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: nothing was compiled for TPUs (pip install 'fedexp[tpu]')",
)
TOPOLOGIES = ("v2:2x2", "v5e:2x2", "v6e:2x2")


def program_of(strategy, topology, *problem) -> Program:
    """A round's program, compiled for the devices of a topology."""
    with as_on_tpu():
        compiled = round_on(described(topology, strategy), *problem)
    return Program(compiled.as_text(), CHIPS[topology.partition(":")[0]])


@needs_libtpu
@pytest.mark.slow
def test_trips_of_all_devices_are_those_of_their_schedules():
    with as_on_tpu():
        session = session_of("emnist", "v5e:2x2", "mesh", 1, ["uniform.cohort_size = 30"])
        prepared = session.engine.prepare(0, session.sample(0))
        of_schedules = trips(prepared, session.engine.preparer.batch_sizes("train"))
        assert busy_devices(session, prepared) == of_schedules
        # Two convolutions and two dense layers, forward and for two gradients; of the images there is none.
        first, second = 26 * 26 * 9 * 32, 24 * 24 * 9 * 32 * 64
        dense = 12 * 12 * 64 * 128 + 128 * 62
        assert needed_flops(session) == [2 * 20 * (2 * first + 3 * (second + dense))]


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("name", tasks.TASKS)
def test_every_task_compiles_with_one_sum_over_the_devices(name, topology):
    program = program_of("mesh", topology, *tasks.problem(name), 2, np.arange(4))

    found = program.collectives()
    assert found["inside"] == []
    assert [opcode for opcode in found["outside"] if "all-reduce" in opcode] == ["all-reduce"]


LINEAR = linear.task(noise=0.2)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("name", strategies.algorithms(LINEAR))
def test_every_algorithm_compiles(name):
    algorithm = strategies.algorithms(LINEAR)[name]
    sample = strategies.sampler_for(name).sample(linear.dataset().client_ids, 0, 0)
    params = LINEAR.init(jax.random.key(0), None)
    for topology in TOPOLOGIES:
        program = program_of("mesh", topology, algorithm, linear.dataset(), params, 2, sample)
        # What kmeans++ sums up to choose the first models is in a branch, for the first round alone.
        assert (program.collectives()["inside"] != []) == (name == "kmeans++")


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("strategy", ["jit", "pmap", "mesh"])
def test_every_strategy_compiles(strategy, topology):
    algorithm = strategies.algorithms(LINEAR)["scaffold1"]
    params = LINEAR.init(jax.random.key(0), None)
    for lanes in (1, 3):
        program = program_of(
            strategy, topology, algorithm, linear.dataset(), params, lanes, np.arange(5)
        )
        sums = [one for one in program.collectives()["outside"] if "all-reduce" in one]
        # Its first pass, of the control variates, adds nothing up.
        assert len(sums) == (0 if strategy == "jit" else 1)
