"""From "start this model" to its first token: everything cold, and by a snapshot, phase by phase.

    tools/gpu/run tools/bench/coldstart.py --json FILE             on the GPU machine: 7.2 GB, about 5 minutes
    python tools/bench/coldstart.py --device cpu --gigabytes 0.05  a trial anywhere; as root, with CRIU

The server is an unmodified one (`_plain_server.py`). Rows:
    cold           started from the model's own folder, nothing in memory: neither weights nor Python's libraries
    cold mount     the same from a weightfs mount
    warm mount     everything in memory that can be
    restore        by `weightfs snapshot restore`, encrypted, what it reads in memory; the server loaded from the mount
    restore unencrypted, restore plain
                   the same of a snapshot made with --no-encrypt, and with --plain as well: CRIU reads its own images
    restore cold   as `restore`, with nothing in memory
    suspend        GPU memory to the host and back in place, without CRIU: what `weightfs snapshot` does, less the dump

Every sample ends when the client has the answer to a request, which must be the answer the server gave before. What the
phases of a row leave unaccounted is a phase of its own. Caches are dropped for the whole machine: needs root.
"""

from __future__ import annotations

import argparse
import ctypes
import http.client
import json
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final

from checkpoint.criu import find_criu
from checkpoint.cuda_helper import Cuda
from checkpoint.processes import tree_of

HERE: Final = os.path.dirname(os.path.abspath(__file__))
KINDS: Final = {
    "restore": (),
    "restore unencrypted": ("--no-encrypt",),
    "restore plain": ("--no-encrypt", "--plain"),
}
"""How a row's snapshot is made; without a word of encryption, with a key."""
ROWS: Final = ("cold", "cold mount", "warm mount", *KINDS, "restore cold", "suspend")
START_S: Final = 240.0
MOVE_S: Final = 120.0
WEIGHTFS: Final = shutil.which("weightfs") or "weightfs"
HUGE_PAGES: Final = "/sys/kernel/mm/transparent_hugepage/enabled"
_SUBREAPER: Final = 36  # PR_SET_CHILD_SUBREAPER: what CRIU restores is ours to wait for


@dataclass
class Sample:
    """One start.

    Attributes:
        total_s: from the command to the answer.
        phases: seconds by name, in order; they add up to the total.
        same: the answer was that of the server before.
    """

    total_s: float
    phases: dict[str, float]
    same: bool


@dataclass
class Clock:
    """Phases, one after the other."""

    began: float = field(default_factory=time.monotonic)
    phases: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.phases[name] = time.monotonic() - started

    def sample(self, *, same: bool) -> Sample:
        total = time.monotonic() - self.began
        return Sample(total, self.phases | {"unaccounted": total - sum(self.phases.values())}, same)


@dataclass
class Place:
    """Where everything lies, and what it is measured with."""

    folder: str
    model: str
    mount: str
    device: str
    port: int
    answer: dict[str, Any] | None = None
    snapshot_bytes: dict[str, dict[str, int]] = field(default_factory=dict)

    def store(self, kind: str) -> str:
        return os.path.join(self.folder, "snapshots", kind.replace(" ", "-"))

    def key(self) -> str:
        """A file with a key."""
        path = os.path.join(self.folder, "key")
        if not os.path.exists(path):
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(os.urandom(32))
        return path


def ask(port: int, path: str = "/", *, timeout_s: float = 30.0) -> dict[str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        connection.request("GET", path)
        answer: dict[str, Any] = json.loads(connection.getresponse().read())
    finally:
        connection.close()
    return answer


def drop_caches() -> None:
    os.sync()
    _write("/proc/sys/vm/drop_caches", "3")


def fill_cache(folder: str) -> None:
    """Everything below it into memory."""
    for root, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(root, name), "rb", buffering=0) as file:
                while file.read(16 << 20):
                    pass


# A server


def start(place: Place, model: str) -> tuple[subprocess.Popen[bytes], Sample]:
    """Start it, and wait for the answer to a request."""
    argv = [sys.executable, os.path.join(HERE, "_plain_server.py"), model, place.device, str(place.port)]
    with open(os.path.join(place.folder, "server.log"), "ab") as log:
        clock = Clock()
        spawned = time.time()
        server = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log, start_new_session=True
        )
    answer = first_answer(place, server)
    total = time.monotonic() - clock.began
    told = ask(place.port, "/phases")
    clock.phases = {"start Python": told["started"] - spawned} | told["phases"]
    clock.phases["answer a request"] = total - sum(clock.phases.values())
    place.answer = place.answer or answer
    return server, Sample(total, clock.phases, answer == place.answer)


def first_answer(place: Place, server: subprocess.Popen[bytes]) -> dict[str, Any]:
    deadline = time.monotonic() + START_S
    while True:
        try:
            return ask(place.port)
        except ConnectionRefusedError:
            if server.poll() is not None or time.monotonic() > deadline:
                end(server.pid)
                with open(os.path.join(place.folder, "server.log"), encoding="utf-8", errors="replace") as file:
                    raise SystemExit(f"the server did not start:\n{file.read()[-2000:]}") from None
            time.sleep(0.002)


