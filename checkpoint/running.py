"""A command in the foreground, from its snapshot where that can be, else started anew.

    snapshot restored             it runs on as our child
    no snapshot, or no fit, ...   the command is started; with `create` it is snapshotted once it is warm, and goes on

Whoever runs a service wants it to run: whatever keeps a snapshot from being restored is a reason for a cold start,
told in one line, unless `strict`.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Final

from checkpoint import points, readiness
from checkpoint.chunks.keys import MasterKey
from checkpoint.creation import CreateOptions, create
from checkpoint.errors import CheckpointError, SnapshotNameError
from checkpoint.foreground import Foreground, Interrupted
from checkpoint.preflight import LOG_WRITTEN
from checkpoint.readiness import Readiness
from checkpoint.relaying import Relay
from checkpoint.restoration import RestoreOptions, restore
from checkpoint.store import Store
from checkpoint.tools import Tools
from weightfs.errors import WeightfsError

NOT_FOUND: Final = 127
NOT_EXECUTABLE: Final = 126
"""What a shell exits with for a command that is not there, or can't be executed."""

_YOUNG: Final = 300
"""The kernel begins again at this pid when they run out (RESERVED_PIDS): a lower one was given in a young namespace."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOptions:
    """How a command is run.

    Attributes:
        command: and its arguments; never empty.
        ready: how it shows that it is warm, and after a restore (its `url` only) that it answers.
        ready_timeout_s: for that.
        timeout_s: see `CreateOptions` and `RestoreOptions`.
        create: it is snapshotted once it is warm, if there is no snapshot of that name.
        replace: also if there is one that could not be restored.
        strict: that one can't be restored is an error.
        verify: whether images are compared with their digests before a restore.
        master: gives the key of the snapshot, None where it is not encrypted; that it can't is one more reason for a
            cold start. Called before anything is started: a key in the environment is not for the command.
    """

    command: Sequence[str]
    ready: Readiness
    ready_timeout_s: float = 600.0
    timeout_s: float = 120.0
    create: bool = False
    replace: bool = False
    strict: bool = False
    verify: bool = True
    master: Callable[[], MasterKey | None] = lambda: None


@dataclass(frozen=True, kw_only=True, slots=True)
class Surroundings:
    """What a run needs of its caller.

    Attributes:
        store: gives the store.
        tools: gives what snapshots are made and restored with, and puts right what is left half done.
        say: tells people a line.
        ready: told once, when the process is ready.
    """

    store: Callable[[], Store]
    tools: Callable[[], AbstractContextManager[Tools]]
    say: Callable[[str], None]
    ready: Callable[[], None]


def run(name: str, options: RunOptions, around: Surroundings) -> int:
    """Run a command in the foreground, until it ends. In the main thread.

    Returns:
        Its exit status; 128 and the signal's number where one has ended it; 127 or 126 where it can't be started.

    Raises:
        WeightfsError: the snapshot can't be restored, and `strict` is asked for.
    """
    with Foreground() as parent, Relay() as relay:
        try:
            refusal = _restored(name, options, around, parent, relay)
        except Interrupted as e:
            parent.end_children()
            return 128 + e.number
        if refusal is None:
            relay.begin()
            around.ready()
        else:
            if options.strict and not (options.create and isinstance(refusal, SnapshotNameError)):
                raise refusal
            status = _started(name, options, around, parent, relay, refusal)
            if status is not None:
                return status
        status = parent.wait()
        relay.finish()
        return status


def _restored(
    name: str, options: RunOptions, around: Surroundings, parent: Foreground, relay: Relay
) -> WeightfsError | None:
    """Restore the snapshot; gives what kept it from that."""
    try:
        with parent.hold(), _keyed(options.master) as master, around.tools() as tools:
            back = restore(
                name,
                around.store(),
                tools,
                RestoreOptions(
                    ready=Readiness(url=options.ready.url) if options.ready.url else None,
                    timeout_s=options.timeout_s,
                    attached=relay.given,
                    command=options.command,
                    verify=options.verify,
                    master=master,
                ),
            )
            parent.adopt(back.pid)
    except WeightfsError as e:
        return e
    except OSError as e:  # whatever the machine lacks, the service runs
        return CheckpointError(f"it can't be restored here: {e.strerror}", path=e.filename)
    for warning in back.warnings:
        around.say(warning)
    around.say(f"{name} restored, pid {back.pid}, {sum(back.seconds.values()):.3f} s")
    return None


@contextlib.contextmanager
def _keyed(master: Callable[[], MasterKey | None]) -> Iterator[MasterKey | None]:
    yield master()


def _started(
    name: str, options: RunOptions, around: Surroundings, parent: Foreground, relay: Relay, refusal: WeightfsError
) -> int | None:
    """Start the command; gives an exit status when it has ended already, or could not be started."""
    around.say(f"cold start: {refusal} (would be exit {refusal.exit_code})")
    point = _point(around) if options.create and os.geteuid() == 0 else None
    fds = relay.given.plain if options.create else relay.given.own
    try:
        with parent.hold():
            child = _start(options.command, fds, point)
            parent.adopt(child.pid)
            child.returncode = 0  # `parent` waits for it
    except Interrupted as e:
        parent.end_children()
        return 128 + e.number
    except OSError as e:
        around.say(f"{options.command[0]}: can't be started: {os.strerror(e.errno or 0)}")
        return NOT_FOUND if isinstance(e, FileNotFoundError) else NOT_EXECUTABLE
    relay.begin()
    if not options.ready.is_asked_for and point is None:
        around.ready()
        return None
    try:
        readiness.wait(replace(options.ready, point=point), options.ready_timeout_s, lambda: not parent.has_ended())
        if point is not None and (isinstance(refusal, SnapshotNameError) or options.replace):
            _snapshot(name, options, around, parent, point)
        if not parent.has_ended():
            around.ready()
    except CheckpointError as e:
        if not parent.has_ended():
            around.say(f"no snapshot: {e}" if options.create else f"{e}")
    finally:
        if point is not None:
            points.dismiss(point)
    return None


def _point(around: Surroundings) -> str | None:
    """A folder to speak with the process; None where there can be none: then there is no snapshot, but a start."""
    try:
        return points.make()
    except CheckpointError as e:
        around.say(f"no snapshot: {e}" + (f"; {e.mend}" if e.mend else ""))
        return None


def _snapshot(name: str, options: RunOptions, around: Surroundings, parent: Foreground, point: str) -> None:
    reached = points.reached(point) is not None
    try:
        with parent.hold(), _keyed(options.master) as master, around.tools() as tools:
            made = CreateOptions(
                leave_running=True,
                replace=options.replace,
                timeout_s=options.timeout_s,
                point=point if reached else None,
                command=options.command,
                master=master,
            )
            created = create(name, parent.pid, around.store(), tools, made)
    except Interrupted:
        around.say("no snapshot: a signal came first")
    except OSError as e:
        around.say(f"no snapshot: {e}")
    except WeightfsError as e:
        around.say(f"no snapshot: {e}" + (f"; {e.mend}" if e.mend else ""))
    else:
        for finding in created.findings:
            if finding.code != LOG_WRITTEN:
                around.say(str(finding))
        around.say(f"{name} snapshotted, {sum(created.seconds.values()):.3f} s")


def _start(command: Sequence[str], fds: tuple[int, int, int], point: str | None) -> subprocess.Popen[bytes]:
    if point is not None and os.getpid() < _YOUNG:
        _leave_low_pids()
    environment = dict(os.environ)
    environment.pop(points.VARIABLE, None)
    if point is not None:
        environment[points.VARIABLE] = point
    return subprocess.Popen(
        command, stdin=fds[0], stdout=fds[1], stderr=fds[2], start_new_session=True, env=environment
    )


def _leave_low_pids() -> None:
    """In a container the first pids are taken by us and CRIU at every start, and the process must find its own free.

    A thread takes a pid as a process does, 0.4 ms each on two busy cores; `ns_last_pid` is there for this, but can't be
    written in most containers.
    """
    until = random.randrange(_YOUNG, 2 * _YOUNG)
    ids: list[int] = [0]
    while ids[-1] < until:
        thread = threading.Thread(target=lambda: ids.append(threading.get_native_id()))
        thread.start()
        thread.join()
