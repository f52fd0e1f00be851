"""What a cold start is measured with: a place on the disk, servers in it, a clock, and what servers hold."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final

from _harness import resident

from checkpoint.errors import CheckpointError, CudaError
from checkpoint.nvml import Nvml
from checkpoint.processes import tree_of

HERE: Final = os.path.dirname(os.path.abspath(__file__))
WEIGHTFS: Final = shutil.which("weightfs") or "weightfs"
START_S: Final = 240.0
HUGE_PAGES: Final = "/sys/kernel/mm/transparent_hugepage/enabled"
_STILL_THERE: Final = 0.01
"""Of the files that a cold start reads, the most that may be in memory before it."""
_LOOK_S: Final = 0.002
_KEPT: Final = "place.json"
_TAIL: Final = 1500


class FailedError(Exception):
    """A start or a snapshot that did not come to its end; the message says why."""


@dataclass
class Sample:
    """One start.

    Attributes:
        total_s: from the command to the answer.
        phases: seconds by name, in order; they add up to the total.
        same: the answer was that of the server before.
        inside: seconds by name as the server itself took them, of which some went by beside the phases.
    """

    total_s: float
    phases: dict[str, float]
    same: bool
    inside: dict[str, float] = field(default_factory=dict)


@dataclass
class Clock:
    """Phases, one after the other."""

    began: float = field(default_factory=time.monotonic)
    phases: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What happens within is that phase."""
        started = time.monotonic()
        yield
        self.phases[name] = time.monotonic() - started

    def sample(self, *, same: bool) -> Sample:
        """The time since it was made; what no phase had is a phase of its own."""
        total = time.monotonic() - self.began
        return Sample(total, self.phases | {"unaccounted": total - sum(self.phases.values())}, same)


@dataclass
class Place:
    """Where everything lies.

    Attributes:
        folder: for all that is made.
        model: the folder of weights.
        mount: a mount of it that reads ahead; `still` is one that does not.
        device: where the model runs, `cuda` or `cpu`.
        port: that servers listen on.
        baseline_bytes: of all GPUs together, in use before any server was started; None without one.
        answer: of the first server; all others must give the same.
        snapshots: what `weightfs snapshot create` said of the bytes, by the name of the snapshot.
        held: what a technique holds, by its name: see `Held`.
        warmed: bytes of the files that a technique finds in memory when it is warm, by its name.
    """

    folder: str
    model: str
    mount: str
    still: str
    device: str
    port: int
    baseline_bytes: int | None = None
    answer: dict[str, Any] | None = None
    snapshots: dict[str, dict[str, int]] = field(default_factory=dict)
    held: dict[str, dict[str, Held]] = field(default_factory=dict)
    warmed: dict[str, int] = field(default_factory=dict)

    def key(self) -> str:
        """A file with a key."""
        path = os.path.join(self.folder, "key")
        if not os.path.exists(path):
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(os.urandom(32))
        return path

    def remember(self) -> None:
        """Write down what a later run in this folder needs, to use the snapshots that are there."""
        with open(os.path.join(self.folder, _KEPT), "w", encoding="utf-8") as file:
            json.dump({"port": self.port, "answer": self.answer, "snapshots": self.snapshots}, file)

    def recall(self) -> None:
        """Take up what an earlier run wrote down, if one did: its servers' port, their answer, its snapshots."""
        with suppress(FileNotFoundError), open(os.path.join(self.folder, _KEPT), encoding="utf-8") as file:
            kept = json.load(file)
            self.port, self.answer, self.snapshots = kept["port"], kept["answer"], kept["snapshots"]

    @property
    def log(self) -> str:
        """What servers write."""
        return os.path.join(self.folder, "server.log")

    def log_tail(self) -> str:
        """The last of it."""
        with suppress(FileNotFoundError), open(self.log, encoding="utf-8", errors="replace") as file:
            return file.read()[-_TAIL:].strip()
        return ""


# Servers


def ask(port: int, path: str = "/", *, timeout_s: float = 60.0) -> dict[str, Any]:
    """A request's answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        connection.request("GET", path)
        answer: dict[str, Any] = json.loads(connection.getresponse().read())
    finally:
        connection.close()
    return answer


def first_answer(place: Place, pid: int, port: int | None = None) -> dict[str, Any]:
    """The answer to a request as soon as there is one.

    Args:
        place: where.
        pid: of the server.
        port: through which it is asked; None for its own. One that is published may reset until the server listens.

    Raises:
        FailedError: the process ended, or took too long. It is ended.
    """
    deadline = time.monotonic() + START_S
    while True:
        try:
            return ask(place.port if port is None else port)
        except ConnectionError:
            if not _runs(pid) or time.monotonic() > deadline:
                end(pid)
                raise FailedError(f"the server does not answer: {place.log_tail()}") from None
            time.sleep(_LOOK_S)


def serve(place: Place, argv: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a server in a session of its own."""
    with open(place.log, "ab") as log:
        return subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log, start_new_session=True
        )


