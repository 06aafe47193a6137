"""Processes of a launcher: seen to end, and reaped with all that they have started."""

import os
import subprocess
import sys

import pytest

from fedexp import children
from tests.support.tensorboard import eventually

# Ends while a process of its own, which holds the pipe open, goes on.
LEAVES_ONE_BEHIND = """
import subprocess, sys
input()
subprocess.Popen(["sleep", "1000"], stdout=sys.stdout)
sys.exit(7)
"""


@pytest.mark.parametrize("waitid", [True, False])
def test_an_ended_child_is_reaped_with_its_group(monkeypatch, waitid):
    if not waitid:
        monkeypatch.delattr(os, "waitid", raising=False)
    elif not hasattr(os, "waitid"):
        pytest.skip("there is no os.waitid here")
    child = subprocess.Popen(
        [sys.executable, "-c", LEAVES_ONE_BEHIND],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert not children.has_ended(child)
    child.stdin.write(b"go on\n")
    child.stdin.close()
    eventually(lambda: children.has_ended(child), timeout=60)
    assert children.has_ended(child)
    assert children.reap(child) == 7
    assert child.stdout.read() == b""  # Ends once no process holds the pipe.
    child.stdout.close()
