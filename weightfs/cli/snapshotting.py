"""`snapshot create`, `restore`, `recover`: processes into the store and out of it.

As in `snapshot_store`, `checkpoint` is imported where it is needed: `mount` is not to wait for it.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Final, NoReturn

import typer

from weightfs import linux
from weightfs.cli.options import Json
from weightfs.cli.output import emit, human_bytes, printable, reporting, say
from weightfs.cli.snapshot_keys import Keys, keyed
from weightfs.cli.snapshot_store import DEFAULT_STORE, StoreFolder
from weightfs.errors import UnfitError, UsageError

if TYPE_CHECKING:
    from checkpoint.creation import Created
    from checkpoint.errors import MisfitError
    from checkpoint.instances import Published
    from checkpoint.phases import Phases
    from checkpoint.restoration import Restored
    from checkpoint.tools import Tools

Name = Annotated[str, typer.Argument(help="Of the snapshot.")]
Timeout = Annotated[float, typer.Option(help="Seconds for the GPU to come to rest, and for CRIU.")]
ReadyUrl = Annotated[str | None, typer.Option(help="Ready when this address answers a GET.")]
ReadyFile = Annotated[str | None, typer.Option(help="Ready when this file exists.")]
ReadyTimeout = Annotated[float, typer.Option(help="Seconds to wait until it is ready.")]
WaitUrl = Annotated[str | None, typer.Option(help="Return once this address answers a GET.")]
Log = Annotated[str | None, typer.Option(help="File for what the process writes.")]
_ENDING: Final = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
_NEEDED: Final = (
    ("SYS_ADMIN", linux.CAP_SYS_ADMIN),
    ("NET_ADMIN", linux.CAP_NET_ADMIN),
    ("SYS_TIME", linux.CAP_SYS_TIME),
)
"""What a dump and a restore failed without in a container of crun, CRIU 4.2.1; nothing else was missed."""


@keyed
def create(
    context: typer.Context,
    name: Name,
    pid: Annotated[int | None, typer.Option(help="The process, with its descendants.")] = None,
    ready_url: ReadyUrl = None,
    ready_file: ReadyFile = None,
    ready_timeout: ReadyTimeout = 600.0,
    leave_running: Annotated[bool, typer.Option("--leave-running", help="It goes on afterwards.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="A snapshot of that name makes way.")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="Keep CRIU's images as they are, large and open.")] = False,
    weights: Annotated[
        list[str] | None, typer.Option(metavar="PATH", help="Weights it has read and closed: a file or folder.")
    ] = None,
    log: Log = None,
    timeout: Timeout = 120.0,
    store: StoreFolder = DEFAULT_STORE,
    *,
    keys: Keys,
    as_json: Json = False,
) -> None:
    """Snapshot a process: one that runs, or COMMAND, which is started for it. Do it before the first user's request.

    Example: weightfs snapshot create llama --no-encrypt --ready-url http://127.0.0.1:8000/health -- llama-server -m M
    """
    with reporting(as_json=as_json), undone_by_signals():
        if plain and not keys.no_encrypt:
            raise UsageError("plain images are not encrypted: --plain goes with --no-encrypt")
        master = keys.master()
        command = list(context.args)
        if (pid is None) == (not command):
            raise UsageError("name either a process (--pid) or a command (-- COMMAND...)")
        from checkpoint import creation, launch, readiness
        from checkpoint.phases import Phases
        from checkpoint.store import Store

        phases = Phases.of_this_process()
        opened = Store(store)
        options = creation.CreateOptions(
            leave_running=leave_running,
            replace=replace,
            timeout_s=timeout,
            plain=plain,
            master=master,
            weights=weights or (),
        )
        ready = readiness.Readiness(url=ready_url, file=ready_file)
        with tools(opened.path, name, phases) as found:
            if pid is None:
                made = launch.create_of_command(
                    name, command, opened, found, options, ready, ready_timeout, log=log, phases=phases
                )
            else:
                if ready.is_asked_for:
                    with phases.phase("warm up"):
                        readiness.wait(ready, ready_timeout, readiness.while_there(pid))
                made = creation.create(name, pid, opened, found, options, phases=phases)
            _no_more_signals()
        _say_created(made, phases.whole(), as_json=as_json)


@keyed
def restore(
    name: Name,
    wait_url: WaitUrl = None,
    timeout: Annotated[float, typer.Option(help="Seconds for CRIU, and again until it answers.")] = 120.0,
    log: Log = None,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not compare the digests of a plain one.")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="No page server: CRIU reads memory back itself.")] = False,
    root: Annotated[str | None, typer.Option(help="Where its container's root filesystem is mounted.")] = None,
    new_pidns: Annotated[
        bool, typer.Option("--new-pidns", help="Beside another instance: own pids, own network.")
    ] = False,
    publish: Annotated[
        list[str] | None, typer.Option(metavar="[HOST:]PORT:PORT", help="With --new-pidns: port out here, in there.")
    ] = None,
    store: StoreFolder = DEFAULT_STORE,
    *,
    keys: Keys,
    as_json: Json = False,
) -> None:
    """Bring a process back from its snapshot; prints its pid.

    Example: weightfs snapshot restore llama --no-encrypt --wait-url http://127.0.0.1:8000/health
    """
    with reporting(as_json=as_json), differences_shown(), undone_by_signals():
        master = keys.master()
        from checkpoint.phases import Phases

        phases = Phases.of_this_process()
        if publish and not new_pidns:
            raise UsageError("--publish goes with --new-pidns")
        ports = [parse_published(one) for one in publish or ()]
        with tools(store, name, phases) as found:  # first, since it begins to open the GPUs' driver, which takes longer
            with phases.phase("start"):
                from checkpoint import restoration
                from checkpoint.readiness import Readiness
                from checkpoint.store import Store
            options = restoration.RestoreOptions(
                ready=Readiness(url=wait_url) if wait_url else None,
                timeout_s=timeout,
                log=log,
                verify=not no_verify,
                plain=plain,
                root=root,
                own_namespaces=new_pidns,
                ports=ports,
                master=master,
            )
            back = restoration.restore(name, Store(store), found, options, phases)
            _no_more_signals()
        for warning in back.warnings:
            sys.stderr.write(f"weightfs: {printable(warning)}\n")
        _say_restored(back, phases.whole(), as_json=as_json)


def recover(as_json: Json = False) -> None:
    """Complete or undo what a snapshot command that died has begun. `create`, `restore` and `run` do it first.

    Example: weightfs snapshot recover
    """
    with reporting(as_json=as_json):
        _require_rights()
        from checkpoint import recovery
        from checkpoint.tools import found

        with found() as tools_found:
            done = recovery.recover(tools_found)
        if as_json:
            emit({"recovered": [{"kind": o.kind, "name": o.name, "step": o.step, "outcome": o.outcome} for o in done]})
            return
        for one in done:
            say(f"{one.kind} of {one.name}, which died while {one.step}: {one.outcome}")
        if not done:
            say("nothing was left half done")


@contextlib.contextmanager
def tools(store: str, name: str, phases: Phases | None = None) -> Iterator[Tools]:
    """What a snapshot needs of this machine; what commands that died have begun is put right first.

    What can't be put right is told on stderr, and keeps nobody from another snapshot; see `recovery.prepare`.

    Args:
        store: the folder of the snapshot's store.
        name: of the snapshot.
        phases: of the command: finding the tools is one, and giving them up.
    """
    from checkpoint.phases import Phases

    phases = phases or Phases()
    with phases.phase("start"):
        from checkpoint import recovery
        from checkpoint.tools import found

    _require_rights()
    held = contextlib.ExitStack()
    try:
        with phases.phase("tools"):
            these = held.enter_context(found())
            done, unread = recovery.prepare(these, os.path.abspath(store), name)
            for one in done:
                text = f"{one.kind} of {one.name}, which died while {one.step}, is {one.outcome}"
                sys.stderr.write(printable(f"weightfs: {text}" + (f": {one.fault}" if one.fault else "")) + "\n")
            if unread is not None:
                sys.stderr.write(printable(f"weightfs: {unread}; {unread.mend}") + "\n")
        yield these
    finally:
        with phases.phase("end"):
            held.close()


def _require_rights() -> None:
    if os.geteuid() != 0:
        raise UnfitError("snapshots need root: CRIU reads and writes other processes", mend="run it as root")
    if missing := [name for name, number in _NEEDED if not linux.has_capability(number)]:
        options = " ".join(f"--cap-add {name}" for name, _ in _NEEDED)
        raise UnfitError(f"this container lacks the capability {missing[0]}", mend=f"start it with {options}")


@contextlib.contextmanager
def undone_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the command as SIGINT does: what it has begun is undone."""

    def end(number: int, _: object) -> NoReturn:
        _no_more_signals()  # the undoing is not to be cut off
        sys.exit(128 + number)

    before = {each: signal.signal(each, end) for each in _ENDING}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _no_more_signals() -> None:
    """Within `undone_by_signals`: from now on none ends the command, such as when what was asked for is done."""
    for each in _ENDING:
        signal.signal(each, signal.SIG_IGN)


