"""Snapshots of and in containers: another pid, mount, network, IPC and UTS namespace at each start."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.containers import Bundle, bundle, needs_crun, pid_1
from tests.helpers.mounting import wait_until
from tests.helpers.targets import end, needs_criu

pytestmark = [needs_criu, needs_crun, pytest.mark.alone]

SERVER = """
import os, signal, sys
held = open("/only-in-the-image")
def term(number, frame):
    print("asked to end", flush=True)
    sys.exit(7)
def again(number, frame):
    print("here", held.read(), os.getpid(), flush=True)
    held.seek(0)
signal.signal(signal.SIGTERM, term)
signal.signal(signal.SIGUSR1, again)
print("begun", flush=True)
open("/ready", "w").close()
while True:
    signal.pause()
"""
WEIGHTFS = [sys.executable, "-c", "from weightfs.cli.main import main; main()", "snapshot"]


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Bundle]:
    folder = tmp_path / "bundle"
    folder.mkdir()
    with bundle(folder) as found:
        (found.rootfs / "only-in-the-image").write_text("the image")
        (found.rootfs / "server.py").write_text(SERVER)
        yield found


@contextlib.contextmanager
def running(container: Bundle, log: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A container whose output goes through a pipe to a file, as container runtimes have it; gives its pid 1, too."""
    with log.open("wb") as file, subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=file) as cat:
        assert cat.stdin is not None
        with container.start(f"weightfs-{os.getpid()}", cat.stdin) as process:
            cat.stdin.close()
            try:
                init = wait_until(functools.partial(pid_1, process), "the container runs")
                assert init is not None
                yield process, init
            finally:
                with contextlib.suppress(ProcessLookupError, OSError):
                    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
                        end(int(child))


def said(log: Path, text: str) -> None:
    wait_until(lambda: text in log.read_text(), f"{text!r} in {log.name}", timeout_s=30)


def test_run_is_pid_1_of_a_container_that_starts_again(made: Bundle, tmp_path: Path) -> None:
    store = ["--no-encrypt", "--store", "/store"]
    made.write(
        [*WEIGHTFS, "run", "it", *store, "--create", "--ready-file", "/ready", "--", sys.executable, "/server.py"]
    )
    for number, shown in enumerate(("it snapshotted", "it restored")):
        (made.rootfs / "ready").unlink(missing_ok=True)
        log = tmp_path / f"log{number}"
        with running(made, log) as (container, init):
            said(log, shown)
            os.kill(init, signal.SIGUSR1)
            said(log, "here the image")
            os.kill(init, signal.SIGTERM)
            assert container.wait(20) == 7
        assert "asked to end" in log.read_text()
    assert "begun" not in log.read_text()


def test_a_container_is_snapshotted_from_outside(made: Bundle, tmp_path: Path) -> None:
    made.write([sys.executable, "/server.py"])
    log, after = tmp_path / "log", tmp_path / "after"
    store = ["--no-encrypt", "--json", "--store", str(tmp_path / "store")]
    with running(made, log) as (container, init):
        said(log, "begun")
        call("create", "it", *store, "--pid", str(init))
        container.wait(20)
    assert "--root" in call("restore", "it", *store, code=3)["error"]["mend"]
    root = ["--root", str(made.rootfs)]
    assert "--new-pidns" in call("restore", "it", *store, *root, "--new-pidns", code=3)["error"]["mend"]
    pid = call("restore", "it", *store, *root, "--log", str(after))["pid"]
    try:
        os.kill(pid, signal.SIGUSR1)
        said(after, "here the image 1")
    finally:
        end(pid)


def test_weights_in_the_image_of_a_container(made: Bundle, tmp_path: Path) -> None:
    """They are compared where the container has them, and this machine may have another file at that path."""
    weights = made.rootfs / "model.safetensors"
    weights.write_bytes(b"x" * (2 << 20))
    held = "import mmap\nheld_too = mmap.mmap(os.open('/model.safetensors', os.O_RDONLY), 0, prot=mmap.PROT_READ)\n"
    (made.rootfs / "server.py").write_text(SERVER.replace("def term", held + "def term", 1))
    made.write([sys.executable, "/server.py"])
    log = tmp_path / "log"
    store = ["--no-encrypt", "--json", "--store", str(tmp_path / "store")]
    with running(made, log) as (container, init):
        said(log, "begun")
        call("create", "it", *store, "--pid", str(init))
        container.wait(20)
    back = ["restore", "it", *store, "--root", str(made.rootfs), "--log", str(tmp_path / "after")]
    end(call(*back)["pid"])
    with weights.open("r+b") as file:
        file.write(b"y")
    error = call(*back, code=4)["error"]
    assert error["path"] == str(weights)


def call(*arguments: str, code: int = 0) -> dict[str, Any]:
    done = subprocess.run([*WEIGHTFS, *arguments], capture_output=True, timeout=60, check=False)
    assert done.returncode == code, done.stderr.decode()
    document: dict[str, Any] = json.loads(done.stdout)
    return document
