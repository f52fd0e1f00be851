"""Completes or undoes what commands that died have begun."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from checkpoint import control, creation, journal
from checkpoint.errors import CheckpointError
from checkpoint.journal import Entry
from checkpoint.processes import family, process, start_ticks
from checkpoint.store import Store
from checkpoint.tools import Tools

_CRIU_S: Final = 120.0
_LOOK_S: Final = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class Recovered:
    """What was found.

    Attributes:
        kind: `create` or `restore`.
        name: of the snapshot.
        step: at which the command died.
        outcome: `undone` or `completed`.
    """

    kind: str
    name: str
    step: str
    outcome: str


def recover(tools: Tools, folder: str = journal.FOLDER) -> list[Recovered]:
    """Deal with every journal that was left over, then with what is left over in the stores they name.

    Raises:
        CheckpointError: something could not be put right; its journal stays.
    """
    done = []
    stores = set()
    for path, entry in journal.left_over(folder):
        stores.add(entry.store)
        outcome = _create(entry, tools) if entry.kind == "create" else _restore(entry)
        journal.finish(path)
        done.append(Recovered(kind=entry.kind, name=entry.name, step=entry.step, outcome=outcome))
    for store in sorted(stores):
        Store(store).recover()
    return done


def _create(entry: Entry, tools: Tools) -> str:
    if entry.step == "finishing":
        creation.finish(entry, tools, None)
        return "completed"
    if entry.images:
        _wait_for_criu(entry.images)
    creation.undo(entry, tools)
    return "undone"


def _restore(entry: Entry) -> str:
    if entry.step == "restoring":
        for pid in _criu_at(entry.images):
            os.kill(pid, signal.SIGSTOP)
            restored = family(pid)[1:]
            os.kill(pid, signal.SIGKILL)
            control.end(restored)
        since = start_ticks(entry.root)
        if since is not None and since >= entry.since_ticks and _may_be(entry):
            control.end(family(entry.root))
    elif entry.step in ("filling", "letting go", "ready"):
        control.end(entry.tree)
    return "undone"


def _may_be(entry: Entry) -> bool:
    """Whether the process that has the root's pid is the one restored; its arguments may not have been filled in."""
    found = process(entry.root).cmdline
    return found == tuple(entry.command) or not any(found)


def _wait_for_criu(images: str) -> None:
    """CRIU has a session of its own and goes on with its dump when the command has died."""
    until = time.monotonic() + _CRIU_S
    while pids := list(_criu_at(images)):
        if time.monotonic() > until:
            raise CheckpointError(f"CRIU (process {pids[0]}) still dumps", path=images, mend=f"kill {pids[0]}")
        time.sleep(_LOOK_S)


def _criu_at(images: str) -> Iterator[int]:
    """The CRIU that works on a folder of images."""
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/cmdline", "rb") as file:
                arguments = file.read().split(b"\0")
        except OSError:
            continue
        if b"--images-dir" in arguments and os.fsencode(images) in arguments and b"--libdir" in arguments:
            yield int(name)
