"""Starts a process that is to be snapshotted once it is warm."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import replace

from checkpoint import control, points, readiness, stdio
from checkpoint.creation import Created, CreateOptions, create, published, undo
from checkpoint.errors import CheckpointError
from checkpoint.journal import Entry, Journal
from checkpoint.keeping import require_key
from checkpoint.phases import Phases
from checkpoint.processes import start_ticks
from checkpoint.readiness import Readiness
from checkpoint.store import Store
from checkpoint.tools import Tools


def create_of_command(
    name: str,
    command: Sequence[str],
    store: Store,
    tools: Tools,
    options: CreateOptions,
    ready: Readiness,
    ready_timeout_s: float,
    *,
    log: str | None = None,
    phases: Phases | None = None,
) -> Created:
    """Start a command, wait until it is ready, and snapshot it; it ends when that fails.

    Args:
        name, store, tools, options: see `creation.create`.
        command: and its arguments.
        ready: how it shows that it is ready, besides its own `snapshot_point`.
        ready_timeout_s: for that.
        log: takes what it writes; None for one named after the snapshot.
        phases: of the whole command, which those of the snapshot are added to.

    Raises:
        SnapshotNameError: there is one of that name.
        CorruptError: the key is not that of the store's chunks.
        CheckpointError: it can't be started, or ends too early; and what `creation.create` raises.
        RetryError: it was not ready in time.
    """
    phases = phases or Phases()
    store.require_new(name, replace=options.replace)
    require_key(store.path, plain=options.plain, master=options.master)
    point = points.make()
    entry = Entry(kind="create", step="starting", name=name, store=store.path, started=True, point=point)
    child: subprocess.Popen[bytes] | None = None
    log = log or os.path.join(stdio.LOGS, f"{name}.log")
    with Journal(entry) as journal, stdio.log(log) as output:
        try:
            with phases.phase("warm up"):
                child = start(command, output, point)
                journal.at("starting", root=child.pid, tree=[(child.pid, start_ticks(child.pid) or 0)])
                readiness.wait(replace(ready, point=point), ready_timeout_s, lambda: child.poll() is None, log=log)
            reached = points.reached(point) is not None
            wanted = replace(options, point=point if reached else None, command=command)
            return create(name, child.pid, store, tools, wanted, journal, phases)
        except BaseException:
            if published(entry) is None:
                control.to_its_end(lambda: undo(entry, tools))
            raise
        finally:
            if child is not None and not (options.leave_running and child.poll() is None):
                child.wait()


def start(command: Sequence[str], output: int | None, point: str) -> subprocess.Popen[bytes]:
    """Start a command that may say when it is warm.

    Args:
        command: and its arguments.
        output: takes what it writes, and it is the leader of a session of its own; None keeps our stdio and session.
        point: see `checkpoint.points`.

    Raises:
        CheckpointError: it can't be started.
    """
    try:
        return subprocess.Popen(
            command,
            stdin=None if output is None else subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=output is not None,
            env={**os.environ, points.VARIABLE: point},
        )
    except OSError as e:
        raise CheckpointError(f"can't be started: {os.strerror(e.errno or 0)}", path=command[0]) from e
