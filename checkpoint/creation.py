"""Makes a snapshot of a process tree: all of it, or the tree goes on as it was found.

    step            undone by
    starting        the process that was started for it is ended, here and in each step below
    begun           nothing: nothing has been touched
    locking         CUDA processes are unlocked
    checkpointing   their GPU memory is brought back, they are unlocked
    dumping         CRIU is ended; the tree is let go, and as above
    ingesting       as above; chunks that were added are garbage, until a snapshot needs them
    committing      as above; the draft is removed
    committed       nothing: completed by `finishing`
    finishing       completed: the tree is ended, or let go on where that was asked for

CRIU leaves the tree stopped, so that it can still go on when the snapshot can't be written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from checkpoint import attachments, control, criu, criu_command, in_use, points, processes, programs, stdio
from checkpoint.candidates import candidates
from checkpoint.chunks.keys import MasterKey
from checkpoint.errors import CheckpointError, CudaError, RetryError, TargetError
from checkpoint.findings import Finding
from checkpoint.journal import Entry, Journal
from checkpoint.keeping import Keeping, keeping_in
from checkpoint.machine import fingerprint_here
from checkpoint.manifest import Manifest
from checkpoint.phases import Phases
from checkpoint.preflight import examine
from checkpoint.processes import Process, start_ticks
from checkpoint.sockets import sockets_of
from checkpoint.states import State
from checkpoint.store import Draft, Snapshot, Store
from checkpoint.tools import Tools
from checkpoint.weights import unchanged_since


@dataclass(frozen=True, kw_only=True, slots=True)
class CreateOptions:
    """How a snapshot is made.

    Attributes:
        leave_running: the process goes on afterwards; else it ends.
        replace: a snapshot of that name makes way.
        timeout_s: for the GPU to come to rest, and again for CRIU.
        point: the folder through which the process speaks with us, None where it does not.
        command: what it was started with, where that is known: a script's interpreter, or a title, is in its own
            command line.
        plain: CRIU's images are kept as they are.
        master: the key to encrypt with; None where nothing is encrypted.
        weights: weight files, or folders of them, that the process has read and may have closed.
    """

    leave_running: bool = False
    replace: bool = False
    timeout_s: float = 120.0
    point: str | None = None
    command: Sequence[str] = ()
    plain: bool = False
    master: MasterKey | None = None
    weights: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Created:
    """What was made.

    Attributes:
        snapshot: as it is in the store.
        pid: of the root.
        seconds: by phase.
        findings: what the snapshot changes for the process, none of it fatal.
    """

    snapshot: Snapshot
    pid: int
    seconds: dict[str, float]
    findings: list[Finding]


def create(
    name: str,
    pid: int,
    store: Store,
    tools: Tools,
    options: CreateOptions,
    journal: Journal | None = None,
    phases: Phases | None = None,
) -> Created:
    """Snapshot a process and its descendants.

    Args:
        name: of the snapshot.
        pid: of the root.
        store: takes it.
        tools: see there.
        options: see there.
        journal: of a command that has begun already, with the start of the process.
        phases: of the whole command, which those of the snapshot are added to.

    Raises:
        TargetError: it can't be, as it is.
        CheckpointError: see `checkpoint.errors`; whatever is raised, the tree is as it was, or the error says which
            process is not.
    """
    phases = phases or Phases()
    with phases.phase("look"):
        tree = processes.tree_of(pid)
        if tree[0].has_ended:
            raise TargetError(f"process {pid} has ended")
        pids = [one.pid for one in tree if not one.has_ended]
        cuda = tools.cuda.states(pids) if tools.cuda is not None else {}
        for each, state in cuda.items():
            if state is not State.RUNNING:
                raise RetryError(
                    f"process {each} is {state.word} by another checkpoint",
                    mend="weightfs snapshot recover puts right what one has left half done",
                )
    with contextlib.ExitStack() as held:
        if journal is None:
            journal = held.enter_context(Journal(Entry(kind="create", name=name, store=store.path)))
        journal.at(
            "begun",
            tree=control.tree(tree),
            root=pid,
            command=list(tree[0].cmdline),
            cuda={each: int(state) for each, state in cuda.items()},
            leave_running=options.leave_running,
            point=options.point or journal.entry.point,
        )
        with phases.phase("store"):
            store.recover()  # a signal just after `begin` leaves a draft that nobody knows of
            draft = held.enter_context(store.begin(name, replace=options.replace))
            keeping = held.enter_context(
                keeping_in(draft, journal.entry.work, tools.state, plain=options.plain, master=options.master)
            )
        return _create(tree, draft, keeping, tools, options, phases, journal)


def _create(
    tree: Sequence[Process],
    draft: Draft,
    keeping: Keeping,
    tools: Tools,
    options: CreateOptions,
    phases: Phases,
    journal: Journal,
) -> Created:
    entry = journal.entry
    gpu_bytes: dict[str, int] = {}
    gpu_models: dict[str, str] = {}
    if tools.cuda is not None and entry.cuda:
        with phases.phase("look"):
            gpu_bytes = tools.cuda.used_bytes(list(entry.cuda))
            gpu_models = {one.uuid: one.name for one in tools.cuda.devices()}
    with phases.phase("weights"):
        seen = in_use.mounts_seen(entry.root)
        weights = candidates(
            tree, seen, tools.cache, plain=options.plain, command=options.command, given=options.weights
        )
    with phases.phase("programs"):
        mapped = set(programs.mapped(tree)) - set(weights.paths)
        code = programs.identify(sorted(mapped), cache=tools.cache, root=f"/proc/{entry.root}/root")
    with phases.phase("examine"):
        sockets = sockets_of(tree)
        found = examine(
            tree,
            criu=tools.criu,
            sockets=sockets,
            weights_roots=[one.mountpoint for one in seen],
            store=os.path.dirname(draft.folder),
            gpu_bytes=sum(gpu_bytes.values()),
            in_memory=not options.plain,
        )
        dumped = criu_command.options_for(tree)
        replaced, outside = stdio.resources(tree), attachments.outside(tree)
    if fatal := [one for one in found if one.fatal]:
        more = f" (and {len(fatal) - 1} more)" if len(fatal) > 1 else ""
        raise TargetError(
            f"process {fatal[0].pid} can't be snapshotted: {fatal[0].what}: {fatal[0].why}{more}",
            mend=fatal[0].mend,
            findings=[one.document() for one in found],
        )
    mount = next((one for one in seen if any(each.mountpoint == one.mountpoint for each in weights.weights)), None)
    try:
        if tools.cuda is not None and entry.cuda:
            journal.at("locking")
            with phases.phase("cuda lock"):
                tools.cuda.lock_all(list(entry.cuda), options.timeout_s)
            journal.at("checkpointing")
            with phases.phase("cuda checkpoint"):
                tools.cuda.checkpoint_all(list(entry.cuda))
        journal.at("dumping", images=keeping.images)
        with phases.phase("criu dump"):
            stopped = replace(dumped, leave_stopped=True)
            criu.dump(
                tools.criu,
                entry.root,
                keeping.images,
                stopped,
                options.timeout_s,
                work=entry.work,
                inherited=keeping.inherited,
            )
        # All are stopped now, with the children they have had since they were looked at.
        stays = processes.family(entry.root) or control.with_descendants(entry.tree)
        journal.at("ingesting", tree=stays)
        with phases.phase("ingest"):
            keeping.take_in(list(weights.identities), needed=len(weights.used.weights))
        journal.at("committing", id=draft.id)
        with phases.phase("store"):
            unchanged_since(weights.identities)
            said = Manifest(
                name=draft.name,
                id=draft.id,
                created_ns=time.time_ns(),
                root_pid=entry.root,
                pids=[pid for pid, _ in entry.tree],
                command=entry.command,
                cuda_pids=list(entry.cuda),
                gpu_bytes=gpu_bytes,
                gpu_models=gpu_models,
                stdio=[_leads_to(tree[0], fd) for fd in (0, 1, 2)],
                replaced=replaced,
                outside=outside,
                listeners=sorted(
                    one.local for one in sockets.values() if one.family == "tcp" and one.state == "listening"
                ),
                cwd=tree[0].cwd,
                mount=mount,
                fingerprint=fingerprint_here(
                    criu=tools.criu,
                    mountpoint=mount.mountpoint if mount else None,
                    command=options.command or entry.command,
                    root=f"/proc/{entry.root}/root",
                ),
                weights=weights.weights,
                programs=code,
                phases=phases.seconds,
                hooks=options.point is not None and points.reached(options.point) is not None,
                point=options.point,
                criu_options=_kept(_restored_with(dumped, entry.root)),
            )
            snapshot = keeping.commit(said)
    except BaseException as failure:
        made = published(entry)
        if made is None:
            try:
                control.to_its_end(lambda: undo(entry, tools))
            except CudaError as stuck:
                error = CudaError(f"{failure}; {stuck.message}", mend=stuck.mend, stuck=stuck.stuck)
                error.is_half_done = True
                raise error from failure
            raise
        snapshot = made  # a signal came too late
    with phases.phase("finish"):
        try:
            control.to_its_end(lambda: _finish(journal, tools))
        except Exception:
            raise
        except BaseException:  # noqa: BLE001 - a signal came too late; it is the only one, see `control.to_its_end`
            pass
    return Created(snapshot=snapshot, pid=entry.root, seconds=phases.seconds, findings=found)


def published(entry: Entry) -> Snapshot | None:
    """The snapshot, where a create came so far that it is in the store."""
    if not entry.id:
        return None
    try:
        found = Store(entry.store).open(entry.name)
    except CheckpointError:
        return None
    return found if found.manifest.id == entry.id else None


def undo(entry: Entry, tools: Tools) -> None:
    """Bring the tree back to how it was found, from wherever a create stopped before it had committed.

    Raises:
        CudaError: a process is stuck.
        CheckpointError: one that was started for the snapshot does not end.
    """
    if entry.started:
        users = [(pid, start_ticks(pid) or 0) for pid in points.users(entry.point)]
        # Once more: a pid may have become another's before it was asked when that began.
        control.end_all([*entry.tree, *(one for one in users if points.is_user(one[0], entry.point))])
        shutil.rmtree(entry.point, ignore_errors=True)
    else:
        _go_on(entry, tools)


def finish(entry: Entry, tools: Tools) -> None:
    """After a create has committed: the tree ends, or goes on.

    Raises:
        CudaError: a process that is to go on is stuck.
        CheckpointError: one that is to end does not.
    """
    if not entry.leave_running:
        control.end(entry.tree)
        if entry.point:
            shutil.rmtree(entry.point, ignore_errors=True)
        return
    _go_on(entry, tools)
    if entry.point:
        points.dismiss(entry.point)


def _finish(journal: Journal, tools: Tools) -> None:
    journal.at("finishing")
    finish(journal.entry, tools)


def _go_on(entry: Entry, tools: Tools) -> None:
    control.resume(control.with_descendants(entry.tree))  # a dump stops those as well
    if tools.cuda is not None and entry.cuda:
        tools.cuda.settle({pid: State(number) for pid, number in entry.cuda.items()})


def _restored_with(dumped: criu_command.DumpOptions, root: int) -> criu_command.RestoreOptions:
    """How to restore it; a root folder that is not ours is only known to whoever runs the container."""
    options = criu_command.restore_options_of(dumped)
    if options.root is not None and not os.path.samefile(f"/proc/{root}/root", "/"):
        return replace(options, root=criu_command.ROOT_TO_BE_NAMED)
    return options


def _leads_to(process: Process, fd: int) -> str:
    return next((one.target for one in process.descriptors if one.fd == fd), "")


def _kept(options: criu_command.RestoreOptions) -> dict[str, Any]:
    """The options that say something."""
    defaults = dataclasses.asdict(criu_command.RestoreOptions())
    return {key: value for key, value in dataclasses.asdict(options).items() if value != defaults[key]}
