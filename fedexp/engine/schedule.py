"""Packs a cohort onto lanes: plain NumPy, no JAX.

A *lane* runs its clients one after another, back to back; lanes run side by side. Padding every client to
the longest would waste most of the device, because clients differ in size by a factor of twenty; packing
them longest-first wastes only what the lanes' ends differ by.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fedexp.data.batching import consecutive


class Schedule(NamedTuple):
    """Which examples make batch t of lane l, and where clients begin and end.

    Time runs in *steps*, one batch in every lane. It is cut into *segments* at the steps where some lane
    passes from one client to the next, so within a segment every lane stays with one client.
    T >= total steps, S = client slots, L = lanes, B = batch size; only the first `num_segments` count.

    Attributes:
      rows: (T, L, B) int32, row of each example in the examples array; -1 is padding, and last.
      widths: (T,) int32, which of the compiled batch sizes holds the step's largest batch.
      bounds: (S + 1,) int32, segment s is steps bounds[s]:bounds[s + 1].
      slots: (S, L) int32, the client slot that lane l works for in segment s; S when it is idle.
      lanes: (S,) int32, the lane of each client slot.
      starts: (S,) int32, its first step.
      begins: (S,) int32, client slots in the order in which they begin.
      begun: (S + 1,) int32, those in begins[begun[s]:begun[s + 1]] begin with segment s.
      ends: (S,) int32, client slots in the order in which they end.
      ended: (S + 1,) int32, those in ends[ended[s]:ended[s + 1]] end with segment s.
      num_segments: () int32.
    """

    rows: Any
    widths: Any
    bounds: Any
    slots: Any
    lanes: Any
    starts: Any
    begins: Any
    begun: Any
    ends: Any
    ended: Any
    num_segments: Any

    def without_lanes(self) -> Schedule:
        """The schedule of an only lane, whose arrays lose the axis of lanes."""
        return self._replace(rows=self.rows[:, 0], slots=self.slots[:, 0])


def pack(
    batches: np.ndarray,
    lengths: np.ndarray,
    lane_of: np.ndarray,
    start_of: np.ndarray,
    *,
    lanes: int,
    slots: int,
    steps: int,
    batch_sizes: Sequence[int],
) -> Schedule:
    """Lays the clients' batches out on their lanes.

    Args:
      batches: (steps of all, B) int, client by client; -1 is padding, and last.
      lengths: (num_clients,) int64, the steps of each client; one without any is left out.
      lane_of: (num_clients,) int, the lane of each client.
      start_of: (num_clients,) int, its first step; lanes run their clients without a gap.
      lanes: L.
      slots: S, the client slots to pad to.
      steps: T, the steps to pad to.
      batch_sizes: the compiled ones, ascending; the last is B.
    """
    end_of = start_of + lengths
    rows = np.full((steps, lanes, batch_sizes[-1]), -1, np.int32)
    rows[consecutive(start_of, lengths), np.repeat(lane_of, lengths)] = batches
    fullest = (rows >= 0).sum(axis=2).max(axis=1)
    widths = np.searchsorted(batch_sizes, fullest).astype(np.int32)

    ran = np.flatnonzero(lengths)
    is_edge = np.bincount(end_of, minlength=1)
    is_edge[0] = 1
    edges = np.flatnonzero(is_edge)
    num_segments = len(edges) - 1
    bounds = _padded(edges, slots + 1, edges[-1])
    slot = np.full((slots, lanes), slots, np.int32)
    first, last = np.searchsorted(edges, [start_of, end_of])
    client = np.repeat(np.arange(len(lengths)), last - first)
    slot[consecutive(first, last - first), lane_of[client]] = client

    begins, ends = (ran[np.argsort(at[ran], kind="stable")] for at in (start_of, end_of))
    return Schedule(
        rows,
        widths,
        bounds,
        slot,
        lanes=_padded(lane_of, slots),
        starts=_padded(start_of, slots),
        begins=_padded(begins, slots),
        begun=np.searchsorted(start_of[begins], bounds).astype(np.int32),
        ends=_padded(ends, slots),
        ended=np.searchsorted(end_of[ends], bounds, side="right").astype(np.int32),
        num_segments=np.int32(num_segments),
    )


def _padded(values: np.ndarray, length: int, padding: int = 0) -> np.ndarray:
    padded = np.full(length, padding, np.int32)
    padded[: len(values)] = values
    return padded


def assign(lengths: Sequence[int] | np.ndarray, lanes: int) -> tuple[np.ndarray, np.ndarray]:
    """Longest-processing-time-first scheduling (Graham 1969): at most 4/3 of the shortest makespan.

    Args:
      lengths: steps of each client.
      lanes: number of lanes.

    Returns:
      (lane, start): int64 arrays (num_clients,), each client's lane and first step.
    """
    lane = np.zeros(len(lengths), np.int64)
    start = np.zeros(len(lengths), np.int64)
    free = [(0, index) for index in range(lanes)]
    for client in np.argsort(-np.asarray(lengths, np.int64), kind="stable"):
        start[client], lane[client] = heapq.heappop(free)
        heapq.heappush(free, (int(start[client] + lengths[client]), int(lane[client])))
    return lane, start


def batch_sizes(counts: np.ndarray, most: int) -> tuple[int, ...]:
    """Chooses up to `most` batch sizes to compile, so that small batches are padded to a smaller one.

    Args:
      counts: (B + 1,) int, how many batches hold 0, ..., B real examples.
      most: at most so many; a further size has to save another 5 % of the computed examples.

    Returns:
      Ascending; the last is B.
    """
    full = len(counts) - 1
    up_to = np.cumsum(counts)  # Batches that a size holds.
    best, cost = (full,), full * int(up_to[-1])
    while len(best) < min(most, full):
        # A size between two of the best takes over the batches that only the larger one has held.
        ends = np.array(best)[np.searchsorted(best, np.arange(full))]
        held = np.concatenate([[0], up_to[np.array(best[:-1], np.int64)]])
        before = held[np.searchsorted(best, np.arange(full))]
        saved = (ends - np.arange(full)) * (up_to[:full] - before)
        saved[[0, *best[:-1]]] = -1  # No sizes, or none that are new.
        size = int(saved.argmax())
        if cost - saved[size] > 0.95 * cost:
            break
        best, cost = tuple(sorted({*best, size})), cost - int(saved[size])
    return best