def end(pid: int) -> None:
    """Kill a server that is ours to wait for, started or restored, and wait."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    with suppress(ChildProcessError):
        os.waitpid(pid, 0)


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# What they hold


@dataclass(frozen=True)
class Held:
    """What a server holds of the machine.

    Attributes:
        gpu_bytes: in use on all GPUs more than before any server was started; None without a GPU. Others who use them
            meanwhile count.
        by_pid_bytes: of these the driver names its processes for; None where it names none.
        host_bytes: proportional share (PSS) of its processes' memory, its page cache mappings included.
    """

    gpu_bytes: int | None
    by_pid_bytes: int | None
    host_bytes: int


def held(place: Place, pid: int | None) -> Held:
    """What a server holds now; of one that is gone (None), what is left of it on the GPUs."""
    pids = [] if pid is None else [one.pid for one in tree_of(pid)]
    host = host_bytes(pids)
    try:
        devices = Nvml().devices()
    except CudaError:
        return Held(None, None, host)
    used = sum(one.total_bytes - one.free_bytes for one in devices)
    named = [one.used_bytes[each] for one in devices for each in pids if each in one.used_bytes]
    return Held(max(0, used - (place.baseline_bytes or 0)), sum(named) if named else None, host)


def gpu_bytes_in_use() -> int | None:
    """Of all GPUs together; None without one."""
    try:
        return sum(one.total_bytes - one.free_bytes for one in Nvml().devices())
    except CudaError:
        return None


def host_bytes(pids: Sequence[int]) -> int:
    """Proportional share of these processes' memory (PSS)."""
    return sum(_pss(each) for each in pids)


def _pss(pid: int) -> int:
    with suppress(OSError), open(f"/proc/{pid}/smaps_rollup", encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10
    return 0


# Memory, cold and warm


def make_cold(*folders: str) -> None:
    """Have the kernel forget all files; returns once mincore(2) says so of those in these folders.

    Raises:
        FailedError: they stay in memory.
    """
    for _ in range(10):
        os.sync()
        write("/proc/sys/vm/drop_caches", "3")
        stays = {path: share for path in _files(folders) if (share := resident(path)) > _STILL_THERE}
        if not stays:
            return
        time.sleep(0.5)  # what was being written or read has come to its end by then
    raise FailedError(f"stays in memory: {stays}")


def make_warm(*folders: str) -> int:
    """All files in these folders into memory; gives their bytes."""
    nbytes = 0
    for path in _files(folders):
        with open(path, "rb", buffering=0) as file:
            while part := len(file.read(16 << 20)):
                nbytes += part
    return nbytes


def _files(folders: Sequence[str]) -> list[str]:
    found = [os.path.join(root, name) for top in folders for root, _, names in os.walk(top) for name in names]
    return [path for path in found if os.path.isfile(path) and os.path.getsize(path)]


# Mounts, and the machine's settings


@contextmanager
def mounted(source: str, mountpoint: str, state: str, *options: str) -> Iterator[tuple[int, int]]:
    """A mount, for the while; gives the pids of its supervisor and its daemon.

    What will be opened is not foretold there: each sample is to begin with the same.
    """
    os.makedirs(mountpoint, exist_ok=True)
    command = [WEIGHTFS, "mount", source, mountpoint, "--state-dir", state, "--predict", "off", "--json", *options]
    done = subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=60)
    said = json.loads(done.stdout)
    try:
        yield said["supervisor_pid"], said["daemon_pid"]
    finally:
        subprocess.run([WEIGHTFS, "umount", "--lazy", mountpoint], check=True, stdout=sys.stderr)


@contextmanager
def huge_pages(policy: str | None) -> Iterator[str]:
    """The machine's policy for anonymous memory, changed for the while if one is given; gives what it is."""
    with open(HUGE_PAGES, encoding="ascii") as file:
        before = file.read().split("[")[1].split("]")[0]
    if policy is not None:
        write(HUGE_PAGES, policy)
    try:
        yield policy or before
    finally:
        if policy is not None:
            write(HUGE_PAGES, before)


def write(path: str, text: str) -> None:
    """Into a file of the kernel's."""
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
    return port


def criu_version() -> str | None:
    """Of the CRIU that snapshots would use; None without one."""
    from checkpoint.criu import find_criu

    try:
        return ".".join(map(str, find_criu().version))
    except CheckpointError:
        return None
