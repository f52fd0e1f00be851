"""fio lays checksummed blocks down on the backing file and finds every one of them through the mount."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.mounting import ENGINES, Mount, Mounter

pytestmark = pytest.mark.skipif(shutil.which("fio") is None, reason="this machine lacks fio")

MIB = 1 << 20
MANY = 16
ONE_BYTES = 64 * MIB
EACH_BYTES = 4 * MIB


def fio(folder: str, *options: str) -> dict[str, int]:
    """Run one fio command; gives the bytes it read and its errors."""
    arguments = ["fio", "--name=weights", f"--directory={folder}", "--verify=crc32c", "--bs=64k", "--group_reporting"]
    done = subprocess.run(
        [*arguments, "--output-format=json", *options],
        cwd=os.path.dirname(folder),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    report = json.loads(done.stdout[done.stdout.index("{") :])
    jobs = report["jobs"]
    return {
        "read": sum(job["read"]["io_bytes"] for job in jobs),
        "errors": sum(job["error"] for job in jobs),
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = str(tmp_path_factory.mktemp("fio") / "source")
    os.mkdir(root)
    write = ["--rw=write", "--ioengine=psync", "--do_verify=0", "--end_fsync=1"]
    fio(root, *write, "--filename=one", f"--size={ONE_BYTES}")
    fio(root, *write, "--filename=shared", f"--size={EACH_BYTES}")
    fio(root, *write, "--filename_format=many.$jobnum", f"--size={EACH_BYTES}", f"--numjobs={MANY}")
    yield root
    shutil.rmtree(root)


@pytest.fixture(scope="module", params=ENGINES)
def mount(request: pytest.FixtureRequest, source: str, module_mounter: Mounter) -> Mount:
    return module_mounter(source, request.param)


def has_io_uring() -> bool:
    try:
        return Path("/proc/sys/kernel/io_uring_disabled").read_text().strip() == "0"
    except FileNotFoundError:
        return False


IO_URING = pytest.param(
    "io_uring",
    marks=pytest.mark.skipif(not has_io_uring(), reason="this machine lacks io_uring (disabled or kernel < 6.6)"),
)


@pytest.mark.parametrize("direct", [0, 1])
@pytest.mark.parametrize("ioengine", ["psync", "mmap", IO_URING])
@pytest.mark.parametrize("rw", ["read", "randread"])
def test_one_job(mount: Mount, ioengine: str, direct: int, rw: str) -> None:
    found = fio(
        mount.path(),
        f"--rw={rw}",
        f"--ioengine={ioengine}",
        f"--direct={direct}",
        "--iodepth=8",
        "--filename=one",
        f"--size={ONE_BYTES}",
        "--verify_fatal=1",
    )
    assert found == {"read": ONE_BYTES, "errors": 0}


@pytest.mark.parametrize("direct", [0, 1])
@pytest.mark.parametrize("ioengine", ["psync", "mmap", IO_URING])
def test_sixteen_threads_on_one_file(mount: Mount, ioengine: str, direct: int) -> None:
    """Each reads all of it, in an order of its own. (Parts of one file would do, but fio 3.33 maps them wrongly.)"""
    found = fio(
        mount.path(),
        "--rw=randread",
        f"--ioengine={ioengine}",
        f"--direct={direct}",
        "--iodepth=4",
        "--filename=shared",
        f"--numjobs={MANY}",
        "--thread",
        f"--size={EACH_BYTES}",
        "--verify_fatal=1",
    )
    assert found == {"read": MANY * EACH_BYTES, "errors": 0}


@pytest.mark.parametrize("direct", [0, 1])
@pytest.mark.parametrize("ioengine", ["psync", "mmap", IO_URING])
def test_sixteen_threads_on_many_files(mount: Mount, ioengine: str, direct: int) -> None:
    found = fio(
        mount.path(),
        "--rw=randread",
        f"--ioengine={ioengine}",
        f"--direct={direct}",
        "--iodepth=4",
        "--filename_format=many.$jobnum",
        f"--numjobs={MANY}",
        "--thread",
        f"--size={EACH_BYTES}",
        "--verify_fatal=1",
    )
    assert found == {"read": MANY * EACH_BYTES, "errors": 0}


def test_a_wrong_byte_is_found(mount: Mount) -> None:
    """The check itself: a flipped byte underneath must fail the run."""
    path = os.path.join(mount.source, "many.3")
    with open(path, "r+b") as file:
        file.seek(1_000_000)
        byte = file.read(1)
        file.seek(1_000_000)
        file.write(bytes([byte[0] ^ 1]))
    try:
        with pytest.raises(AssertionError, match="verify"):
            fio(
                mount.path(),
                "--rw=read",
                "--ioengine=psync",
                "--filename=many.3",
                f"--size={EACH_BYTES}",
                "--verify_fatal=1",
            )
    finally:
        with open(path, "r+b") as file:
            file.seek(1_000_000)
            file.write(byte)
