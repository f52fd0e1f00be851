"""A real memory control group at its limit: the budget knows it, the pressure on it is noticed, and nobody dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefetch import pressure
from prefetch.pressure import Pressure
from tests.helpers.groups import limited_group
from tests.helpers.mounting import child
from weightfs.memory import MemoryGroup

MIB = 1 << 20
LIMIT = 128 * MIB

JOIN = """
import json, os, sys, time
folder, path = sys.argv[1:]
with open(folder + "/cgroup.procs", "w") as joined:
    joined.write(str(os.getpid()))
"""


@pytest.fixture
def group() -> Iterator[MemoryGroup]:
    with limited_group(LIMIT) as made:
        yield made


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Three times the limit, on the disk and not in memory."""
    path = tmp_path / "weights"
    with path.open("wb") as file:
        for _ in range(3 * LIMIT // MIB):
            file.write(os.urandom(MIB))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return path


def in_group(group: MemoryGroup, weights: Path, code: str) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-c", JOIN + code, group.path, str(weights)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, f"{done.returncode}: {done.stderr}"
    return dict(json.loads(done.stdout))


def test_the_budget_is_half_of_what_the_group_leaves(group: MemoryGroup, weights: Path) -> None:
    found = in_group(
        group,
        weights,
        """
import msgspec
from prefetch.budget import effective_budget
before = effective_budget()
fd = os.open(path, os.O_RDONLY)
os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
for at in range(0, 64 << 20, 1 << 20):
    os.pread(fd, 1 << 20, at)
after = effective_budget()
print(json.dumps({"before": msgspec.to_builtins(before), "after": msgspec.to_builtins(after)}))
""",
    )
    before, after = found["before"], found["after"]
    assert isinstance(before, dict)
    assert isinstance(after, dict)
    assert before["cgroup"] == group.path
    assert before["cgroup_limit_bytes"] == LIMIT
    assert LIMIT // 4 < before["nbytes"] <= LIMIT // 2
    assert group.path in before["limited_by"]
    assert after["nbytes"] > LIMIT // 4, "what was read ahead counts as free: 64 MiB of it"


def test_a_limit_met_is_noticed_within_a_second(group: MemoryGroup, weights: Path) -> None:
    """The reader stands for the filler: it reads three times what the group may hold, and lives."""
    found = in_group(
        group,
        weights,
        """
from prefetch.pressure import Pressure
with Pressure(triggers=False) as pressure:
    assert pressure.check() is None, pressure.check()
    fd = os.open(path, os.O_RDONLY)
    at = met_s = 0
    reason, asked_s = None, time.monotonic()
    failures = folder + ("/memory.failcnt" if os.path.exists(folder + "/memory.failcnt") else "/memory.events")
    quiet = open(failures).read()
    while reason is None and at < os.fstat(fd).st_size:
        at += len(os.pread(fd, 1 << 20, at))
        if not met_s and open(failures).read() != quiet:
            met_s = time.monotonic()
        if time.monotonic() - asked_s >= 0.25:
            asked_s = time.monotonic()
            reason = pressure.check()
    if reason is None:
        time.sleep(max(0, asked_s + 0.25 - time.monotonic()))
        reason = pressure.check()
    after_s = time.monotonic() - met_s
print(json.dumps({"kind": reason and reason.kind, "detail": reason and reason.detail, "after_s": after_s, "at": at}))
""",
    )
    print(found)
    assert found["kind"] == "limit", found
    assert group.path in str(found["detail"])
    assert isinstance(found["after_s"], float)
    assert found["after_s"] < 3, "a second, on a machine of its own"


THRASH = """
import mmap
fd = os.open(path, os.O_RDONLY)
mapped = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
print("runs", flush=True)
ends = time.monotonic() + 60
while time.monotonic() < ends:
    sum(mapped[at] for at in range(0, len(mapped), 4096))
"""


@pytest.mark.parametrize("triggers", [True, False], ids=["trigger", "sampled"])
def test_tasks_that_wait_for_memory(
    group: MemoryGroup, weights: Path, monkeypatch: pytest.MonkeyPatch, triggers: bool
) -> None:
    """A process that faults in more than its group may hold, again and again, waits: PSI of the machine says so."""
    if not os.path.exists("/proc/pressure/memory"):
        pytest.skip("this machine lacks pressure stall information (PSI)")
    # Windows of 2 s are for everyone, shorter ones take CAP_SYS_RESOURCE.
    monkeypatch.setattr(pressure, "WINDOW_US", 2_000_000)
    monkeypatch.setattr(pressure, "STALL_US", 20_000)
    with Pressure(triggers=triggers) as watched:
        assert watched.sources["/proc/pressure/memory"] == ("trigger" if triggers else "sampled")
        with child(JOIN + THRASH, group.path, str(weights)) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "runs\n"
            began = time.monotonic()
            while (reason := watched.check()) is None:
                assert time.monotonic() - began < 30, Path("/proc/pressure/memory").read_text()
                time.sleep(0.25)
    print(f"{reason} after {time.monotonic() - began:.2f} s")
    assert reason.kind in ("stall", "limit")


def test_what_is_pinned_outlives_what_is_read(group: MemoryGroup, weights: Path) -> None:
    """Twice three times what the group may hold is read; a part that was read once and not pinned is gone by then."""
    found = in_group(
        group,
        weights,
        """
from prefetch.pins import Pins
from tests.helpers.page_cache import resident_bytes
part = 16 << 20
with open(path, "rb") as file:
    fd = file.fileno()
    pins = Pins()
    pinned = pins.pin("hot", fd, [(0, part)])
    os.pread(fd, part, part)
    for _ in range(2):
        for at in range(2 * part, os.fstat(fd).st_size, 1 << 20):
            os.pread(fd, 1 << 20, at)
print(json.dumps({
    "pinned": pinned, "hot": resident_bytes(path, 0, part), "cold": resident_bytes(path, part, part)
}))
""",
    )
    assert found["pinned"] == found["hot"] == 16 * MIB
    assert isinstance(found["cold"], int)
    assert found["cold"] < 4 * MIB
