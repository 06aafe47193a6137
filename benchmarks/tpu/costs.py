"""What a program that was compiled for a TPU costs, read from its text; and what a chip can do.

XLA's totals count the body of every loop once. Here a loop counts by its trips, so costs are taken from the
instructions: matrix products from their shapes, bytes of the chip's memory from layouts, and time from the
cycles that the compiler expects of each instruction.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from fedexp.engine.loop import OVER_CLIENTS


class Chip(NamedTuple):
    """A TensorCore, which is what JAX calls a device.

    Attributes:
      flops: bfloat16 operations a second, at most.
      bandwidth: bytes a second to and from its memory.
      memory: bytes.
      clock: cycles a second.
    """

    flops: float
    bandwidth: float
    memory: float
    clock: float


# A TensorCore's share of its chip's published figures; docs/accelerators.md has the sources.
CHIPS = {
    "v2": Chip(23e12, 358e9, 8e9, 0.70e9),
    "v3": Chip(61.5e12, 450e9, 17.2e9, 0.94e9),
    "v4": Chip(137.5e12, 614e9, 17.2e9, 1.05e9),
    "v5e": Chip(197e12, 819e9, 17.2e9, 1.50e9),
    "v6e": Chip(918e12, 1638e9, 34.4e9, 1.75e9),
}


class Trips(NamedTuple):
    """How often a device runs the engine's loops in a round.

    Attributes:
      segments: of the outer loop.
      steps: of the inner loop, all segments together.
      shares: of the steps, those of every compiled batch size.
      clients: of the loops over those that begin or end, all segments together.
    """

    segments: float
    steps: float
    shares: Sequence[float]
    clients: float = 1


ONCE = Trips(1, 1, ())


class Cost(NamedTuple):
    """Of a program or a part of it.

    Attributes:
      flops: of matrix products and convolutions.
      bytes: moved to or from the chip's memory.
      cycles: that the compiler expects, as far as it says.
      seconds: those cycles, or the bytes where they take longer, computation by computation.
    """

    flops: float = 0
    bytes: float = 0
    cycles: float = 0
    seconds: float = 0

    def plus(self, other: Cost, times: float = 1) -> Cost:
        return Cost(*(a + times * b for a, b in zip(self, other, strict=True)))


class Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    operands: list[str]
    text: str


_COMPUTATION = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%([\w.\-]+) = (.*?[\]})]) ([a-z][\w\-]*)\((.*)")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"\b(\w+)=\{?((?:%[\w.\-]+(?:, )?)+)")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([\d,]*)((?::|\w|\([\d,]*\))*)\})?")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_COLLECTIVE = re.compile(
    r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?"
)
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"}
_SLICES = {"gather", "dynamic-slice", "slice"}


class Program:
    """A compiled program's computations.

    Args:
      text: as `jax.stages.Compiled.as_text` gives it.
      chip: that it was compiled for.
    """

    def __init__(self, text: str, chip: Chip):
        self._chip = chip
        self._computations: dict[str, dict[str, Instruction]] = defaultdict(dict)
        name = self._entry = ""
        for line in text.splitlines():
            if found := _COMPUTATION.match(line):
                name = found[2]
                self._entry = name if found[1] else self._entry
            elif found := _INSTRUCTION.match(line):
                *head, text = found.groups()
                operands = _NAME.findall(text.partition(")")[0])
                self._computations[name][found[1]] = Instruction(*head, operands, text)

    def cost(self, trips: Trips) -> dict[str, Cost]:
        """A device's cost of 'server', what is outside the loops; 'clients', their ends; and 'steps'."""
        parts: dict[str, Cost] = defaultdict(Cost)
        for depth, name, times in self._walk(self._entry, trips):
            part = ("server", "clients", "steps")[depth]
            parts[part] = parts[part].plus(self._own(name), times)
        return dict(parts)

    def of_steps(self, trips: Trips) -> dict[str, Cost]:
        """A device's cost of the steps' instructions, those with 'products' and 'others'."""
        parts: dict[str, Cost] = defaultdict(Cost)
        for depth, name, times in self._walk(self._entry, trips):
            for one in self._computations[name].values() if depth == 2 else ():
                cost = self._of(name, one)
                part = "products" if cost.flops else "others"
                parts[part] = parts[part].plus(cost, times)
        return dict(parts)

    def collectives(self) -> dict[str, list[str]]:
        """The collectives 'outside' of all loops, and those 'inside' one."""
        found: dict[str, list[str]] = {"outside": [], "inside": []}
        for name, body in self._computations.items():
            opcodes = [one.opcode for one in body.values()]
            place = "outside" if name == self._entry else "inside"
            found[place] += filter(_COLLECTIVE.fullmatch, opcodes)
        return found

    def _walk(self, name: str, trips: Trips, depth: int = 0, times: float = 1):
        """Yields (loops of the engine around it, name, times) of a computation and what it calls."""
        yield depth, name, times
        for one in self._computations[name].values():
            called = _called(one)
            if one.opcode == "while":
                count, inner = self._constant_in(called["condition"][0]), depth
                if count is None:  # The engine's own: its bounds are data.
                    count, inner = self._engine_loop(one, trips, depth)
                for part in (*called["condition"], *called["body"]):
                    yield from self._walk(part, trips, inner, times * count)
            elif one.opcode == "conditional":
                for part, share in self._branches(called, trips):
                    yield from self._walk(part, trips, depth, times * share)
            elif one.opcode == "call":
                yield from self._walk(called["to_apply"][0], trips, depth, times)

    def _engine_loop(self, one: Instruction, trips: Trips, depth: int) -> tuple[float, int]:
        """How often one of the engine's loops runs, and how deep it is."""
        if depth == 0:
            return trips.segments, 1
        if f"/{OVER_CLIENTS}/" in one.text:
            return trips.clients / trips.segments, depth
        return trips.steps / trips.segments, depth + 1

    def _branches(self, called: dict[str, list[str]], trips: Trips) -> list[tuple[str, float]]:
        """Branches of a `lax.switch` over batch sizes, with their shares; without, the dearest one."""
        if "true_computation" in called:
            branches = [called["false_computation"][0], called["true_computation"][0]]
        else:
            branches = called["branch_computations"]
        if len(branches) == len(trips.shares):
            return list(zip(branches, trips.shares, strict=True))
        dearest = max(branches, key=lambda name: self._own(name).bytes)
        return [(dearest, 1.0)]

    def _constant_in(self, condition: str) -> int | None:
        """What a loop counts to; None where that is data."""
        for one in self._computations[condition].values():
            if one.opcode == "constant" and one.shape.startswith("s32[]"):
                return int(one.text.partition(")")[0])
        return None

    @functools.cache  # noqa: B019  A program is soon forgotten.
    def _own(self, name: str) -> Cost:
        """Of a computation without loops and branches."""
        costs = (self._of(name, one) for one in self._computations[name].values())
        cost = functools.reduce(Cost.plus, costs, Cost())
        return cost._replace(seconds=self._seconds(cost))

    def _of(self, name: str, one: Instruction) -> Cost:
        """Of an instruction."""
        found = _CYCLES.search(one.text)
        cycles = int(found[1]) if found else 0
        cost = Cost(self._flops(name, one), self._bytes(name, one), cycles)
        return cost._replace(seconds=self._seconds(cost))

    def _seconds(self, cost: Cost) -> float:
        return max(cost.cycles / self._chip.clock, cost.bytes / self._chip.bandwidth)

    def _flops(self, computation: str, one: Instruction) -> float:
        if one.opcode == "fusion":
            inner = _called(one)["calls"][0]
            return sum(self._flops(inner, part) for part in self._computations[inner].values())
        if one.opcode != "convolution":
            return 0
        return _convolution_flops(one, self._computations[computation][one.operands[1]].shape)

    def _bytes(self, computation: str, one: Instruction) -> float:
        if one.opcode in _FREE or one.opcode.endswith("-done") or one.opcode == "custom-call":
            return 0
        body = self._computations[computation]
        if one.opcode.endswith("-start"):  # The output lists source and target.
            return _bytes_of(one.shape)
        read = sum(self._read(computation, one, index) for index in range(len(one.operands)))
        return read + self._written(body, one)

    def _read(self, computation: str, one: Instruction, index: int) -> float:
        """Bytes of an operand that are read; of one that is cut, only what is taken."""
        whole = _bytes_of(self._computations[computation][one.operands[index]].shape)
        if not whole or (one.opcode == "dynamic-update-slice" and index == 0):
            return 0
        if one.opcode in _SLICES and index == 0:
            return min(whole, _bytes_of(one.shape) or whole)
        if one.opcode != "fusion":
            return whole
        inner = _called(one)["calls"][0]
        body = self._computations[inner]
        waiting = [p.name for p in body.values() if _is_parameter(p, index)]
        root, read = list(body)[-1], 0.0
        while waiting:
            name = waiting.pop()
            read += whole if name == root else 0  # By what comes after this fusion in another.
            for user in body.values():
                for place in (i for i, operand in enumerate(user.operands) if operand == name):
                    if user.opcode in ("bitcast", "reshape", "copy"):
                        waiting.append(user.name)
                    else:
                        read += self._read(inner, user, place)
        return min(read, whole)

    def _written(self, body: dict[str, Instruction], one: Instruction) -> float:
        if one.opcode == "fusion":
            inner = self._computations[_called(one)["calls"][0]]
            root = list(inner.values())[-1]
            if root.opcode == "dynamic-update-slice" and _bytes_of(one.shape):
                return _bytes_of(inner[root.operands[1]].shape)
        if one.opcode == "dynamic-update-slice":
            return _bytes_of(body[one.operands[1]].shape)
        return _bytes_of(one.shape)


