"""A server as users have it, on a real mount, and the commands that snapshot and restore it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from checkpoint import runtime
from checkpoint.processes import process, start_ticks
from checkpoint.store import Store
from tests.helpers.models import Tensor, write_safetensors
from tests.helpers.mounting import WEIGHTFS, Mounter, wait_until, wait_until_settled
from tests.helpers.targets import end

SERVER = """
import http.server, json, mmap, os, random, socketserver, sys, threading
import numpy as np
from checkpoint import on_restore, on_snapshot, snapshot_point

weights_path, port, *extras = sys.argv[1:]
with open(weights_path, "rb") as file:
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
weights = np.frombuffer(mapped, np.uint8)
heap = np.random.default_rng(7).integers(0, 255, 4 << 20, np.uint8)
served = 0
outcome, reseeded = "", 0.0
children = []

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        global served
        served += self.path == "/answer"
        body = json.dumps({
            "weights": int(weights.sum(dtype=np.uint64)), "heap": int(heap.sum(dtype=np.uint64)), "served": served,
            "pid": os.getpid(), "threads": threading.active_count(), "random": random.random(),
            "reseeded": reseeded, "outcome": outcome, "children": [pid for pid in children if alive(pid)],
        }).encode()
        print("served", self.path, flush=True)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_):
        pass

def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True

if "tree" in extras:
    for _ in range(2):
        if not (child := os.fork()):
            grandchild = os.fork()
            while True:
                threading.Event().wait(1)
        children.append(child)
if "threads" in extras:
    for _ in range(3):
        threading.Thread(target=threading.Event().wait, daemon=True).start()
if "point" in extras:
    @on_snapshot
    def before():
        print("before the snapshot", flush=True)
    @on_restore
    def after():
        global reseeded
        random.seed(os.urandom(8))
        reseeded = random.random()
    outcome = snapshot_point("warm")

class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

with Server(("127.0.0.1", int(port)), Handler) as server:
    server.serve_forever()
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


