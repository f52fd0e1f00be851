"""`snapshot run` as systemd's ExecStart line and a container would call it, against the plain command."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from checkpoint import runtime
from checkpoint.processes import start_ticks
from tests.helpers.mounting import wait_until
from tests.helpers.targets import end, needs_criu

pytestmark = needs_criu

SERVER = """
import os, signal, sys, time
def term(number, frame):
    print("asked to end", flush=True)
    sys.exit(7)
def again(number, frame):
    print("signal", number, flush=True)
for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH):
    signal.signal(number, again)
signal.signal(signal.SIGTERM, term)
signal.signal(signal.SIGINT, term)
print("begun", os.getpid(), flush=True)
open(sys.argv[1], "w").close()
while True:
    signal.pause()
"""


class Running:
    """`snapshot run` (or the plain command) with its output in a file."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self.log = log

    def said(self, text: str, *, timeout_s: float = 40) -> None:
        """Wait until it is in the log."""

        def is_said() -> bool:
            assert self.process.poll() is None or text in self.log.read_text(), self.log.read_text()
            return text in self.log.read_text()

        wait_until(is_said, f"{text!r} in the log", timeout_s=timeout_s)

    @property
    def root(self) -> int:
        """The server's pid, as its parent says it."""
        words = self.log.read_text().split()
        return int(words[words.index("pid") + 1].rstrip(",") if "pid" in words else words[words.index("begun") + 1])


