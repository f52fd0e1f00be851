"""Of a process that is held one thread runs, and none on its own; with its tracer it dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoint.errors import CheckpointError
from checkpoint.holding import Holding
from checkpoint.processes import is_stopped, start_ticks
from tests.helpers.mounting import wait_until

COUNTS = """
import mmap, os, sys, threading, time
with open(sys.argv[1], "r+b") as file:
    shown = mmap.mmap(file.fileno(), 0)
def count(number):
    at = 16 * number
    shown[at + 8:at + 16] = threading.get_native_id().to_bytes(8, "little")
    if number != 1:
        os.read(0, 1)  # without the interpreter, which the other one needs
    value = 0
    while True:
        value += 1
        shown[at:at + 8] = value.to_bytes(8, "little")
        if number == 1 and shown[4000]:  # not before it is held, or it might wait for one that is held
            thread = threading.Thread(target=int)
            thread.start()
            thread.join()
        time.sleep(0.001)
for number in range(3):
    threading.Thread(target=count, args=(number,), daemon=True).start()
threading.Event().wait()
"""
TRACES = """
import os, sys
from checkpoint.holding import Holding
with Holding([int(sys.argv[1])], {int(sys.argv[1]): int(sys.argv[2])}) as holding:
    holding.begin()
    print("held", flush=True)
    sys.stdin.read()
"""


class Counters:
    """A process with three threads that count: the second one at once, the others when they are told to."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(bytes(4096))
        self._path = path
        self.process = subprocess.Popen([sys.executable, "-c", COUNTS, str(path)], stdin=subprocess.PIPE)
        self.pid = self.process.pid

    def counts(self) -> list[int]:
        return [self._number(16 * number) for number in range(3)]

    def thread(self, number: int) -> int:
        return self._number(16 * number + 8)

    def _number(self, at: int) -> int:
        return int.from_bytes(self._path.read_bytes()[at : at + 8], "little")

    def tell(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b"gg")
        self.process.stdin.flush()

    def start_threads(self) -> None:
        with self._path.open("r+b") as file:
            file.seek(4000)
            file.write(b"1")

    def count_on(self, *numbers: int) -> None:
        before = self.counts()
        wait_until(lambda: all(self.counts()[n] > before[n] + 20 for n in numbers), "they count")

    def stop(self) -> None:
        wait_until(lambda: self.thread(0) and self.thread(2) and self.counts()[1] > 20, "they count")
        os.kill(self.pid, signal.SIGSTOP)
        wait_until(lambda: is_stopped(self.pid), "it is stopped")


@pytest.fixture
def counters(tmp_path: Path) -> Iterator[Counters]:
    one = Counters(tmp_path / "counts")
    one.stop()
    try:
        yield one
    finally:
        with one.process:
            one.process.kill()


def test_one_thread_runs_and_starts_others(counters: Counters) -> None:
    counters.tell()
    with Holding([counters.pid], {counters.pid: counters.thread(1)}) as holding:
        holding.begin()
        counters.start_threads()
        counters.count_on(1)
        os.kill(counters.pid, signal.SIGTERM)  # comes when all of it runs
        counters.count_on(1)
        holding.finish()
        before = counters.counts()
        assert (before[0], before[2]) == (0, 0)
        time.sleep(0.05)
        assert counters.counts() == before
        holding.let_go()
    wait_until(lambda: counters.process.poll() is not None, "the signal has come")


def test_it_goes_on_as_it_was(counters: Counters) -> None:
    counters.tell()
    with Holding([counters.pid], {counters.pid: counters.thread(1)}) as holding:
        holding.begin()
        counters.count_on(1)
        holding.finish()
        holding.let_go()
    counters.count_on(0, 1, 2)


def test_without_a_runner_it_stays_stopped(counters: Counters) -> None:
    with Holding([counters.pid], {}) as holding:
        holding.begin()
        holding.finish()
        holding.let_go()
    wait_until(lambda: is_stopped(counters.pid), "it is stopped again")


@pytest.mark.parametrize("runs", [True, False])
def test_what_fails_kills_it(counters: Counters, runs: bool) -> None:
    def fail() -> None:
        with Holding([counters.pid], {counters.pid: counters.thread(1)}) as holding:
            if runs:
                holding.begin()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert start_ticks(counters.pid) is None, "whoever traces it, here its parent, has waited for it"


def test_a_process_that_is_killed_meanwhile(counters: Counters) -> None:
    def fail() -> None:
        with Holding([counters.pid], {counters.pid: counters.thread(1)}) as holding:
            holding.begin()
            os.kill(counters.pid, signal.SIGKILL)
            holding.finish()

    with pytest.raises(CheckpointError):
        fail()
    assert start_ticks(counters.pid) is None


def test_one_that_is_traced_already(counters: Counters) -> None:
    with Holding([counters.pid], {}) as holding:
        code = f"from checkpoint.holding import Holding\nwith Holding([{counters.pid}], {{}}): pass"
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "can't be traced" in other.stderr
        holding.let_go()
    wait_until(lambda: is_stopped(counters.pid), "it is stopped again")


def test_it_dies_with_its_tracer(counters: Counters) -> None:
    argv = [sys.executable, "-c", TRACES, str(counters.pid), str(counters.thread(1))]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as tracer:
        assert tracer.stdout is not None
        assert tracer.stdout.readline() == b"held\n"
        tracer.kill()
        assert counters.process.wait(10) == -signal.SIGKILL