class Commands:
    """`weightfs snapshot` on a store of its own; what was restored ends with the block.

    Attributes:
        store: its folder.
        runtime: their folder for journals: what one left is found by no other test's commands.
        log: given to every command that starts or restores something.
        env: of the commands.
    """

    def __init__(self, folder: Path) -> None:
        self.store = str(folder / "snapshots")
        self.log = str(folder / "server.log")
        self.runtime = str(folder / "run")
        self.env = {**os.environ, runtime.VARIABLE: self.runtime}
        self._pids: list[tuple[int, int]] = []
        self.program = [WEIGHTFS]

    def argv(self, action: str, *arguments: str, command: Sequence[str] = ()) -> list[str]:
        options = []
        if action in ("create", "restore"):
            options = ["--store", self.store, "--no-encrypt", "--json", "--timeout", "60"]
            if not {"--log", "--pid"} & set(arguments):
                options += ["--log", self.log]
        elif action == "recover":
            options = ["--json"]
        elif action == "verify":
            options = ["--store", self.store, "--no-encrypt", "--json"]
        else:
            options = ["--store", self.store, "--json"]
        return [*self.program, "snapshot", action, *arguments, *options, *(["--", *command] if command else [])]

    def start(self, action: str, *arguments: str, command: Sequence[str] = ()) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.argv(action, *arguments, command=command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.env,
        )

    def run(self, action: str, *arguments: str, command: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        """Run one to its end."""
        with self.start(action, *arguments, command=command) as started:
            try:
                out, err = started.communicate(timeout=100)
            except subprocess.TimeoutExpired:
                started.kill()
                raise
        if started.returncode == 0 and action == "restore":
            self.note(json.loads(out)["pid"])
        return subprocess.CompletedProcess(started.args, started.returncode, out, err)

    def told(self, action: str, *arguments: str, command: Sequence[str] = (), code: int = 0) -> dict[str, Any]:
        """Run one that ends with a code; gives its document."""
        done = self.run(action, *arguments, command=command)
        assert done.returncode == code, (done.returncode, done.stdout, done.stderr, self.log_text())
        document: dict[str, Any] = json.loads(done.stdout)
        assert document["schema"] == 1
        return document

    def refused(self, action: str, *arguments: str, command: Sequence[str] = (), code: int) -> dict[str, Any]:
        """Run one that fails with a code; gives its error, which is one line with a mend."""
        error: dict[str, Any] = self.told(action, *arguments, command=command, code=code)["error"]
        assert "\n" not in error["message"]
        return error

    def note(self, pid: int) -> int:
        """A process, with its descendants, that is to end with the block."""
        if (since := start_ticks(pid)) is not None:
            self._pids.append((pid, since))
        return pid

    def log_text(self) -> str:
        with contextlib.suppress(FileNotFoundError):
            return Path(self.log).read_text()
        return ""

    def require_consistent(self, *names: str) -> None:
        """The store holds exactly these, each whole; no draft of it is left."""
        store = Store(self.store)
        listed = store.list()
        assert [(one.name, one.fault) for one in listed] == [(name, None) for name in sorted(names)]
        for name in names:
            store.verify(name)
        for folder in (self.store, f"{self.store}/.chunks-open"):
            if os.path.exists(folder):
                assert not [name for name in os.listdir(folder) if name.startswith(".draft")]

    def close(self) -> None:
        for pid, since in self._pids:
            if start_ticks(pid) == since:
                for one in sessions_of(pid):
                    end(one)


def sessions_of(pid: int) -> list[int]:
    """A process and all others of its process group's session: what a server started."""
    found = [pid]
    try:
        session = os.getsid(pid)
    except ProcessLookupError:
        return found
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if name.isdigit() and int(name) != pid and os.getsid(int(name)) == session:
                found.append(int(name))
    return found if session != os.getsid(0) else [pid]


class Bench(Commands):
    """A mount with weights, a port, and the server's command.

    Attributes:
        mount: the mount.
        weights: path of the weight file in the source.
        port: the server's.
    """

    def __init__(self, folder: Path, mounter: Mounter) -> None:
        super().__init__(folder)
        source = folder / "models"
        data = np.random.default_rng(1).integers(0, 255, 2 << 20, np.uint8).tobytes()
        self.weights = write_safetensors(str(source / "m" / "model.safetensors"), {"w": Tensor("U8", (2 << 20,), data)})
        wait_until_settled(self.weights)
        self.mounter = mounter
        self.mount = mounter(str(source))
        self.server_program = folder / "server.py"
        self.server_program.write_text(SERVER)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/"

    def command(self, *extras: str) -> list[str]:
        return [
            sys.executable,
            str(self.server_program),
            self.mount.path("m", "model.safetensors"),
            str(self.port),
            *extras,
        ]

    def ask(self, path: str = "answer") -> dict[str, Any]:
        with urllib.request.urlopen(self.url + path, timeout=20) as reply:
            document: dict[str, Any] = json.loads(reply.read())
        return document

    def answers(self) -> bool:
        try:
            self.ask("health")
        except OSError:
            return False
        return True

    def expected(self) -> int:
        """The sum of the weight file's bytes."""
        return int(np.fromfile(self.weights, np.uint8).sum(dtype=np.uint64))

    @contextmanager
    def server(self, *extras: str, log: str = "") -> Iterator[subprocess.Popen[bytes]]:
        """The server, started by somebody else than weightfs, and answering."""
        with (
            open(log or self.log, "ab") as output,
            subprocess.Popen(
                self.command(*extras),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env=self.env,
            ) as started,
        ):
            try:
                wait_until(self.answers, "the server answers", timeout_s=30)
                yield started
            finally:
                for pid in sessions_of(started.pid):
                    end(pid)


@contextmanager
def bench(folder: Path, mounter: Mounter) -> Iterator[Bench]:
    """One whose processes end with the block."""
    made = Bench(folder, mounter)
    try:
        yield made
    finally:
        made.close()


def is_running(pid: int) -> bool:
    """Whether a process is there, has not ended and is not stopped."""
    try:
        found = process(pid)
    except (OSError, ValueError):
        return False
    return not found.has_ended and found.state not in "Tt"


def await_gone(pid: int) -> None:
    wait_until(lambda: start_ticks(pid) is None, f"process {pid} is gone, and waited for")
