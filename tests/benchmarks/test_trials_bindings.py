"""A sample of the trials with mutated bindings, as far as nothing is built."""

from __future__ import annotations

import itertools

from benchmarks.trials import bindings as trials


def test_mutated_bindings_are_fine_or_refused_in_one_line():
    outcomes = {"ok": 0, "refused": 0}
    for trial in itertools.islice(trials.mutations(seed=7), 300):
        outcome, said = trials.checked(trial)
        assert outcome in outcomes, (trial, said)
        outcomes[outcome] += 1
    assert min(outcomes.values()) > 20
    assert trials.checked(trials.Trial(trials.CONFIGS[0], trials.SMALL)) == ("ok", "")
