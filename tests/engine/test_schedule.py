"""The schedule's promises, checked by replaying it."""

from __future__ import annotations

import sys

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedexp.engine import schedule as schedule_lib

lengths_of_clients = st.lists(st.integers(1, 12), min_size=1, max_size=12)
lanes = st.integers(1, 6)


def batches_of(lengths: list[int], batch_size: int = 3) -> np.ndarray:
    """Client c's batch t holds the row 100 c + t, and padding."""
    batches = [np.zeros((0, batch_size), np.int64)]
    for client, length in enumerate(lengths):
        rows = np.full((length, batch_size), -1)
        rows[:, 0] = 100 * client + np.arange(length)
        batches.append(rows)
    return np.concatenate(batches)


def replay(schedule: schedule_lib.Schedule) -> dict[int, list[int]]:
    """Runs the schedule as the engine would; returns each client slot's rows in order."""
    finished: dict[int, list[int]] = {}
    num_slots, num_lanes = schedule.slots.shape
    running: dict[int, tuple[int, list[int]]] = {}  # By lane.
    for s in range(int(schedule.num_segments)):
        begin, end = schedule.bounds[s], schedule.bounds[s + 1]
        assert begin < end
        for slot in schedule.begins[schedule.begun[s] : schedule.begun[s + 1]].tolist():
            assert schedule.starts[slot] == begin
            assert running.setdefault(int(schedule.lanes[slot]), (slot, [])) == (slot, [])
        for lane in range(num_lanes):
            rows = schedule.rows[begin:end, lane, 0]
            if lane in running:
                assert schedule.slots[s, lane] == running[lane][0]
                running[lane][1].extend(rows.tolist())
            else:
                assert schedule.slots[s, lane] == num_slots
                assert (rows == -1).all()
        for slot in schedule.ends[schedule.ended[s] : schedule.ended[s + 1]].tolist():
            mine, rows = running.pop(int(schedule.lanes[slot]))
            assert mine == slot and slot not in finished
            finished[slot] = rows
    assert not running
    return finished


def packed(lengths: list[int], num_lanes: int, more_slots: int = 0, more_steps: int = 0):
    lane_of, start_of = schedule_lib.assign(lengths, num_lanes)
    lengths = np.array(lengths, np.int64)
    return schedule_lib.pack(
        batches_of(lengths),
        lengths,
        lane_of,
        start_of,
        lanes=num_lanes,
        slots=len(lengths) + more_slots,
        steps=int((start_of + lengths).max(initial=0)) + more_steps,
        batch_sizes=(3,),
    )


@given(st.lists(st.integers(0, 12), max_size=12), lanes, st.integers(0, 3), st.integers(0, 5))
def test_every_client_runs_once_whole_and_in_order(lengths, num_lanes, more_slots, more_steps):
    schedule = packed(lengths, num_lanes, more_slots, more_steps)
    expected = {
        client: [100 * client + t for t in range(length)]
        for client, length in enumerate(lengths)
        if length
    }
    assert replay(schedule) == expected
    assert (schedule.rows[schedule.bounds[schedule.num_segments] :] == -1).all()


@given(lengths_of_clients, lanes)
def test_longest_first_is_within_grahams_bound(lengths, num_lanes):
    schedule = packed(lengths, num_lanes)
    steps = schedule.bounds[schedule.num_segments]
    # No schedule is shorter than the mean load or the longest client (Graham 1969).
    assert steps >= max(max(lengths), sum(lengths) / num_lanes)
    assert steps <= sum(lengths) / num_lanes + max(lengths) * (1 - 1 / num_lanes)


def test_a_segment_ends_only_where_a_client_ends():
    schedule = packed([4, 2, 2], 2)
    assert schedule.num_segments == 2
    assert schedule.bounds.tolist() == [0, 2, 4, 4]
    assert schedule.slots[:2].tolist() == [[0, 1], [0, 2]]


@given(st.lists(st.integers(0, 50), min_size=2, max_size=12))
def test_two_batch_sizes_are_the_best_two_or_one(counts):
    """Against trying them all; the largest is kept, and a small gain is not worth compiling for."""
    full = len(counts) - 1

    def computed(*sizes):
        fits = [min(size for size in sizes if size >= real) for real in range(full + 1)]
        return sum(size * count for size, count in zip(fits, counts, strict=True))

    chosen = schedule_lib.batch_sizes(np.array(counts), most=2)
    best = min(computed(size, full) for size in range(1, full + 1))
    worth = best <= 0.95 * computed(full) and full > 1
    assert computed(*chosen) == (best if worth else computed(full))
    assert list(chosen) == sorted(chosen) and chosen[-1] == full


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=30), st.integers(1, 6))
def test_batch_sizes_are_added_one_by_one_the_best_first(counts, most):
    """Against trying every further size."""
    full, real = len(counts) - 1, np.arange(len(counts))

    def computed(sizes):
        return int(np.array(sizes)[np.searchsorted(sizes, real)] @ counts)

    best = (full,)
    while len(best) < min(most, full):
        more = [tuple(sorted({*best, size})) for size in range(1, full) if size not in best]
        better = min(more, key=computed)
        if computed(better) > 0.95 * computed(best):
            break
        best = better
    assert schedule_lib.batch_sizes(np.array(counts), most) == best


def test_batch_sizes_of_a_million_are_chosen_at_once():
    """By a few operations on arrays: there is no loop over sizes."""
    counts = np.zeros(1_000_001, np.int64)
    counts[[300_000, 1_000_000]] = 5, 1
    events = []
    sys.setprofile(lambda *event: events.append(event[1]))
    try:
        chosen = schedule_lib.batch_sizes(counts, 3)
    finally:
        sys.setprofile(None)
    assert chosen == (300_000, 1_000_000)
    assert 0 < len(events) < 1000


def test_a_step_is_as_wide_as_its_largest_batch():
    batches = np.array([[0, 1, 2, 3], [4, -1, -1, -1], [5, 6, -1, -1]])
    for lane_of, start_of, widths in (
        ([0, 1], [0, 0], [2, 0]),
        ([0, 0], [0, 2], [2, 0, 1]),
    ):
        schedule = schedule_lib.pack(
            batches,
            np.array([2, 1]),
            np.array(lane_of),
            np.array(start_of),
            lanes=2,
            slots=2,
            steps=len(widths),
            batch_sizes=(1, 2, 4),
        )
        assert schedule.widths.tolist() == widths
