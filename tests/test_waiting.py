"""What is said where something takes long."""

from __future__ import annotations

import time

import pytest
from absl import logging

from fedexp import waiting
from fedexp.reporting import Observer
from tests.test_at_start import go


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(waiting, "AFTER", 0.05)
    before = logging.get_verbosity()
    logging.set_verbosity(logging.INFO)
    yield lines
    logging.set_verbosity(before)


def test_of_what_takes_long_only(said):
    with waiting.saying("nothing", said.append):
        pass
    with waiting.saying("sleeping", said.append):
        time.sleep(0.02 + waiting.AFTER)
        assert said == ["sleeping ..."]
    assert said == ["sleeping ...", "sleeping took 0 s"]


def test_not_of_what_fails_nor_where_nobody_wants_to_know(said):
    with pytest.raises(OSError), waiting.saying("failing", said.append):
        raise OSError
    logging.set_verbosity(logging.WARNING)
    with waiting.saying("sleeping", said.append):
        time.sleep(0.02 + waiting.AFTER)
    assert not said


def test_of_the_first_item_only(said):
    def slow():
        for number in range(3):
            time.sleep(0.02 + waiting.AFTER)
            yield number

    assert list(waiting.saying_first(slow(), "counting", said.append)) == [0, 1, 2]
    assert said == ["counting ...", "counting took 0 s"]
    assert not list(waiting.saying_first(iter(()), "nothing", said.append))


class Saying(Observer):
    def __init__(self):
        self.said = []

    def say(self, message):
        self.said.append(message)


def test_a_run_says_what_it_does_before_its_first_round(said, monkeypatch, caplog):
    monkeypatch.setattr(waiting, "AFTER", 0.0)
    caplog.set_level("INFO", "absl")
    observer = Saying()
    go(None, observer, num_rounds=1)
    told = [line for line in caplog.messages + observer.said if " took " in line]
    assert [line.split(" took ")[0] for line in told] == [
        "making the model",
        "placing the data on the devices",
        "preparing the evaluations",
        "preparing the evaluations",
        "tracing the evaluations",
        "telling the data from others",
        "opening the checkpoints",
        "preparing the first round",
        "evaluating the initial parameters",
        "compiling the first round",
        "running the first round",
    ]
