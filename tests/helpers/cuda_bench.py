"""Processes and a helper over the driver double, for tests of the CUDA side without a GPU."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from checkpoint.cuda_channel import Helper
from checkpoint.cuda_helper import Cuda, Deadlines
from checkpoint.cuda_program import Request
from tests.helpers import cuda_double
from tests.helpers.cuda_double import UUID, World

ROOT = Path(__file__).resolve().parents[2]
OPEN_S = 30.0
# Generous for calls that succeed; tests of hangs make their own.
DEADLINES = Deadlines(open_s=OPEN_S, ask_s=20.0, move_s=20.0, lock_s=2.0, margin_s=20.0)


class Standing:
    """A real process that does nothing, registered with the double as what it stands for."""

    def __init__(self, bench: DoubleBench, kind: str, mib: int) -> None:
        self._bench = bench
        self._process = subprocess.Popen(["sleep", "infinity"])
        self.pid = self._process.pid
        if kind in ("initialised", "context"):
            bench.world.add(self.pid, mib)

    def tell(self, command: str) -> str:
        match command.split()[0]:
            case "busy" | "rest":
                self._bench.world.set(self.pid, busy=command == "busy")
            case "fork":
                return f"ok {self._bench.victim('plain').pid}"
        return "ok"

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


class DoubleBench:
    """See `tests.gpu.scenarios.Bench`."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._helper: Helper | None = None
        self._standing: list[Standing] = []

    def helper(self) -> Helper:
        if self._helper is None or not self._helper.alive:
            self._helper = Helper(cuda_double.MODULE, OPEN_S)
        return self._helper

    def cuda(self, deadlines: Deadlines = DEADLINES) -> Cuda:
        return Cuda(cuda_double.MODULE, deadlines)

    def other_helper(self) -> Helper:
        return Helper(cuda_double.MODULE, OPEN_S)

    def victim(self, kind: str = "context", mib: int = 64, environment: Mapping[str, str] | None = None) -> Standing:
        one = Standing(self, kind, mib)
        self._standing.append(one)
        return one

    def pids(self, count: int, *, mib: int = 64) -> list[int]:
        """So many CUDA processes."""
        return [self.victim(mib=mib).pid for _ in range(count)]

    def free_mib(self) -> int:
        devices = self.helper().ask(Request(call="devices"), OPEN_S).devices
        return next(one.free_bytes for one in devices if one.uuid == UUID) >> 20

    def close(self) -> None:
        for one in self._standing:
            one.end()
        if self._helper is not None:
            self._helper.close()


@contextmanager
def double_bench(folder: Path, patch: pytest.MonkeyPatch, gpus: dict[str, int] | None = None) -> Iterator[DoubleBench]:
    """A bench whose processes are gone afterwards. The helper finds the double and its world by the environment."""
    world = World.new(folder / "world.json", gpus)
    patch.setenv(cuda_double.FILE_VARIABLE, str(world.path))
    patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep))
    bench = DoubleBench(world)
    try:
        yield bench
    finally:
        bench.close()