class Service:
    """A store, a command, and runs of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ready = folder / "ready"
        self.program = folder / "server.py"
        self.program.write_text(SERVER)
        self.runs = 0

    @property
    def command(self) -> list[str]:
        return [sys.executable, str(self.program), str(self.ready)]

    def arguments(self, *options: str, key: Sequence[str] = ("--no-encrypt",)) -> list[str]:
        return [
            *(sys.executable, "-c", "from weightfs.cli.main import main; main()", "snapshot", "run", "service", *key),
            *("--store", str(self.folder / "store"), "--ready-file", str(self.ready), *options, "--"),
        ]

    @contextlib.contextmanager
    def running(self, argv: Sequence[str]) -> Iterator[Running]:
        with contextlib.suppress(FileNotFoundError):
            self.ready.unlink()
        self.runs += 1
        log = self.folder / f"log{self.runs}"
        with log.open("wb") as output:
            process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        found = Running(process, log)
        with process:
            try:
                yield found
            finally:
                process.kill()

    def run(self, *options: str) -> contextlib.AbstractContextManager[Running]:
        return self.running([*self.arguments(*options), *self.command])


@pytest.fixture
def service(tmp_path: Path) -> Service:
    return Service(tmp_path)


@pytest.fixture
def snapshotted(service: Service) -> Service:
    with service.run("--create") as first:
        first.said("service snapshotted")
        first.process.send_signal(signal.SIGTERM)
        assert first.process.wait(20) == 7
        assert "asked to end" in first.log.read_text()
    return service


def test_starts_cold_then_comes_back_with_signals_logs_and_status(snapshotted: Service) -> None:
    with snapshotted.run() as again:
        again.said("service restored, pid")
        assert "begun" not in again.log.read_text(), "it was not started anew"
        for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH):
            again.process.send_signal(number)
            again.said(f"signal {int(number)}\n")
        again.process.send_signal(signal.SIGTERM)
        assert again.process.wait(20) == 7
        assert "asked to end" in again.log.read_text()
        assert start_ticks(again.root) is None, "nothing is left, and nobody has to wait for it"


def test_a_signal_that_ends_it_is_in_the_status(snapshotted: Service) -> None:
    with snapshotted.run() as again:
        again.said("service restored, pid")
        os.kill(again.root, signal.SIGKILL)
        assert again.process.wait(20) == 128 + signal.SIGKILL


def test_killing_the_parent_ends_a_restored_process_and_a_cold_one(snapshotted: Service) -> None:
    for options, shown in (((), "restored, pid"), (("--store", str(snapshotted.folder / "none")), "begun")):
        with snapshotted.run(*options) as one:
            one.said(shown)
            wait_until(lambda: one.root > 0, "its pid is told")
            root = one.root
            started = start_ticks(root)
            assert started is not None
            one.process.kill()
            one.process.wait(30)
            wait_until(functools.partial(is_gone, root, started), "it ends, too")


def test_a_taken_pid_is_a_cold_start(snapshotted: Service) -> None:
    with snapshotted.run() as one:
        one.said("service restored, pid")
        with snapshotted.run() as other:
            other.said("begun")
            assert "cold start" in other.log.read_text()
            assert "is taken" in other.log.read_text()
            assert one.process.poll() is None


def test_damaged_images_are_a_cold_start_or_with_strict_exit_4(snapshotted: Service) -> None:
    (pack,) = (snapshotted.folder / "store").rglob("*.pack")
    with pack.open("r+b") as file:
        file.seek(pack.stat().st_size // 2)
        file.write(b"\xff" * 64)
    with snapshotted.run("--strict") as strict:
        assert strict.process.wait(30) == 4
        assert "begun" not in strict.log.read_text()
    with snapshotted.run() as cold:
        cold.said("begun")
        assert "would be exit 4" in cold.log.read_text()


def test_a_key_that_can_not_be_had_is_a_cold_start_or_with_strict_exit_1(service: Service) -> None:
    key = service.folder / "key"
    options = ("--key-file", str(key))
    with service.running([*service.arguments("--create", key=options), *service.command]) as cold:
        cold.said("begun")
        assert "cold start: " in cold.log.read_text()
        assert str(key) in cold.log.read_text()
    with service.running([*service.arguments("--strict", key=options), *service.command]) as strict:
        assert strict.process.wait(30) == 1
    key.touch(0o600)
    key.write_bytes(os.urandom(32))
    with service.running([*service.arguments("--create", key=options), *service.command]) as made:
        made.said("snapshotted")
    with service.running([*service.arguments("--strict", key=options), *service.command]) as back:
        back.said("restored")


def test_another_command_is_not_restored(snapshotted: Service) -> None:
    argv = [*snapshotted.arguments(), *snapshotted.command, "--port", "1"]
    with snapshotted.running(argv) as one:
        one.said("begun")
        assert "command" in one.log.read_text()


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (["true"], 0),
        (["sh", "-c", "exit 9"], 9),
        (["sh", "-c", "kill -USR1 $$"], 128 + signal.SIGUSR1),
        (["/nowhere/at/all"], 127),
        (["/etc/passwd"], 126),
    ],
)
def test_status_of_a_cold_start(service: Service, command: list[str], status: int) -> None:
    done = subprocess.run([*service.arguments(), *command], capture_output=True, timeout=60, check=False)
    assert done.returncode == status, done.stderr


@pytest.mark.parametrize("options", [[], ["--create"]])
def test_without_a_place_for_journals_it_starts_cold(
    service: Service, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container whose /run is read-only."""
    monkeypatch.setenv(runtime.VARIABLE, os.path.join(os.devnull, "nowhere"))
    arguments = service.arguments(*options)
    arguments[arguments.index("--") + 1 :] = ["sh", "-c", "echo begun; exit 9"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (9, "begun\n"), done.stderr
    assert "cold start" in done.stderr
    assert ("no snapshot: " in done.stderr) is bool(options)
    assert "Traceback" not in done.stderr


def test_output_through_a_pipe_and_a_terminal(snapshotted: Service) -> None:
    """The snapshot was made with a file; a terminal can't stand for one, so what it writes is passed on."""
    controller, terminal = os.openpty()
    process = subprocess.Popen(
        [*snapshotted.arguments(), *snapshotted.command], stdin=terminal, stdout=terminal, stderr=subprocess.PIPE
    )
    os.close(terminal)
    with process:
        try:
            assert process.stderr is not None
            assert b"restored" in process.stderr.readline()
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 7
            assert os.read(controller, 100).strip() == b"asked to end"
        finally:
            process.kill()
            os.close(controller)


def test_as_systemd_starts_it(service: Service) -> None:
    """Its output is a socket, as the journal's, an address is told when it is ready, and stop is a SIGTERM."""
    for shown in (b"service snapshotted", b"service restored"):
        service.ready.unlink(missing_ok=True)
        notified = service.folder / "notify"
        notified.unlink(missing_ok=True)
        journal, theirs = socket.socketpair()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, journal:
            manager.bind(str(notified))
            manager.settimeout(40)
            process = subprocess.Popen(
                [*service.arguments("--create"), *service.command],
                stdin=subprocess.DEVNULL,
                stdout=theirs.fileno(),
                stderr=theirs.fileno(),
                env={
                    "PATH": "/usr/bin:/bin",
                    "NOTIFY_SOCKET": str(notified),
                    "PYTHONPATH": os.getcwd(),
                    runtime.VARIABLE: os.environ[runtime.VARIABLE],
                },
            )
            theirs.close()
            with process:
                try:
                    assert manager.recv(100) == b"READY=1"
                    process.send_signal(signal.SIGTERM)
                    assert process.wait(20) == 7
                finally:
                    process.kill()
            log = b"".join(iter(lambda: journal.recv(1 << 16), b""))
        assert shown in log
        assert log.rstrip().endswith(b"asked to end"), "what it wrote last is passed on"


@pytest.mark.alone
def test_as_pid_1_it_waits_for_orphans_and_comes_back(service: Service) -> None:
    """Every start of a container has its own pid namespace, with the low pids taken by the start itself."""
    unshare = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    service.program.write_text("import subprocess\nsubprocess.run(['sh', '-c', 'sleep 0.2 &'])\n" + SERVER)
    for shown in ("service snapshotted", "service restored, pid"):
        with service.running([*unshare, *service.arguments("--create"), *service.command]) as one:
            one.said(shown)
            children = Path(f"/proc/{one.process.pid}/task/{one.process.pid}/children").read_text().split()
            init = int(children[0])
            wait_until(functools.partial(has_no_zombies, init), "orphans are waited for")
            os.kill(init, signal.SIGTERM)
            assert one.process.wait(20) == 7
            assert "asked to end" in one.log.read_text()


def is_gone(pid: int, started: int) -> bool:
    return start_ticks(pid) != started


def has_no_zombies(parent: int) -> bool:
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        with contextlib.suppress(FileNotFoundError):
            if Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return False
    return True


def test_a_signal_while_it_is_restored_leaves_nothing(snapshotted: Service) -> None:
    with snapshotted.run() as one:
        wait_until(lambda: caught(one.process.pid, signal.SIGTERM), "signals are handled")
        one.process.send_signal(signal.SIGTERM)
        assert one.process.wait(30) in (7, 128 + signal.SIGTERM)
        assert not left(snapshotted), "no process of it is left"


def caught(pid: int, number: signal.Signals) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    mask = int(next(line for line in status.splitlines() if line.startswith("SigCgt:")).split()[1], 16)
    return bool(mask >> (number - 1) & 1)


def left(service: Service) -> list[int]:
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                arguments = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")
                if os.fsencode(service.program) in arguments:
                    found.append(int(name))
    return found


@pytest.fixture(autouse=True)
def nothing_left(service: Service) -> Iterator[None]:
    yield
    for pid in left(service):
        end(pid)
