"""The real driver and real CUDA processes for `scenarios.py`."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from checkpoint.cuda_channel import Helper
from checkpoint.cuda_helper import REAL_DRIVER
from checkpoint.cuda_program import Request

CHILD = Path(__file__).with_name("child.py")
ANSWER_S = 90.0
"""16 GB read back and compared took 17 s; a machine whose memory is short is slower."""
END_S = 60.0
"""The driver may hold a killed process until it has given its GPU memory back; one held longer is a failure."""


class Child:
    """A process of `child.py`, in a session of its own so that what it forks ends with it."""

    def __init__(self, kind: str, mib: int, environment: Mapping[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(CHILD), kind, str(mib)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            bufsize=0,
            env=os.environ | dict(environment or {}),
        )
        self.pid = self._process.pid
        if not self._line().startswith("ok"):
            raise RuntimeError(f"a {kind} process did not start")

    def tell(self, command: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(command.encode() + b"\n")
        return self._line()

    def end(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait(END_S)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def _line(self) -> str:
        """What it says next; `silent` if that does not come, `gone` if it ended."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], ANSWER_S)[0]:
            return f"silent for {ANSWER_S:.0f} s"
        return self._process.stdout.readline().decode().strip() or "gone"


class RealBench:
    """See `scenarios.Bench`."""

    def __init__(self) -> None:
        self._helper: Helper | None = None
        self._children: list[Child] = []

    def helper(self) -> Helper:
        if self._helper is None or not self._helper.alive:
            self._helper = Helper(REAL_DRIVER, 120)
        return self._helper

    def other_helper(self) -> Helper:
        return Helper(REAL_DRIVER, 120)

    def victim(self, kind: str, mib: int = 0, environment: Mapping[str, str] | None = None) -> Child:
        child = Child(kind, mib, environment)
        self._children.append(child)
        return child

    def free_mib(self) -> int:
        return self.helper().ask(Request(call="devices"), 30).devices[0].free_bytes >> 20

    def close(self) -> None:
        with ExitStack() as left:  # one that does not end keeps no other
            if self._helper is not None:
                left.callback(self._helper.close)
            for child in self._children:
                left.callback(child.end)


@contextmanager
def real_bench() -> Iterator[RealBench]:
    """A bench whose processes are gone afterwards."""
    bench = RealBench()
    try:
        yield bench
    finally:
        bench.close()
