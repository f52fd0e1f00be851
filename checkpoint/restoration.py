"""Brings a snapshot back: what does not fit or has changed is refused before anything is touched.

    step            undone by
    begun           nothing
    restoring       CRIU is ended, with what it has restored so far
    filling         every process of the tree is ended
    letting go      every process of the tree is ended
    ready           as above, until the process answers

The tree is restored stopped, and its memory filled in by a page server while CRIU goes on (see
`checkpoint.pageserver`); once all of it is there, every weight file is looked at once more, and the tree runs.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from checkpoint import control, criu, in_use, points, processes, readiness, stdio, userfaultfd
from checkpoint.creation import options_kept
from checkpoint.digests import Identity
from checkpoint.errors import RetryError
from checkpoint.fingerprint import Difference, compare, require_fit
from checkpoint.journal import Entry, Journal
from checkpoint.machine import fingerprint_here
from checkpoint.manifest import Manifest
from checkpoint.pageserver import Filled, PageServer
from checkpoint.phases import Phases
from checkpoint.processes import start_ticks
from checkpoint.readiness import Readiness
from checkpoint.store import Snapshot, Store
from checkpoint.tools import Tools
from checkpoint.weights import check_weights, unchanged_since

_WAITED_FOR_S: Final = 10.0
"""Init, or whoever started it, may be slow to wait for a process that was dumped."""
_LOOK_S: Final = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class RestoreOptions:
    """How a snapshot is restored.

    Attributes:
        ready: how the process shows that it answers; None where it is not waited for.
        timeout_s: for CRIU, and again for the process to answer.
        log: the file that takes what the process writes; None for its own log, or one named after the snapshot.
        attached: the stdio of the process, which becomes this one's child; None for a session of its own.
        command: what it must have been; empty where that does not matter.
        verify: whether the images' digests are compared.
        plain: CRIU reads memory back itself, with one thread.
    """

    ready: Readiness | None = None
    timeout_s: float = 120.0
    log: str | None = None
    attached: stdio.Given | None = None
    command: Sequence[str] = ()
    verify: bool = True
    plain: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Restored:
    """What was restored.

    Attributes:
        manifest: of the snapshot.
        pid: of the root.
        seconds: by phase.
        bytes_read: of images.
        differences: between the machines, none of which matters.
        warnings: a line each.
        filled: what the page server filled in; None where CRIU read it back.
    """

    manifest: Manifest
    pid: int
    seconds: dict[str, float]
    bytes_read: int
    differences: list[Difference]
    warnings: list[str]
    filled: Filled | None


def differences(manifest: Manifest, tools: Tools, command: Sequence[str] = ()) -> list[Difference]:
    """What of this machine is not as it was where a snapshot was made."""
    mountpoint = manifest.mount.mountpoint if manifest.mount is not None else None
    here = {one.mountpoint for one in in_use.mounts_seen(os.getpid())}
    now = fingerprint_here(criu=tools.criu, mountpoint=mountpoint if mountpoint in here else None, command=command)
    return compare(manifest.fingerprint, now, uses_gpu=bool(manifest.cuda_pids))


def restore(name: str, store: Store, tools: Tools, options: RestoreOptions) -> Restored:
    """Restore a snapshot of the store.

    Raises:
        MisfitError: it does not fit this machine. Nothing was touched.
        CorruptError: images or weights are not what they were.
        RetryError: a pid is taken, a GPU has too little memory free, or it took too long.
        CheckpointError: see `checkpoint.errors`. Whatever is raised, nothing that was restored is left.
    """
    phases = Phases()
    with store.lock(name, shared=True):
        snapshot = store.open(name)
        manifest = snapshot.manifest
        with phases.phase("fit"):
            found = differences(manifest, tools, options.command)
            require_fit(name, found)
            _require_free(manifest)
            if tools.cuda is not None:
                tools.cuda.require_free(manifest.gpu_bytes)
        with phases.phase("weights"):
            weights = check_weights(manifest, cache=tools.cache)
        if options.verify:
            with phases.phase("verify"):
                snapshot.verify()
        entry = Entry(
            kind="restore",
            name=name,
            store=store.path,
            images=snapshot.images,
            root=manifest.root_pid,
            command=manifest.command,
            since_ticks=int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK")),
        )
        with Journal(entry) as journal:
            pid, filled, warnings = _restored(snapshot, tools, options, phases, journal)
            journal.at("letting go", tree=processes.family(pid), root=pid)
            try:
                _let_go(manifest, journal.entry.tree, weights, tools, phases)
                if options.ready is not None:
                    journal.at("ready")
                    root = journal.entry.tree[0]
                    with phases.phase("ready"):
                        readiness.wait(options.ready, options.timeout_s, lambda: control.is_there(*root))
            except BaseException:
                control.end(journal.entry.tree)
                raise
    return Restored(
        manifest=manifest,
        pid=pid,
        seconds=phases.seconds,
        bytes_read=manifest.bytes_logical,
        differences=found,
        warnings=[*warnings, *_counted(manifest, tools)],
        filled=filled,
    )


def _require_free(manifest: Manifest) -> None:
    until = time.monotonic() + _WAITED_FOR_S
    for pid in manifest.pids:
        while (since := start_ticks(pid)) is not None:
            if control.is_there(pid, since):
                raise RetryError(
                    f"pid {pid}, which a process of the snapshot has, is taken",
                    mend="end that process, or restore into a pid namespace of its own (--new-pidns)",
                )
            if time.monotonic() > until:
                raise RetryError(
                    f"pid {pid} is still held by a process that has ended: its parent does not wait for it",
                    mend=f"end its parent, which ps -o ppid= {pid} tells",
                )
            time.sleep(_LOOK_S)


def _restored(
    snapshot: Snapshot, tools: Tools, options: RestoreOptions, phases: Phases, journal: Journal
) -> tuple[int, Filled | None, list[str]]:
    """The pid of the root, whose tree is stopped with all its memory in place; what was filled in; and warnings."""
    manifest = snapshot.manifest
    replaced = [(fd, resource, path) for fd, resource, path in manifest.replaced]
    default = os.path.join(stdio.LOGS, f"{manifest.name}.log")
    obstacle = None if options.plain else userfaultfd.reason_against()
    with contextlib.ExitStack() as held:
        work = held.enter_context(tempfile.TemporaryDirectory(prefix="weightfs-restore-"))
        if options.attached is not None:
            inherit = stdio.callers(replaced, options.attached)
        else:
            inherit = held.enter_context(stdio.opened(replaced, options.log, default))
        server = None
        if not options.plain and obstacle is None:
            server = held.enter_context(PageServer(snapshot.images, work))
        wanted = replace(
            options_kept(manifest.criu_options),
            leave_stopped=True,
            inherit=inherit,
            sibling=options.attached is not None,
            lazy_pages=server is not None,
        )
        journal.at("restoring")
        try:
            with phases.phase("criu restore"):
                check = server.check if server is not None else None
                pid = criu.restore(tools.criu, snapshot.images, wanted, options.timeout_s, work=work, check=check)
            journal.at("filling", tree=processes.family(pid), root=pid)
            if server is None:
                return pid, None, [f"CRIU alone read memory back: {obstacle}"] if obstacle else []
            with phases.phase("memory"):
                return pid, server.finish(options.timeout_s), []
        except BaseException:
            # Before the page server goes, which lets memory that is missing read as zeros.
            control.end(journal.entry.tree)
            raise


def _let_go(
    manifest: Manifest, tree: control.Tree, weights: Mapping[str, Identity], tools: Tools, phases: Phases
) -> None:
    unchanged_since(weights)
    if manifest.point is not None:
        points.let_go(manifest.point, "restored")
    control.resume(tree)
    if manifest.cuda_pids and tools.cuda is not None:
        with phases.phase("cuda restore"):
            tools.cuda.restore_all(manifest.cuda_pids)
        with phases.phase("cuda unlock"):
            unchanged_since(weights)
            tools.cuda.unlock_all(manifest.cuda_pids)


def _counted(manifest: Manifest, tools: Tools) -> list[str]:
    """Count this restore; warns where clones share what must not be shared."""
    folder = os.path.join(tools.state, "restored")
    path = os.path.join(folder, manifest.id)
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        with open(path, "ab") as file:
            before = file.tell()
            file.write(b".")
    except OSError:
        return []
    if before and not manifest.hooks:
        return [
            f"snapshot {manifest.name} has been restored {before} times before: its clones share random state, TLS "
            "sessions and tokens unless hooks (checkpoint.on_restore) renew them"
        ]
    return []
