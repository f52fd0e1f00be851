"""Brings a snapshot back: what does not fit or has changed is refused before anything is touched.

    step            undone by
    begun           nothing
    restoring       CRIU is ended, with what it has restored so far, its memory filled in or not
    letting go      every process of the tree is ended
    ready           as above, until the process answers

The tree is restored stopped, and its memory filled in by a page server while CRIU goes on (see
`checkpoint.pageserver`); once all of it is there, and what it was read from is verified (see
`checkpoint.verification`), every weight file is looked at once more, and the tree runs. GPU memory comes back while
host memory is filled in, where that is possible (see `checkpoint.gpu_side`), else after that.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import msgspec

from checkpoint import (
    attachments,
    control,
    criu,
    destination,
    in_use,
    instances,
    points,
    processes,
    readiness,
    stdio,
    userfaultfd,
)
from checkpoint.criu_command import options_kept
from checkpoint.digests import Identity
from checkpoint.errors import CheckpointError
from checkpoint.fingerprint import Difference, compare, require_fit
from checkpoint.gpu_side import GpuSide
from checkpoint.instances import Instance, Published
from checkpoint.journal import Entry, Journal
from checkpoint.laying import Laid
from checkpoint.machine import fingerprint_here
from checkpoint.manifest import Manifest
from checkpoint.pagemap import private_pages
from checkpoint.pageserver import Filled, PageServer
from checkpoint.phases import Phases, Span
from checkpoint.processes import start_ticks
from checkpoint.readable import Readable
from checkpoint.readiness import Readiness
from checkpoint.store import Store
from checkpoint.tools import Tools
from checkpoint.verification import Verification, Verified
from checkpoint.weights import check_weights, seen_by, unchanged_since

if TYPE_CHECKING:
    from checkpoint.chunks.keys import MasterKey

_CRIU_S: Final = 120.0
_REPLACED_S: Final = 30.0
"""Who replaces a snapshot holds it for as long as a dump takes; a cold start instead would take longer."""


class RestoreOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a snapshot is restored.

    Attributes:
        ready: how the process shows that it answers; None where it is not waited for.
        timeout_s: for CRIU, and again for the process to answer.
        log: the file that takes what the process writes; None for its own log, or one named after the snapshot.
        attached: the stdio of the process, which becomes this one's child; None for a session of its own.
        command: what it must have been; empty where that does not matter.
        verify: whether the images' digests are compared.
        plain: CRIU reads memory back itself, with one thread.
        root: where the root filesystem of its container is mounted; None where it has none of its own.
        own_namespaces: it is a second instance, see `instances`.
        ports: published from there.
        master: the key that the snapshot is encrypted with; None where it must not be encrypted.
    """

    ready: Readiness | None = None
    timeout_s: float = 120.0
    log: str | None = None
    attached: stdio.Given | None = None
    command: Sequence[str] = ()
    verify: bool = True
    plain: bool = False
    root: str | None = None
    own_namespaces: bool = False
    ports: Sequence[Published] = ()
    master: MasterKey | None = None


class Restored(msgspec.Struct, frozen=True, kw_only=True):
    """What was restored.

    Attributes:
        manifest: of the snapshot.
        pid: of the root.
        seconds: by phase.
        spans: what went on when.
        bytes_read: of images.
        differences: between the machines, none of which matters.
        warnings: a line each.
        filled: what the page server filled in; None where CRIU read it back.
        verified: what was compared with its digests; None where that was not asked for.
    """

    manifest: Manifest
    pid: int
    seconds: dict[str, float]
    spans: Sequence[Span]
    bytes_read: int
    differences: list[Difference]
    warnings: list[str]
    filled: Filled | None
    verified: Verified | None


def differences(manifest: Manifest, tools: Tools, command: Sequence[str] = ()) -> list[Difference]:
    """What of this machine is not as it was where a snapshot was made."""
    mountpoint = manifest.mount.mountpoint if manifest.mount is not None else None
    here = {one.mountpoint for one in in_use.mounts_seen(os.getpid())}
    now = fingerprint_here(criu=tools.criu, mountpoint=mountpoint if mountpoint in here else None, command=command)
    return compare(manifest.fingerprint, now, uses_gpu=bool(manifest.cuda_pids))


