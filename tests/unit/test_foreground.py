"""Signals of a command in the foreground, before and while it has a process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from checkpoint.foreground import Foreground, Interrupted
from checkpoint.processes import start_ticks

PROGRAM = """
import signal, sys
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(3))
print("ready", flush=True)
signal.pause()
"""


def ask(*numbers: signal.Signals) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


def test_one_that_came_before_anything_could_be_undone_is_not_lost() -> None:
    with Foreground() as parent:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGWINCH)
        with pytest.raises(Interrupted) as interrupted, parent.hold():
            pytest.fail("it went on")
    assert interrupted.value.number == signal.SIGTERM


def test_the_first_that_ends_interrupts_and_others_wait() -> None:
    with Foreground() as parent:
        with pytest.raises(Interrupted) as interrupted, parent.hold():
            ask(signal.SIGUSR1, signal.SIGHUP)
        assert interrupted.value.number == signal.SIGHUP


def test_what_was_held_reaches_the_process() -> None:
    with Foreground() as parent:
        with parent.hold():
            os.kill(os.getpid(), signal.SIGUSR1)
            child = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE)
            assert child.stdout is not None
            assert child.stdout.readline() == b"ready\n"
            parent.adopt(child.pid)
            child.returncode = 0
        assert parent.wait() == 3
        child.stdout.close()


def test_after_it_everything_is_as_it_was() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Foreground():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


ENDING = """
import subprocess
from checkpoint.foreground import Foreground
with Foreground() as parent:
    child = subprocess.Popen(["sh", "-c", "sleep 1000 & echo $!; wait"], stdout=subprocess.PIPE)
    print(child.pid, child.stdout.readline().decode(), flush=True)
    parent.end_children()
    child.returncode = 0
"""


def test_the_children_of_its_children_end_with_them() -> None:
    """As when a whole tree was restored before the signal came."""
    done = subprocess.run([sys.executable, "-c", ENDING], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    assert [start_ticks(pid) for pid in pids] == [None, None]