@contextlib.contextmanager
def differences_shown() -> Iterator[None]:
    """Before a misfit is reported, what differs goes to stderr as a table."""
    from checkpoint.errors import MisfitError

    try:
        yield
    except MisfitError as e:
        _show_differences(e)
        raise


def _show_differences(error: MisfitError) -> None:
    for one in error.differences:
        mark = "matters" if one["matters"] else "does not matter"
        sys.stderr.write(
            printable(f"  {one['what']}: {one['snapshot']} there, {one['here']} here; {mark}: {one['why']}") + "\n"
        )


def parse_published(text: str) -> Published:
    """`18000:8000` or `0.0.0.0:18000:8000`: the port out here, on 127.0.0.1 or that address, and the one in there.

    Raises:
        UsageError: it is none of these.
    """
    from checkpoint.instances import Published

    found = re.fullmatch(r"(?:(.+):)?(\d{1,5}):(\d{1,5})", text, re.ASCII)
    if found is None or not all(0 < int(port) < 1 << 16 for port in found.groups()[1:]):
        raise UsageError(f"{text!r} publishes nothing: write PORT:PORT or HOST:PORT:PORT")
    return Published(host=found[1] or "127.0.0.1", port=int(found[2]), inside=int(found[3]))


def _say_created(made: Created, seconds: dict[str, float], *, as_json: bool) -> None:
    manifest = made.snapshot.manifest
    for one in made.findings:
        sys.stderr.write(printable(f"weightfs: {one}") + "\n")
    if as_json:
        emit(
            {
                "name": manifest.name,
                "id": manifest.id,
                "pid": made.pid,
                "phases": seconds,
                "bytes": {
                    "logical": manifest.bytes_logical,
                    "stored": made.snapshot.bytes_stored,
                    **manifest.bytes_by_kind,
                },
                "findings": [one.document() for one in made.findings],
            }
        )
        return
    say(f"{manifest.name}: process {made.pid}, {human_bytes(made.snapshot.bytes_stored)} ({_told(seconds)})")


def _say_restored(back: Restored, seconds: dict[str, float], *, as_json: bool) -> None:
    import msgspec

    if as_json:
        document: dict[str, Any] = {
            "name": back.manifest.name,
            "id": back.manifest.id,
            "pid": back.pid,
            "phases": seconds,
            "timeline": msgspec.to_builtins(back.spans),
            "bytes": {"logical": back.manifest.bytes_logical, "read": back.bytes_read},
            "memory": msgspec.to_builtins(back.filled),
            "verified": msgspec.to_builtins(back.verified),
            "warnings": back.warnings,
            "differences": [msgspec.to_builtins(one) for one in back.differences],
        }
        emit(document)
        return
    say(f"{back.pid}")
    if sys.stderr.isatty():
        from weightfs.cli.spans import bars

        sys.stderr.writelines(f"{line}\n" for line in bars(msgspec.to_builtins(back.spans)))
    sys.stderr.write(f"weightfs: {back.manifest.name} restored ({_told(seconds)})\n")


def _told(seconds: dict[str, float]) -> str:
    return ", ".join(f"{name} {spent:.3f} s" for name, spent in seconds.items())
