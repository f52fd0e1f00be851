"""Ten thousand triggers within seconds, by many programs that open many models: others notice nothing of it."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any

from prefetch.residency import drop, resident_bytes
from tests.helpers.models import model_tensors, write, write_safetensors
from tests.helpers.mounting import Daemon, Mount, Mounter, child, wait_until

PROCESSES = 8
EACH = 1250
MODELS = 12
OPEN = """
import sys
paths = sys.argv[2:]
print("ready", flush=True)
sys.stdin.readline()
for turn in range(int(sys.argv[1])):
    with open(paths[turn % len(paths)], "rb") as file:
        file.read(1)
print("done", flush=True)
"""


def prefetch(mount: Mount) -> dict[str, Any]:
    return dict(mount.live()["prefetch"])


def test_others_are_answered_and_every_model_is_read(tmp_path: Path, mounter: Mounter) -> None:
    source = str(tmp_path / "source")
    weights = [os.path.join(source, f"m{number}", "model.safetensors") for number in range(MODELS)]
    for path in weights:
        write_safetensors(path, model_tensors(2, rows=2048))
        write(os.path.join(os.path.dirname(path), "config.json"), b"{}")
    write(os.path.join(source, "bystander"), b"content")
    mount = mounter(source)
    for path in weights:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            drop(file.fileno())
    daemon = Daemon(mount.daemon_pid())
    threads, memory = len(os.listdir(f"/proc/{daemon.pid}/task")), daemon.rss_bytes()
    slowest_s = 0.0
    with child(OPEN, "1", mount.path("m0", "config.json")) as first:  # the filler's threads begin with the first
        first.communicate("go\n", timeout=20)
    with contextlib.ExitStack() as stack:
        models = [[f"m{(number * 3 + n) % MODELS}" for n in range(3)] for number in range(PROCESSES)]
        processes = [
            stack.enter_context(child(OPEN, str(EACH), *(mount.path(name, "config.json") for name in names)))
            for names in models
        ]
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        began = time.monotonic()
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        while any(process.poll() is None for process in processes):
            at = time.monotonic()
            with open(mount.path("bystander"), "rb") as file:
                assert file.read() == b"content"
            slowest_s = max(slowest_s, time.monotonic() - at)
            assert at - began < 120
        took_s = time.monotonic() - began
    wait_until(lambda: not prefetch(mount)["active"], "prefetch ends")
    state = prefetch(mount)
    print(f"{state['triggers']} triggers in {took_s:.2f} s, {state['coalesced']} coalesced, slowest {slowest_s:.3f} s")
    assert state["triggers"] == PROCESSES * EACH + 1
    # A process is looked at once a second for each file it opens; a busy machine only makes the seconds more.
    assert state["triggers"] - state["coalesced"] <= 3 * PROCESSES * (took_s + 2)
    assert state["wanted"] == MODELS
    assert state["failed"] == []
    assert slowest_s < 5
    plans = len(mount.control("timeline")["loads"])
    assert MODELS <= plans <= MODELS * (took_s + 2), "a plan of a model a second at most"
    for path in weights:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            assert resident_bytes(file.fileno(), 0, size) >= 0.9 * size
    assert len(os.listdir(f"/proc/{daemon.pid}/task")) <= threads + 32
    assert daemon.rss_bytes() - memory < 64 << 20
    assert not daemon.has_ended()
    daemon.close()
