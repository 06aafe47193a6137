"""What ends a worker process, and what is said of it."""

import os
import signal
import sys
import time

import pytest

from fedexp.data import workers
from fedexp.errors import UserError


def _wait_and_loop():
    workers.LIMIT_S = 0.2
    with workers.limited():
        time.sleep(0.5)  # Waiting for a disk does not count.
    print("waited", file=sys.stderr, flush=True)
    with workers.limited():
        sum(range(10**12))  # Python gets no chance to look at signals, as in a library that hangs.


def _crash():
    os.kill(os.getpid(), signal.SIGSEGV)


@pytest.mark.parametrize(
    ("function", "message", "said"),
    [
        (
            _wait_and_loop,
            "took more than 60 s of CPU time at one place, .* get it again",
            1,
        ),
        (_crash, "exit code -11, a crash: the file is probably damaged; get it again", 0),
    ],
)
def test_one_line_for_whatever_ends_it(function, message, said, capfd):
    with pytest.raises(UserError, match=f"reading it: .*{message}") as caught:
        workers.run("reading it", function)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err.count("waited") == said


def test_there_is_no_limit_outside_of_workers(monkeypatch):
    monkeypatch.setattr(workers, "LIMIT_S", 0.01)
    with workers.limited():
        assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)
