"""Profiles: which rounds are recorded, where the record goes, and what is refused."""

from __future__ import annotations

import fsspec
import jax
import optax
import pytest

from fedexp import config
from fedexp.algorithms import fedavg
from fedexp.data import uniform
from fedexp.errors import UserError
from fedexp.profiling import ProfilePlan, recorded
from fedexp.trainer import Experiment
from tests.support import linear


def run(workdir, plan, num_rounds=4, **options):
    task = linear.task()
    experiment = Experiment(
        linear.splits(),
        task,
        fedavg(task, optax.sgd(0.05), optax.sgd(1.0)),
        num_rounds,
        uniform(2),
        profile=plan,
        observers=[],
        **options,
    )
    return experiment.run(workdir)


def profiles(workdir):
    return sorted(workdir.glob("plugins/profile/*/*.xplane.pb"))


def rounds_in(profile):
    """The numbers of the rounds that a profile has on the host's thread."""
    return sorted(
        dict(event.stats)["step_num"]
        for plane in jax.profiler.ProfileData.from_file(str(profile)).planes
        for line in plane.lines
        for event in line.events
        if event.name == "round"
    )


def count_up(done, stop):
    yield from range(done, stop)


def go_through(plan, workdir, done=0, stop=5):
    waits = []
    rounds = recorded(
        count_up(done, stop), plan, workdir, done=done, wait=lambda: waits.append(None)
    )
    assert list(rounds) == list(range(done, stop))
    return len(waits)


def test_a_run_records_the_planned_rounds_and_ends_as_without(tmp_path):
    plain, profiled = (run(tmp_path / str(plan), plan) for plan in (None, ProfilePlan((2, 3))))
    (profile,) = profiles(tmp_path / str(ProfilePlan((2, 3))))
    assert rounds_in(profile) == [2, 3]
    assert profiled.history == plain.history
    assert not profiles(tmp_path / "None")


def test_a_resumed_run_records_what_is_left(tmp_path):
    go_through(ProfilePlan((2, 4)), tmp_path / "within", done=3)
    (profile,) = profiles(tmp_path / "within")
    assert rounds_in(profile) == [4]
    assert go_through(ProfilePlan((2, 3)), tmp_path / "after", done=3) == 0
    assert not profiles(tmp_path / "after")


def test_rounds_on_their_way_are_waited_for_at_both_ends(tmp_path):
    assert go_through(ProfilePlan((2, 3)), tmp_path) == 2


def test_a_run_that_stops_early_leaves_its_profile(tmp_path):
    rounds = recorded(count_up(0, 9), ProfilePlan((1, 9)), tmp_path, done=0, wait=lambda: None)
    next(rounds)
    rounds.close()
    (profile,) = profiles(tmp_path)
    assert rounds_in(profile) == [1]


def test_a_bucket_gets_its_profile():
    go_through(ProfilePlan((1, 2)), "memory://bucket/run")
    found = fsspec.filesystem("memory").glob("/bucket/run/plugins/profile/*/*.xplane.pb")
    assert len(found) == 1


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "plugins").write_text("in the way")
    with pytest.raises(UserError, match=f"cannot write the profile to {tmp_path}"):
        go_through(ProfilePlan((1, 2)), tmp_path)


@pytest.mark.parametrize("rounds", [(0, 3), (5, 3), (3,), 4, (1, 2, 3), ("a", 2)])
def test_rounds_that_are_no_range_are_refused(rounds):
    with pytest.raises(UserError, match="ProfilePlan.rounds must be"):
        ProfilePlan(rounds)


def test_rounds_that_will_not_come_are_refused_before_any_work(tmp_path):
    with pytest.raises(UserError, match=r"\(3, 5\), but train.num_rounds is 4"):
        run(tmp_path, ProfilePlan())
    with pytest.raises(UserError, match="needs a --workdir"):
        run(None, ProfilePlan((1, 2)))
    assert not list(tmp_path.iterdir())


def test_gin_binds_the_rounds(tmp_path):
    config.load(
        ["tests/support/linear.gin"],
        ["train.profile = @ProfilePlan()", "ProfilePlan.rounds = (2, 2)"],
    )
    Experiment(observers=[]).run(tmp_path)
    (profile,) = profiles(tmp_path)
    assert rounds_in(profile) == [2]
