"""Real processes whose memory the page server fills in."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoint import userfaultfd
from checkpoint.pages import Part, PlainPages
from checkpoint.processes import tree_of
from checkpoint.userfaultfd import Event
from tests.helpers.paged import back, dumped, needs_userfaultfd
from tests.helpers.targets import needs_criu, target

pytestmark = [needs_criu, needs_userfaultfd]

HASHES = """
import hashlib
ballast = bytearray(os.urandom(1 << 20)) * 48
while True:
    tell(hashlib.sha256(ballast).hexdigest())
    wait()
"""


@pytest.mark.parametrize("threads", [1, 4, None])
def test_memory_is_what_it_was(tmp_path: Path, threads: int | None) -> None:
    with target(HASHES, tmp_path) as hasher:
        before = hasher.said()
        one = dumped(hasher, tmp_path)
        filled = back(one, threads=threads)
        os.kill(hasher.pid, signal.SIGCONT)
        assert hasher.ask() == before
        assert filled.bytes_copied > 48 << 20


CHURNS = """
import hashlib, random
pages = [os.urandom(4096) for _ in range(64)]
kept = bytearray(b"".join(pages)) * 96
want = hashlib.sha256(kept).hexdigest()
regions = [mmap.mmap(-1, 2 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(48)]
for number, region in enumerate(regions):
    region[:] = bytes([number + 1]) * len(region)
faulty = []
def see(what, region, number, low, high, want):
    if bytes(region[low:high]) != bytes([want]) * (high - low):
        faulty.append(f"{what} {number}")
def churn(number, region):
    half = len(region) // 2
    fate = number % 4
    if fate == 0:  # given up in part, and read again
        region.madvise(mmap.MADV_DONTNEED, 0, half)
        see("given up", region, number, 0, half, 0)
        see("kept beside it", region, number, half, 2 * half, number + 1)
        time.sleep(0.05)
        see("given up, later", region, number, 0, half, 0)
    elif fate == 1:  # moved
        region.resize(4 * half)
        see("moved", region, number, 0, 2 * half, number + 1)
        see("grown", region, number, 2 * half, 4 * half, 0)
    elif fate == 2:  # unmapped, and something else mapped, perhaps there
        region.close()
        other = mmap.mmap(-1, 2 * half, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        see("mapped anew", other, number, 0, 2 * half, 0)
        other.close()
    else:  # written to first
        region[:4096] = bytes(4096)
        see("written", region, number, 0, 4096, 0)
        see("not written", region, number, 4096, 2 * half, number + 1)
tell("ready")
while not os.path.exists(sys.argv[2]):  # restored, it goes on at once
    time.sleep(0.001)
children = []
for number in range(4):
    if (pid := os.fork()) == 0:
        churn(4 + number, regions[4 + number])
        os._exit(bool(faulty) or hashlib.sha256(kept).hexdigest() != want)
    children.append(pid)
def churn_all(mine):
    for number in mine:
        churn(number, regions[number])
threads = [threading.Thread(target=churn_all, args=(range(8 + i, len(regions), 4),)) for i in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
faulty += [f"child {pid}" for pid in children if os.waitpid(pid, 0)[1]]
if hashlib.sha256(kept).hexdigest() != want:
    faulty.append("what was not touched")
tell(" ".join(faulty) or "as it should be")
wait()
"""


@pytest.mark.parametrize("threads", [1, 3])
def test_what_a_process_does_to_its_memory_meanwhile(
    tmp_path: Path, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[int] = set()
    parts, events = PlainPages.parts, userfaultfd.read_events

    def slow(self: PlainPages, offset: int, nbytes: int) -> Iterator[Part]:
        yield from parts(self, offset, nbytes)
        time.sleep(0.004)

    def noted(fd: int) -> list[Event]:
        found = events(fd)
        seen.update(one.kind for one in found)
        return found

    monkeypatch.setattr(PlainPages, "parts", slow)  # so that it is not done before the process has begun
    monkeypatch.setattr(userfaultfd, "read_events", noted)
    go = tmp_path / "go"
    with target(CHURNS, tmp_path, str(go)) as churner:
        assert churner.said() == "ready"
        one = dumped(churner, tmp_path)
        os.unlink(churner.told)
        go.touch()
        filled = back(one, stopped=False, threads=threads)
        assert churner.said() == "as it should be"
        assert filled.faults > 0
    assert seen == {getattr(userfaultfd, kind) for kind in ("PAGEFAULT", "FORK", "REMAP", "REMOVE", "UNMAP")}


FORKED = """
import hashlib
ballast = bytearray(os.urandom(1 << 20)) * 8
children = []
for _ in range(3):
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        ours.close()
        own = bytearray(os.urandom(1 << 16)) * 16
        while theirs.recv(1):
            theirs.send(hashlib.sha256(ballast + own).digest())
        os._exit(0)
    theirs.close()
    children.append(ours)
while True:
    said = hashlib.sha256(ballast)
    for child in children:
        child.send(b"?")
        said.update(child.recv(32))
    tell(said.hexdigest())
    wait()
"""


def test_a_tree(tmp_path: Path) -> None:
    with target(FORKED, tmp_path) as parent:
        before = parent.said()
        one = dumped(parent, tmp_path)
        back(one)
        tree = tree_of(parent.pid)
        assert len(tree) == 4
        for each in tree:
            assert each.state == "T"
            os.kill(each.pid, signal.SIGCONT)
        assert parent.ask() == before


def test_a_process_that_had_ended(tmp_path: Path) -> None:
    waits_for_nobody = """
if os.fork() == 0:
    os._exit(7)
os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
tell("forked")
wait()
tell(os.waitstatus_to_exitcode(os.wait()[1]))
wait()
"""
    with target(waits_for_nobody, tmp_path) as parent:
        assert parent.said() == "forked"
        back(dumped(parent, tmp_path), stopped=False)
        assert parent.ask() == "7"