def restore(name: str, store: Store, tools: Tools, options: RestoreOptions, phases: Phases | None = None) -> Restored:
    """Restore a snapshot of the store.

    Args:
        name: of the snapshot.
        store: has it.
        tools, options: see there.
        phases: of the whole command, which those of the restore are added to.

    Raises:
        MisfitError: it does not fit this machine. Nothing was touched.
        CorruptError: images or weights are not what they were.
        RetryError: a pid is taken, this machine or a GPU has too little memory free, or it took too long.
        CheckpointError: see `checkpoint.errors`. Whatever is raised, nothing that was restored is left.
    """
    phases = phases or Phases()
    verified = None
    with contextlib.ExitStack() as held:
        with phases.phase("open"):
            held.enter_context(store.lock(name, shared=True, timeout_s=_REPLACED_S))
            snapshot = store.open(name)
            manifest = snapshot.manifest
            gpu = held.enter_context(GpuSide(manifest, tools.cuda, phases))
            readable = held.enter_context(contextlib.closing(Readable(snapshot, tools.state, options.master)))
            verification = None
            if options.verify and readable.is_plain:
                later = () if options.plain or userfaultfd.reason_against() else private_pages(snapshot.images)
                verification = held.enter_context(Verification(snapshot, later))
        with phases.phase("fit"):
            found = differences(manifest, tools, options.command)
            require_fit(name, found)
            destination.require_placed(manifest, root=options.root, own_namespaces=options.own_namespaces)
            if not options.own_namespaces and not destination.is_container(manifest):
                destination.require_free(manifest)
            destination.require_memory(manifest)
            destination.require_programs(manifest, tools.cache, root=options.root)
        with phases.phase("weights"):
            weights = check_weights(manifest, cache=tools.cache, root=options.root or "/")
        if verification is not None:
            with phases.phase("verify"):
                verification.others()
        entry = Entry(
            kind="restore",
            name=name,
            store=store.path,
            root=manifest.root_pid,
            own_pids=options.own_namespaces,
            since_ticks=int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK")),
        )
        with contextlib.ExitStack() as inner:
            journal = inner.enter_context(Journal(entry))
            instance = inner.enter_context(_instance(options, phases))
            with phases.phase("lay out"):
                laid = inner.enter_context(readable.laid_out(entry.work, weights))
            with phases.phase("driver"):
                found += gpu.placed()
            try:
                journal.at("restoring", images=laid.images)
                inside, filled = _memory_filled(manifest, laid, entry, tools, options, phases, instance, verification)
                if verification is not None:
                    with phases.phase("verify"):
                        verified = verification.finish()
                pid = inside
                if instance is not None:
                    pid = instance.pids()[inside]
                journal.at("letting go", tree=processes.family(pid), root=pid)
                weights = seen_by(pid, manifest, weights, root=options.root or "/")
                _let_go(manifest, entry.tree, weights, tools, phases, instance, gpu)
                if options.ready is not None:
                    journal.at("ready")
                    with phases.phase("ready"):
                        _wait(options.ready, options, entry.tree[0], instance)
                if instance is not None:
                    instance.keep(inside)
            except BaseException:
                control.to_its_end(lambda: undo(entry))
                raise
    return Restored(
        manifest=manifest,
        pid=pid,
        seconds=phases.seconds,
        spans=phases.spans,
        bytes_read=manifest.bytes_logical,
        differences=found,
        warnings=[*_slower(options, filled), *_counted(manifest, tools)],
        filled=filled,
        verified=verified,
    )


def undo(entry: Entry, *, later: bool = False) -> None:
    """End what a restore has brought back so far, from wherever it stopped.

    Args:
        entry: of its journal.
        later: its command has died, who knows when: where only CRIU has told of the root, the pid may be somebody
            else's since. A tree that nobody let go is stopped.

    Raises:
        CheckpointError: CRIU, which goes on when its command has died, does not end; or a process does not.
    """
    if entry.tree:
        control.end_all(entry.tree)
    elif entry.step == "restoring" and not entry.own_pids:
        criu.wait_for(entry.images, _CRIU_S)
        pid = criu.restored_pid(entry.work)
        if pid is None or (since := start_ticks(pid)) is None or since < entry.since_ticks:
            return
        if not later or processes.is_stopped(pid):
            control.end_all([(pid, since)])


@contextlib.contextmanager
def _instance(options: RestoreOptions, phases: Phases) -> Iterator[Instance | None]:
    if not options.own_namespaces:
        yield None
        return
    with contextlib.ExitStack() as held:
        with phases.phase("namespaces"):
            instance = held.enter_context(instances.made(options.ports))
        yield instance


