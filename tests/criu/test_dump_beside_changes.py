"""A process that uses the mount is dumped and restored by CRIU while the source changes and daemons come and go."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.models import write
from tests.helpers.mounting import Mounter, both_engines, wait_until
from tests.helpers.targets import CRIU, needs_criu

DATA = random.Random(11).randbytes(3_000_000)

READER = """
import mmap, os, signal, sys, time
path, told = sys.argv[1:]
held = os.open(path, os.O_RDONLY)
mapped = mmap.mmap(held, 0, prot=mmap.PROT_READ)
assert mapped[5_000] is not None
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
while True:
    with open(told + ".new", "wb") as file:
        file.write(os.pread(held, 1 << 22, 0) + bytes(mapped))
    os.rename(told + ".new", told)
    signal.sigwait({signal.SIGUSR1})
"""


def run_criu(command: str, images: str, *options: str) -> None:
    assert CRIU is not None
    done = subprocess.run(
        [CRIU.path, command, "-D", images, "--shell-job", "--libdir", images, "-o", "log", *options],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    log = Path(images, "log")
    assert done.returncode == 0, log.read_text()[-3000:] if log.exists() else done.stderr


@needs_criu
@both_engines
@pytest.mark.parametrize("event", ["nothing", "killed", "replaced beside", "chmod"])
def test_dumped_and_restored(mounter: Mounter, tmp_path: Path, images: str, engine: str, event: str) -> None:
    """What it has mapped and open is named by a path on the mount, and is the same file again after the restore."""
    source, told = f"{tmp_path}/source", f"{tmp_path}/told"
    write(f"{source}/model/weights", DATA)
    mount = mounter(source, engine)
    path = mount.path("model/weights")
    with subprocess.Popen(
        [sys.executable, "-c", READER, path, told],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as reader:
        wait_until(lambda: os.path.exists(told), "the process reads")
        if event == "killed":
            mount.kill_daemon()
        elif event == "replaced beside":
            write(f"{source}/model/.new", b"new")
            os.rename(f"{source}/model/.new", f"{source}/model/other")
        elif event == "chmod":
            os.chmod(f"{source}/model/weights", 0o600)
        os.stat(path)
        run_criu("dump", images, "-t", str(reader.pid))
        assert reader.wait(30) == -signal.SIGKILL
    os.unlink(told)
    mount.kill_daemon()
    run_criu("restore", images, "--restore-detached")
    try:
        os.kill(reader.pid, signal.SIGUSR1)
        wait_until(lambda: os.path.exists(told), "it reads again")
        assert Path(told).read_bytes() == DATA + DATA
        with open(f"/proc/{reader.pid}/maps") as maps:
            assert any(line.rstrip("\n").endswith(path) for line in maps)
    finally:
        os.kill(reader.pid, signal.SIGKILL)
        ends = time.monotonic() + 5
        while os.path.exists(f"/proc/{reader.pid}") and time.monotonic() < ends:
            time.sleep(0.02)
