"""Random operations on a source and its mount for hours, daemons killed and replaced meanwhile, against a plain model.

The operations and the model are those of `tests/faults/test_state_machine.py` (`tests/helpers/world.py`), here with the
mount's own defaults: what changed must show soon. Several threads work, each in a folder of its own. Every interval a
line of JSON says what was done and what both processes hold; the last line sums up. Ends with status 1 as soon as the
mount shows something that the model does not, and says what was done before.

    python tools/soak.py --hours 8 | tee soak.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from dataclasses import asdict
from typing import Any, Final

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from tests.helpers.footprint import Footprint
from tests.helpers.mounting import Mount, weightfs
from tests.helpers.world import World
from tests.helpers.world_changes import CHANGES
from tests.helpers.world_uses import USES

_PATIENCE_S: Final = 2.0
_LONGEST: Final = 400
"""Operations in one folder before the next begins: a small tree has more that meets."""
_TOLD: Final = 60


class Worker(threading.Thread):
    """One thread and its worlds."""

    def __init__(self, number: int, seed: int, mount: Mount, ends: threading.Event) -> None:
        super().__init__(name=f"world-{number}", daemon=True)
        self._chosen = random.Random(seed * 1000 + number)
        self._number = number
        self._mount = mount
        self._ends = ends
        self.world: World | None = None
        self.worlds = 0
        self.stale = 0
        self.latencies: dict[str, list[float]] = {}
        self.done: deque[str] = deque(maxlen=_TOLD)
        self.fault = ""

    def run(self) -> None:
        """Until the end, or the first difference."""
        try:
            while not self._ends.is_set():
                self._live()
        except BaseException:  # noqa: BLE001 - told by whoever waits for us
            self.fault = traceback.format_exc()
            self._ends.set()

    def _live(self) -> None:
        self.worlds += 1
        name = f"world-{self._number}-{self.worlds}"
        source = os.path.join(self._mount.source, name)
        os.mkdir(source)
        world = World(
            source, self._mount.path(name), patience_s=_PATIENCE_S, cuts_are_stale=self._mount.engine == "portable"
        )
        self.world = world
        self.done.append(f"a new folder, {name}")
        try:
            for _ in range(_LONGEST):
                if self._ends.is_set():
                    return
                operation = self._chosen.choice(CHANGES if self._chosen.random() < 0.4 else USES)
                self.done.append(operation)
                world.do(operation, self._chosen)
            world.compare_all()
        finally:
            world.close()
            self.stale += world.stale
            for operation, times in world.latencies.items():
                self.latencies.setdefault(operation, []).extend(times)


class Soak:
    """The mount, its workers, and what is told of them."""

    def __init__(self, place: str, options: argparse.Namespace) -> None:
        self._options = options
        self._started = time.monotonic()
        self._ends = threading.Event()
        self._chosen = random.Random(options.seed)
        source = os.path.join(place, "source")
        os.mkdir(source)
        self.mount = Mount(source, os.path.join(place, "mount"), os.path.join(place, "state"), options.engine)
        self._workers = [Worker(n, options.seed, self.mount, self._ends) for n in range(options.threads)]
        self._kills = self._replaces = 0

    def run(self) -> bool:
        """Gives whether mount and model agreed to the end."""
        for worker in self._workers:
            worker.start()
        ends = self._started + self._options.hours * 3600
        tells = self._started
        while not self._ends.is_set() and time.monotonic() < ends:
            if time.monotonic() >= tells:
                self._tell()
                tells += self._options.interval
            self._ends.wait(self._chosen.uniform(0.2, 2) * self._options.every)
            if not self._ends.is_set():
                self._disturb()
        self._ends.set()
        for worker in self._workers:
            worker.join(60)
        faults = [worker for worker in self._workers if worker.fault or worker.is_alive()]
        self._tell(last=True)
        for worker in faults:
            print(f"{worker.name}: {worker.fault or 'hangs'}", file=sys.stderr)
            print("\n".join(worker.done), file=sys.stderr)
        return not faults

    def _disturb(self) -> None:
        if self._chosen.random() < 0.7:
            self.mount.kill_daemon()
            self._kills += 1
        else:
            mount = self.mount
            done = weightfs(
                "mount", "--replace", mount.source, mount.mountpoint, "--engine", mount.engine,
                "--state-dir", mount.state_dir,
            )  # fmt: skip
            if done.returncode:
                raise SystemExit(f"--replace: status {done.returncode}: {done.stderr}")
            self._replaces += 1

    def _tell(self, *, last: bool = False) -> None:
        times: dict[str, list[float]] = {}
        for worker in self._workers:
            for operation, some in worker.latencies.copy().items():
                times.setdefault(operation, []).extend(some)
        figures: dict[str, Any] = {
            "t_s": round(time.monotonic() - self._started, 1),
            "operations": sum(map(len, times.values())),
            "worlds": sum(worker.worlds for worker in self._workers),
            "kills": self._kills,
            "replaces": self._replaces,
            "stale_where_allowed": sum(worker.stale for worker in self._workers),
            **asdict(Footprint.of(self.mount.mountpoint)),
        }
        if last:
            figures["latencies_ms"] = {
                operation: {
                    "calls": len(some),
                    "p50": round(sorted(some)[len(some) // 2] * 1e3, 3),
                    "p99": round(sorted(some)[len(some) * 99 // 100] * 1e3, 3),
                    "slowest": round(max(some) * 1e3, 3),
                }
                for operation, some in sorted(times.items())
            }
        print(json.dumps(figures), flush=True)


def main() -> None:
    """Run it."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--hours", type=float, default=8.0)
    options.add_argument("--interval", type=float, default=60.0, help="seconds between two lines (default 60)")
    options.add_argument("--every", type=float, default=4.0, help="seconds between two disturbances, about (default 4)")
    options.add_argument("--threads", type=int, default=4)
    options.add_argument("--engine", choices=("auto", "passthrough", "portable"), default="auto")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--folder", default=None, help="where to work (default: the folder for temp files)")
    given = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="weightfs-soak-", dir=given.folder) as place:
        soak = Soak(place, given)
        with soak.mount:
            agreed = soak.run()
            soak.mount.log_must_be_clean = False
    sys.exit(not agreed)


if __name__ == "__main__":
    main()