def _wait(ready: Readiness, options: RestoreOptions, root: tuple[int, int], instance: Instance | None) -> None:
    inside = instance.network() if instance is not None and not options.ports else contextlib.nullcontext()
    with inside:
        readiness.wait(ready, options.timeout_s, lambda: processes.is_there(*root))


def _memory_filled(
    manifest: Manifest,
    laid: Laid,
    entry: Entry,
    tools: Tools,
    options: RestoreOptions,
    phases: Phases,
    instance: Instance | None,
    verification: Verification | None,
) -> tuple[int, Filled | None]:
    """Restore the tree, stopped; gives the pid of the root, in its instance, and what the page server filled in."""
    work = entry.work
    replaced = [(fd, resource, path) for fd, resource, path in manifest.replaced]
    default = os.path.join(stdio.LOGS, f"{manifest.name}.log")
    with contextlib.ExitStack() as held:
        if options.attached is not None:
            inherit = stdio.callers(replaced, options.attached)
        else:
            inherit = held.enter_context(stdio.opened(replaced, options.log, default))
        kept = options_kept(manifest.criu_options)
        wanted = replace(
            kept,
            root=options.root or kept.root,
            leave_stopped=True,
            inherit=(*inherit, *held.enter_context(attachments.stand_ins(manifest.outside))),
            sibling=options.attached is not None,
            enter=instance.enter if instance is not None else (),
        )
        server: PageServer | None = None
        if not options.plain and userfaultfd.reason_against() is None:
            server = PageServer(laid.images, work, opened=laid.opened)
        if server is None or server.parts_memory:
            with phases.phase("lay out"):
                laid.complete({})
            if verification is not None:  # CRIU reads all images
                with phases.phase("verify"):
                    verification.finish()
            with phases.phase("criu restore"):
                pid = criu.restore(
                    tools.criu, laid.images, wanted, options.timeout_s, work=work, inherited=laid.inherited
                )
                return pid, None
        with phases.phase("lay out"):
            laid.complete(server.lazy)
        held.enter_context(server)
        wanted = replace(wanted, lazy_pages=True)

        def check() -> None:
            server.check()
            if verification is not None:
                verification.check()

        try:
            with phases.phase("criu restore"):
                pid = criu.restore(
                    tools.criu,
                    laid.images,
                    wanted,
                    options.timeout_s,
                    work=work,
                    check=check,
                    inherited=laid.inherited,
                )
            with phases.phase("memory"):
                filled = server.finish(options.timeout_s)
            if (filled_between := server.filled_between) is not None:
                phases.note("filling", *filled_between, beside=True)
            if filled.given_up_bytes:  # all are stopped: no process of theirs discarded it
                raise CheckpointError(
                    f"{filled.given_up_bytes} bytes of memory were discarded before they were filled in",
                    mend="restore with --plain",
                )
            return pid, filled
        except BaseException as e:
            if instance is None:  # which ends what is in it
                _kill(entry)
            if verification is not None and isinstance(e, CheckpointError):
                verification.finish()  # bytes that are not those that were written may be why
            raise


def _kill(entry: Entry) -> None:
    """Kill what is half filled, while the page server still keeps it from reading zeros: `undo` waits for its end."""
    root = criu.restored_pid(entry.work)
    if root is not None:
        control.kill([one for one in processes.family(root) if one[1] >= entry.since_ticks])


def _slower(options: RestoreOptions, filled: Filled | None) -> list[str]:
    """Warns where CRIU alone had to read memory back."""
    reason = userfaultfd.reason_against() if filled is None and not options.plain else None
    return [f"CRIU alone read memory back, slower: {reason}"] if reason is not None else []


def _let_go(
    manifest: Manifest,
    tree: control.Tree,
    weights: Mapping[str, Identity],
    tools: Tools,
    phases: Phases,
    instance: Instance | None,
    gpu: GpuSide,
) -> None:
    unchanged_since(weights)
    if manifest.point is not None:
        points.let_go(manifest.point, "restored")
    control.resume(tree)
    if manifest.cuda_pids and tools.cuda is not None:
        outside = instance.pids() if instance is not None else {}
        pids = [outside.get(pid, pid) for pid in manifest.cuda_pids]
        gpu.restore(pids)
        with phases.phase("cuda unlock"):
            unchanged_since(weights)
            tools.cuda.unlock_all(pids)


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
        times = "once" if before == 1 else f"{before} times"
        return [
            f"snapshot {manifest.name} has been restored {times} before: its clones share random state, TLS "
            "sessions and tokens unless hooks (checkpoint.on_restore) renew them"
        ]
    return []