def end(pid: int) -> None:
    """Kill a server that is ours to wait for, started or restored, and wait."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    with suppress(ChildProcessError):
        os.waitpid(pid, 0)


# Rows


def cold(place: Place, model: str, *, warm: bool = False) -> Sample:
    if not warm:
        drop_caches()
    server, sample = start(place, model)
    end(server.pid)
    return sample


def snapshot(place: Place, kind: str) -> Sample:
    """Start a server from the mount, and snapshot it; the sample is that of the snapshot."""
    server, _ = start(place, place.mount)
    clock = Clock()
    said = weightfs(place, kind, "create", "--pid", str(server.pid), "--replace", *KINDS[kind][1:])
    sample = _with_phases(clock, said)
    end(server.pid)
    place.snapshot_bytes[kind] = said["bytes"]
    return sample


def restored(place: Place, kind: str, *, warm: bool) -> Sample:
    """From the command to the answer. Every byte is verified on the way."""
    if warm:
        fill_cache(place.store(kind))
        fill_cache(place.mount)
    else:
        drop_caches()
    clock = Clock()
    said = weightfs(place, kind, "restore")
    command = _with_phases(clock, said)
    clock.phases = {name: seconds for name, seconds in command.phases.items() if name != "unaccounted"}
    clock.phases["the command itself"] = command.phases["unaccounted"]
    with clock.phase("answer a request"):
        answer = ask(place.port)
    sample = clock.sample(same=answer == place.answer)
    end(said["pid"])
    return sample


def weightfs(place: Place, kind: str, command: str, *arguments: str) -> dict[str, Any]:
    """What `weightfs snapshot COMMAND` says."""
    encryption = KINDS[kind][:1] or ("--key-file", place.key())
    argv = [WEIGHTFS, "snapshot", command, "server", "--store", place.store(kind), *encryption, "--json", *arguments]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=2 * MOVE_S, check=False)
    said: dict[str, Any] = json.loads(done.stdout or "{}")
    if done.returncode:
        raise SystemExit(f"weightfs snapshot {command}: status {done.returncode}, {said.get('error')}")
    return said


def _with_phases(clock: Clock, said: dict[str, Any]) -> Sample:
    clock.phases = {name: float(seconds) for name, seconds in said["phases"].items()}
    return clock.sample(same=True)


def suspended(place: Place, rounds: int) -> list[Sample]:
    """The GPU's memory to the host and back, in a server that stays."""
    server, _ = start(place, place.mount)
    samples = []
    try:
        with ExitStack() as stack:
            cuda, pids = _gpu_side(Clock(), stack, server.pid)
            if cuda is None:
                return []
            for _ in range(rounds):
                held = sum(cuda.used_bytes(pids).values())
                clock = Clock()
                with clock.phase("CUDA lock"):
                    cuda.lock_all(pids, MOVE_S)
                with clock.phase("CUDA checkpoint"):
                    cuda.checkpoint_all(pids)
                left = sum(cuda.used_bytes(pids).values())
                with clock.phase("CUDA restore"):
                    cuda.restore_all(pids)
                with clock.phase("CUDA unlock"):
                    cuda.unlock_all(pids)
                with clock.phase("answer a request"):
                    answer = ask(place.port)
                samples.append(clock.sample(same=answer == place.answer))
                print(f"    suspend: held {held >> 20} MiB of the GPU, {left >> 20} MiB while away", file=sys.stderr)
    finally:
        end(server.pid)
    return samples


def _gpu_side(clock: Clock, stack: ExitStack, pid: int) -> tuple[Cuda | None, list[int]]:
    cuda = _driver(clock, stack)
    if cuda is None:
        return None, []
    with clock.phase("find CUDA processes"):
        pids = cuda.find([one.pid for one in tree_of(pid)])
    return (cuda, pids) if pids else (None, [])


def _driver(clock: Clock, stack: ExitStack) -> Cuda | None:
    with clock.phase("open the CUDA driver"):
        cuda = Cuda.detect()
    if cuda is not None:
        stack.callback(cuda.close)
    return cuda


# The whole


