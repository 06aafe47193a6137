"""The schedule's promises, checked by replaying it."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedexp.strategies import schedule as schedule_lib

lengths_of_clients = st.lists(st.integers(1, 12), min_size=0, max_size=12)
lanes = st.integers(1, 6)


def batches_of(lengths: list[int], batch_size: int = 3) -> list[np.ndarray]:
    """Client c's batch t holds the row 100 c + t, and padding."""
    batches = []
    for client, length in enumerate(lengths):
        rows = np.full((length, batch_size), -1)
        rows[:, 0] = 100 * client + np.arange(length)
        batches.append(rows)
    return batches


def replay(schedule: schedule_lib.Schedule) -> dict[int, list[int]]:
    """Runs the schedule as the engine would; returns each client slot's rows in order."""
    finished, running = {}, {}
    num_lanes = schedule.slots.shape[1]
    for s in range(int(schedule.num_segments)):
        begin, end = schedule.bounds[s], schedule.bounds[s + 1]
        assert begin < end
        for lane in range(num_lanes):
            slot = int(schedule.slots[s, lane])
            rows = schedule.rows[begin:end, lane, 0]
            if slot == len(schedule.slots):
                assert (rows == -1).all()
                assert not schedule.ends[s, lane]
                continue
            if schedule.starts[s, lane] == begin:
                assert slot not in running
                running[slot] = []
            running[slot].extend(rows.tolist())
            if schedule.ends[s, lane]:
                finished[slot] = running.pop(slot)
    assert not running
    return finished


def packed(lengths: list[int], num_lanes: int, more_slots: int = 0, more_steps: int = 0):
    lane_of, start_of = schedule_lib.assign(lengths, num_lanes)
    longest = int((start_of + np.array(lengths, np.int64)).max(initial=0))
    return schedule_lib.pack(
        batches_of(lengths),
        lane_of,
        start_of,
        lanes=num_lanes,
        slots=len(lengths) + more_slots,
        steps=longest + more_steps,
        batch_size=3,
    )


@given(lengths_of_clients, lanes, st.integers(0, 3), st.integers(0, 5))
def test_every_client_runs_once_whole_and_in_order(lengths, num_lanes, more_slots, more_steps):
    schedule = packed(lengths, num_lanes, more_slots, more_steps)
    expected = {
        client: [100 * client + t for t in range(length)] for client, length in enumerate(lengths)
    }
    assert replay(schedule) == expected
    assert (schedule.rows[schedule.bounds[schedule.num_segments] :] == -1).all()


@given(lengths_of_clients.filter(len), lanes)
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
