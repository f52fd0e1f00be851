"""How a server is started by each technique, cold or warm, and what it leaves behind."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from _coldstart_place import (
    HERE,
    WEIGHTFS,
    Clock,
    FailedError,
    Held,
    Place,
    Sample,
    ask,
    end,
    first_answer,
    held,
    make_cold,
    make_warm,
    serve,
)
from _coldstart_techniques import BY_NAME, OPEN, State, Technique, split

from checkpoint.cuda_helper import Cuda
from checkpoint.errors import CheckpointError
from checkpoint.processes import tree_of

_MOVE_S: Final = 240.0
_FILL_S: Final = 120.0


# One start


def path_of(place: Place, technique: Technique) -> str:
    """Where its server finds the weights."""
    found: str = getattr(place, technique.source)
    return found


def argv_of(place: Place, technique: Technique) -> list[str]:
    """Its server's command line."""
    script = os.path.join(HERE, technique.server)
    return [sys.executable, script, path_of(place, technique), place.device, str(place.port)]


def prepare(place: Place, technique: Technique, state: State) -> None:
    """Have in memory what is to be there, or nothing."""
    folders = [path_of(place, technique)]
    if technique.snapshot is not None:
        folders.append(store_of(place, technique))
    if state == "cold":
        make_cold(place.model, *folders[1:])
    else:
        place.warmed[technique.name] = make_warm(*folders)


def started(place: Place, technique: Technique, state: State) -> Sample:
    """From the command to the answer, of a server that is started anew."""
    prepare(place, technique, state)
    with ExitStack() as stack:
        clock = Clock()
        beside = _begin_beside(place, technique, stack)
        spawned = time.time()
        server = serve(place, argv_of(place, technique))
        stack.callback(lambda: end(server.pid))
        answer = first_answer(place, server.pid)
        total = time.monotonic() - clock.began
        told = ask(place.port, "/phases")
        clock.phases = {"start Python": told["started"] - spawned} | told["phases"]
        clock.phases["answer a request"] = total - sum(clock.phases.values())
        _note(place, technique, "serving", server.pid)
        inside = _end_beside(beside)
    _note(place, technique, "idle", None)
    place.answer = place.answer or answer
    return Sample(total, clock.phases, answer == place.answer, inside)


def restored(place: Place, technique: Technique, state: State) -> Sample:
    """The same, of one that a restore brings back. Every byte is verified on the way."""
    if technique.stored_as not in place.snapshots:
        raise FailedError("there is no snapshot: making it failed")
    prepare(place, technique, state)
    clock = Clock()
    said = snapshot_command(place, technique, "restore", *technique.restore)
    clock.phases = {name: float(seconds) for name, seconds in said["phases"].items()}
    clock.phases["the command itself"] = time.monotonic() - clock.began - sum(clock.phases.values())
    try:
        with clock.phase("answer a request"):
            answer = first_answer(place, said["pid"])
        sample = clock.sample(same=answer == place.answer)
        sample.inside = dict(ask(place.port, "/phases").get("reload", {}))
        _note(place, technique, "serving", said["pid"])
    finally:
        end(said["pid"])
    _note(place, technique, "idle", None)
    return sample


def suspended(place: Place, technique: Technique, rounds: int) -> list[Sample]:
    """The GPU's memory to the host and back, in a server that stays: what a snapshot does, less the dump."""
    if (cuda := Cuda.detect()) is None:
        return []
    samples = []
    with ExitStack() as stack:
        stack.callback(cuda.close)
        server = serve(place, argv_of(place, technique))
        stack.callback(lambda: end(server.pid))
        first_answer(place, server.pid)
        pids = cuda.find([one.pid for one in tree_of(server.pid)])
        _note(place, technique, "serving", server.pid)
        for _ in range(rounds if pids else 0):
            cuda.lock_all(pids, _MOVE_S)
            away = time.monotonic()
            cuda.checkpoint_all(pids)
            away = time.monotonic() - away
            _note(place, technique, "idle", server.pid)
            clock = Clock()
            with clock.phase("CUDA restore"):
                cuda.restore_all(pids)
            with clock.phase("CUDA unlock"):
                cuda.unlock_all(pids)
            with clock.phase("answer a request"):
                answer = ask(place.port)
            sample = clock.sample(same=answer == place.answer)
            sample.inside = {"CUDA checkpoint, before": away}
            samples.append(sample)
    return samples


def _begin_beside(place: Place, technique: Technique, stack: ExitStack) -> subprocess.Popen[bytes] | None:
    """What is started with the server; it is gone when `stack` is."""
    if technique.beside is None:
        return None
    fill = [sys.executable, os.path.join(HERE, "_fill_bare.py"), place.model]
    argv = fill if technique.beside == "fill" else [WEIGHTFS, "warm", path_of(place, technique), "--json"]
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    stack.enter_context(process)
    stack.callback(process.kill)  # first; of one that has ended it does nothing
    return process


def _end_beside(process: subprocess.Popen[bytes] | None) -> dict[str, float]:
    """How long that took."""
    if process is None:
        return {}
    said, _ = process.communicate(timeout=_FILL_S)
    if process.returncode:
        raise FailedError(f"{process.args!r} ended with status {process.returncode}")
    return {"reading ahead": float(json.loads(said)["seconds"])}


