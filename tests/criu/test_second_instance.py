"""`snapshot restore --new-pidns`: a second instance while the first one runs, with the same pid and port."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from checkpoint.processes import start_ticks
from tests.helpers.mounting import wait_until
from tests.helpers.targets import end, needs_criu_for_sockets

pytestmark = needs_criu_for_sockets

SERVER = """
import http.server, itertools, sys, os
count = itertools.count(1)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = f"{os.getpid()} {next(count)}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


class Snapshots:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pids: list[int] = []

    def call(self, *arguments: str, code: int = 0) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-c", "from weightfs.cli.main import main; main()", "snapshot", *arguments],
            capture_output=True,
            timeout=90,
            check=False,
        )
        assert done.returncode == code, done.stderr.decode()
        document: dict[str, Any] = json.loads(done.stdout)
        if "pid" in document:
            self.pids.append(document["pid"])
        return document

    @property
    def options(self) -> list[str]:
        return ["--no-encrypt", "--json", "--store", str(self.folder / "store"), "--log", str(self.folder / "log")]

    def create(self, port: int) -> dict[str, Any]:
        program = self.folder / "server.py"
        program.write_text(SERVER)
        url = f"http://127.0.0.1:{port}/"
        command = [sys.executable, str(program), str(port)]
        return self.call("create", "web", *self.options, "--leave-running", "--ready-url", url, "--", *command)


@pytest.fixture
def snapshots(tmp_path: Path) -> Iterator[Snapshots]:
    made = Snapshots(tmp_path)
    yield made
    for pid in made.pids:
        end(pid)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def is_refused(port: int) -> bool:
    """Whether nobody listens there; who has just begun to end may still take a connection and drop it."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        pass
    return False


def asked(port: int) -> tuple[int, int]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10) as reply:
        pid, count = reply.read().split()
    return int(pid), int(count)


def test_two_instances_with_the_same_pid_and_port(snapshots: Snapshots) -> None:
    port, outside = free_port(), free_port()
    first = snapshots.create(port)
    assert asked(port) == (first["pid"], 2)
    refused = snapshots.call("restore", "web", *snapshots.options, code=75)
    assert "--new-pidns" in refused["error"]["mend"]

    url = f"http://127.0.0.1:{outside}/"
    publish = ["--new-pidns", "--publish", f"{outside}:{port}", "--wait-url", url]
    second = snapshots.call("restore", "web", *snapshots.options, *publish)
    assert second["pid"] != first["pid"]
    assert asked(outside) == (first["pid"], 3), "its pid is what it was, in its own namespace"
    assert asked(port) == (first["pid"], 3), "the first one is another one"
    for namespace in ("pid", "net"):
        inside, ours = (os.readlink(f"/proc/{pid}/ns/{namespace}") for pid in (second["pid"], "self"))
        assert inside != ours

    init = int(Path(f"/proc/{second['pid']}/stat").read_text().rsplit(")", 1)[1].split()[1])
    since = start_ticks(init)
    os.kill(second["pid"], signal.SIGTERM)
    wait_until(lambda: start_ticks(init) != since, "its namespace ends with it")
    wait_until(lambda: is_refused(outside), "nobody listens for it")
    assert asked(port)[0] == first["pid"]


def test_without_a_port_it_is_asked_in_its_own_network(snapshots: Snapshots) -> None:
    port = free_port()
    first = snapshots.create(port)
    second = snapshots.call(
        "restore", "web", *snapshots.options, "--new-pidns", "--wait-url", f"http://127.0.0.1:{port}/"
    )
    assert second["phases"]["ready"] > 0
    assert asked(port) == (first["pid"], 2), "the first one was not asked"


def test_a_port_that_is_taken_leaves_nothing(snapshots: Snapshots) -> None:
    port = free_port()
    snapshots.create(port)
    before = instances()
    refused = snapshots.call(
        "restore", "web", *snapshots.options, "--new-pidns", "--publish", f"{port}:{port}", code=75
    )
    assert str(port) in refused["error"]["message"]
    snapshots.call("restore", "web", *snapshots.options, "--publish", "1:2", code=2)
    assert instances() == before


def test_one_that_does_not_answer_leaves_nothing(snapshots: Snapshots) -> None:
    port = free_port()
    snapshots.create(port)
    before = instances()
    never = ["--wait-url", f"http://127.0.0.1:{free_port()}/", "--timeout", "1"]
    snapshots.call("restore", "web", *snapshots.options, "--new-pidns", *never, code=75)
    wait_until(lambda: instances() == before, "the namespace is gone")


def instances() -> set[str]:
    found = set()
    for pid in os.listdir("/proc"):
        if pid.isdigit():
            try:
                if b"instance_program.py" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.add(pid)
            except OSError:
                continue
    return found
