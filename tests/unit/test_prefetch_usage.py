"""Who uses a file: real processes, and a /proc made of files for what real ones don't do on demand."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from prefetch import usage
from prefetch.usage import Key, files_in_use
from tests.helpers.mounting import child

HOLD = """
import mmap, os, sys, threading
how, path = sys.argv[1:]
fd = os.open(path, os.O_RDONLY)
if how != "open":
    mapped = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
    os.close(fd)  # mmap keeps a descriptor of its own
    for number in os.listdir("/proc/self/fd"):
        if how != "open" and os.path.realpath(f"/proc/self/fd/{number}") == path:
            os.close(int(number))
print("holds", flush=True)
sys.stdin.read(1)
"""


def key_of(path: Path) -> Key:
    found = path.stat()
    return found.st_dev, found.st_ino


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "model with spaces.safetensors"
    path.write_bytes(bytes(1 << 16))
    return path


@pytest.mark.parametrize("how", ["open", "mapped"])
def test_another_process_uses_it(weights: Path, how: str) -> None:
    key = key_of(weights)
    beside = (key[0], key[1] + 1_000_000_007)
    with child(HOLD, how, str(weights)) as user:
        assert user.stdout is not None
        assert user.stdout.readline() == "holds\n"
        holders = [
            fd for fd in os.listdir(f"/proc/{user.pid}/fd") if os.readlink(f"/proc/{user.pid}/fd/{fd}") == str(weights)
        ]
        assert bool(holders) == (how == "open"), "a mapping is left alone, without a handle"
        assert files_in_use({key, beside}).in_use == {key}
        assert not files_in_use({key, beside}, {user.pid}).in_use, "it does not count"
        assert not files_in_use({beside}).in_use
    assert not files_in_use({key}).in_use, "it has ended"


def test_this_process_does_not_count(weights: Path) -> None:
    with weights.open("rb"):
        assert not files_in_use({key_of(weights)}).in_use


def test_nothing_asked_for() -> None:
    assert files_in_use(set()) == usage.Usage(frozenset(), frozenset())


def test_a_process_whose_first_thread_has_ended(weights: Path) -> None:
    code = """
import ctypes, mmap, os, sys, threading
fd = os.open(sys.argv[1], os.O_RDONLY)
def hold():
    mapped = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
    first.wait()
    print("holds", flush=True)
    sys.stdin.read(1)
first = threading.Event()
threading.Thread(target=hold).start()
first.set()
ctypes.CDLL(None).syscall(60, 0)  # exit of this thread alone
"""
    if os.uname().machine != "x86_64":
        pytest.skip("this machine lacks the number of exit(2) known here (x86_64)")
    with child(code, str(weights)) as user:
        assert user.stdout is not None
        ends = time.monotonic() + 5
        while Path(f"/proc/{user.pid}/maps").read_text():
            assert time.monotonic() < ends
        assert files_in_use({key_of(weights)}).in_use == {key_of(weights)}


class FakeProcesses:
    """Processes as files; the device of their mappings is that of `weights`."""

    def __init__(self, root: Path, weights: Path) -> None:
        self.root = root
        self.weights = weights
        self.line = "7f0000000000-7f0000010000 r--s 00000000 %02x:%02x %d   %s\n"

    def add(self, pid: int, maps: str | None, *, opens: bool = False) -> None:
        folder = self.root / "proc" / str(pid)
        (folder / "fd").mkdir(parents=True)
        (folder / "task" / str(pid)).mkdir(parents=True)
        if maps is not None:
            (folder / "maps").write_text(maps)
        if opens:
            (folder / "fd" / "3").symlink_to(self.weights)
        (folder / "fd" / "4").symlink_to("/nowhere")

    def mapping(self, inode: int) -> str:
        device = self.weights.stat().st_dev
        return self.line % (os.major(device), os.minor(device), inode, self.weights)


@pytest.fixture
def processes(tmp_path: Path, weights: Path) -> FakeProcesses:
    return FakeProcesses(tmp_path / "root", weights)


def test_those_that_vanish_or_refuse_do_not_stop_it(
    processes: FakeProcesses, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = key_of(weights)
    other = (key[0], 123456)
    processes.add(10, None)  # gone between the two looks
    processes.add(11, "")
    processes.add(12, processes.mapping(key[1]) * 3)
    processes.add(13, "refused")
    processes.add(14, processes.mapping(123456 * 10 + 7))
    (processes.root / "proc" / "self").mkdir()
    real = usage._read

    def read(path: bytes) -> bytes:
        if b"/13/" in path:
            raise PermissionError
        if b"/11/" in path:
            raise ProcessLookupError
        return real(path)

    monkeypatch.setattr(usage, "_read", read)
    found = files_in_use({key, other}, root=str(processes.root))
    assert found.in_use == {key}
    assert found.unreadable == {13}


def test_what_is_open_in_one_whose_mappings_are_hidden(
    processes: FakeProcesses, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes.add(13, "", opens=True)

    def read(path: bytes) -> bytes:
        raise PermissionError(path)

    monkeypatch.setattr(usage, "_read", read)
    found = files_in_use({key_of(weights)}, root=str(processes.root))
    assert found.in_use == {key_of(weights)}
    assert found.unreadable == {13}


def test_inode_numbers_of_64_bits(processes: FakeProcesses, weights: Path) -> None:
    large = (1 << 63) + 5
    processes.add(10, processes.mapping(large))
    key = (weights.stat().st_dev, large)
    assert files_in_use({key}, root=str(processes.root)).in_use == {key}


def test_500_processes_of_300_mappings(processes: FakeProcesses, weights: Path) -> None:
    """200 models are looked for; the bound is generous, the machine may be busy."""
    key = key_of(weights)
    text = "".join(processes.mapping(10_000_000 + number) for number in range(300))
    for pid in range(1000, 1500):
        processes.add(pid, text, opens=pid == 1400)
    keys = {(key[0], 20_000_000 + number) for number in range(200)} | {key}
    began = time.monotonic()
    assert files_in_use(keys, root=str(processes.root)).in_use == {key}
    took = time.monotonic() - began
    print(json.dumps({"processes": 500, "mappings": 150_000, "seconds": round(took, 3)}))
    assert took < 10
