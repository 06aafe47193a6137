"""Processes of a launcher: seen to end, and reaped with all that they have started."""

import os
import signal
import subprocess
import sys

import pytest

from fedexp import children
from tests.support.tensorboard import eventually

OBEYING_OR_NOT = """
import signal, sys, time
signal.signal(signal.SIGTERM, {handler})
print("ready", flush=True)
time.sleep(1000)
"""
# Watches the program that its arguments are.
WATCHER = "import os, sys; from fedexp import children; sys.exit(children.watch(os.getppid(), sys.argv[1:]))"

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


@pytest.mark.parametrize("code", [0, 3, -signal.SIGKILL])
def test_a_watched_programs_exit_code_is_passed_on(code):
    ending = f"sys.exit({code})" if code >= 0 else f"os.kill(os.getpid(), {-code})"
    ended = subprocess.run(watched(f"import os, sys; {ending}"))
    assert ended.returncode == (code if code >= 0 else 128 - code)


def test_a_watched_program_has_the_signals_of_its_group():
    child = subprocess.Popen(
        watched(OBEYING_OR_NOT.format(handler="lambda *_: sys.exit(7)")),
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert child.stdout.readline() == b"ready\n"
    children.signal_group(child, signal.SIGTERM)
    assert child.wait(timeout=60) == 7
    child.stdout.close()


@pytest.mark.parametrize("by_kernel", [True, False])
def test_a_program_dies_with_its_launcher(by_kernel):
    if by_kernel and sys.platform != "linux":
        pytest.skip("only Linux does so")
    program = OBEYING_OR_NOT.format(handler="signal.SIG_IGN")
    command = "children.settled(sys.argv[1:])" if by_kernel else "sys.argv[1:]"
    launching = f"import subprocess, sys; from fedexp import children; subprocess.run({command})"
    arguments = [sys.executable, "-c", program] if by_kernel else watched(program)
    launcher = subprocess.Popen(
        [sys.executable, "-c", launching, *arguments], stdout=subprocess.PIPE
    )
    assert launcher.stdout.readline() == b"ready\n"
    launcher.kill()
    assert launcher.communicate(timeout=60)[0] == b""  # Ends once no process holds the pipe.


def watched(program: str) -> list[str]:
    return [sys.executable, "-c", WATCHER, sys.executable, "-c", program]
