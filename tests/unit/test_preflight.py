"""What a preflight says of trees that stand in for real ones: GPUs, and what this machine can't have."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from checkpoint import preflight_memory
from checkpoint.preflight import examine
from checkpoint.preflight_memory import private_bytes
from checkpoint.processes import Descriptor, Mapping, Process, namespaces_of
from checkpoint.sockets import Socket
from tests.helpers.fake_memory import GIB, MOUNTED_V2, V2, FakeMachine

HERE = namespaces_of("self")


def process(*held: Descriptor, mappings: tuple[Mapping, ...] = (), **known: object) -> Process:
    values = {"pid": 4_194_300, "ppid": 1, "session": 4_194_300, "namespaces": HERE} | known
    return Process(descriptors=held, mappings=mappings, **values)  # type: ignore[arg-type]


def device(path: str, fd: int = 3) -> Descriptor:
    return Descriptor(fd=fd, target=path, kind="device", rdev=os.makedev(195, 0), flags=os.O_RDWR)


def mapped(path: str, perms: str = "rw-s", nbytes: int = 4096, inode: int = 7) -> Mapping:
    return Mapping(
        start=0x1000, end=0x1000 + nbytes, perms=perms, offset=0, device=5, inode=inode, path=path, is_deleted=False
    )


def codes(*processes: Process, sockets: dict[int, Socket] | None = None) -> list[tuple[str, bool]]:
    return [(one.code, one.fatal) for one in examine(processes, sockets=sockets or {})]


def test_the_driver_takes_its_own_devices_along() -> None:
    gpu = device("/dev/nvidia0"), device("/dev/nvidiactl", 4), device("/dev/nvidia-uvm", 5)
    assert codes(process(*gpu, mappings=(mapped("/dev/nvidia0"), mapped("/dev/nvidia-uvm")))) == []


def test_files_of_capabilities_are_no_sign_of_a_part_of_a_gpu() -> None:
    assert codes(process(device("/dev/nvidia0"), device("/dev/nvidia-caps/nvidia-cap21", 4))) == []


def test_the_multi_process_service() -> None:
    held = Descriptor(fd=5, target="socket:[9]", inode=9, kind="socket")
    control = Socket(inode=9, family="unix", protocol="UNIX-STREAM", remote="/tmp/nvidia-mps/control", peer=10)
    found = codes(process(device("/dev/nvidia0"), held), sockets={9: control})
    assert ("mps", True) in found


def test_rdma_and_buffers_of_nccl() -> None:
    assert ("rdma", True) in codes(process(device("/dev/infiniband/uverbs0")))
    shared = mapped("/dev/shm/nccl-Ab12")
    assert codes(process(device("/dev/nvidia0"), mappings=(shared,))) == [("gpu-shared-memory", False)]
    assert codes(process(mappings=(shared,))) == []


def test_memory_of_another_device() -> None:
    assert codes(process(mappings=(mapped("/dev/kfd"),))) == [("device", True)]
    assert codes(process(mappings=(mapped("/dev/zero"), mapped("/dev/shm/sem")))) == []


def test_inside_a_pid_namespace_only_the_first(tmp_path: Path) -> None:
    inside = process(namespaces=HERE | {"pid": 1})
    proc = tmp_path / "proc"
    proc.mkdir()
    (proc / "self").symlink_to("/proc/self")
    (proc / "meminfo").symlink_to("/proc/meminfo")
    (proc / "4194300").mkdir()
    status = proc / "4194300/status"
    for last, expected in (("7", ["pid-namespace"]), ("1", [])):
        status.write_text(f"NSpid:\t4194300\t{last}\nTracerPid:\t0\n")
        found = examine([inside], sockets={}, proc=str(proc))
        assert [one.code for one in found] == expected


def test_one_that_waits_for_a_disk() -> None:
    assert codes(process(state="D")) == [("waits", False)]


def test_one_that_is_stopped() -> None:
    assert codes(process(state="T")) == [("stopped", True)]


def test_the_fatal_come_first_and_are_documents() -> None:
    writes = Descriptor(fd=1, target="/var/log/x", kind="file", flags=os.O_WRONLY)
    ring = Descriptor(fd=2, target="anon_inode:[io_uring]", kind="anon")
    first, second = examine([process(writes, ring)], sockets={})
    assert (first.code, second.code) == ("io-uring", "log-written")
    assert set(first.document()) == {"code", "pid", "what", "why", "mend", "fatal"}
    assert str(first).startswith("process 4194300: descriptor 2 is an io_uring: ")


def test_shared_memory_counts_once() -> None:
    memory = mapped("/memfd:x", nbytes=1 << 20)
    both = [process(mappings=(memory,)), process(mappings=(memory, mapped("/memfd:y", nbytes=1 << 12, inode=8)))]
    assert private_bytes(both) == (1 << 20) + (1 << 12)
    (me,) = [process(pid=os.getpid())]
    before = private_bytes([me])
    ballast = bytearray(b"x" * (32 << 20))
    assert private_bytes([me]) - before > 24 << 20
    del ballast


def test_a_dump_into_memory_needs_memory_and_hardly_any_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight_memory, "private_bytes", lambda processes, *, proc: 1 << 30)
    machine = FakeMachine(tmp_path)

    def found(available: int, free: int, *, gpu: int = 0, in_memory: bool = True) -> list[str]:
        machine.meminfo(8 << 30, available)
        monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result((1, 1, 0, free, free, 0, 0, 0, 0, 255)))
        findings = preflight_memory.memory_findings(
            [process()], store="/store", gpu_bytes=gpu, in_memory=in_memory, root=machine.root
        )
        return [one.code for one in findings]

    assert found(2 << 30, 1 << 28) == []
    assert found(1 << 30, 1 << 28) == ["memory"]
    assert found(2 << 30, 1 << 20) == ["store-space"]
    assert found(3 << 30, 1 << 28, gpu=1 << 30) == ["memory"], "the GPU's is there twice: held, and dumped"
    assert found(4 << 30, 1 << 28, gpu=1 << 30) == []
    assert found(1 << 30, 1 << 28, in_memory=False) == ["store-space"]
    assert found(1 << 30, 2 << 30, in_memory=False) == []


def test_a_control_group_s_limit_counts_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight_memory, "private_bytes", lambda processes, *, proc: GIB)
    machine = FakeMachine(tmp_path)
    machine.meminfo(64 * GIB, 32 * GIB)
    machine.groups(V2, MOUNTED_V2)
    machine.version_2("/a/b", used=3 * GIB, max=8 * GIB)
    machine.version_2("/a", used=7 * GIB, inactive=GIB // 2, max=8 * GIB)
    found = preflight_memory.available(root=machine.root)
    assert found.nbytes == GIB + GIB // 2 + 7, "8 - 7, and what the group has in the page cache"
    assert str(found) == f"1536 MiB are free under the limit of {tmp_path}/sys/fs/cgroup/a"

    def codes_of(gpu_bytes: int) -> list[str]:
        found = preflight_memory.memory_findings(
            [process()], store=None, gpu_bytes=gpu_bytes, in_memory=True, root=machine.root
        )
        return [one.code for one in found]

    assert codes_of(0) == []
    assert codes_of(GIB) == ["memory"]
    machine.version_2("/a", used=7 * GIB, max="max")
    assert preflight_memory.available(root=machine.root).nbytes == 5 * GIB + 7
    machine.version_2("/a/b", used=3 * GIB, max="max")
    assert str(preflight_memory.available(root=machine.root)) == "32768 MiB are free on this machine"