def _called(one: Instruction) -> dict[str, list[str]]:
    """Attribute of an instruction -> the computations that it names."""
    return {name: _NAME.findall(names) for name, names in _CALLED.findall(one.text)}


def _is_parameter(one: Instruction, index: int) -> bool:
    return one.opcode == "parameter" and one.text.startswith(f"{index})")


def _bytes_of(shape: str) -> float:
    """Bytes of the arrays of a shape that lie in the chip's memory, padded to whole tiles."""
    total = 0.0
    for dtype, dims, order, layout in _ARRAY.findall(shape):
        if "S(" in layout or not dims:  # In memory of the core itself, or a number.
            continue
        sizes = [int(size) for size in dims.split(",") if size]
        sizes = [sizes[int(axis)] for axis in reversed(order.split(",")) if axis] or sizes
        if tile := re.search(r"T\(([\d,]+)\)", layout):
            tiles = [int(size) for size in tile[1].split(",")]
            sizes = [1] * (len(tiles) - len(sizes)) + sizes
            for axis, size in enumerate(reversed(tiles), start=1):
                sizes[-axis] = -(-sizes[-axis] // size) * size
        bits = int(re.sub(r"\D", "", dtype.partition("e")[0]) or 8)
        total += math.prod(sizes) * bits / 8
    return total


def _convolution_flops(one: Instruction, kernel: str) -> float:
    """Twice the products of a convolution; those with padding or the gaps of a dilation do not count."""
    labels = re.search(r"dim_labels=\w+_(\w+)->(\w+)", one.text)
    window = re.search(r"window=\{([^}]*)\}", one.text)
    options = dict(re.findall(r"(\w+)=([\w\-]+)", window[1] if window else ""))
    kernel_dims, output_dims = (
        dict(zip(names, _dims(shape), strict=True))
        for names, shape in zip(labels.groups(), (kernel, one.shape), strict=True)
    )
    products = kernel_dims["i"] * output_dims["b"] * output_dims["f"]
    for axis, label in enumerate(sorted(set(kernel_dims) - {"i", "o"})):

        def option(name: str, default: str, axis: int = axis) -> list[int]:
            words = options[name].split("x")[axis] if name in options else default
            return [int(number) for number in words.split("_")]

        (low, high), (stride,) = option("pad", "0_0"), option("stride", "1")
        (gap,), (spread,) = option("lhs_dilate", "1"), option("rhs_dilate", "1")
        outputs, taps = output_dims[label], kernel_dims[label]
        end = (outputs - 1) * stride + (taps - 1) * spread + 1 - low - high
        places = itertools.product(range(outputs), range(taps))
        inputs = (output * stride + tap * spread - low for output, tap in places)
        products *= sum(0 <= place < end and place % gap == 0 for place in inputs)
    return 2.0 * products


def _dims(shape: str) -> list[int]:
    return [int(size) for size in _ARRAY.search(shape)[2].split(",") if size]