def measure(place: Place, rows: list[str], rounds: int, cold_rounds: int) -> dict[str, list[Sample]]:
    samples: dict[str, list[Sample]] = {}

    def row(name: str, count: int, once: Callable[[], Sample]) -> None:
        if name in rows:
            for _ in range(count):
                samples.setdefault(name, []).append(told(name, once()))

    # So that "cold" does not pay for what is made once after an installation, such as byte code.
    told("(first of all)", cold(place, place.model, warm=True))
    row("cold", cold_rounds, lambda: cold(place, place.model))
    row("cold mount", cold_rounds, lambda: cold(place, place.mount))
    row("warm mount", rounds, lambda: cold(place, place.mount, warm=True))
    if "suspend" in rows:
        for sample in suspended(place, rounds):
            samples.setdefault("suspend", []).append(told("suspend", sample))
    kinds = [kind for kind in KINDS if kind in rows or (kind == "restore" and "restore cold" in rows)]
    for kind in kinds:
        samples[f"(snapshot for {kind})"] = [told(f"(snapshot for {kind})", snapshot(place, kind))]
    for _ in range(rounds):  # one after the other, so that whatever else the machine does meets all of them
        for kind in kinds:
            row(kind, 1, lambda kind=kind: restored(place, kind, warm=True))  # type: ignore[misc]
    row("restore cold", cold_rounds, lambda: restored(place, "restore", warm=False))
    return samples


def told(name: str, sample: Sample) -> Sample:
    parts = ", ".join(f"{phase} {seconds:.3f}" for phase, seconds in sample.phases.items())
    print(f"{name}: {sample.total_s:.3f} s{'' if sample.same else ' OTHER ANSWER'} ({parts})", file=sys.stderr)
    return sample


def summary(name: str, samples: list[Sample]) -> dict[str, Any]:
    """Medians; the phases are those of the sample in the middle, so that they add up."""
    middle = sorted(samples, key=lambda one: one.total_s)[len(samples) // 2]
    return {
        "row": name,
        "median_s": round(statistics.median(one.total_s for one in samples), 4),
        "totals_s": [round(one.total_s, 4) for one in samples],
        "phases": {phase: round(seconds, 4) for phase, seconds in middle.phases.items()},
        "same": all(one.same for one in samples),
    }


@contextmanager
def mounted(source: str, mountpoint: str, state: str) -> Iterator[None]:
    os.makedirs(mountpoint, exist_ok=True)
    command = [WEIGHTFS, "mount", source, mountpoint, "--state-dir", state]
    subprocess.run(command, check=True, stdout=sys.stderr, timeout=60)
    try:
        yield
    finally:
        subprocess.run([WEIGHTFS, "umount", "--lazy", mountpoint], check=True, stdout=sys.stderr)


@contextmanager
def huge_pages(policy: str | None) -> Iterator[str]:
    """The machine's policy for anonymous memory, changed for the while if one is given; gives what it is."""
    with open(HUGE_PAGES, encoding="ascii") as file:
        before = file.read().split("[")[1].split("]")[0]
    if policy is not None:
        _write(HUGE_PAGES, policy)
    try:
        yield policy or before
    finally:
        if policy is not None:
            _write(HUGE_PAGES, before)


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
    return port


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--gigabytes", type=float, default=7.2, help="size of the weights (default 7.2)")
    options.add_argument("--device", default="cuda", help="where the model runs: cuda or cpu")
    options.add_argument("--rows", default=",".join(ROWS), help="which, separated by commas")
    options.add_argument("--rounds", type=int, default=3, help="samples of each warm row (default 3)")
    options.add_argument("--cold-rounds", type=int, default=1, help="samples of each cold row (default 1)")
    options.add_argument("--folder", default=None, help="where model and images go (default: a temp folder)")
    options.add_argument("--thp", choices=("always", "madvise", "never"), help="huge pages, for the while")
    options.add_argument("--json", default=None, metavar="FILE", help="write everything there")
    given = options.parse_args()
    rows = given.rows.split(",")
    if unknown := set(rows) - set(ROWS):
        options.error(f"no such row: {', '.join(sorted(unknown))}")
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    with ExitStack() as stack:
        policy = stack.enter_context(huge_pages(given.thp))
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="coldstart-", dir=given.folder))
        model = os.path.join(folder, "model")
        script = os.path.join(HERE, "_random_llama.py")
        made = subprocess.run(
            [sys.executable, script, model, str(given.gigabytes), given.device], check=True, stdout=subprocess.PIPE
        )
        about = json.loads(made.stdout.splitlines()[-1])
        print(f"model: {about}", file=sys.stderr)
        mount = os.path.join(folder, "mount")
        stack.enter_context(mounted(model, mount, os.path.join(folder, "state")))
        place = Place(folder, model, mount, given.device, free_port())
        samples = measure(place, rows, given.rounds, given.cold_rounds)
    report = {
        "kernel": platform.release(),
        "cores": os.cpu_count(),
        "criu": ".".join(map(str, find_criu().version)),
        "huge_pages": policy,
        "gpus": _gpus(),
        "model": about,
        "snapshot_bytes": place.snapshot_bytes,
        "rows": [summary(name, ones) for name, ones in samples.items()],
    }
    if given.json:
        with open(given.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
    print(json.dumps(report, indent=1))


def _gpus() -> list[str]:
    cuda = Cuda.detect()
    if cuda is None:
        return []
    with cuda:
        return [f"{one.name}, driver {cuda.version()}" for one in cuda.devices()]


if __name__ == "__main__":
    main()