def _note(place: Place, technique: Technique, when: str, pid: int | None) -> None:
    """Keep what it holds; the last sample's."""
    found: Held = held(place, pid)
    place.held.setdefault(technique.name, {})[when] = found


# Snapshots


def store_of(place: Place, technique: Technique) -> str:
    """The store that its snapshot lies in."""
    return os.path.join(place.folder, "snapshots", technique.stored_as)


def snapshot(place: Place, technique: Technique) -> Sample:
    """Start its server and snapshot it; the sample is that of the snapshot, a start by its command included."""
    options = ("--replace", *[one for one in technique.snapshot or () if one not in OPEN])
    clock = Clock()
    if technique.is_made_by_command:
        command = ("--log", place.log, "--", *argv_of(place, technique))
        said = snapshot_command(place, technique, "create", *options, *command)
    else:
        server = serve(place, argv_of(place, technique))
        try:
            first_answer(place, server.pid)
            clock = Clock()
            said = snapshot_command(place, technique, "create", "--pid", str(server.pid), *options)
        finally:
            end(server.pid)
    clock.phases = {name: float(seconds) for name, seconds in said["phases"].items()}
    place.snapshots[technique.stored_as] = said["bytes"]
    place.remember()
    _note(place, technique, "idle", None)
    return clock.sample(same=True)


def snapshot_command(place: Place, technique: Technique, command: str, *arguments: str) -> dict[str, Any]:
    """What `weightfs snapshot COMMAND` says.

    Raises:
        FailedError: it failed.
    """
    status, said = snapshot_attempt(place, technique, command, *arguments)
    if status:
        raise FailedError(f"snapshot {command}: status {status}, {said.get('error')}; {place.log_tail()}")
    return said


def snapshot_attempt(place: Place, technique: Technique, command: str, *arguments: str) -> tuple[int, dict[str, Any]]:
    """The same, failed or not: its status, and what it says."""
    argv = snapshot_argv(place, technique, command, *arguments)
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=2 * _MOVE_S, check=False)
    said: dict[str, Any] = json.loads(done.stdout or "{}")
    return done.returncode, said


def snapshot_argv(place: Place, technique: Technique, command: str, *arguments: str) -> list[str]:
    """The command line of `weightfs snapshot COMMAND` for its snapshot."""
    encryption = OPEN if "--no-encrypt" in (technique.snapshot or ()) else ("--key-file", place.key())
    store = store_of(place, technique)
    return [WEIGHTFS, "snapshot", command, "server", "--store", store, *encryption, "--json", *arguments]


# All rows


@dataclass
class Measured:
    """Samples by row, and why others have none, or fewer.

    Attributes:
        samples: in the order in which they were taken.
        failures: by row; one that failed is not tried again.
    """

    samples: dict[str, list[Sample]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def take(self, row: str, once: Callable[[], Sample | list[Sample]], told: Callable[[str, Sample], Sample]) -> None:
        """Take a sample, or several."""
        if row in self.failures:
            return
        try:
            taken = once()
        except (FailedError, CheckpointError, OSError, subprocess.SubprocessError) as error:
            self.failures[row] = f"{error}"
            print(f"{row}: FAILED: {error}", file=sys.stderr, flush=True)
            return
        for sample in taken if isinstance(taken, list) else [taken]:
            self.samples.setdefault(row, []).append(told(row, sample))


def measure(
    place: Place,
    rows: Iterable[str],
    rounds: int,
    cold_rounds: int,
    told: Callable[[str, Sample], Sample],
    until: float | None = None,
) -> Measured:
    """Samples of each row. Rows take turns, so that whatever else the machine does meets all of them.

    Args:
        place: where.
        rows: which.
        rounds: samples of each warm row.
        cold_rounds: of each cold one.
        told: is told of each sample.
        until: no sample is begun after that (monotonic); rows may then have fewer, or none.

    Raises:
        FailedError: not even a server without anything of ours starts.
    """
    found = Measured()
    pairs = [(row, *split(row)) for row in rows]
    if place.answer is None or any(technique.snapshot is None for _, technique, _ in pairs):
        # So that the first row does not pay for what is made once after an installation, such as byte code.
        told("(first of all)", started(place, BY_NAME["none"], "warm"))
    for technique in dict.fromkeys(each for _, each, _ in pairs):
        if technique.snapshot is not None and technique.stored_as not in place.snapshots:
            found.take(f"(snapshot for {technique.name})", partial(snapshot, place, technique), told)
    for row, technique, _ in pairs:
        if technique.in_place:
            found.take(row, partial(suspended, place, technique, rounds), told)
    for state, count in (("cold", cold_rounds), ("warm", rounds)):
        for _ in range(count):
            for row, technique, wanted in pairs:
                if wanted == state and not technique.in_place and time.monotonic() < (until or math.inf):
                    once = started if technique.snapshot is None else restored
                    found.take(row, partial(once, place, technique, wanted), told)
    return found
